"""Cached labels of one packed micro-batch, and the teacher's distribution that they stand for.

Alignment: label j describes the distribution over the token at target index t_j, given the tokens
before it, so the loss for it uses the student's hidden state at t_j - 1. `SparseTargets.positions`
holds that hidden index already; nothing downstream shifts again.

Shapes: T labelled positions, E cached entries of all of them, R rows, L tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import ConfigError, RecordError
from schemas.record import LabelRows, target_positions
from schemas.spec import RecordSpec
from trainer.config import LossConfig
from trainer.segments import Segments


@dataclass(frozen=True)
class SparseTargets:
    """What the loss needs to know about the labelled positions of one packed micro-batch.

    Attributes:
        positions: [T] int64, index into the flattened hidden states, t_j - 1.
        token_ids: [T] int64, the token that stands at t_j: the hard label.
        weights: [T] float32, weight of each position in the loss.
        entry_ids: [E] int32, cached vocabulary ids, each at most once per position.
        entry_logprobs: [E] float16, teacher log-probability at temperature 1, nats.
        entry_bounds: [T + 1] int64, CSR offsets of the entries, always on the CPU so that cutting
            chunks never waits for the device.
        entry_offsets: [T + 1] int64, the same on the device of the other tensors.
        tail_logmass: [T] float16, log of the teacher's probability outside the entries; None where
            the labels are tokens alone.
        lse: [T, num_temperatures] float16, log sum over the whole vocabulary of p^(1/T).
        temperatures: the temperatures of the columns of `lse`.
        num_ids: one more than the highest vocabulary id named here.
    """

    positions: Tensor
    token_ids: Tensor
    weights: Tensor
    entry_ids: Tensor
    entry_logprobs: Tensor
    entry_bounds: Tensor
    entry_offsets: Tensor
    tail_logmass: Tensor | None
    lse: Tensor | None
    temperatures: tuple[float, ...]
    num_ids: int

    @property
    def num_labels(self) -> int:
        return self.positions.numel()

    @property
    def num_entries(self) -> int:
        return self.entry_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same targets on `device`; `entry_bounds` stays on the CPU."""

        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self._tensors().items()
            if name != "entry_bounds"
        }
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """The same targets in page-locked memory, for copies that overlap with compute."""
        pinned: dict[str, Any] = {
            name: tensor.pin_memory() for name, tensor in self._tensors().items()
        }
        return replace(self, **pinned)

    def chunk(self, start: int, stop: int) -> Self:
        """The targets of the positions start:stop, entries included; tensors are views."""
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
            tail_logmass=None if self.tail_logmass is None else self.tail_logmass[start:stop],
            lse=None if self.lse is None else self.lse[start:stop],
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def segments(self) -> Segments:
        """How the entries belong to the positions."""
        return Segments.of(self.entry_offsets, self.entry_bounds)


@dataclass(frozen=True)
class TeacherPartition:
    """The teacher at one temperature, on the cached ids S and one bucket for all the others.

    Attributes:
        scaled: [E], log-probability of each entry over the temperature, not normalised.
        log_sum: [T], log of their summed exponentials.
        log_head: [T], log of the probability of the head.
        tail, log_tail: [T], probability of the bucket; exactly 0 and -inf where nothing is left.
    """

    scaled: Tensor
    log_sum: Tensor
    log_head: Tensor
    tail: Tensor
    log_tail: Tensor

    def log_weights(self, segments: Segments) -> Tensor:
        """[E], log-probability of each entry; those of a position sum to 1 - tail."""
        return self.scaled + segments.spread(self.log_head - self.log_sum)

    def log_shares(self, segments: Segments) -> Tensor:
        """[E], log of each entry's share of the head; those of a position sum to 1."""
        return self.scaled - segments.spread(self.log_sum)


