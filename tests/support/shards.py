"""Reading of entire shards."""

from schemas.label_set.shards import read_row_group
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from schemas.storage.store import Store


def read_shard(store: Store, rel: str, spec: RecordSpec, num_groups: int) -> LabelRows:
    """All rows of a shard, in order."""
    groups = [read_row_group(store, rel, index, spec) for index in range(num_groups)]
    return LabelRows.concat(groups)
