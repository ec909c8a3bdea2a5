"""Mixtures of views: assigns each packed sequence of a run to a view.

Packed sequences are numbered through the run. Sequence i comes from a view with share w if
floor((i + 1) w) - floor(i w) = 1; otherwise the same rule is applied to the remaining views. So the
shares hold at any time to within one sequence per view, and the position in each view follows from
i alone. Shares are exact fractions, since rounding could assign a sequence to another view.

Sequences have equal lengths, so shares count tokens, up to padding. Each view keeps the order that
it has on its own and repeats epoch after epoch, so the rows of a small view with a large share
recur more often.
"""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Protocol

import pyarrow as pa

from schemas.label_set.label_set import LabelSet
from schemas.spec import RecordSpec
from schemas.views.view import View
from trainer.config.train import WeightedView


class TrainingView(Protocol):
    """The part of `View` that training reads; `MixedView` implements it too."""

    url: str
    view_hash: str
    table: pa.Table
    label_sets: list[LabelSet]
    records: list[RecordSpec]

    def check_shards(self) -> None: ...


class MixedView:
    """Several views as one `TrainingView`; their rows are concatenated in order.

    Attributes:
        views: in the order of the configuration.
        shares: each view's share of the packed sequences; they sum to one.
    """

    def __init__(self, views: Sequence[View], shares: Sequence[Fraction]) -> None:
        self.views, self.shares = tuple(views), tuple(shares)
        self.url = " + ".join(view.url for view in views)
        self.label_sets = [label_set for view in views for label_set in view.label_sets]
        self.records = [record for view in views for record in view.records]
        self.table = _concatenated(views)
        parts = [(view.view_hash, str(share)) for view, share in zip(views, shares, strict=True)]
        self.view_hash = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def check_shards(self) -> None:
        """Checks the shards of every view; see `View.check_shards`."""
        for view in self.views:
            view.check_shards()


def open_view(view: str | list[WeightedView]) -> TrainingView:
    """Opens the ``view`` of a training run: a single view or a mixture.

    Raises:
        StoreError, DamagedError: see `View.open`.
    """
    if isinstance(view, str):
        return View.open(view)
    return MixedView([View.open(part.view) for part in view], normalised_shares(view))


def normalised_shares(views: Sequence[WeightedView]) -> tuple[Fraction, ...]:
    """Each weight divided by their sum; exact for the decimals in the configuration."""
    weights = [Fraction(repr(part.weight)) for part in views]
    return tuple(weight / sum(weights) for weight in weights)


def sequence_source(number: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """The view of packed sequence ``number`` of a run, and its number within that view.

    All numbers count from 0.
    """
    rest = Fraction(1)
    for view, share in enumerate(shares[:-1]):
        share_of_rest = share / rest
        before = floor(number * share_of_rest)
        if floor((number + 1) * share_of_rest) > before:
            return view, before
        number, rest = number - before, rest - share
    return len(shares) - 1, number


def sequences_per_view(number: int, shares: Sequence[Fraction]) -> list[int]:
    """Counts how many of the first ``number`` packed sequences come from each view."""
    counts, rest = [], Fraction(1)
    for share in shares[:-1]:
        counts.append(floor(number * (share / rest)))
        number, rest = number - counts[-1], rest - share
    return [*counts, number]


def _concatenated(views: Sequence[View]) -> pa.Table:
    """Concatenates the views' tables; ``label_set`` indexes the concatenated label sets."""
    tables, num_label_sets = [], 0
    column = views[0].table.column_names.index("label_set")
    for view in views:
        numbers = pa.array(view.table["label_set"].to_numpy() + num_label_sets, pa.int16())
        tables.append(view.table.set_column(column, view.table.schema.field(column), numbers))
        num_label_sets += len(view.label_sets)
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()
