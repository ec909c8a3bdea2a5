"""Uniform random numbers for the draws that label a row."""

import numpy as np

from schemas.record.uniforms import LABELLING, uniforms
from schemas.spec import RecordSpec


def row_uniforms(record: RecordSpec, row_key: bytes, targets: np.ndarray) -> np.ndarray | None:
    """Returns the random numbers for the draws of a row.

    Philox numbers: the key is the row key, the counter the target index, the stream ``LABELLING``
    and the seed ``record.draw_seed``.

    Args:
        record: determines the numbers per position, and the seed.
        row_key: 16 bytes.
        targets: int64 [N], target indices, rising.

    Returns:
        float64 [N, numbers per position], in [0, 1); None for kinds without draws.
    """
    if not record.has_draws:
        return None
    per_position = record.draws if record.kind == "sampled" else 1
    return uniforms(row_key, targets, per_position, record.draw_seed, LABELLING)