def teacher_partition(
    targets: SparseTargets, temperature: float, segments: Segments, dtype: torch.dtype
) -> TeacherPartition:
    """Reads the teacher's distribution at `temperature` from its cached labels.

    At temperature 1 the head's mass is P = 1 - exp(tail_logmass) and the entries are rescaled to
    sum to it: the sum of rounded float16 probabilities may exceed 1, which would turn the gradient
    of the tail bucket round. At other temperatures the weights are exp(lp / T - lse_T), exact
    because lse_T was computed over the full vocabulary when the labels were made.

    Args:
        targets: labels with a teacher.
        temperature: distillation temperature.
        segments: `targets.segments()`.
        dtype: of the result.

    Raises:
        ConfigError: the labels have no teacher, or do not hold this temperature.
    """
    if targets.tail_logmass is None:
        raise ConfigError(
            "the loss needs a teacher's labels, but these rows are tokens alone; use "
            'loss.kind = "hard" or a label set with a teacher'
        )
    scaled = targets.entry_logprobs.to(dtype) / temperature
    log_sum = segments.logsumexp(scaled)
    if temperature == 1.0:
        log_tail = targets.tail_logmass.to(dtype)
        log_head = torch.log(-torch.expm1(log_tail))
        return TeacherPartition(scaled, log_sum, log_head, log_tail.exp(), log_tail)
    column = temperature_column(targets.temperatures, temperature)
    if targets.lse is None:
        raise ConfigError("column lse was not read, which a temperature other than 1 needs")
    # Rounding may lift the sum over 1: then the head is everything there is.
    log_head = (log_sum - targets.lse[:, column].to(dtype)).clamp(max=0.0)
    tail = -torch.expm1(log_head)
    return TeacherPartition(scaled, log_sum, log_head, tail, tail.log())


def temperature_column(stored: Sequence[float], temperature: float) -> int:
    """Index of `temperature` among those that the labels hold a normaliser for.

    Raises:
        ConfigError: it is not among them.
    """
    if temperature in stored:
        return stored.index(temperature)
    served = ", ".join(str(t) for t in sorted({1.0, *stored}))
    raise ConfigError(
        f"loss.temperature = {temperature} cannot be computed from these labels, which serve "
        f"{served}; choose one of those, or label again with {temperature} in record.temperatures"
    )


def check_loss(loss: LossConfig, record: RecordSpec) -> None:
    """Refuses, before any training, a target that labels of this record cannot give.

    Raises:
        ConfigError: the loss needs a teacher and the labels are tokens alone, or its temperature
            is not stored.
    """
    if loss.kind == "hard":
        return
    if record.kind == "tokens":
        raise ConfigError(
            f'loss.kind = "{loss.kind}" needs a teacher\'s labels, but the label set is of '
            'record.kind = "tokens"; use loss.kind = "hard" or a label set with a teacher'
        )
    if loss.temperature != 1.0:
        temperature_column(record.temperatures, loss.temperature)


