"""Counter-based random numbers: a pure function of row key, position, seed and stream.

The generator is Philox 4x64 (Salmon et al. 2011, as implemented by numpy):

- its 128-bit key is the row key;
- its 256-bit counter has the block index, derived from the target index, in the low words, the
  stream in the third word and the seed in the fourth.

Teachers draw labels from LABELLING, `schemas.record.reduce` thins stored draws from REDUCING, and
teachers select the labels to audit from AUDITING, so their numbers are independent. All are
bit-identical in every run and on every machine, however rows are batched or split into steps.
"""

import numpy as np
import numpy.typing as npt

LABELLING = 0
"""Stream of the draws stored in labels."""
REDUCING = 1
"""Stream of the draws that thin stored labels for a larger tau."""
AUDITING = 2
"""Stream that selects which labels of a row to audit."""

_WORDS_PER_BLOCK = 4
_STREAM_SHIFT = 128
_SEED_SHIFT = 192


def uniforms(
    row_key: bytes,
    positions: npt.NDArray[np.int64],
    per_position: int,
    seed: int,
    stream: int = LABELLING,
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2^-53, for positions of one row.

    Args:
        row_key: 16 bytes.
        positions: int64 [N], target indices in the row, ascending.
        per_position: random numbers per position.
        seed: usually ``RecordSpec.draw_seed``.
        stream: LABELLING, REDUCING or AUDITING.

    Returns:
        float64 [N, per_position]; a row of it does not depend on the other positions.
    """
    if not len(positions):
        return np.zeros((0, per_position))
    blocks = -(-per_position // _WORDS_PER_BLOCK)
    key = int.from_bytes(row_key, "little")
    offset = (stream << _STREAM_SHIFT) | (seed << _SEED_SHIFT)
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    words = [
        np.random.Philox(key=key, counter=offset + int(run[0]) * blocks).random_raw(
            len(run) * blocks * _WORDS_PER_BLOCK
        )
        for run in runs
    ]
    raw = np.concatenate(words).reshape(len(positions), -1)[:, :per_position]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
