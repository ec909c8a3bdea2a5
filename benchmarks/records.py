"""Record specs that keep an equal number of ids per label.

Shapes: T positions, V vocabulary.
"""

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.demo_labels import TokenRows, ids_per_label, label
from schemas.spec import RecordSpec

IDS_PER_LABEL = 12.0
TOPK_64 = RecordSpec(kind="topk", k=64, entropy=False)

_MAIN_FIELDS = {"topk": "k", "topp": "top_p", "sampled": "draws", "threshold": "tau"}


def described(record: RecordSpec) -> str:
    """The field that decides how many ids a record keeps, and its value."""
    name = _MAIN_FIELDS[record.kind]
    return f"{name} = {getattr(record, name):.4g}"


def matched_records(
    logits: Tensor, temperature: float, num_ids: float = IDS_PER_LABEL
) -> dict[str, RecordSpec]:
    """One record of each kind, all keeping the same number of ids, with draws at ``temperature``.

    The number of draws is an integer, so ``sampled`` comes as close as it can to ``num_ids`` and
    the other kinds match it.

    Args:
        logits: [T, V], the teacher's.
        temperature: draw temperature; above 1, the records also store its normaliser.
        num_ids: mean ids per label.
    """
    p = torch.softmax(logits.double(), 1)
    drawn_from = torch.softmax(logits.double() / temperature, 1)
    served = {"temperatures": (temperature,)} if temperature != 1.0 else {}

    def distinct(draws: int) -> float:
        return float((1 - (1 - drawn_from) ** draws).sum(1).mean())

    enough = bisect.bisect_left(range(1, 255), num_ids, key=distinct) + 1
    draws = min((max(1, enough - 1), enough), key=lambda n: abs(distinct(n) - num_ids))
    matched = distinct(draws)
    before = p.sort(1, descending=True).values.cumsum(1)

    def covering(top_p: float) -> float:
        return float(((before < top_p).sum(1) + 1).clamp(max=128).double().mean())

    return {
        "topk": RecordSpec(kind="topk", k=round(matched), **served),
        "topp": RecordSpec(kind="topp", top_p=bisected(covering, matched, 0.1, 0.9999), **served),
        "sampled": RecordSpec(kind="sampled", draws=draws, **served),
        "threshold": RecordSpec(kind="threshold", tau=threshold_tau(drawn_from, matched), **served),
    }


def threshold_tau(probs: Tensor, num_ids: float = IDS_PER_LABEL) -> float:
    """The tau with which ``threshold`` keeps ``num_ids`` ids on average, from probs [T, V]."""
    ordered = probs.sort(1, descending=True).values

    def kept(tau: float) -> float:
        exact = ordered >= tau
        exact[:, 0] = True  # the most probable id is always in the head
        return float((exact.sum(1) + torch.where(exact, 0.0, ordered).sum(1) / tau).mean())

    return bisected(kept, num_ids, 0.9, 1e-3)


def threshold_record(rows: TokenRows) -> RecordSpec:
    """The ``threshold`` record that keeps 12 ids per label of the demo teacher, within 1%."""

    def record(tau: float) -> RecordSpec:
        return RecordSpec(kind="threshold", tau=tau, entropy=False)

    return record(_matched(rows, record, 0.5, 1e-3))


def sampled_record(rows: TokenRows) -> RecordSpec:
    """The ``sampled`` record that comes closest to 12 ids per label of the demo teacher."""

    def record(draws: float) -> RecordSpec:
        return RecordSpec(kind="sampled", draws=round(draws), entropy=False)

    return record(_matched(rows, record, 4.0, 200.0))


def _matched(
    rows: TokenRows, record: Callable[[float], RecordSpec], low: float, high: float
) -> float:
    """Finds the argument of ``record`` that keeps 12 ids per label, on a twelfth of the rows."""
    some = rows[:: max(1, len(rows.token_ids) // 12)]
    return bisected(
        lambda value: ids_per_label(label(some, record(value))), IDS_PER_LABEL, low, high, 0.01
    )


def bisected(
    function: Callable[[float], float],
    wanted: float,
    low: float,
    high: float,
    tolerance: float = 0.0,
) -> float:
    """Bisects for the point at which an increasing function reaches ``wanted``.

    Args:
        function: monotonic; decreasing ones take ``low`` above ``high``.
        tolerance: relative width of the final interval.
    """
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
        if abs(high - low) <= tolerance * middle:
            break
    return (low + high) / 2
