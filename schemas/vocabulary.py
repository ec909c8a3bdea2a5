"""Comparison of vocabularies, as mappings from token to id.

Sizes are not compared: equal sizes prove nothing, and different ones may be mere padding (151,936
and 152,064 rows for the same tokenizer).
"""

from collections.abc import Mapping

_SHOWN = 5


def vocabulary_differences(
    expected: Mapping[str, int], found: Mapping[str, int], expected_in: str, found_in: str
) -> tuple[int, str]:
    """Finds tokens of one vocabulary that have another id, or none, in a second one.

    Args:
        expected: token -> id.
        found: token -> id; additional tokens are fine.
        expected_in: name of the first vocabulary, for the text.
        found_in: name of the second.

    Returns:
        The number of such tokens, and a text that describes the first few.
    """
    differing = sorted((id_, token) for token, id_ in expected.items() if found.get(token) != id_)
    token_at = {id_: token for token, id_ in found.items()}
    parts = []
    for id_, token in differing[:_SHOWN]:
        other = f"{token_at[id_]!r}" if id_ in token_at else "nothing"
        place = f"where {token!r} has id {found[token]}" if token in found else f"without {token!r}"
        parts.append(f"id {id_} is {token!r} in {expected_in} but {other} in {found_in}, {place}")
    return len(differing), "; ".join(parts) + ("; ..." if len(differing) > _SHOWN else "")
