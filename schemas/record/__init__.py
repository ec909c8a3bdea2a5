"""The label record: its columns, its rows in memory, and what always holds between them.

``columns``     the table of columns, and the Arrow schema of a spec
``rows``        `LabelRows`, a batch of rows as flat arrays, to and from Arrow
``validate``    what every batch has to satisfy before it is written
``rounding``    `round_logprobs`, what is stored of a log-probability
``reduce``      a richer record reduced to what was asked for
``uniforms``    the counter-based random numbers behind every draw
"""

from schemas.record.columns import COLUMNS, Column, Length, arrow_schema
from schemas.record.rounding import LOWEST_LOGPROB, round_logprobs
from schemas.record.rows import LabelRows, target_positions
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
