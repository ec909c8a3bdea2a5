"""Mixtures of views: which view each packed sequence of a run comes from.

Packed sequences are counted through the whole run; number i of them comes from a view with share w
where floor((i + 1) w) - floor(i w) = 1, and from the others otherwise, which are told apart in the
same way among themselves. So the shares hold at every moment within one sequence a view, and where
a run stands in each view follows from one number, without a count of its own. Shares are exact
fractions: floating point would move a sequence from one view to another once in a while.

Sequences have one size, so shares are of tokens, as nearly as packing is full. Each view is read in
the order that it would have alone, and begins again, in the order of its next epoch, when all its
rows were read: rows of a small view with a large share come more often than others.
"""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from math import floor

import pyarrow as pa

from schemas.views.view import View
from trainer.config.train import WeightedView


class MixedView(View):
    """Several views as one; rows of the first come first.

    Attributes:
        shares: of each view; they sum to one.
        num_rows_of: rows of each view in ``table``.
    """

    def __init__(self, views: Sequence[View], shares: Sequence[Fraction]) -> None:
        """Not of View: there is no such folder."""
        tables, first = [], 0
        place = views[0].table.column_names.index("label_set")
        for view in views:
            numbers = pa.array(view.table["label_set"].to_numpy() + first, pa.int16())
            field = view.table.schema.field("label_set")
            tables.append(view.table.set_column(place, field, numbers))
            first += len(view.label_sets)
        self.shares = tuple(shares)
        self.num_rows_of = tuple(len(view.table) for view in views)
        self.url = " + ".join(view.url for view in views)
        self.table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        self.label_sets = [label_set for view in views for label_set in view.label_sets]
        self.sources = [source for view in views for source in view.sources]
        self.records = [record for view in views for record in view.records]
        self.num_rows = sum(view.num_rows for view in views)
        self.num_tokens = sum(view.num_tokens for view in views)
        self.num_labels = sum(view.num_labels for view in views)
        made_of = [(v.view_hash, str(share)) for v, share in zip(views, shares, strict=True)]
        self.view_hash = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def open_view(view: str | list[WeightedView]) -> View:
    """What ``view`` of a training run names: one view, or a mixture.

    Raises:
        StoreError, DamagedError: see ``View.open``.
    """
    if isinstance(view, str):
        return View.open(view)
    return MixedView([View.open(part.view) for part in view], shares_of(view))


def shares_of(views: Sequence[WeightedView]) -> tuple[Fraction, ...]:
    """The weights, as they are written, over their sum."""
    weights = [Fraction(repr(part.weight)) for part in views]
    return tuple(weight / sum(weights) for weight in weights)


def place_of(number: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Which view packed sequence ``number`` of a run is from, and its number in that view.

    All numbers are counted from 0.
    """
    rest = Fraction(1)
    for view, share in enumerate(shares[:-1]):
        here = share / rest
        before = floor(number * here)
        if floor((number + 1) * here) > before:
            return view, before
        number, rest = number - before, rest - share
    return len(shares) - 1, number


def taken(number: int, shares: Sequence[Fraction]) -> list[int]:
    """How many of the first ``number`` packed sequences are from each view."""
    counts, rest = [], Fraction(1)
    for share in shares[:-1]:
        counts.append(floor(number * (share / rest)))
        number, rest = number - counts[-1], rest - share
    return [*counts, number]
