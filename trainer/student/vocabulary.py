"""Checks that a student and its labels map the same tokens to the same ids."""

from collections.abc import Mapping

from schemas.errors import VocabularyError
from schemas.vocabulary import vocabulary_differences


def check_vocabularies(
    student: Mapping[str, int], vocab_size: int, labels: Mapping[str, int], where: str = "student"
) -> None:
    """Refuses a student that maps the ids of labels to other tokens.

    Tokens that exist only in the student are allowed, since labels never contain their ids.

    Args:
        student: token -> id of the student's tokenizer.
        vocab_size: rows of the student's lm_head; rows beyond the tokenizer's ids are padding.
        labels: token -> id of the labels.
        where: name of the student in the message.

    Raises:
        VocabularyError: a token of the labels has another id in the student or none, or the
            student's lm_head has too few rows.
    """
    count, shown = vocabulary_differences(labels, student, "the labels", "the student")
    if count:
        raise VocabularyError(
            f"the tokenizer of {where} differs from the labels' in {count} of {len(labels)} "
            f"tokens: {shown}. Use the teacher's tokenizer for the student, or label the corpus "
            "again with a teacher that shares the student's"
        )
    needed = 1 + max(labels.values())
    if vocab_size < needed:
        raise VocabularyError(
            f"{where} has {vocab_size} rows in its output head but the labels' tokenizer has "
            f"{needed} ids; resize the student's embeddings to at least {needed}"
        )
