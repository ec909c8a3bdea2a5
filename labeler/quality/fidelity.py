"""Fidelity: the divergence between the teacher's distribution and the stored labels.

Measured as the forward KL from the teacher to the labels that a trainer reads back, on the
partition of the vocabulary that a record stores: one cell per exact entry, and one bucket for all
other ids. (On the full vocabulary it would be infinite for every sparse record.)
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from labeler.teachers.protocol import RowLabels
from schemas.label_set.manifest import Fidelity
from schemas.record import LabelRows
from schemas.spec import RecordSpec

# Floor of a bucket's mass: if the head is the full vocabulary, the teacher's bucket holds only
# rounding errors, and the stored bucket may be exactly 0.
_NO_MASS = 1e-12

Float64s = npt.NDArray[np.float64]


def measure(labels: Sequence[RowLabels], stored: LabelRows, record: RecordSpec) -> Fidelity | None:
    """Compares the audited labels of a unit, in stored form, with the full distribution.

    Args:
        labels: one per row, with their audits.
        stored: the same rows in stored form, rounded.
        record: record of both.

    Returns:
        None if no label was audited.
    """
    places = [
        stored.label_offsets[row] + one.audit.labels
        for row, one in enumerate(labels)
        if one.audit is not None
    ]
    audits = [one.audit for one in labels if one.audit is not None]
    if not audits or not sum(map(len, places)):
        return None
    at = np.concatenate(places)
    true = np.concatenate([audit.logprobs for audit in audits])
    assert stored.entry_offsets is not None
    assert stored.entry_logprobs is not None
    assert stored.head_len is not None
    assert stored.tail_logmass is not None
    slots = np.arange(true.shape[1])
    starts, ends = stored.entry_offsets[at], stored.entry_offsets[at + 1]
    last = len(stored.entry_logprobs) - 1
    kept = stored.entry_logprobs[np.minimum(starts[:, None] + slots, last)]
    lengths = stored.head_len[at] if record.kind != "sampled" else ends - starts
    tail = np.concatenate([audit.tail for audit in audits]).astype(np.float64)
    kl = partition_kl(true, tail, kept, stored.tail_logmass[at], slots < lengths[:, None], record)
    best = np.concatenate([audit.best for audit in audits])
    return Fidelity(
        labels=len(at),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        covered_mass=float((1.0 - tail).mean()),
        missed_mass=float((best - (1.0 - tail)).max()),
    )


def partition_kl(
    true_logprobs: npt.NDArray[np.floating],
    true_tail: Float64s,
    stored_logprobs: npt.NDArray[np.floating],
    stored_tail_logmass: npt.NDArray[np.floating],
    used: npt.NDArray[np.bool_],
    record: RecordSpec,
) -> Float64s:
    """KL(teacher, stored) on entries and bucket, with the stored side as a trainer reads it.

    Heads are rescaled to 1 - exp(tail_logmass). Kind ``sampled`` stores no tail mass, so the
    teacher's is used for both sides.

    Args:
        true_logprobs: [A, K], the teacher's log-probabilities of the entries.
        true_tail: [A], the teacher's probability outside the head; unused for kind ``sampled``.
        stored_logprobs: [A, K].
        stored_tail_logmass: [A].
        used: [A, K], whether a slot is an entry of the partition.
        record: record of the labels.

    Returns:
        float64 [A], nats.
    """
    true = np.where(used, true_logprobs.astype(np.float64), -np.inf)
    kept = np.where(used, stored_logprobs.astype(np.float64), -np.inf)
    weights, kept_weights = np.exp(true), np.exp(kept)
    if record.kind == "sampled":
        true_tail = np.maximum(1.0 - weights.sum(1), 0.0)
        kept_tail = true_tail
    else:
        kept_tail = np.exp(stored_tail_logmass.astype(np.float64))
    kept = kept + np.log((1.0 - kept_tail) / kept_weights.sum(1))[:, None]
    ratio = np.zeros(true.shape)
    np.subtract(true, kept, out=ratio, where=weights > 0)
    bucket = np.zeros(len(true))
    some = true_tail > 0
    floor = np.maximum(kept_tail, _NO_MASS)
    bucket[some] = true_tail[some] * np.log(true_tail[some] / floor[some])
    result: Float64s = (weights * ratio).sum(1) + bucket
    return result
