"""Serving less from more: rows of a smaller record, from those of a larger one, without a teacher.

Exact heads are cut short. A larger tau thins labels of kind ``threshold``: the entries of the head
that fall below it, and the draws that are there, are drawn from once more, at equal distances of
the new tau along their sizes in order of id. A demoted entry has the size p_s, its probability at
the temperature of draws; a draw has the old tau, which is what it stands for. An entry is kept with
probability size / tau, and so stands for the new tau if it is: the labels stay unbiased.

Thinning is two draws in a row, so there may be one draw more or less than new draws of the teacher
would give, and its variance is a little larger.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import RecordError
from schemas.record.rounding import round_logprobs
from schemas.record.rows import LabelRows, offsets_of, target_positions
from schemas.record.uniforms import REDUCING, uniforms
from schemas.spec import LabelSetSpec, RecordSpec

ONE = 2**40
"""The size 1 in fixed point. Sums run over all positions of a batch, up to eight million."""

_Bools = npt.NDArray[np.bool_]
_Int64s = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


def cannot_serve(have: LabelSetSpec, want: LabelSetSpec) -> list[str]:
    """What keeps labels of `want` from being served by a label set of `have`; empty if nothing.

    First each difference as ``field: there / wanted``, then, where the record is all of it, why
    its rows cannot be reduced.
    """
    if have.fingerprint() == want.fingerprint():
        return []
    differences = have.differences(want)
    if want.model_copy(update={"record": have.record}).fingerprint() != have.fingerprint():
        return differences
    reasons = subsumes(have.record, want.record)
    return differences + reasons if reasons else []


def subsumes(have: RecordSpec, want: RecordSpec) -> list[str]:
    """Why rows of `want` cannot be made of rows of `have`; empty if they can."""
    if have.identity() == want.identity():
        return []
    reasons = []
    if want.teacher_context != have.teacher_context:
        reasons.append("record.teacher_context differs, so the teacher saw something else")
    missing = [t for t in want.temperatures if t not in have.temperatures]
    if missing:
        reasons.append(f"record.temperatures: {missing} are not stored")
    if want.entropy and not have.entropy:
        reasons.append("record.entropy is not stored")
    if want.logprob_bits > have.logprob_bits:
        reasons.append(f"record.logprob_bits: {have.logprob_bits} are stored")
    return reasons + _entries_lacking(have, want)


def _entries_lacking(have: RecordSpec, want: RecordSpec) -> list[str]:
    """Why the entries that `want` has do not follow from those of `have`."""
    kinds = (have.kind, want.kind)
    if kinds == ("topk", "topk"):
        return [] if want.k <= have.k else [f"record.k: {have.k} entries are stored"]
    if kinds == ("topk", "topp"):
        enough = want.max_head <= have.k
        return [] if enough else [f"record.max_head: {have.k} entries are stored"]
    if kinds == ("topp", "topp"):
        stored = {"top_p": have.top_p, "max_head": have.max_head}
        return [
            f"record.{name}: {value} is stored"
            for name, value in stored.items()
            if getattr(want, name) > value
        ]
    if have.kind != want.kind or not have.has_draws:
        return [f'record.kind: entries of kind "{want.kind}" do not follow from "{have.kind}"']
    reasons = [
        f"record.{name}: draws are stored for {stored}, and cannot be made for {wanted}"
        for name, stored, wanted in (
            ("draw_temperature", have.drawn_at, want.drawn_at),
            ("draw_seed", have.draw_seed, want.draw_seed),
            ("draws", have.draws, want.draws),
        )
        if stored != wanted
    ]
    if want.tau < have.tau:
        reasons.append(f"record.tau: {have.tau:g} is stored, a smaller one cannot be served")
    return reasons


def reduce_rows(rows: LabelRows, have: RecordSpec, want: RecordSpec) -> LabelRows:
    """Rows of the record `want`, from rows of `have`; the same ones where the two are the same.

    Columns that were not read stay out. Which draws a thinned position keeps follows from its row
    key, its place and ``draw_seed`` alone.

    Args:
        rows: of `have`, as they are stored.
        have: the record of the label set.
        want: a record that `have` subsumes.

    Raises:
        RecordError: `have` does not subsume `want`; or lse, which tau is compared with, was not
            read.
    """
    reasons = subsumes(have, want)
    if reasons:
        raise RecordError("these labels cannot be reduced: " + "; ".join(reasons))
    if have.identity() == want.identity():
        return rows
    changed = _changed_entries(rows, have, want) if rows.entry_ids is not None else {}
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
        at: [E], the position of each.
        place: [E], its place among the entries of the position.
        in_head: [E].
        probs: [E], at temperature 1, those of a head summing to the head's mass.
        tail: [N], mass outside the head.
    """

    at: _Int64s
    place: _Int64s
    in_head: _Bools
    probs: _Floats
    tail: _Floats


def _changed_entries(rows: LabelRows, have: RecordSpec, want: RecordSpec) -> dict[str, Any]:
    """The columns of entries that are others in `want`."""
    shared = {name: getattr(want, name) for name in ("temperatures", "entropy", "logprob_bits")}
    if have.model_copy(update=shared).identity() == want.identity():
        return {}
    entries = _entries(rows)
    if want.kind == "threshold":
        return _thinned(rows, entries, have, want)
    if want.kind == "topk":
        kept = entries.place < want.k
    else:
        kept = (_before(entries) < want.top_p) & (entries.place < want.max_head)
        kept |= entries.place == 0
    return _picked(rows, entries, want, kept, np.flatnonzero(kept))


