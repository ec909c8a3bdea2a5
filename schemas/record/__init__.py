"""The label record: its columns, its rows in memory, and its invariants.

``columns``     the table of columns, and the Arrow schema of a spec
``rows``        `LabelRows`, a batch of rows as flat arrays, to and from Arrow
``spans``       spans and offsets as flat arrays
``validate``    the invariants checked on every batch before it is written
``rounding``    `round_logprobs`, the stored precision of log-probabilities
``reduce``      reduction of a richer record to a requested one
``uniforms``    the counter-based random numbers used for every draw
"""

from schemas.record.columns import COLUMNS, Column, Length, arrow_schema
from schemas.record.rounding import LOWEST_LOGPROB, round_logprobs
from schemas.record.rows import LabelRows
from schemas.record.spans import target_positions
from schemas.record.validate import validate

__all__ = [
    "COLUMNS",
    "LOWEST_LOGPROB",
    "Column",
    "LabelRows",
    "Length",
    "arrow_schema",
    "round_logprobs",
    "target_positions",
    "validate",
]
