"""Row keys as Arrow columns."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.keys import KEY_BYTES, Keys

KEY_TYPE = pa.binary(KEY_BYTES)


def key_column(keys: Keys) -> pa.FixedSizeBinaryArray:
    """Wraps keys, uint8 [R, 16], as an Arrow column; copies only if they are not contiguous."""
    buffer = pa.py_buffer(np.ascontiguousarray(keys))
    return pa.FixedSizeBinaryArray.from_buffers(KEY_TYPE, len(keys), [None, buffer])


def key_values(column: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint8]:
    """uint8 [R, 16]: a view of the keys in an Arrow column, which may be a slice."""
    if not len(column):
        return np.empty((0, KEY_BYTES), np.uint8)
    keys = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, KEY_BYTES)
    return keys[column.offset : column.offset + len(column)]
