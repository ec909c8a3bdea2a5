"""The parity check: once per label set, a second implementation of the teacher scores a few rows.

A faulty engine can still return plausible labels: a wrong kernel, quantisation or RoPE setting. So
a second implementation rescores rows of the set's first unit; if the two differ by more than a
bound, nothing is published. The result is stored in ``parity.json``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from labeler.config import GatesConfig
from labeler.corpus.requests import Request
from labeler.corpus.windows import clip_spans
from labeler.quality.fidelity import partition_kl
from labeler.teachers.protocol import RowLabels
from labeler.units.unit_labels import UnitLabels
from schemas.errors import TeacherError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.parity_result import PARITY_FILE, Parity
from schemas.record.spans import span_targets
from schemas.spec import LabelSetSpec

_MAX_KL = {"float32": 1e-4}
_MAX_KL_HALF = 1e-2

# Log-probabilities of less probable entries may differ widely without affecting training.
_PROBABLE = 1e-3


Scorer = Callable[
    [Sequence[np.ndarray], Sequence[np.ndarray], Sequence[np.ndarray]], list[np.ndarray]
]
"""Maps token ids, label spans and entry ids [N, K] of rows to float64 [N, K] per row, in nats; NaN
where unknown."""


@dataclass(frozen=True)
class Reference:
    """A second implementation of the teacher.

    Attributes:
        name: shown in messages and ``parity.json``.
        logprobs: returns log-probabilities of given ids at each target.
    """

    name: str
    logprobs: Scorer


def check_parity(
    label_set: LabelSet, gates: GatesConfig, reference: Reference, unit_labels: UnitLabels
) -> None:
    """Compares the labels of a few rows with a reference, and records the result if they agree.

    Args:
        label_set: where the result is written.
        gates: number of rows and labels, and the bound.
        reference: scores the same rows.
        unit_labels: labels of one unit; at least one.

    Raises:
        TeacherError: the two differ by more than the bound; nothing is recorded.
    """
    spec, count = label_set.spec, gates.parity_rows
    some = [
        _first_labels(request, row, gates.parity_tokens)
        for request, row in zip(
            unit_labels.requests[:count], (unit_labels.labels or ())[:count], strict=True
        )
    ]
    scored = reference.logprobs(
        [request.token_ids for request, _ in some],
        [request.label_spans for request, _ in some],
        [row.entry_ids for _, row in some],
    )
    kl, differences = [], []
    for (_, row), true in zip(some, scored, strict=True):
        row_kl, difference = _compare(row, true, spec)
        kl.append(row_kl)
        differences.append(difference)
    bound = gates.max_parity_kl or _MAX_KL.get(spec.teacher.dtype, _MAX_KL_HALF)
    result = Parity(
        reference=reference.name,
        rows=len(some),
        labels=sum(map(len, kl)),
        mean_kl=float(np.concatenate(kl).mean()),
        max_kl=float(np.concatenate(kl).max()),
        max_logprob_difference=max(differences),
        bound=bound,
    )
    if not result.mean_kl <= bound:
        raise TeacherError(
            f"the teacher's labels differ from those of {reference.name}: KL {result.mean_kl:.2e} "
            f"nats per label on {result.labels} labels of {result.rows} rows, log-probabilities by "
            f"up to {result.max_logprob_difference:.2g}; at most {bound:.0e} is allowed "
            "(gates.max_parity_kl). Nothing was published; compare the engine's options with the "
            "model's configuration, or raise the bound if the difference is intended"
        )
    label_set.store.create_exclusive(PARITY_FILE, result.model_dump_json(indent=1).encode())


def _first_labels(request: Request, row: RowLabels, most: int) -> tuple[Request, RowLabels]:
    """Truncates a row after its first `most` labels; returns it with these labels."""
    if row.num_labels <= most:
        return request, row
    end = int(span_targets(request.label_spans)[most - 1]) + 1
    short = replace(
        request,
        token_ids=request.token_ids[:end],
        label_spans=clip_spans(request.label_spans, 0, end),
    )
    arrays: dict[str, Any] = {
        name: value[:most] for name, value in vars(row).items() if isinstance(value, np.ndarray)
    }
    return short, replace(row, **arrays)


def _compare(row: RowLabels, true: np.ndarray, spec: LabelSetSpec) -> tuple[np.ndarray, float]:
    """KL(reference, teacher) [N] and the largest difference of probable entries, in nats."""
    record = spec.record
    lengths = row.head_len if record.kind != "sampled" else row.tail_len
    used = (np.arange(true.shape[1]) < lengths[:, None]) & ~np.isnan(true)
    weights = np.where(used, np.exp(true), 0.0)
    tail = np.maximum(1.0 - weights.sum(1), 0.0)
    mine = np.where(used, np.exp(row.entry_logprobs.astype(np.float64)), 0.0)
    with np.errstate(divide="ignore"):  # a head of the full vocabulary leaves no tail
        own_tail = np.log(np.maximum(1.0 - mine.sum(1), 0.0))
    kl = partition_kl(true, tail, row.entry_logprobs, own_tail, used, record)
    probable = used & (weights > _PROBABLE)
    difference = np.abs(true - row.entry_logprobs)[probable]
    return kl, float(difference.max(initial=0.0))
