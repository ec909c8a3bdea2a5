"""Checks that a tokenizer belongs to a model; equal sizes do not imply equal mappings."""

from typing import Any

from schemas.errors import VocabularyError
from schemas.vocabulary import vocabulary_differences

# Embeddings are padded to round sizes, by 128 to 465 rows in common models. A larger excess means
# another vocabulary, not padding.
_PADDING_IDS = 1024
_PADDING_SHARE = 0.05
_SHOWN = 3


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """The mapping token -> id of a tokenizer, added tokens included."""
    return dict(tokenizer.get_vocab())


def check_vocabulary_fits(tokenizer: Any, vocab_size: int, where: str, model: str) -> None:
    """Checks a tokenizer against the size of a model's vocabulary.

    Every id must be below ``vocab_size``. Unused ids count as padding up to 1,024 or 5% of the
    vocabulary, whichever is more.

    Raises:
        VocabularyError: ids are outside the model's vocabulary, or too many are unused.
    """
    mapping = vocabulary(tokenizer)
    outside = sorted((id_, token) for token, id_ in mapping.items() if id_ >= vocab_size)
    if outside:
        raise VocabularyError(
            f"the tokenizer of {where} has {len(outside)} ids that {model} does not have, the "
            f"first {_show(outside)}; the model's ids are 0 to {vocab_size - 1}; use its own "
            "tokenizer"
        )
    unused = vocab_size - 1 - max(mapping.values(), default=-1)
    if unused > max(_PADDING_IDS, vocab_size * _PADDING_SHARE):
        raise VocabularyError(
            f"the tokenizer of {where} ends at id {vocab_size - 1 - unused}, but {model} has ids "
            f"up to {vocab_size - 1}; {unused} unused ids are more than padding; use its own "
            "tokenizer"
        )


def check_same_vocabulary(tokenizer: Any, own: Any, where: str, model: str) -> None:
    """Checks that a tokenizer has the same mapping as the model's own tokenizer.

    Raises:
        VocabularyError: the mappings differ; the message names the first differences.
    """
    given, expected = vocabulary(tokenizer), vocabulary(own)
    count, shown = vocabulary_differences(expected, given, "the model", where)
    if not count:  # tokens that exist only in the given tokenizer
        count, shown = vocabulary_differences(given, expected, where, "the model")
    if count:
        raise VocabularyError(
            f"the tokenizer of {where} is not that of {model}: {count} tokens differ ({shown}); "
            "leave teacher.tokenizer empty to use the model's own"
        )


def _show(pairs: list[tuple[int, str]]) -> str:
    return ", ".join(f"{id_} ({token!r})" for id_, token in pairs[:_SHOWN])