def _entries(rows: LabelRows) -> _Entries:
    assert rows.head_len is not None
    assert rows.entry_offsets is not None
    assert rows.entry_logprobs is not None
    assert rows.tail_logmass is not None
    lengths = np.diff(rows.entry_offsets)
    at = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(at)) - rows.entry_offsets[at]
    in_head = place < rows.head_len.astype(np.int64)[at]
    probs = np.exp(rows.entry_logprobs.astype(np.float64))
    tail = np.exp(rows.tail_logmass.astype(np.float64))
    # Their sum is off by rounding, the mass of the tail is not.
    sums = np.bincount(at, probs * in_head, len(lengths)).astype(np.float64)
    scale = np.divide(1.0 - tail, sums, out=np.ones_like(sums), where=sums > 0)
    return _Entries(at, place, in_head, np.where(in_head, probs * scale[at], probs), tail)


def _before(entries: _Entries) -> _Floats:
    """[E], the mass of the entries in front of each within its position."""
    before = np.cumsum(entries.probs) - entries.probs
    starts = np.flatnonzero(entries.place == 0)
    return before - before[starts][np.cumsum(entries.place == 0) - 1]


def _thinned(
    rows: LabelRows, entries: _Entries, have: RecordSpec, want: RecordSpec
) -> dict[str, Any]:
    """Columns of labels of a larger tau; see the text of the module."""
    assert rows.entry_ids is not None
    probs = _probs_drawn_from(rows, entries, have)
    kept = entries.in_head & ((probs >= want.tau) | (entries.place == 0))
    others = np.flatnonzero(~kept)
    others = others[np.lexsort((rows.entry_ids[others], entries.at[others]))]
    sizes = np.where(entries.in_head[others], probs[others], have.tau)
    drawn = _systematic(sizes, entries.at[others], want.tau, _offsets(rows, want))
    order = np.concatenate([np.flatnonzero(kept), others[drawn]])
    # Heads come first, each as it was; sorting keeps them and the draws in their own order.
    order = order[np.argsort(entries.at[order] * 2 + ~kept[order], kind="stable")]
    return _picked(rows, entries, want, kept, order)


def _probs_drawn_from(rows: LabelRows, entries: _Entries, have: RecordSpec) -> _Floats:
    """[E], at the temperature that draws are made at."""
    assert rows.entry_logprobs is not None
    logprobs = rows.entry_logprobs.astype(np.float64)
    if have.drawn_at == 1.0:
        return np.exp(logprobs)
    if rows.lse is None:
        raise RecordError("column lse was not read, which tau at another temperature goes by")
    lse = rows.lse[:, have.temperatures.index(have.drawn_at)].astype(np.float64)
    return np.asarray(np.exp(logprobs / have.drawn_at - lse[entries.at]))


def _systematic(sizes: _Floats, at: _Int64s, step: float, offsets: _Floats) -> _Bools:
    """Which of the items points at (offset + i) * step fall on, along the sizes of a position.

    Args:
        sizes: [E], below `step`, position by position.
        at: [E], the position of each, rising.
        step: distance of the points.
        offsets: [N], in [0, 1), where the points of each position begin.
    """
    ends = np.cumsum(np.rint(sizes * ONE).astype(np.int64))
    begins = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    first = np.flatnonzero(np.diff(at, prepend=-1))
    start = np.repeat(begins[first], np.diff(first, append=len(at)))
    fixed = round(step * ONE)
    points = np.floor(offsets * fixed).astype(np.int64)[at]
    # How many points lie in front of a place; never negative, since an offset is below a step.
    upto_end = (ends - start - points + fixed - 1) // fixed
    upto_begin = (begins - start - points + fixed - 1) // fixed
    return np.asarray(upto_end > upto_begin)


def _offsets(rows: LabelRows, want: RecordSpec) -> _Floats:
    """[N], one random number a position."""
    positions, bounds = target_positions(rows.label_spans, rows.span_offsets)
    parts = [
        uniforms(key.tobytes(), positions[start:stop], 1, want.draw_seed, REDUCING)
        for key, (start, stop) in zip(rows.row_key, pairwise(bounds.tolist()), strict=True)
    ]
    return np.concatenate([np.zeros((0, 1)), *parts])[:, 0]


def _picked(
    rows: LabelRows, entries: _Entries, want: RecordSpec, kept: _Bools, order: _Int64s
) -> dict[str, Any]:
    """Columns of the entries `order`, of which `kept` [E] are the head; the rest of it is tail."""
    assert rows.entry_ids is not None
    assert rows.entry_logprobs is not None
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
        "entry_ids": rows.entry_ids[order],
        "entry_logprobs": rows.entry_logprobs[order],
        "tail_logmass": tail,
    }


def _rounded(values: npt.NDArray[np.floating[Any]], want: RecordSpec) -> npt.NDArray[np.float16]:
    return round_logprobs(values.astype(np.float32), want.logprob_bits)
