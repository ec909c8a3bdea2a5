"""Measures the teacher's calibration, bytes by column, and units over time, for a report."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import MANIFESTS
from schemas.maintenance.sample import SampledGroup
from schemas.record.rows import LabelRows

BINS = 15
MAX_FOOTERS = 64
"""Maximum number of shard footers to read; more would barely change the mean."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """How often the teacher's top token is the real one, by its probability.

    Attributes:
        edges: float64 [BINS + 1], equal widths over confidence 0 to 1.
        counts: int64 [BINS], number of labels in each bin.
        confidence: float64 [BINS], mean probability of the top token; NaN in empty bins.
        accuracy: float64 [BINS], share of labels whose top token is real; NaN in empty bins.
        ece: expected calibration error, bins weighted by counts (Guo et al. 2017).
    """

    edges: Floats
    counts: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats
    ece: float


def calibration(groups: list[SampledGroup]) -> Calibration | None:
    """Computes calibration from the first entry of each head; None for kinds without heads."""
    parts = [found for group in groups if (found := _first_entries(group.rows)) is not None]
    if not parts:
        return None
    confidence = np.concatenate([part[0] for part in parts])
    hit = np.concatenate([part[1] for part in parts]).astype(np.float64)
    if not len(confidence):
        return None
    edges = np.linspace(0.0, 1.0, BINS + 1)
    # Confidences of exactly 1 belong to the last bin, not to one above it.
    into = np.clip(np.digitize(confidence, edges) - 1, 0, BINS - 1)
    counts = np.bincount(into, minlength=BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 in empty bins
        mean_confidence = np.bincount(into, confidence, BINS) / counts
        accuracy = np.bincount(into, hit, BINS) / counts
    gaps = np.nan_to_num(np.abs(mean_confidence - accuracy))
    ece = float((counts * gaps).sum() / counts.sum())
    return Calibration(edges, counts, mean_confidence, accuracy, ece)


def _first_entries(rows: LabelRows) -> tuple[Floats, npt.NDArray[np.bool_]] | None:
    """Probability of each label's top token, and whether it is the real token of the row."""
    if rows.head_len is None or rows.entry_offsets is None:
        return None
    assert rows.entry_ids is not None
    assert rows.entry_logprobs is not None
    with_head = rows.head_len > 0
    first = rows.entry_offsets[:-1][with_head]
    confidence = np.exp(rows.entry_logprobs[first].astype(np.float64))
    return confidence, rows.entry_ids[first] == rows.target_ids()[with_head]


def bytes_by_column(label_set: LabelSet, seed: int) -> tuple[dict[str, float], int]:
    """Compressed bytes per label by column, largest first, and the number of shards read."""
    shards = [manifest for manifest in label_set.manifests() if manifest.shard]
    order = np.random.default_rng(seed).permutation(len(shards))[:MAX_FOOTERS]
    sizes: dict[str, int] = {}
    labels = 0
    for number in order:
        labels += shards[number].num_labels
        with label_set.store.open(shards[number].shard) as file:
            meta = pq.ParquetFile(file).metadata
        for group in range(meta.num_row_groups):
            for index in range(meta.num_columns):
                column = meta.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    return {name: size / max(labels, 1) for name, size in ranked}, len(order)


@dataclass(frozen=True)
class UnitsOverTime:
    """Units whose provenance records their duration, in commit order.

    Attributes:
        minutes: float64 [units], commit time since the first commit.
        tokens: float64 [units].
        seconds: float64 [units], time the teacher took.
    """

    minutes: Floats
    tokens: Floats
    seconds: Floats


def units_over_time(label_set: LabelSet) -> UnitsOverTime:
    """Reads commit times from the modification times of manifests."""
    written = {file.rel: file.modified.timestamp() for file in label_set.store.walk(MANIFESTS)}
    found = sorted(
        (
            written[f"{MANIFESTS}/{manifest.unit_key}.json"] / 60,
            float(manifest.num_tokens),
            float(manifest.provenance["seconds"]),
        )
        for manifest in label_set.manifests()
        if manifest.num_tokens and manifest.provenance.get("seconds")
    )
    minutes, tokens, seconds = np.array(found).reshape(-1, 3).T
    return UnitsOverTime(minutes - minutes[:1], tokens, seconds)
