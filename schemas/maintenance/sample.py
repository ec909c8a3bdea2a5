"""Samples row groups of a label set, and computes distributions of their labels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from schemas.console.progress import ProgressCallback
from schemas.label_set.label_set import LabelSet
from schemas.label_set.shards import read_row_group
from schemas.record.rows import LabelRows, present
from schemas.record.spans import offsets_of, span_targets

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SampledGroup:
    """A row group and its place."""

    shard: str
    row_group: int
    rows: LabelRows


def sample_groups(
    label_set: LabelSet,
    count: int,
    seed: int,
    progress: ProgressCallback | None = None,
) -> list[SampledGroup]:
    """Samples row groups without replacement, deterministically for a set and seed.

    Args:
        label_set: the label set to sample.
        count: number of row groups; all if the set has fewer.
        seed: random seed.
        progress: called with the number of row groups read so far, and in the sample.

    Raises:
        DamagedError: a manifest or a shard is damaged.
    """
    places = [
        (manifest.shard, index)
        for manifest in label_set.manifests()  # sorted by unit key, so the order is stable
        for index in range(len(manifest.row_groups))
    ]
    order = sorted(np.random.default_rng(seed).permutation(len(places))[:count])
    groups = []
    for shard, index in (places[i] for i in order):
        rows = read_row_group(label_set.store, shard, index, label_set.spec.record)
        groups.append(SampledGroup(shard, index, rows))
        if progress is not None:
            progress(len(groups), len(order))
    return groups


def distributions(groups: list[SampledGroup]) -> dict[str, Floats]:
    """Values in the sample by name, one per row or one per label.

    Per row: ``tokens a row``, ``labels a row``. Per label: ``entropy`` (nats), ``covered mass`` (of
    the exact head), ``entries a label``, ``of the head``, ``of draws`` (counts), ``target logprob``
    (nats), ``target rank``. Omits values that the record does not have.
    """
    rows = [group.rows for group in groups]
    found = {
        "tokens a row": [np.diff(r.token_offsets) for r in rows],
        "labels a row": [np.diff(r.label_offsets) for r in rows],
    }
    if rows and rows[0].head_len is not None:
        found |= {
            "entries a label": [np.diff(present(r.entry_offsets)) for r in rows],
            "of the head": [present(r.head_len) for r in rows],
            "of draws": [present(r.tail_len) for r in rows],
            "covered mass": [
                0.0 - np.expm1(present(r.tail_logmass).astype(np.float64)) for r in rows
            ],
            "target logprob": [present(r.target_logprob) for r in rows],
            "target rank": [present(r.target_rank) for r in rows],
        }
        if rows[0].entropy is not None:
            found["entropy"] = [present(r.entropy) for r in rows]
        if not any(present(r.tail_len).any() for r in rows):
            del found["of the head"], found["of draws"]
    return {
        name: np.concatenate([np.asarray(part, np.float64) for part in parts])
        for name, parts in found.items()
        if parts
    }


@dataclass(frozen=True)
class LabelledPosition:
    """A label of a row, for display.

    Attributes:
        target: target index: the token in the row that the distribution is over.
        token: id of that token.
        logprob, rank: the teacher's log-probability and rank of that token.
        head: (id, log-probability) of the exact entries, most probable first.
        draws: (id, log-probability, count) of the tail draws; count 1 if none is stored.
    """

    target: int
    token: int
    logprob: float
    rank: int
    head: list[tuple[int, float]]
    draws: list[tuple[int, float, int]]


def labelled_positions(rows: LabelRows, row: int) -> list[LabelledPosition]:
    """The labels of one row, in order; none for sets of kind ``tokens``."""
    one = rows.slice(row, row + 1)
    if one.head_len is None:
        return []
    targets = span_targets(one.label_spans)
    offsets, ids, logprobs = (
        present(one.entry_offsets), present(one.entry_ids), present(one.entry_logprobs),
    )  # fmt: skip
    tails = offsets_of(present(one.tail_len))
    counts = np.ones(tails[-1], np.uint8) if one.entry_counts is None else one.entry_counts
    found = []
    for j, target in enumerate(targets):
        middle = int(offsets[j]) + int(present(one.head_len)[j])
        head, tail = slice(offsets[j], middle), slice(middle, offsets[j + 1])
        found.append(
            LabelledPosition(
                target=int(target),
                token=int(one.token_ids[target]),
                logprob=float(present(one.target_logprob)[j]),
                rank=int(present(one.target_rank)[j]),
                head=list(zip(ids[head].tolist(), logprobs[head].tolist(), strict=True)),
                draws=list(
                    zip(
                        ids[tail].tolist(),
                        logprobs[tail].tolist(),
                        counts[tails[j] : tails[j + 1]].tolist(),
                        strict=True,
                    )
                ),
            )
        )
    return found
