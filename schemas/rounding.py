"""What is stored of a log-probability: a float16 with as many mantissa bits as the spec keeps.

The column stays an ordinary float16; the dropped bits are zeros, which compression removes.
"""

import numpy as np
import numpy.typing as npt

FLOAT16_BITS = 10
LOWEST_LOGPROB = -65504.0

CHUNK_VALUES = 1 << 15
"""Values that are rounded together: few enough that all steps find them in the CPU's cache."""


def round_logprobs(x: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float16]:
    """Rounds to the nearest float16 with `bits` mantissa bits, ties to even.

    Below the lowest such number, minus infinity included, comes that number: about -65504, whose
    exp is zero in every floating-point type, so that a probability of zero stays zero and stored
    log-probabilities stay finite. NaN stays NaN, for `validate` to find.

    Args:
        x: float32, any shape, nats.
        bits: mantissa bits to keep, 1 to 10.

    Returns:
        float16 of the same shape, within a relative 2 ** -(bits + 1) of `x`.
    """
    values = np.asarray(x, np.float32, order="C")
    rounded = np.empty(values.shape, np.float16)
    flat, stored = values.reshape(-1), rounded.reshape(-1)
    for first in range(0, len(flat), CHUNK_VALUES):
        part = slice(first, first + CHUNK_VALUES)
        stored[part] = _cut_mantissas(np.maximum(flat[part], np.float32(_lowest(bits))), bits)
    return rounded


def _cut_mantissas(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Rounds values [n] in place to `bits` mantissa bits, ties to even."""
    if bits >= FLOAT16_BITS:
        return values
    # The mantissa of a NaN may be emptied below, which would make it an infinity.
    undefined = np.isnan(values)
    dropped = 23 - bits
    raw = values.view(np.uint32)
    half = raw >> np.uint32(dropped)
    half &= np.uint32(1)
    half += np.uint32((1 << (dropped - 1)) - 1)
    raw += half
    raw &= np.uint32(~((1 << dropped) - 1) & 0xFFFFFFFF)
    if undefined.any():
        values[undefined] = np.nan
    return values


def _lowest(bits: int) -> float:
    return -(2.0 - 2.0**-bits) * 2.0**15