def build_targets(
    rows: LabelRows,
    row_starts: NDArray[np.int64],
    temperatures: Sequence[float],
    vocab_size: int,
    row_weights: NDArray[np.float32] | None = None,
) -> SparseTargets:
    """Turns label rows, packed at known places, into the targets of their micro-batch.

    A student with fewer padding ids than its teacher (equal tokenizers, other vocabulary sizes) has
    no logit for some ids that labels may name. Their probability moves to the tail bucket, which
    is where the student keeps all that it has no entry for; no other entry changes.

    Args:
        rows: R label rows.
        row_starts: [R] int64, index of each row's first token in the flattened [B x L] token axis.
        temperatures: `RecordSpec.temperatures` of the label set, in order.
        vocab_size: rows of the student's lm_head.
        row_weights: [R] float32, weight of every position of a row; None for ones.

    Returns:
        CPU tensors that share memory with `rows` where they can.

    Raises:
        RecordError: a position has no entries although the rows have a teacher, or draws, which no
            loss here reads; a token of the text lies outside the student's vocabulary.
    """
    indices, label_offsets = target_positions(rows.label_spans, rows.span_offsets)
    num_labels = np.diff(label_offsets)
    token_ids = rows.token_ids[indices + np.repeat(rows.token_offsets[:-1], num_labels)]
    if len(token_ids) and token_ids.max() >= vocab_size:
        raise RecordError(
            f"token id {token_ids.max()} stands in the text but the student has {vocab_size} ids; "
            "train a student with the vocabulary of the labels"
        )
    weights = np.ones(len(rows), np.float32) if row_weights is None else row_weights
    highest = int(token_ids.max(initial=-1))
    entries = _entries(rows, vocab_size, len(token_ids))
    bounds = _tensor(entries.offsets)
    return SparseTargets(
        positions=torch.from_numpy(indices + np.repeat(row_starts, num_labels) - 1),
        token_ids=torch.from_numpy(token_ids.astype(np.int64)),
        weights=torch.from_numpy(np.repeat(weights.astype(np.float32), num_labels)),
        entry_ids=_tensor(entries.ids),
        entry_logprobs=_tensor(entries.logprobs),
        entry_bounds=bounds,
        entry_offsets=bounds,
        tail_logmass=None if entries.tail is None else _tensor(entries.tail),
        lse=None if rows.lse is None else _tensor(rows.lse),
        temperatures=tuple(temperatures),
        num_ids=1 + max(highest, int(entries.ids.max(initial=-1))),
    )


@dataclass(frozen=True)
class _Entries:
    """Cached entries of all positions: ids and logprobs [E], offsets [T + 1], tail [T] or None."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]
    offsets: NDArray[np.int64]
    tail: NDArray[np.float16] | None


def _entries(rows: LabelRows, vocab_size: int, num_labels: int) -> _Entries:
    """The entries that the student has a logit for; none where the rows have no teacher."""
    ids, logprobs, offsets, tail = (
        rows.entry_ids, rows.entry_logprobs, rows.entry_offsets, rows.tail_logmass
    )  # fmt: skip
    if ids is None or logprobs is None or offsets is None or tail is None:
        bounds = np.zeros(num_labels + 1, np.int64)
        return _Entries(np.zeros(0, np.int32), np.zeros(0, np.float16), bounds, None)
    if rows.tail_len is not None and rows.tail_len.any():
        raise RecordError("label rows hold tail draws, which no loss reads; use a topk label set")
    if len(ids) and ids.max() >= vocab_size:
        ids, logprobs, offsets, tail = _fold_absent(ids, logprobs, offsets, tail, vocab_size)
    lengths = np.diff(offsets)
    if len(lengths) and lengths.min() == 0:
        raise RecordError(
            f"label {int(lengths.argmin())} of a packed micro-batch has no entries, so the teacher "
            "says nothing there; label these rows again"
        )
    return _Entries(ids, logprobs, offsets, tail)


def _tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over `array`; a copy only of read-only memory, which torch cannot stand for."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _fold_absent(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float16],
    offsets: NDArray[np.int64],
    tail: NDArray[np.float16],
    vocab_size: int,
) -> tuple[NDArray[np.int32], NDArray[np.float16], NDArray[np.int64], NDArray[np.float16]]:
    """Moves the entries that the student has no logit for to the tail bucket of their position."""
    kept = ids < vocab_size
    row = np.repeat(np.arange(len(tail)), np.diff(offsets))
    absent = np.exp(logprobs[~kept].astype(np.float64))
    mass = np.exp(tail.astype(np.float64)) + np.bincount(row[~kept], absent, len(tail))
    with np.errstate(divide="ignore"):
        folded = np.where(mass > 0, np.log(np.minimum(mass, 1.0)), -np.inf).astype(np.float16)
    lengths = np.bincount(row[kept], minlength=len(tail))
    return ids[kept], logprobs[kept], np.concatenate([[0], np.cumsum(lengths)]), folded
