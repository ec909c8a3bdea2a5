"""Comparison of vocabularies, as mappings from token to id.

Equal sizes prove nothing, and different ones may be padding alone (151,936 and 152,064 rows for the
same tokenizer), so that mappings are compared.
"""

from collections.abc import Mapping

_SHOWN = 5


def vocabulary_differences(
    expected: Mapping[str, int], found: Mapping[str, int], expected_in: str, found_in: str
) -> tuple[int, str]:
    """Tokens of one vocabulary whose id in another one differs or is missing.

    Args:
        expected: token -> id.
        found: token -> id; may have further tokens.
        expected_in: name of the first vocabulary in the text.
        found_in: name of the second.

    Returns:
        Their number, and a text about the first few.
    """
    differing = sorted((id_, token) for token, id_ in expected.items() if found.get(token) != id_)
    token_at = {id_: token for token, id_ in found.items()}
    parts = []
    for id_, token in differing[:_SHOWN]:
        other = f"{token_at[id_]!r}" if id_ in token_at else "nothing"
        place = f"where {token!r} has id {found[token]}" if token in found else f"without {token!r}"
        parts.append(f"id {id_} is {token!r} in {expected_in} but {other} in {found_in}, {place}")
    return len(differing), "; ".join(parts) + ("; ..." if len(differing) > _SHOWN else "")
