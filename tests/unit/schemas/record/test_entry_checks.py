"""What validation finds in heads of unequal length and in draws."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schemas.errors import RecordError
from schemas.record import LabelRows, validate
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows

VOCAB = 50


def with_value(name: str, at: int, value: float) -> Callable[[LabelRows], LabelRows]:
    def change(rows: LabelRows) -> LabelRows:
        values = getattr(rows, name).copy()
        values.reshape(-1)[at] = value
        # The offsets stay those of the valid rows.
        return replace(rows, **{name: values})

    return change


def shorter(name: str) -> Callable[[LabelRows], LabelRows]:
    return lambda rows: replace(rows, **{name: getattr(rows, name)[:-1]})


def at_draw(place: int, name: str, change: Callable[[Any], Any]) -> Callable[[LabelRows], Any]:
    """Changes a value of a column of entries, at a place behind the end of a position's head.

    The position is one with three heads and four draws or more, so that 0 is the first draw.
    """

    def changed(rows: LabelRows) -> LabelRows:
        values = getattr(rows, name).copy()
        fits = (rows.head_len >= min(3, rows.head_len.max())) & enough(rows)
        label = int(np.flatnonzero(fits)[0])
        at = rows.entry_offsets[label] + rows.head_len[label] + place
        values[at] = change(values[at])
        return replace(rows, **{name: values})

    def enough(rows: LabelRows) -> np.ndarray:
        return (rows.tail_len >= 4) | (rows.tail_len == 0)

    return changed


def moved_length(name: str, by: int) -> Callable[[LabelRows], LabelRows]:
    """Takes an entry of a position from the head to the draws, or to the head."""

    def changed(rows: LabelRows) -> LabelRows:
        other = "tail_len" if name == "head_len" else "head_len"
        at = int(np.flatnonzero((rows.head_len >= 3) & (rows.tail_len >= 4))[0])
        lengths = {n: getattr(rows, n).copy() for n in (name, other)}
        lengths[name][at] += by
        lengths[other][at] -= by
        return replace(rows, **lengths)

    return changed


TOPP = RecordSpec(logprob_bits=10, kind="topp", top_p=0.9, max_head=30)
THRESHOLD = RecordSpec(
    logprob_bits=10, kind="threshold", tau=0.06, temperatures=(2.0,), draw_temperature=1.0
)
WARM = RecordSpec(logprob_bits=10, kind="threshold", tau=0.06, temperatures=(2.0,))
SAMPLED = RecordSpec(logprob_bits=10, kind="sampled", draws=12)

RAGGED_RULES: list[tuple[RecordSpec, Callable[[LabelRows], LabelRows], str]] = [
    (TOPP, with_value("head_len", 4, 0), r"column head_len: found 0; expected 1 to 30"),
    (TOPP, with_value("head_len", 4, 31), r"column head_len: found 31; expected 1 to 30"),
    (TOPP, with_value("tail_len", 4, 1), r"column tail_len: found 1; expected 0"),
    (TOPP, at_draw(-1, "entry_logprobs", lambda x: x / 2), r"entry_logprobs.*decreasing order"),
    (TOPP, at_draw(-1, "entry_logprobs", lambda x: x * 4), r"probability of 1, found a sum of 0"),
    (TOPP, at_draw(-2, "entry_ids", lambda x: VOCAB), r"entry_ids.*expected ids in"),
    (TOPP.model_copy(update={"top_p": 0.95}), lambda rows: rows, r"mass 0.95 or more, found"),
    (TOPP.model_copy(update={"top_p": 0.6}), lambda rows: rows, r"fewest ids of mass 0.6"),
    (THRESHOLD, with_value("head_len", 4, 0), r"column head_len: found 0; expected 1 to 18"),
    (THRESHOLD, with_value("tail_len", 4, 18), r"column tail_len: found 18; expected at most 18"),
    (THRESHOLD, moved_length("head_len", 1), r"column entry_(ids|logprobs).*expected"),
    (THRESHOLD, moved_length("tail_len", 1), r"column entry_(ids|logprobs).*expected"),
    (THRESHOLD, at_draw(0, "entry_logprobs", lambda x: np.float16(np.nan)), r"expected finite"),
    (
        THRESHOLD,
        at_draw(0, "entry_logprobs", lambda x: np.float16(-2.0)),
        r"draws below tau",
    ),
    (THRESHOLD, at_draw(1, "entry_ids", lambda x: 0), r"entry_ids.*(ascending id|each id once)"),
    (THRESHOLD, at_draw(-1, "entry_logprobs", lambda x: x * 4), r"probability of 1, found"),
    (THRESHOLD, with_value("tail_logmass", 4, -0.0), r"probability of 1, found a sum of [12]"),
    (
        THRESHOLD.model_copy(update={"tau": 0.1}),
        lambda rows: rows,
        r"expected (a head of ids of at least tau, 0.1|tail_logmass over tau|at most 12|0 to 12)",
    ),
    (
        THRESHOLD.model_copy(update={"tau": 0.04}),
        lambda rows: rows,
        r"expected (draws below tau, 0.04|exp.tail_logmass. / tau = )",
    ),
    (
        WARM.model_copy(update={"tau": 0.055}),
        lambda rows: rows,
        r"expected draws below tau, 0.055, at temperature 2",
    ),
    (SAMPLED, with_value("head_len", 4, 1), r"column head_len: found 1; expected 0"),
    (SAMPLED, with_value("tail_len", 4, 0), r"column tail_len: found 0; expected 1 to 12"),
    (SAMPLED, with_value("tail_logmass", 4, -1.0), r"tail_logmass: found -1.; expected 0"),
    (SAMPLED, at_draw(1, "entry_counts", lambda x: 0), r"entry_counts.*expected 1 or more"),
    (SAMPLED, at_draw(1, "entry_counts", lambda x: x + 1), r"entry_counts.*expected a sum of 12"),
    (SAMPLED, at_draw(1, "entry_ids", lambda x: 0), r"entry_ids.*expected draws by ascending id"),
    (SAMPLED, shorter("entry_counts"), r"column entry_counts has shape"),
    (SAMPLED, lambda rows: replace(rows, entry_counts=None), r"column entry_counts is missing"),
    (
        SAMPLED,
        lambda rows: replace(
            rows, entry_logprobs=np.maximum(rows.entry_logprobs, np.float16(-0.5))
        ),
        r"expected the draws to sum to at most",
    ),
]


@pytest.mark.parametrize(("spec", "change", "said"), RAGGED_RULES)
def test_broken_ragged_rows_are_named(
    spec: RecordSpec, change: Callable[[LabelRows], LabelRows], said: str
) -> None:
    made_for = {"topp": TOPP, "sampled": SAMPLED}.get(spec.kind, THRESHOLD)
    made_for = WARM if spec.drawn_at == 2.0 else made_for
    rows = make_rows(12, made_for, VOCAB, seed=3, min_tokens=12, scale=1.5)
    validate(rows, made_for, VOCAB)
    with pytest.raises(RecordError, match=said):
        validate(change(rows), spec, VOCAB)


@pytest.mark.parametrize("spec", [TOPP, THRESHOLD, SAMPLED])
def test_shifted_ragged_labels_are_found(spec: RecordSpec) -> None:
    """Every label describes the token one earlier; the lengths move with them."""
    rows = make_rows(12, spec, VOCAB, seed=3, min_tokens=12)
    first = int(rows.head_len[0]) + int(rows.tail_len[0])
    names = ["head_len", "tail_len", "tail_logmass"]
    by = dict.fromkeys(names, -1) | {"entry_ids": -first, "entry_logprobs": -first}
    if spec.kind == "sampled":
        by["entry_counts"] = -first
    moved = {name: np.roll(getattr(rows, name), shift) for name, shift in by.items()}
    with pytest.raises(RecordError, match=r"column target_logprob"):
        validate(replace(rows, **moved, entry_offsets=None), spec, VOCAB)
