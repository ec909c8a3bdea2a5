"""Do the student and the labels mean the same tokens by the same ids?

Equal vocabulary sizes prove nothing, and different ones may be padding alone (151,936 and 152,064
rows for the same tokenizer), so the mapping from token to id is what is compared.
"""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from schemas.errors import VocabularyError
from schemas.label_set.label_set import LabelSet

_SHOWN = 5


def check_vocabularies(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, label_set: LabelSet, where: str = "student"
) -> None:
    """Refuses a student that would read the ids of a label set as other tokens.

    Args:
        tokenizer: the student's.
        vocab_size: rows of the student's lm_head; rows beyond the tokenizer's ids are padding.
        label_set: the labels to train on.
        where: the name of the student in the message.

    Raises:
        VocabularyError: the mappings differ, or the student has too few rows.
    """
    compare_vocabularies(tokenizer.get_vocab(), vocab_size, label_set.vocabulary(), where)


def compare_vocabularies(
    student: Mapping[str, int], vocab_size: int, labels: Mapping[str, int], where: str
) -> None:
    """`check_vocabularies` on the mappings from token to id themselves.

    Tokens that only the student has are allowed: labels never name their ids.

    Raises:
        VocabularyError: a token of the labels has another id in the student, or none; or the
            student has fewer rows than ids are needed.
    """
    at = {token_id: token for token, token_id in student.items()}
    wrong = sorted(
        (token_id, token) for token, token_id in labels.items() if student.get(token) != token_id
    )
    if wrong:
        shown = "; ".join(
            f"id {token_id} is {token!r} in the labels, {_found(token_id, token, student, at)}"
            for token_id, token in wrong[:_SHOWN]
        )
        raise VocabularyError(
            f"the tokenizer of {where} differs from the labels' in {len(wrong)} of {len(labels)} "
            f"tokens: {shown}{'; ...' if len(wrong) > _SHOWN else ''}. Use the teacher's tokenizer "
            "for the student, or label the corpus again with a teacher that shares the student's"
        )
    needed = 1 + max(labels.values())
    if vocab_size < needed:
        raise VocabularyError(
            f"{where} has {vocab_size} rows in its output head but the labels' tokenizer has "
            f"{needed} ids; resize the student's embeddings to at least {needed}"
        )


def _found(token_id: int, token: str, student: Mapping[str, int], at: Mapping[int, str]) -> str:
    """What the student has at an id that differs."""
    here = f"{at[token_id]!r}" if token_id in at else "nothing"
    place = f"which has id {student[token]} there" if token in student else "which it lacks"
    return f"{here} in the student, {place}"
