"""The rules of `validate` about entries: heads, draws, what they sum to, and the target's own.

Heads of one width (``topk``) are checked as matrices. The other kinds have entries as they come:
flat arrays, with sums over the runs of a position.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.record.rows import LabelRows
from schemas.record.violations import Bools, Rules, have, is_logprob, magnitude_bits
from schemas.spec import RecordSpec

# How far float32 arithmetic of a teacher may be from a sum of exactly one.
MASS_SLACK = 1e-3
# The same of one probability, as a share of it: what decides how many points fall on a tail.
PROB_SLACK = 1e-4
# Entries that are checked together, so that the temporary arrays stay in the CPU's cache.
CHUNK_ENTRIES = 1 << 17

_Ids = npt.NDArray[np.int32]
_Halves = npt.NDArray[np.float16]
_Floats = npt.NDArray[np.float32]

# exp of each float16 by its bits: four times as fast as widening it and taking the exp.
with np.errstate(over="ignore", invalid="ignore"):
    _ALL: _Floats = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    _EXP: _Floats = np.exp(_ALL)


@functools.lru_cache
def _moved(bits: int) -> _Floats:
    """How far rounding may have moved exp of each float16, by its bits.

    A log-probability l was rounded by at most |l| * 2^-(bits + 1).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(_ALL * np.float32(1.0 - 1.1 * 2.0 ** -(bits + 1))) - _EXP


_MASS_RULE = "expected head and tail_logmass to sum to a probability of 1"
_DRAWN_MASS_RULE = "expected the draws to sum to no more than tail_logmass"
_TARGET_RULE = "expected that of the target's entry, or below the head where it has none"
_RANK_RULE = "expected at most the place of the target's entry in the head"


def check_entries(rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str) -> None:
    """Checks the entries of rows whose lengths are known to be right; see `validate`."""
    if spec.kind == "topk":
        _EqualHeads(rows, spec, vocab_size, where).check()
    else:
        _RaggedEntries(rows, spec, vocab_size, where).check()


