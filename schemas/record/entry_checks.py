"""Checks of `validate` on entries: heads, draws, their mass, and agreement with the target.

``topk`` heads have equal lengths and are checked as matrices. Entries of other kinds are checked as
flat arrays, with a segment per position.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.record.record_check import RecordCheck, descending_bits, is_valid_logprob
from schemas.record.rows import LabelRows, present
from schemas.record.spans import Bools
from schemas.spec import RecordSpec

# Tolerance for sums of probabilities, which the teacher computes in float32.
MASS_SLACK = 1e-3
# Relative tolerance for the tail mass, which determines the number of draws.
PROB_SLACK = 1e-4
# Number of entries checked at once, so that temporary arrays stay in the CPU cache.
CHUNK_ENTRIES = 1 << 17

_Ids = npt.NDArray[np.int32]
_Halves = npt.NDArray[np.float16]
_Floats = npt.NDArray[np.float32]

# exp of every float16, indexed by its bits: four times faster than converting and computing exp.
with np.errstate(over="ignore", invalid="ignore"):
    _ALL: _Floats = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    _EXP: _Floats = np.exp(_ALL)


@functools.lru_cache
def _rounding_errors(bits: int) -> _Floats:
    """Maximum error of exp(l), from rounding l, for every float16 l, indexed by its bits.

    Rounding changed a log-probability l by at most |l| * 2^-(bits + 1).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(_ALL * np.float32(1.0 - 1.1 * 2.0 ** -(bits + 1))) - _EXP


_MASS_RULE = "expected head and tail_logmass to sum to a probability of 1, found a sum of {:.5f}"
_DRAWN_MASS_RULE = "expected the draws to sum to at most tail_logmass"
_TARGET_RULE = "expected that of the target's entry, or a value below the head if it has none"
_RANK_RULE = "expected at most the position of the target's entry in the head"


def check_entries(rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str) -> None:
    """Checks the entries of rows whose lengths have been validated; see `validate`."""
    if spec.kind == "topk":
        _TopkCheck(rows, spec, vocab_size, where).check()
    else:
        _RaggedCheck(rows, spec, vocab_size, where).check()


class _EntryCheck(RecordCheck):
    def rounding_errors(self, logprobs: _Halves) -> _Floats:
        """Maximum rounding errors of probabilities with these stored logarithms."""
        return _rounding_errors(self.spec.logprob_bits).take(logprobs.view(np.uint16))

    @property
    def relative_error(self) -> float:
        """Maximum relative rounding error of a stored value."""
        return 2.0 ** -(self.spec.logprob_bits + 1)

    def target_columns(
        self, first: int, reference: _Halves, has_entry: Bools, places: npt.NDArray[np.int64]
    ) -> None:
        """Checks target_logprob and target_rank against the target's entry, or its absence.

        Args:
            first: index of the first position.
            reference: float16 [n], log-probability of the target's entry, else of the last head
                entry.
            has_entry: bool [n], whether the target has an entry.
            places: int64 [n], index of the target's entry in the head.
        """
        part = slice(first, first + len(reference))
        entry = reference.astype(np.float32)
        above = present(self.rows.target_logprob)[part].astype(np.float32) - entry
        slack = np.abs(entry) * np.float32(2 * self.relative_error) + np.float32(MASS_SLACK)
        bad = np.where(has_entry, np.abs(above) > slack, above > slack)
        self.reject_labels(bad, "target_logprob", _TARGET_RULE, first)
        bad = has_entry & (present(self.rows.target_rank)[part] > places + 1)
        self.reject_labels(bad, "target_rank", _RANK_RULE, first)


