"""Which rows make a unit: about as many tokens in each, however long the rows are.

Rows that are found are gathered until there are enough for several units, and then cut where the
running sum of their tokens passes equal shares. So a unit of long rows is not huge, one of tiny
rows is not tiny, and none is a small rest. A cut unit travels as one row, because Ray Data counts
rows.
"""

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from labeler.config import LabelConfig

GATHERED_UNITS = 32
"""Units' worth of the longest rows that are gathered before they are cut, at most."""

UNIT_SCHEMA = pa.schema([pa.field("unit", pa.binary(), nullable=False)])


def rows_gathered(config: LabelConfig) -> int:
    """How many rows are cut into units together; no unit has more."""
    run = config.run
    units_worth = GATHERED_UNITS * run.unit_tokens // config.text.max_tokens
    return max(1, min(run.unit_rows, units_worth))


def tokens_of(requests: pa.Table, generated_tokens: int = 0) -> npt.NDArray[np.int64]:
    """What each request costs a teacher, in tokens.

    Args:
        requests: of ``labeler.corpus.requests.REQUEST_SCHEMA``.
        generated_tokens: what a response may take, where there will be one.

    Returns:
        int64 [R].
    """
    lengths = pc.list_value_length(requests.column("token_ids")).to_numpy()
    return np.asarray(lengths, np.int64) + generated_tokens


def cut_units(requests: pa.Table, unit_tokens: int, generated_tokens: int = 0) -> list[pa.Table]:
    """Cuts requests, in order, into units of about equally many tokens.

    Args:
        requests: of ``labeler.corpus.requests.REQUEST_SCHEMA``.
        unit_tokens: the target; a unit has at most one row more than that.
        generated_tokens: see ``tokens_of``.

    Returns:
        Tables of the same schema, none of them empty.
    """
    if not requests.num_rows:
        return []
    sums = np.cumsum(tokens_of(requests, generated_tokens))
    total = int(sums[-1])
    shares = max(1, math.ceil(total / unit_tokens))
    # A row belongs to the share that its middle is in, in twice the tokens to stay with integers.
    middles = sums + np.concatenate([np.zeros(1, np.int64), sums[:-1]])
    share_of = np.minimum(middles * shares // (2 * max(total, 1)), shares - 1)
    starts = np.flatnonzero(np.diff(share_of, prepend=-1))
    ends = np.append(starts[1:], requests.num_rows)
    return [requests.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]


def wrapped(unit: pa.Table) -> pa.Table:
    """A unit as one row, of ``UNIT_SCHEMA``."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.schema) as writer:
        writer.write_table(unit)
    return pa.table([pa.array([sink.getvalue().to_pybytes()], pa.binary())], schema=UNIT_SCHEMA)


def unwrapped(units: pa.Table) -> list[pa.Table]:
    """The units of rows of ``UNIT_SCHEMA``."""
    return [pa.ipc.open_stream(unit).read_all() for unit in units.column("unit").to_pylist()]
