"""Groups rows into units of similar token counts, regardless of row length.

Rows for several units are gathered, then cut where the running token sum passes equal shares. So
units of long rows are not huge, units of short rows are not tiny, and no small remainder is left. A
unit travels as one row, because Ray Data batches by rows.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labeler.config import LabelConfig

GATHERED_UNITS = 32
"""Maximum number of units, of rows of maximum length, that are gathered before cutting."""

UNIT_SCHEMA = pa.schema([pa.field("unit", pa.binary(), nullable=False)])


def rows_gathered(config: LabelConfig) -> int:
    """Rows gathered and cut together; an upper bound on the rows of a unit."""
    run = config.run
    units_worth = GATHERED_UNITS * run.unit_tokens // config.text.max_tokens
    return max(1, min(run.unit_rows, units_worth))


def cut_units(requests: pa.Table, unit_tokens: int, generated_tokens: int = 0) -> list[pa.Table]:
    """Cuts requests, in order, into units of similar token counts.

    Args:
        requests: table of ``labeler.corpus.requests.REQUEST_SCHEMA``.
        unit_tokens: target size; a unit exceeds it by at most one row.
        generated_tokens: maximum length of the response to each request.

    Returns:
        Tables of the same schema, none of them empty.
    """
    if not requests.num_rows:
        return []
    lengths = pc.list_value_length(requests.column("token_ids")).to_numpy()
    sums = np.cumsum(np.asarray(lengths, np.int64) + generated_tokens)
    total = int(sums[-1])
    shares = max(1, math.ceil(total / unit_tokens))
    # A row belongs to the share that contains its midpoint; doubled, to stay in integers.
    middles = sums + np.concatenate([np.zeros(1, np.int64), sums[:-1]])
    share_of = np.minimum(middles * shares // (2 * max(total, 1)), shares - 1)
    starts = np.flatnonzero(np.diff(share_of, prepend=-1))
    ends = np.append(starts[1:], requests.num_rows)
    return [requests.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]


def wrapped(unit: pa.Table) -> pa.Table:
    """Serialises a unit into one row of ``UNIT_SCHEMA``."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.schema) as writer:
        writer.write_table(unit)
    return pa.table([pa.array([sink.getvalue().to_pybytes()], pa.binary())], schema=UNIT_SCHEMA)


def unwrapped(units: pa.Table) -> list[pa.Table]:
    """Deserialises units from rows of ``UNIT_SCHEMA``."""
    return [pa.ipc.open_stream(unit).read_all() for unit in units.column("unit").to_pylist()]
