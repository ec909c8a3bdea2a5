"""Selects the rows of views: filters, holds out, mixes and samples by row key and seed.

Whether a row is selected depends only on its own key (in splits, on its document's), not on the
order or number of other rows; mixtures and samples of a given number of rows are exceptions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.config import StrictModel
from schemas.console.progress import ProgressCallback
from schemas.errors import ConfigError, first_line
from schemas.keys import Keys
from schemas.label_set.label_set import LabelSet
from schemas.label_set.tables import first_of_each_key, key_array
from schemas.views.candidate_rows import (
    ROWS,
    SourceRun,
    candidate_rows,
    filter_table,
    open_sources,
)
from schemas.views.view import VIEW, View, write_view
from schemas.views.where import names_in, parse_filter

_SAMPLE, _HOLD_OUT, _MIX = 1, 2, 3  # separate hash streams keep the choices independent


class Selection(StrictModel):
    """How the rows of a view are selected; stored in view.json.

    Attributes:
        sources: `URL` or `URL:RUN` of each label set; a row in several is taken from the first.
        where: filter expression, see `schemas.views.where`; empty: every row.
        holdout: share of documents in the held-out view; 0: no held-out view.
        weights: relative number of rows from each source; empty: all rows.
        sample: share of rows (below 1) or number of rows to keep; 0: all.
        seed: random seed of the selection.
    """

    sources: tuple[str, ...]
    where: str = ""
    holdout: float = 0.0
    weights: tuple[float, ...] = ()
    sample: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Validates the values.

        Raises:
            ConfigError: a value is invalid.
        """
        if not 0.0 <= self.holdout < 1.0:
            raise ConfigError(f"--holdout is {self.holdout}; expected a share between 0 and 1")
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(
                f"--weights has {len(self.weights)} values for {len(self.sources)} --from; "
                "expected one for each"
            )
        if any(not 0.0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"--weights is {list(self.weights)}; expected positive numbers")
        if self.sample < 0 or (self.sample > 1 and self.sample != int(self.sample)):
            raise ConfigError(f"--sample is {self.sample}; expected a share or a number of rows")


def make_views(
    out: str,
    heldout: str,
    selection: Selection,
    progress: ProgressCallback | None = None,
) -> list[View]:
    """Builds the view at `out` and, if rows are held out, the one at `heldout`.

    Args:
        out: URL of the view.
        heldout: URL of the held-out view.
        selection: how to select rows.
        progress: called with the number of units read and of all units, per label set.

    Raises:
        ConfigError: the selection is invalid or leaves no rows.
        StoreError: a label set or run is missing or has lost rows.
    """
    selection.check()
    sources = open_sources(list(selection.sources))
    indices: dict[str, pa.Table] = {}
    for source in sources:
        if source.label_set.url not in indices:
            indices[source.label_set.url] = source.label_set.index(progress)
    parts = [candidate_rows(n, s, indices[s.label_set.url]) for n, s in enumerate(sources)]
    rows = first_of_each_key(
        pa.concat_tables([ROWS.empty_table(), *parts]).unify_dictionaries().combine_chunks()
    )
    total = len(rows)
    rows = _filtered(rows, sources, selection.where)
    sides = [(out, rows)]
    if selection.holdout:
        held = _share(key_array(rows, "document"), selection.seed, _HOLD_OUT) < selection.holdout
        sides = [(out, rows.filter(pa.array(~held))), (heldout, rows.filter(pa.array(held)))]
    chosen = [(url, _sampled(_mixed(side, sources, selection), selection)) for url, side in sides]
    for url, side in chosen:
        if not len(side):
            raise ConfigError(f"{url}: the selection leaves none of {total} rows; loosen it")
    return [_write(url, side, sources, selection) for url, side in chosen]


def _filtered(rows: pa.Table, sources: Sequence[SourceRun], where: str) -> pa.Table:
    if not where:
        return rows
    columns = filter_table(rows, list(sources), names_in(where))
    expression = parse_filter(where, columns.column_names)
    numbered = columns.append_column("__row__", pa.array(np.arange(len(rows))))
    try:
        kept = numbered.filter(expression).column("__row__")
    except (pa.ArrowException, TypeError) as error:
        types = ", ".join(f"{field.name} {field.type}" for field in columns.schema)
        what = first_line(error)
        raise ConfigError(f"--where {where!r}: {what} (columns: {types})") from error
    return rows.take(kept)


def _mixed(rows: pa.Table, sources: Sequence[SourceRun], selection: Selection) -> pa.Table:
    """Keeps as many rows as the requested shares allow, selected by key."""
    if not selection.weights:
        return rows
    given = np.array([source.given for source in sources])[rows.column("label_set").to_numpy()]
    counts = np.bincount(given, minlength=len(selection.weights))
    weights = np.array(selection.weights)
    wanted = np.floor(weights * (counts / weights).min() + 1e-9).astype(np.int64)
    order = _share(key_array(rows, "row_key"), selection.seed, _MIX)
    kept = np.zeros(len(rows), bool)
    for number, count in enumerate(wanted):
        mine = np.flatnonzero(given == number)
        kept[mine[np.argsort(order[mine], kind="stable")[:count]]] = True
    return rows.filter(pa.array(kept))


def _sampled(rows: pa.Table, selection: Selection) -> pa.Table:
    if not selection.sample:
        return rows
    order = _share(key_array(rows, "row_key"), selection.seed, _SAMPLE)
    if selection.sample < 1:
        return rows.filter(pa.array(order < selection.sample))
    kept = np.sort(np.argsort(order, kind="stable")[: int(selection.sample)])
    return rows.take(pa.array(kept))


def _share(keys: Keys, seed: int, stream: int) -> npt.NDArray[np.float64]:
    """float64 [R] in [0, 1): hashes each key, uint8 [R, 16], with seed and stream.

    Applies splitmix64's finaliser (Steele et al. 2014) to both halves of the key, itself a hash.
    """
    halves = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    start = np.array([(seed * 4 + stream) % 2**64], np.uint64)
    mixed = _finalised(_finalised(halves[:, 0] ^ _finalised(start)) ^ halves[:, 1])
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalised(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _write(url: str, rows: pa.Table, sources: Sequence[SourceRun], selection: Selection) -> View:
    """Writes a view without the sources that have no rows, so that trainers do not open them."""
    numbers = rows.column("label_set").to_numpy()
    used = np.unique(numbers)
    renumbered = pa.array(np.searchsorted(used, numbers).astype(np.int16))
    table = rows.set_column(
        rows.column_names.index("label_set"), VIEW.field("label_set"), renumbered
    )
    table = table.select(VIEW.names).combine_chunks()
    runs: list[tuple[LabelSet, str]] = [(sources[n].label_set, sources[n].run) for n in used]
    settings: dict[str, Any] = selection.model_dump(mode="json", exclude_defaults=True)
    return write_view(url, runs, table, selection=settings)
