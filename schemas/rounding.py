"""What is stored of a log-probability: a float16 with as many mantissa bits as the spec keeps.

The column stays an ordinary float16; the dropped bits are zeros, which compression removes.
"""

import numpy as np
import numpy.typing as npt

FLOAT16_BITS = 10
LOWEST_LOGPROB = -65504.0


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
    values = np.maximum(np.asarray(x, np.float32), np.float32(_lowest(bits)))
    if bits < FLOAT16_BITS:
        dropped = 23 - bits
        raw = np.atleast_1d(values).view(np.uint32)
        half = (1 << (dropped - 1)) - 1 + ((raw >> np.uint32(dropped)) & np.uint32(1))
        raw = (raw + half.astype(np.uint32)) & np.uint32(~((1 << dropped) - 1) & 0xFFFFFFFF)
        rounded = raw.view(np.float32).reshape(values.shape)
        # The mantissa of a NaN may have been emptied, which would have made it an infinity.
        values = np.where(np.isnan(values), values, rounded)
    return values.astype(np.float16)


def _lowest(bits: int) -> float:
    return -(2.0 - 2.0**-bits) * 2.0**15