class _TopkCheck(_EntryCheck):
    def check(self) -> None:
        rows, offsets = self.rows, present(self.rows.entry_offsets)
        targets = rows.target_ids()
        width = self.spec.most_entries(self.vocab_size)
        step = max(1, CHUNK_ENTRIES // width)
        for first in range(0, rows.num_labels, step):
            last = min(first + step, rows.num_labels)
            part = slice(offsets[first], offsets[last])
            ids = present(rows.entry_ids)[part].reshape(-1, width)
            logprobs = present(rows.entry_logprobs)[part].reshape(-1, width)
            self.entry_ids(ids, first)
            self.entry_logprobs(logprobs, first)
            self.entry_mass(logprobs, present(rows.tail_logmass)[first:last], first)
            self.entry_of_target(ids, logprobs, targets[first:last], first)

    def entry_ids(self, ids: _Ids, first: int) -> None:
        self.reject_labels(self.outside(ids), "entry_ids", self.id_range, first)
        ordered = np.sort(ids, axis=1)
        twice = ordered[:, 1:] == ordered[:, :-1]
        self.reject_labels(twice, "entry_ids", "expected each id once", first)

    def entry_logprobs(self, logprobs: _Halves, first: int) -> None:
        bad = ~is_valid_logprob(logprobs)
        self.reject_labels(bad, "entry_logprobs", "expected finite and not positive", first)
        bits = descending_bits(logprobs)
        bad = bits[:, 1:] < bits[:, :-1]
        self.reject_labels(bad, "entry_logprobs", "expected a decreasing order", first)

    def entry_mass(self, logprobs: _Halves, tail: _Halves, first: int) -> None:
        """Head and tail mass sum to one."""
        total = _EXP.take(logprobs.view(np.uint16)).sum(axis=1) + _EXP.take(tail.view(np.uint16))
        off = np.abs(total - 1.0)
        bad = ~(off <= MASS_SLACK)
        unsure = np.flatnonzero(bad)
        if not len(unsure):
            return
        error = self.rounding_errors(logprobs[unsure]).sum(axis=1)
        error += self.rounding_errors(tail[unsure])
        bad[unsure] = off[unsure] > error + MASS_SLACK
        self.reject_labels(bad, "entry_logprobs", _with_value(_MASS_RULE, total, bad), first)

    def entry_of_target(self, ids: _Ids, logprobs: _Halves, targets: _Ids, first: int) -> None:
        found = np.flatnonzero(ids == targets[:, None])  # at most one per position
        at = found // ids.shape[1]
        has_entry = np.zeros(len(ids), np.bool_)
        has_entry[at] = True
        places = np.zeros(len(ids), np.int64)
        places[at] = found - at * ids.shape[1]
        reference = logprobs[:, -1].copy()
        reference[at] = logprobs.reshape(-1)[found]
        self.target_columns(first, reference, has_entry, places)


class _RaggedCheck(_EntryCheck):
    def check(self) -> None:
        rows, offsets = self.rows, present(self.rows.entry_offsets)
        if self.spec.kind == "sampled":
            bad = present(rows.tail_logmass) != 0
            self.reject_labels(bad, "tail_logmass", 'expected 0 for kind "sampled"')
            self.draw_counts()
        targets = rows.target_ids()
        first = 0
        while first < rows.num_labels:
            end = np.searchsorted(offsets, offsets[first] + CHUNK_ENTRIES, side="right") - 1
            last = min(max(first + 1, int(end)), rows.num_labels)
            _RaggedChunkCheck(self, first, last).check(targets[first:last])
            first = last

    def draw_counts(self) -> None:
        counts, tail = present(self.rows.entry_counts), present(self.rows.tail_len)
        if not len(tail):
            return
        starts = np.cumsum(tail, dtype=np.int64) - tail
        bad = np.minimum.reduceat(counts, starts) < 1
        self.reject_labels(bad, "entry_counts", "expected 1 or more")
        bad = np.add.reduceat(counts, starts, dtype=np.int64) != self.spec.draws
        rule = f"expected a sum of {self.spec.draws}, the number of draws"
        self.reject_labels(bad, "entry_counts", rule)


class _RaggedChunkCheck:
    """Checks positions [first, last), each with at least one entry, as flat arrays."""

    def __init__(self, owner: _RaggedCheck, first: int, last: int) -> None:
        rows, offsets = owner.rows, present(owner.rows.entry_offsets)
        part = slice(offsets[first], offsets[last])
        self.owner = owner
        self.spec = owner.spec
        self.first = first
        self.positions = slice(first, last)
        self.ids: _Ids = present(rows.entry_ids)[part]
        self.logprobs: _Halves = present(rows.entry_logprobs)[part]
        self.starts = offsets[first:last] - offsets[first]
        self.head_len = present(rows.head_len)[first:last].astype(np.int64)
        self.tail_len = present(rows.tail_len)[first:last].astype(np.int64)
        # The position of each entry within the chunk, and whether it is in the head.
        count = last - first
        lengths = self.head_len + self.tail_len
        self.at = np.repeat(np.arange(count), lengths)
        kinds = np.tile(np.array([True, False]), count)
        by_kind = np.stack([self.head_len, self.tail_len], axis=1).reshape(-1)
        self.in_head = np.repeat(kinds, by_kind)

    def reject_entries(self, bad: Bools, column: str, expected: str) -> None:
        """Fails if any entry is bad."""
        if bad.any():
            at = self.first + int(self.at[np.argmax(bad)])
            self.owner.reject_label(at, column, expected)

    def reject_labels(self, bad: Bools, column: str, expected: str) -> None:
        """Fails if any position is bad."""
        self.owner.reject_labels(bad, column, expected, self.first)

    def check(self, targets: _Ids) -> None:
        self.entry_ids()
        self.entry_logprobs()
        if self.spec.kind == "sampled":
            drawn = np.add.reduceat(_EXP.take(self.logprobs.view(np.uint16)), self.starts)
            self.reject_labels(self.above(drawn, 1.0), "entry_logprobs", _DRAWN_MASS_RULE)
        else:
            self.mass()
        if self.spec.kind == "threshold":
            self.sides_of_tau()
            self.number_of_draws()
        self.targets(targets)

    def entry_ids(self) -> None:
        self.reject_entries(self.owner.outside(self.ids), "entry_ids", self.owner.id_range)
        # Compares entries i and i + 1, except across the boundary between two positions.
        falls = self.ids[1:] <= self.ids[:-1]
        falls &= ~self.in_head[:-1]
        falls[self.starts[1:] - 1] = False
        self.reject_entries(np.append(False, falls), "entry_ids", "expected draws by ascending id")
        if self.spec.kind != "sampled":
            keys = np.sort((self.at << 32) | self.ids)
            twice = keys[1:] == keys[:-1]
            # Sorted keys stay within the segment of their position.
            self.reject_entries(np.append(False, twice), "entry_ids", "expected each id once")

    def entry_logprobs(self) -> None:
        bad = ~is_valid_logprob(self.logprobs)
        self.reject_entries(bad, "entry_logprobs", "expected finite and not positive")
        bits = descending_bits(self.logprobs)
        rises = bits[1:] < bits[:-1]
        rises &= self.in_head[1:]
        rises[self.starts[1:] - 1] = False
        rises = np.append(False, rises)
        self.reject_entries(rises, "entry_logprobs", "expected a decreasing order")

    def above(self, found: _Floats, bound: _Floats | float) -> Bools:
        """Marks positions whose sum exceeds the bound by more than rounding can explain."""
        bad: Bools = found > bound + np.float32(MASS_SLACK)
        if bad.any():
            error = np.add.reduceat(self.owner.rounding_errors(self.logprobs), self.starts)
            bad &= found > bound + error + np.float32(MASS_SLACK)
        return bad

    def mass(self) -> None:
        """Head and tail mass sum to 1, draws to at most the tail mass, ``topp`` heads to top_p."""
        tail_logmass = present(self.owner.rows.tail_logmass)[self.positions]
        tail = _EXP.take(tail_logmass.view(np.uint16))
        probs = _EXP.take(self.logprobs.view(np.uint16))
        everything = np.add.reduceat(probs, self.starts)
        head = np.add.reduceat(probs * self.in_head, self.starts)
        slack = self.owner.rounding_errors(tail_logmass)
        bad = self.above(head + tail - slack, 1.0) | self.above(1.0 - tail - slack, head)
        self.reject_labels(bad, "entry_logprobs", _with_value(_MASS_RULE, head + tail, bad))
        bad = self.above(everything - head, tail + slack)
        self.reject_labels(bad, "entry_logprobs", _DRAWN_MASS_RULE)
        if self.spec.kind == "topp":
            top_p = self.spec.top_p
            bad = self.above(np.float32(top_p) - head, 0.0)
            bad &= self.head_len < self.spec.most_entries(self.owner.vocab_size)
            rule = f"expected a head of mass {top_p:g} or more, found {{:.5f}}"
            self.reject_labels(bad, "entry_logprobs", _with_value(rule, head, bad))
            before = head - probs[self.starts + self.head_len - 1]
            bad = self.above(before, top_p)
            rule = f"expected the fewest ids of mass {top_p:g}, found {{:.5f}} without the last"
            self.reject_labels(bad, "entry_logprobs", _with_value(rule, before, bad))

    def sides_of_tau(self) -> None:
        """At the draw temperature, head entries are at or above tau, and draws below.

        The first entry of a head is exempt: it is stored even if its probability is below tau.
        """
        drawn_at, tau = self.spec.drawn_at, self.spec.tau
        logprobs = self.logprobs.astype(np.float32)
        over = logprobs / np.float32(drawn_at) - np.float32(np.log(tau))
        slack = np.abs(logprobs) / np.float32(drawn_at)
        if drawn_at != 1.0:
            column = self.spec.temperatures.index(drawn_at)
            lse = present(self.owner.rows.lse)[self.positions, column].astype(np.float32)[self.at]
            over -= lse
            slack += np.abs(lse)
        slack = slack * np.float32(1.1 * self.owner.relative_error) + np.float32(MASS_SLACK)
        low = (over < -slack) & self.in_head
        low[self.starts] = False
        rule = f"expected head entries of at least tau, {tau:g}, at temperature {drawn_at:g}"
        self.reject_entries(low, "entry_logprobs", rule)
        high = (over > slack) & ~self.in_head
        rule = f"expected draws below tau, {tau:g}, at temperature {drawn_at:g}"
        self.reject_entries(high, "entry_logprobs", rule)

    def number_of_draws(self) -> None:
        """The number of draws matches systematic sampling of the tail in steps of tau.

        Rows thinned for a larger tau may have one more or less, because their original draws
        represent the tail mass only to within the original, smaller tau.
        """
        if self.spec.drawn_at != 1.0:
            return  # tail mass is stored at temperature 1 only
        logmass = present(self.owner.rows.tail_logmass)[self.positions]
        steps = np.exp(logmass.astype(np.float64)) / self.spec.tau
        slack = 1.0 + self.owner.rounding_errors(logmass) / self.spec.tau + PROB_SLACK * steps
        bad = (self.tail_len < np.floor(steps - slack)) | (self.tail_len > np.ceil(steps + slack))
        rule = "expected exp(tail_logmass) / tau = {:.2f} draws, rounded, give or take one"
        self.reject_labels(bad, "tail_len", _with_value(rule, steps, bad))

    def targets(self, targets: _Ids) -> None:
        found = np.flatnonzero(self.ids == targets[self.at])
        at = self.at[found]
        count = len(self.starts)
        has_entry = np.zeros(count, np.bool_)
        has_entry[at] = True
        # A target among the draws may have any rank.
        places = np.full(count, self.owner.vocab_size, np.int64)
        places[at] = np.where(self.in_head[found], found - self.starts[at], places[at])
        if self.spec.kind == "sampled":
            reference = np.zeros(count, np.float16)
        else:
            reference = self.logprobs[self.starts + self.head_len - 1]
        reference[at] = self.logprobs[found]
        self.owner.target_columns(self.first, reference, has_entry, places)


def _with_value(rule: str, values: npt.NDArray[np.floating[Any]], bad: Bools) -> str:
    """Fills the first violating value into a rule."""
    return rule.format(float(values[np.argmax(bad)])) if len(values) else rule
