"""Cached labels of one packed micro-batch; `trainer.losses.teacher_weights` interprets them.

Alignment: label j describes the distribution over the token at index t_j given all tokens before
it, so its loss uses the student's hidden state at t_j - 1. `SparseTargets.positions` already holds
t_j - 1; nothing downstream shifts again.

Shapes: T labelled positions, E cached entries of all of them, R rows, L tokens of a row.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import RecordError
from schemas.record import LabelRows, target_positions
from schemas.record.spans import offsets_of
from schemas.spec import RecordSpec
from trainer.losses.segments import Segments


@dataclass(frozen=True)
class SparseTargets:
    """Labels of the T labelled positions of one packed micro-batch.

    Attributes:
        positions: [T] int64, index into the flattened hidden states, t_j - 1.
        token_ids: [T] int64, the token at t_j, which is the hard label.
        weights: [T] float32, weight of each position in the loss.
        entry_ids: [E] int32, cached vocabulary ids, each at most once per position.
        entry_logprobs: [E] float16, teacher log-probability at temperature 1, nats.
        entry_bounds: [T + 1] int64, CSR offsets of the entries, kept on the CPU so that slicing
            chunks needs no device sync.
        entry_offsets: [T + 1] int64, the same on the device of the other tensors.
        entry_draws: [E] uint8, how often each entry was drawn, 0 in the exact head; None if the
            record has no draws.
        tail_logmass: [T] float16, log of the teacher's probability outside the head, nats; None if
            the labels are tokens only or the teacher's columns were not read.
        lse: [T, num_temperatures] float16, log sum over the full vocabulary of p^(1/T).
        record: the labels' record, including how draws were made.
        num_ids: one more than the highest vocabulary id in these targets.
    """

    positions: Tensor
    token_ids: Tensor
    weights: Tensor
    entry_ids: Tensor
    entry_logprobs: Tensor
    entry_bounds: Tensor
    entry_offsets: Tensor
    entry_draws: Tensor | None
    tail_logmass: Tensor | None
    lse: Tensor | None
    record: RecordSpec
    num_ids: int

    @property
    def num_labels(self) -> int:
        return self.positions.numel()

    @property
    def num_entries(self) -> int:
        return self.entry_ids.numel()

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures of the columns of `lse`."""
        return self.record.temperatures

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copies the targets to `device`; `entry_bounds` stays on the CPU."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self._tensors().items()
            if name != "entry_bounds"
        }
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """Copies the targets to page-locked memory, so that transfers overlap with compute."""
        pinned: dict[str, Any] = {
            name: tensor.pin_memory() for name, tensor in self._tensors().items()
        }
        return replace(self, **pinned)

    def chunk(self, start: int, stop: int) -> Self:
        """Slices positions start:stop with their entries; tensors are views."""
        first, last = int(self.entry_bounds[start]), int(self.entry_bounds[stop])
        return replace(
            self,
            positions=self.positions[start:stop],
            token_ids=self.token_ids[start:stop],
            weights=self.weights[start:stop],
            entry_ids=self.entry_ids[first:last],
            entry_logprobs=self.entry_logprobs[first:last],
            entry_bounds=self.entry_bounds[start : stop + 1] - first,
            entry_offsets=self.entry_offsets[start : stop + 1] - first,
            entry_draws=None if self.entry_draws is None else self.entry_draws[first:last],
            tail_logmass=None if self.tail_logmass is None else self.tail_logmass[start:stop],
            lse=None if self.lse is None else self.lse[start:stop],
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def segments(self) -> Segments:
        """The assignment of entries to positions."""
        return Segments.from_offsets(self.entry_offsets, self.entry_bounds)


def build_targets(
    rows: LabelRows,
    row_starts: NDArray[np.int64],
    record: RecordSpec,
    vocab_size: int,
    row_weights: NDArray[np.float32] | None = None,
) -> SparseTargets:
    """Converts packed label rows to the targets of their micro-batch.

    A student with fewer padding ids than its teacher (same tokenizer, smaller vocabulary size) has
    no logit for some label ids. If such an entry is exact, its probability moves to the tail
    bucket, which represents all ids without an entry; other entries do not change. If it is a draw,
    it is dropped with its weight, since the tail already includes its probability. The expectation
    of forward_kl is then sum p (log p - log q) over the student's ids, and a position weighs the
    teacher's probability of these ids instead of 1. Redistributing the weight or rescaling to 1
    would bias both.

    Args:
        rows: R label rows.
        row_starts: [R] int64, index of each row's first token in the flattened [B * L] token axis.
        record: the rows' record.
        vocab_size: rows of the student's lm_head.
        row_weights: [R] float32, weight of every position of a row; None means 1.

    Returns:
        CPU tensors that share memory with `rows` where it is writeable.

    Raises:
        RecordError: a position has no entries although the rows have a teacher; a token of the text
            is outside the student's vocabulary; the rows hold draws but the record does not; or
            counts of draws were not read.
    """
    indices, label_offsets = target_positions(rows.label_spans, rows.span_offsets)
    num_labels = np.diff(label_offsets)
    token_ids = rows.target_ids()
    if len(token_ids) and token_ids.max() >= vocab_size:
        raise RecordError(
            f"the text has token id {token_ids.max()}, but the student has only {vocab_size} ids; "
            "train a student with the labels' vocabulary"
        )
    weights = np.ones(len(rows), np.float32) if row_weights is None else row_weights
    entries = _entries(rows, record, vocab_size, len(token_ids))
    bounds = _tensor(entries.offsets)
    return SparseTargets(
        positions=torch.from_numpy(indices + np.repeat(row_starts, num_labels) - 1),
        token_ids=torch.from_numpy(token_ids.astype(np.int64)),
        weights=torch.from_numpy(np.repeat(weights.astype(np.float32), num_labels)),
        entry_ids=_tensor(entries.ids),
        entry_logprobs=_tensor(entries.logprobs),
        entry_bounds=bounds,
        entry_offsets=bounds,
        entry_draws=None if entries.draws is None else _tensor(entries.draws),
        tail_logmass=None if entries.tail is None else _tensor(entries.tail),
        lse=None if rows.lse is None else _tensor(rows.lse),
        record=record,
        num_ids=1 + int(max(token_ids.max(initial=-1), entries.ids.max(initial=-1))),
    )


@dataclass(frozen=True)
class _Entries:
    """Cached entries of all positions: ids, logprobs and draws [E], offsets [T + 1], tail [T]."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    offsets: NDArray[np.int64]
    draws: NDArray[np.uint8] | None
    tail: NDArray[np.float16] | None


def _entries(rows: LabelRows, record: RecordSpec, vocab_size: int, num_labels: int) -> _Entries:
    """Entries for which the student has a logit; none if the rows have no teacher."""
    ids, logprobs, offsets, tail = (
        rows.entry_ids, rows.entry_logprobs, rows.entry_offsets, rows.tail_logmass
    )  # fmt: skip
    if ids is None or logprobs is None or offsets is None or tail is None:
        bounds = np.zeros(num_labels + 1, np.int64)
        return _Entries(np.zeros(0, np.int32), np.zeros(0, np.float16), bounds, None, None)
    entries = _Entries(ids, logprobs, offsets, _draws(rows, record), tail)
    _refuse_empty(entries)
    if len(ids) and ids.max() >= vocab_size:
        entries = _fold_absent(entries, vocab_size)
        if entries.draws is None:
            _refuse_empty(entries)
    return entries


def _refuse_empty(entries: _Entries) -> None:
    lengths = np.diff(entries.offsets)
    if len(lengths) and lengths.min() == 0:
        raise RecordError(
            f"label {int(lengths.argmin())} of a packed micro-batch has no entries, so it holds no "
            "teacher distribution; label these rows again"
        )


def _draws(rows: LabelRows, record: RecordSpec) -> NDArray[np.uint8] | None:
    """uint8 [E], how often each entry was drawn, 0 in the head; None for exact heads."""
    assert rows.head_len is not None
    assert rows.tail_len is not None
    assert rows.entry_ids is not None
    if not record.has_draws:
        if rows.tail_len.any():
            raise RecordError(
                f'label rows hold tail draws, but record.kind = "{record.kind}" has none; '
                "`tutelage labels verify` names the damaged shard"
            )
        return None
    lengths = np.stack([rows.head_len, rows.tail_len], axis=1).reshape(-1)
    drawn = np.repeat(np.tile(np.array([False, True]), len(rows.head_len)), lengths)
    draws = drawn.astype(np.uint8)
    if record.kind == "sampled":
        if rows.entry_counts is None:
            raise RecordError("column entry_counts was not read, but sampled labels need it")
        draws[drawn] = rows.entry_counts
    return draws


def _tensor(array: NDArray[Any]) -> Tensor:
    """A tensor that shares memory with `array`; a copy if it is read-only, which torch rejects."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _fold_absent(entries: _Entries, vocab_size: int) -> _Entries:
    """Removes entries for which the student has no logit; see `build_targets`."""
    assert entries.tail is not None
    kept = entries.ids < vocab_size
    num_labels = len(entries.tail)
    row = np.repeat(np.arange(num_labels), np.diff(entries.offsets))
    # The tail already includes the probability of draws.
    moved = ~kept if entries.draws is None else ~kept & (entries.draws == 0)
    absent = np.exp(entries.logprobs[moved].astype(np.float64))
    mass = np.exp(entries.tail.astype(np.float64)) + np.bincount(row[moved], absent, num_labels)
    with np.errstate(divide="ignore"):
        folded = np.where(mass > 0, np.log(np.minimum(mass, 1.0)), -np.inf).astype(np.float16)
    lengths = np.bincount(row[kept], minlength=num_labels)
    return _Entries(
        ids=entries.ids[kept],
        logprobs=entries.logprobs[kept],
        offsets=offsets_of(lengths),
        draws=None if entries.draws is None else entries.draws[kept],
        tail=folded,
    )
