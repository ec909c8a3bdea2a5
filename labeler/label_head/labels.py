"""The fields of a label, shared by the tensors of a batch and the arrays of a row."""

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

Array = TypeVar("Array")


@dataclass(frozen=True)
class Labels(Generic[Array]):
    """The kept part of the teacher's distribution at N positions, before rounding.

    A label describes the distribution **over** its target token, computed from the tokens before
    that token. Log-probabilities are natural, at temperature 1. K is the most entries that a label
    of the record holds; slots from head_len + tail_len on hold zeros.

    Attributes:
        entry_ids: int32 [N, K], the head by falling probability, ties by rising id, then the draws
            by rising id.
        entry_logprobs: float32 [N, K], nats; -inf for an id that the model forbids.
        head_len: int32 [N], exact entries.
        tail_len: int32 [N], distinct draws.
        entry_counts: [N, K], integers in [0, 255], how often each id was drawn; None except for
            kind ``sampled``.
        tail_logmass: float32 [N], log of the probability outside the head; -inf if there is none.
        target_logprob: float32 [N], of the target token.
        target_rank: int32 [N], 1 + the number of strictly more probable ids.
        entropy: float32 [N], nats, of the full distribution; None if the record has no entropy.
        lse: float32 [N, S], log sum of p^(1/T) over the vocabulary for each of the record's S
            temperatures T; None if it has none.
    """

    entry_ids: Array
    entry_logprobs: Array
    head_len: Array
    tail_len: Array
    entry_counts: Array | None
    tail_logmass: Array
    target_logprob: Array
    target_rank: Array
    entropy: Array | None
    lse: Array | None

    def columns(self) -> list[Array | None]:
        """All fields, in the order of ``COLUMNS``."""
        return [getattr(self, name) for name in COLUMNS]


COLUMNS = tuple(field.name for field in fields(Labels))
