"""Iterates over the rows of a label set, each row key once, by row group."""

import itertools
from collections.abc import Iterator

import numpy as np

from schemas.console.progress import ProgressCallback
from schemas.errors import RecordError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.shards import read_row_group
from schemas.record.rows import LabelRows


def unique_rows(
    label_set: LabelSet, progress: ProgressCallback | None = None
) -> Iterator[LabelRows]:
    """Yields the rows of each row group in index order, without duplicates from later units.

    Args:
        label_set: the set to read.
        progress: called with the number of rows processed so far, and in the set.

    Raises:
        RecordError: the set has no labelled rows.
        DamagedError: a manifest, key file or shard is damaged.
    """
    index = label_set.index()
    if not len(index):
        raise RecordError(f"{label_set.url}: has no labelled rows to export")
    shards = index.column("shard").cast("string").to_pylist()
    groups = index.column("row_group").to_numpy()
    rows = index.column("row").to_numpy()
    # The index is sorted by unit (one shard each) and row group, so a row group is one slice.
    names = np.unique(shards, return_inverse=True)[1]
    changes = (np.diff(names) != 0) | (np.diff(groups) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(index)]
    for start, stop in itertools.pairwise(edges):
        found = read_row_group(
            label_set.store, shards[start], int(groups[start]), label_set.spec.record
        )
        yield found.take(rows[start:stop])
        if progress is not None:
            progress(stop, len(index))