class _EntryRules(Rules):
    def target_ids(self) -> _Ids:
        """int32 [sum N]: the token that stands at each target index."""
        rows = self.rows
        starts = rows.label_spans[0::2].astype(np.int64)
        lengths = rows.label_spans[1::2] - starts
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
        row_starts = np.repeat(rows.token_offsets[:-1], np.diff(rows.span_offsets) // 2)
        indices = np.arange(rows.num_labels) + np.repeat(row_starts + starts - begins, lengths)
        return rows.token_ids[indices]

    def moved(self, logprobs: _Halves) -> _Floats:
        """How far rounding may have moved probabilities, given what is left of their logs."""
        return _moved(self.spec.logprob_bits).take(logprobs.view(np.uint16))

    @property
    def half_unit(self) -> float:
        """How far rounding moves a number at most, as a share of it."""
        return 2.0 ** -(self.spec.logprob_bits + 1)

    def target_of_entry(
        self, first: int, reference: _Halves, present: Bools, places: npt.NDArray[np.int64]
    ) -> None:
        """The target's own columns agree with its entry, or with there being none.

        Args:
            first: the first position.
            reference: float16 [n], of the target's entry, or else the last of the head.
            present: bool [n], whether the target has an entry.
            places: int64 [n], where in the head it is.
        """
        part = slice(first, first + len(reference))
        entry = reference.astype(np.float32)
        above = have(self.rows.target_logprob)[part].astype(np.float32) - entry
        slack = np.abs(entry) * np.float32(2 * self.half_unit) + np.float32(MASS_SLACK)
        bad = np.where(present, np.abs(above) > slack, above > slack)
        self.refuse_labels(bad, "target_logprob", _TARGET_RULE, first)
        bad = present & (have(self.rows.target_rank)[part] > places + 1)
        self.refuse_labels(bad, "target_rank", _RANK_RULE, first)


class _EqualHeads(_EntryRules):
    def check(self) -> None:
        rows, offsets = self.rows, have(self.rows.entry_offsets)
        targets = self.target_ids()
        width = self.spec.most_entries(self.vocab_size)
        step = max(1, CHUNK_ENTRIES // width)
        for first in range(0, rows.num_labels, step):
            last = min(first + step, rows.num_labels)
            part = slice(offsets[first], offsets[last])
            ids = have(rows.entry_ids)[part].reshape(-1, width)
            logprobs = have(rows.entry_logprobs)[part].reshape(-1, width)
            self.entry_ids(ids, first)
            self.entry_logprobs(logprobs, first)
            self.entry_mass(logprobs, have(rows.tail_logmass)[first:last], first)
            self.entry_of_target(ids, logprobs, targets[first:last], first)

    def entry_ids(self, ids: _Ids, first: int) -> None:
        rule = f"expected ids in [0, {self.vocab_size})"
        self.refuse_labels(self.outside(ids), "entry_ids", rule, first)
        ordered = np.sort(ids, axis=1)
        twice = ordered[:, 1:] == ordered[:, :-1]
        self.refuse_labels(twice, "entry_ids", "expected each id once", first)

    def entry_logprobs(self, logprobs: _Halves, first: int) -> None:
        bad = ~is_logprob(logprobs)
        self.refuse_labels(bad, "entry_logprobs", "expected finite and not positive", first)
        bits = magnitude_bits(logprobs)
        bad = bits[:, 1:] < bits[:, :-1]
        self.refuse_labels(bad, "entry_logprobs", "expected a falling order", first)

    def entry_mass(self, logprobs: _Halves, tail: _Halves, first: int) -> None:
        """Head and tail mass sum to one."""
        total = _EXP.take(logprobs.view(np.uint16)).sum(axis=1) + _EXP.take(tail.view(np.uint16))
        off = np.abs(total - 1.0)
        bad = ~(off <= MASS_SLACK)
        unsure = np.flatnonzero(bad)
        if not len(unsure):
            return
        moved = self.moved(logprobs[unsure]).sum(axis=1) + self.moved(tail[unsure])
        bad[unsure] = off[unsure] > moved + MASS_SLACK
        rule = _MASS_RULE
        if bad.any():
            rule += f", found a sum of {float(total[np.argmax(bad)]):.5f}"
        self.refuse_labels(bad, "entry_logprobs", rule, first)

    def entry_of_target(self, ids: _Ids, logprobs: _Halves, targets: _Ids, first: int) -> None:
        found = np.flatnonzero(ids == targets[:, None])  # at most one a position
        at = found // ids.shape[1]
        present = np.zeros(len(ids), np.bool_)
        present[at] = True
        places = np.zeros(len(ids), np.int64)
        places[at] = found - at * ids.shape[1]
        reference = logprobs[:, -1].copy()
        reference[at] = logprobs.reshape(-1)[found]
        self.target_of_entry(first, reference, present, places)


class _RaggedEntries(_EntryRules):
    def check(self) -> None:
        rows, offsets = self.rows, have(self.rows.entry_offsets)
        if self.spec.kind == "sampled":
            bad = have(rows.tail_logmass) != 0
            self.refuse_labels(bad, "tail_logmass", 'expected 0 for kind "sampled"')
            self.draw_counts()
        targets = self.target_ids()
        first = 0
        while first < rows.num_labels:
            end = np.searchsorted(offsets, offsets[first] + CHUNK_ENTRIES, side="right") - 1
            last = min(max(first + 1, int(end)), rows.num_labels)
            _RaggedChunk(self, first, last).check(targets[first:last])
            first = last

    def draw_counts(self) -> None:
        counts, tail = have(self.rows.entry_counts), have(self.rows.tail_len)
        if not len(tail):
            return
        starts = np.cumsum(tail, dtype=np.int64) - tail
        bad = np.minimum.reduceat(counts, starts) < 1
        self.refuse_labels(bad, "entry_counts", "expected 1 or more")
        bad = np.add.reduceat(counts, starts, dtype=np.int64) != self.spec.draws
        self.refuse_labels(bad, "entry_counts", f"expected a sum of {self.spec.draws}, the draws")


class _RaggedChunk:
    """Positions [first, last) and their entries, flat; every position has at least one."""

    def __init__(self, rules: _RaggedEntries, first: int, last: int) -> None:
        rows, offsets = rules.rows, have(rules.rows.entry_offsets)
        part = slice(offsets[first], offsets[last])
        self.rules = rules
        self.spec = rules.spec
        self.first = first
        self.positions = slice(first, last)
        self.ids: _Ids = have(rows.entry_ids)[part]
        self.logprobs: _Halves = have(rows.entry_logprobs)[part]
        self.starts = offsets[first:last] - offsets[first]
        self.head_len = have(rows.head_len)[first:last].astype(np.int64)
        self.tail_len = have(rows.tail_len)[first:last].astype(np.int64)
        # The position of each entry within the chunk, and whether it is in the head.
        count = last - first
        lengths = self.head_len + self.tail_len
        self.at = np.repeat(np.arange(count), lengths)
        kinds = np.tile(np.array([True, False]), count)
        by_kind = np.stack([self.head_len, self.tail_len], axis=1).reshape(-1)
        self.in_head = np.repeat(kinds, by_kind)

    def refuse(self, bad: Bools, column: str, expected: str) -> None:
        """Fails if any entry is bad."""
        if bad.any():
            at = self.first + int(self.at[np.argmax(bad)])
            self.rules.refuse_label(at, column, expected)

    def refuse_labels(self, bad: Bools, column: str, expected: str) -> None:
        """Fails if any position is bad."""
        self.rules.refuse_labels(bad, column, expected, self.first)

    def check(self, targets: _Ids) -> None:
        self.entry_ids()
        self.entry_logprobs()
        if self.spec.kind == "sampled":
            drawn = np.add.reduceat(_EXP.take(self.logprobs.view(np.uint16)), self.starts)
            self.refuse_labels(self.above(drawn, 1.0), "entry_logprobs", _DRAWN_MASS_RULE)
        else:
            self.mass()
        if self.spec.kind == "threshold":
            self.sides_of_tau()
            self.number_of_draws()
        self.targets(targets)

    def entry_ids(self) -> None:
        rule = f"expected ids in [0, {self.rules.vocab_size})"
        self.refuse(self.rules.outside(self.ids), "entry_ids", rule)
        # Of neighbours, the second; the first entry of a position has none before it.
        falls = self.ids[1:] <= self.ids[:-1]
        falls &= ~self.in_head[:-1]
        falls[self.starts[1:] - 1] = False
        self.refuse(np.append(False, falls), "entry_ids", "expected draws by rising id")
        if self.spec.kind != "sampled":
            keys = np.sort((self.at << 32) | self.ids)
            twice = keys[1:] == keys[:-1]
            # Sorted within its position, an entry stays in the position's run.
            self.refuse(np.append(False, twice), "entry_ids", "expected each id once")

    def entry_logprobs(self) -> None:
        bad = ~is_logprob(self.logprobs)
        self.refuse(bad, "entry_logprobs", "expected finite and not positive")
        bits = magnitude_bits(self.logprobs)
        rises = bits[1:] < bits[:-1]
        rises &= self.in_head[1:]
        rises[self.starts[1:] - 1] = False
        self.refuse(np.append(False, rises), "entry_logprobs", "expected a falling order")

    def above(self, found: _Floats, bound: _Floats | float) -> Bools:
        """Where sums over the entries of positions are more than rounding explains above bounds."""
        bad: Bools = found > bound + np.float32(MASS_SLACK)
        if bad.any():
            moved = self.rules.moved(self.logprobs)
            bad &= found > bound + np.add.reduceat(moved, self.starts) + np.float32(MASS_SLACK)
        return bad

    def mass(self) -> None:
        """Head and tail mass sum to one; draws to no more than the tail; topp to its mass."""
        tail_logmass = have(self.rules.rows.tail_logmass)[self.positions]
        tail = _EXP.take(tail_logmass.view(np.uint16))
        probs = _EXP.take(self.logprobs.view(np.uint16))
        everything = np.add.reduceat(probs, self.starts)
        head = np.add.reduceat(probs * self.in_head, self.starts)
        slack = self.rules.moved(tail_logmass)
        bad = self.above(head + tail - slack, 1.0) | self.above(1.0 - tail - slack, head)
        rule = _MASS_RULE
        if bad.any():
            rule += f", found a sum of {float((head + tail)[np.argmax(bad)]):.5f}"
        self.refuse_labels(bad, "entry_logprobs", rule)
        bad = self.above(everything - head, tail + slack)
        self.refuse_labels(bad, "entry_logprobs", _DRAWN_MASS_RULE)
        if self.spec.kind == "topp":
            top_p = self.spec.top_p
            bad = self.above(np.float32(top_p) - head, 0.0)
            bad &= self.head_len < self.spec.most_entries(self.rules.vocab_size)
            rule = f"expected a head of a mass of {top_p:g} or more, found {{:.5f}}"
            self.refuse_labels(bad, "entry_logprobs", _filled(rule, head, bad))
            before = head - probs[self.starts + self.head_len - 1]
            bad = self.above(before, top_p)
            rule = (
                f"expected the fewest ids of a mass of {top_p:g}, found {{:.5f}} without the last"
            )
            self.refuse_labels(bad, "entry_logprobs", _filled(rule, before, bad))

    def sides_of_tau(self) -> None:
        """At the temperature of the draws, heads are at tau or above it, draws below.

        The first of a head may be anywhere: it is in the head whatever its probability.
        """
        drawn_at, tau = self.spec.drawn_at, self.spec.tau
        logprobs = self.logprobs.astype(np.float32)
        over = logprobs / np.float32(drawn_at) - np.float32(np.log(tau))
        slack = np.abs(logprobs) / np.float32(drawn_at)
        if drawn_at != 1.0:
            column = self.spec.temperatures.index(drawn_at)
            lse = have(self.rules.rows.lse)[self.positions, column].astype(np.float32)[self.at]
            over -= lse
            slack += np.abs(lse)
        slack = slack * np.float32(1.1 * self.rules.half_unit) + np.float32(MASS_SLACK)
        low = (over < -slack) & self.in_head
        low[self.starts] = False
        rule = f"expected a head of ids of at least tau, {tau:g}, at temperature {drawn_at:g}"
        self.refuse(low, "entry_logprobs", rule)
        high = (over > slack) & ~self.in_head
        rule = f"expected draws of ids below tau, {tau:g}, at temperature {drawn_at:g}"
        self.refuse(high, "entry_logprobs", rule)

    def number_of_draws(self) -> None:
        """As many as points at distances of tau can fall on the tail, within rounding.

        One more or less in rows that were thinned for a larger tau: the draws that they had stand
        for the mass of the tail within one tau, and a smaller one.
        """
        if self.spec.drawn_at != 1.0:
            return  # The mass of the tail is known at temperature 1 only.
        logmass = have(self.rules.rows.tail_logmass)[self.positions]
        steps = np.exp(logmass.astype(np.float64)) / self.spec.tau
        moved = 1.0 + self.rules.moved(logmass) / self.spec.tau + PROB_SLACK * steps
        bad = (self.tail_len < np.floor(steps - moved)) | (self.tail_len > np.ceil(steps + moved))
        rule = "expected tail_logmass over tau draws, {:.2f}, within one draw of it rounded"
        self.refuse_labels(bad, "tail_len", _filled(rule, steps, bad))

    def targets(self, targets: _Ids) -> None:
        found = np.flatnonzero(self.ids == targets[self.at])
        at = self.at[found]
        count = len(self.starts)
        present = np.zeros(count, np.bool_)
        # A target that was drawn may have any rank.
        places = np.full(count, self.rules.vocab_size, np.int64)
        present[at] = True
        places[at] = np.where(self.in_head[found], found - self.starts[at], places[at])
        if self.spec.kind == "sampled":
            reference = np.zeros(count, np.float16)
        else:
            reference = self.logprobs[self.starts + self.head_len - 1]
        reference[at] = self.logprobs[found]
        self.rules.target_of_entry(self.first, reference, present, places)


def _filled(rule: str, values: npt.NDArray[np.floating[Any]], bad: Bools) -> str:
    """A rule with the value that breaks it first, if any does."""
    return rule.format(float(values[np.argmax(bad)])) if len(values) else rule
