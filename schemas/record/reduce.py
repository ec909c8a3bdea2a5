"""Reduction of stored rows to a smaller record, without the teacher.

Exact heads are truncated. For a larger tau, labels of kind ``threshold`` are thinned: head entries
below the new tau and the stored draws are sampled again, systematically, in steps of the new tau
along their sizes, in order of id. A demoted head entry has the size p_s, its probability at the
draw temperature; a draw has the size of the old tau, the probability it represents. An entry is
kept with probability size / tau and then represents the new tau, so labels stay unbiased.

Because thinning samples a second time, a position may have one draw more or less than if the
teacher had labelled it, and the variance is slightly higher.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import RecordError
from schemas.record.rounding import round_logprobs
from schemas.record.rows import LabelRows, present
from schemas.record.spans import Bools, Int64s, offsets_of, target_positions
from schemas.record.uniforms import REDUCING, uniforms
from schemas.spec import LabelSetSpec, RecordSpec

ONE = 2**40
"""1.0 in fixed point; sums over eight million positions of a batch fit in int64."""

_Floats = npt.NDArray[np.float64]


def label_set_conflicts(stored: LabelSetSpec, requested: LabelSetSpec) -> list[str]:
    """Reasons why a label set cannot serve requested labels; empty if it can.

    Lists each difference as ``field: stored / requested`` and, if only the records differ, why rows
    cannot be reduced.
    """
    if stored.fingerprint() == requested.fingerprint():
        return []
    differences = stored.differences(requested)
    if requested.model_copy(update={"record": stored.record}).fingerprint() != stored.fingerprint():
        return differences
    conflicts = record_conflicts(stored.record, requested.record)
    return differences + conflicts if conflicts else []


def record_conflicts(have: RecordSpec, want: RecordSpec) -> list[str]:
    """Reasons why stored rows of `have` cannot be reduced to `want`; empty if they can."""
    if have.identity() == want.identity():
        return []
    reasons = []
    if want.teacher_context != have.teacher_context:
        reasons.append("record.teacher_context differs: the teacher saw different tokens")
    missing = [t for t in want.temperatures if t not in have.temperatures]
    if missing:
        reasons.append(f"record.temperatures: {missing} are not stored")
    if want.entropy and not have.entropy:
        reasons.append("record.entropy is not stored")
    if want.logprob_bits > have.logprob_bits:
        reasons.append(f"record.logprob_bits: only {have.logprob_bits} stored")
    return reasons + _entry_conflicts(have, want)


def _entry_conflicts(have: RecordSpec, want: RecordSpec) -> list[str]:
    limits: dict[tuple[str, str], dict[str, float]] = {
        ("topk", "topk"): {"k": have.k},
        ("topk", "topp"): {"max_head": have.k},
        ("topp", "topp"): {"top_p": have.top_p, "max_head": have.max_head},
    }
    stored_limits = limits.get((have.kind, want.kind))
    if stored_limits is not None:
        return [
            f"record.{name}: only {value} stored"
            for name, value in stored_limits.items()
            if getattr(want, name) > value
        ]
    if have.kind != want.kind or not have.has_draws:
        return [f'record.kind: "{have.kind}" cannot be reduced to "{want.kind}"']
    reasons = [
        f"record.{name}: stored draws are for {stored} and cannot be reduced to {wanted}"
        for name, stored, wanted in (
            ("draw_temperature", have.drawn_at, want.drawn_at),
            ("draw_seed", have.draw_seed, want.draw_seed),
            ("draws", have.draws, want.draws),
        )
        if stored != wanted
    ]
    if want.tau < have.tau:
        reasons.append(f"record.tau: {have.tau:g} is stored; only a larger tau can be served")
    return reasons


def reduce_rows(rows: LabelRows, have: RecordSpec, want: RecordSpec) -> LabelRows:
    """Reduces stored rows to a smaller record; returns them unchanged if the records are equal.

    Columns that were not read stay None. Which draws a thinned position keeps depends only on its
    row key, its target index and ``draw_seed``.

    Args:
        rows: the stored rows.
        have: the label set's record.
        want: the requested record.

    Raises:
        RecordError: `have` cannot be reduced to `want`, or column lse was not read but is needed to
            compare probabilities with tau.
    """
    conflicts = record_conflicts(have, want)
    if conflicts:
        raise RecordError("these labels cannot be reduced: " + "; ".join(conflicts))
    if have.identity() == want.identity():
        return rows
    changed = _reduced_entries(rows, have, want) if rows.entry_ids is not None else {}
    values = {name: getattr(rows, name) for name in rows.__dataclass_fields__} | changed
    if not want.entropy:
        values["entropy"] = None
    if values["lse"] is not None:
        columns = [have.temperatures.index(temperature) for temperature in want.temperatures]
        values["lse"] = values["lse"][:, columns] if columns else None
    if want.logprob_bits < have.logprob_bits:
        for name in ("entry_logprobs", "tail_logmass", "target_logprob", "entropy", "lse"):
            if values[name] is not None:
                values[name] = _rounded(values[name], want)
    return LabelRows(**values)


@dataclass(frozen=True)
class _Entries:
    """Entries of N positions, flat.

    Attributes:
        at: [E], the position of each entry.
        place: [E], its index among the entries of its position.
        in_head: [E], whether it is exact.
        probs: [E], probability at temperature 1, scaled so that each head sums to its mass.
        tail: [N], probability mass outside the head.
    """

    at: Int64s
    place: Int64s
    in_head: Bools
    probs: _Floats
    tail: _Floats


def _reduced_entries(rows: LabelRows, have: RecordSpec, want: RecordSpec) -> dict[str, Any]:
    """The entry columns that `want` changes."""
    shared = {name: getattr(want, name) for name in ("temperatures", "entropy", "logprob_bits")}
    if have.model_copy(update=shared).identity() == want.identity():
        return {}
    entries = _entries(rows)
    if want.kind == "threshold":
        return _thinned(rows, entries, have, want)
    if want.kind == "topk":
        kept = entries.place < want.k
    else:
        kept = (_mass_before(entries) < want.top_p) & (entries.place < want.max_head)
        kept |= entries.place == 0
    return _picked(rows, entries, want, kept, np.flatnonzero(kept))


def _entries(rows: LabelRows) -> _Entries:
    offsets = present(rows.entry_offsets)
    lengths = np.diff(offsets)
    at = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(at)) - offsets[at]
    in_head = place < present(rows.head_len).astype(np.int64)[at]
    probs = np.exp(present(rows.entry_logprobs).astype(np.float64))
    tail = np.exp(present(rows.tail_logmass).astype(np.float64))
    # The stored tail mass is more precise than a sum of many rounded probabilities.
    sums = np.bincount(at, probs * in_head, len(lengths)).astype(np.float64)
    scale = np.divide(1.0 - tail, sums, out=np.ones_like(sums), where=sums > 0)
    return _Entries(at, place, in_head, np.where(in_head, probs * scale[at], probs), tail)


def _mass_before(entries: _Entries) -> _Floats:
    """[E]: probability mass of the entries that precede each one at its position."""
    before = np.cumsum(entries.probs) - entries.probs
    starts = np.flatnonzero(entries.place == 0)
    return before - before[starts][np.cumsum(entries.place == 0) - 1]


def _thinned(
    rows: LabelRows, entries: _Entries, have: RecordSpec, want: RecordSpec
) -> dict[str, Any]:
    """Entry columns for a larger tau; the module docstring describes the method."""
    probs = _probs_at_draw_temperature(rows, entries, have)
    kept = entries.in_head & ((probs >= want.tau) | (entries.place == 0))
    others = np.flatnonzero(~kept)
    others = others[np.lexsort((present(rows.entry_ids)[others], entries.at[others]))]
    sizes = np.where(entries.in_head[others], probs[others], have.tau)
    drawn = _systematic(sizes, entries.at[others], want.tau, _sampling_offsets(rows, want))
    order = np.concatenate([np.flatnonzero(kept), others[drawn]])
    # A stable sort puts heads first and keeps the order within heads and within draws.
    order = order[np.argsort(entries.at[order] * 2 + ~kept[order], kind="stable")]
    return _picked(rows, entries, want, kept, order)


def _probs_at_draw_temperature(rows: LabelRows, entries: _Entries, have: RecordSpec) -> _Floats:
    logprobs = present(rows.entry_logprobs).astype(np.float64)
    if have.drawn_at == 1.0:
        return np.exp(logprobs)
    if rows.lse is None:
        raise RecordError(
            "column lse was not read, but is needed to compare probabilities with tau"
        )
    lse = rows.lse[:, have.temperatures.index(have.drawn_at)].astype(np.float64)
    return np.asarray(np.exp(logprobs / have.drawn_at - lse[entries.at]))


def _systematic(sizes: _Floats, at: Int64s, step: float, offsets: _Floats) -> Bools:
    """Samples systematically: selects items that contain a point (offset + i) * step.

    Args:
        sizes: [E], lengths of the items, laid end to end at each position; all below `step`.
        at: [E], the position of each item, ascending.
        step: distance between points.
        offsets: [N], in [0, 1), offset of the first point at each position.
    """
    ends = np.cumsum(np.rint(sizes * ONE).astype(np.int64))
    begins = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    first = np.flatnonzero(np.diff(at, prepend=-1))
    start = np.repeat(begins[first], np.diff(first, append=len(at)))
    fixed = round(step * ONE)
    points = np.floor(offsets * fixed).astype(np.int64)[at]
    # Points before each end; never negative, because an offset is smaller than a step.
    upto_end = (ends - start - points + fixed - 1) // fixed
    upto_begin = (begins - start - points + fixed - 1) // fixed
    return np.asarray(upto_end > upto_begin)


def _sampling_offsets(rows: LabelRows, want: RecordSpec) -> _Floats:
    """[N]: a random number in [0, 1) per position."""
    positions, bounds = target_positions(rows.label_spans, rows.span_offsets)
    parts = [
        uniforms(key.tobytes(), positions[start:stop], 1, want.draw_seed, REDUCING)
        for key, (start, stop) in zip(rows.row_key, pairwise(bounds.tolist()), strict=True)
    ]
    return np.concatenate([np.zeros((0, 1)), *parts])[:, 0]


def _picked(
    rows: LabelRows, entries: _Entries, want: RecordSpec, kept: Bools, order: Int64s
) -> dict[str, Any]:
    """Entry columns for the entries in `order`; `kept` [E] marks heads, the others are draws."""
    num_labels = len(entries.tail)
    head_len = np.bincount(entries.at[kept], minlength=num_labels)
    lengths = np.bincount(entries.at[order], minlength=num_labels)
    demoted = entries.in_head & ~kept
    mass = entries.tail + np.bincount(entries.at[demoted], entries.probs[demoted], num_labels)
    tail = rows.tail_logmass
    if demoted.any():
        with np.errstate(divide="ignore"):
            tail = _rounded(np.log(np.minimum(mass, 1.0)), want)
    return {
        "head_len": head_len.astype(np.uint16),
        "tail_len": (lengths - head_len).astype(np.uint16),
        "entry_offsets": offsets_of(lengths),
        "entry_ids": present(rows.entry_ids)[order],
        "entry_logprobs": present(rows.entry_logprobs)[order],
        "tail_logmass": tail,
    }


def _rounded(values: npt.NDArray[np.floating[Any]], want: RecordSpec) -> npt.NDArray[np.float16]:
    return round_logprobs(values.astype(np.float32), want.logprob_bits)
