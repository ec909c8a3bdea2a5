"""Rounds log-probabilities to float16 with as many mantissa bits as the record keeps.

The result is ordinary float16; dropped bits are zero, and compression removes them.
"""

import numpy as np
import numpy.typing as npt

FLOAT16_BITS = 10
LOWEST_LOGPROB = -65504.0

# Bit patterns of a float32 without its sign: the smallest normal float16; the range from there to
# the first number that rounds to infinity; and the difference between the exponent biases.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x8000)
_LEAST_NORMAL = np.uint32(0x38800000)
_NORMALS = np.uint32(0x477FF000 - 0x38800000)
_EXPONENTS = np.uint32((127 - 15) << FLOAT16_BITS)

CHUNK_VALUES = 1 << 15
"""Number of values rounded at once, few enough to stay in the CPU cache through all steps."""


def round_logprobs(
    x: npt.NDArray[np.float32], bits: int, out: npt.NDArray[np.float16] | None = None
) -> npt.NDArray[np.float16]:
    """Rounds to the nearest float16 with `bits` mantissa bits, ties to even.

    Values below the lowest such number (about -65504), including minus infinity, are clamped to it.
    Its exp is zero in every floating-point type, so a probability of zero stays zero while stored
    log-probabilities stay finite. NaN stays NaN, for `validate` to reject.

    Args:
        x: float32, any shape, nats.
        bits: mantissa bits to keep, 1 to 10.
        out: contiguous output of the same shape; None: allocates one.

    Returns:
        float16 of the same shape, with a relative error of at most 2 ** -(bits + 1).
    """
    values = np.atleast_1d(np.asarray(x, np.float32))
    rounded = np.empty(values.shape, np.float16) if out is None else out
    lowest = np.float32(_lowest(bits))
    # Split along the first axis, so that a matrix with strided rows is read only once.
    step = max(1, CHUNK_VALUES * len(values) // max(1, values.size))
    for first in range(0, len(values), step):
        part = slice(first, first + step)
        raised = np.maximum(values[part], lowest, order="C")
        _round(raised.reshape(-1), bits, rounded[part].reshape(-1))
    return rounded.reshape(np.shape(x))


def _round(values: npt.NDArray[np.float32], bits: int, out: npt.NDArray[np.float16]) -> None:
    """Rounds values [n] into `out`; overwrites `values`.

    Works on integers, because numpy's cast to float16 is ten times slower. The few values outside
    the range of normal float16 numbers are cast.
    """
    raw = values.view(np.uint32)
    magnitude = raw & _MAGNITUDE
    unusual = np.flatnonzero((magnitude - _LEAST_NORMAL) >= _NORMALS)
    for_cast = _cut_mantissas(values[unusual], bits)
    dropped = np.uint32(23 - bits)
    up = (raw >> dropped) & np.uint32(1)
    up += np.uint32((1 << (22 - bits)) - 1)
    magnitude += up
    magnitude >>= dropped
    magnitude <<= np.uint32(FLOAT16_BITS - bits)
    magnitude -= _EXPONENTS
    raw >>= np.uint32(16)
    raw &= _SIGN
    magnitude |= raw
    np.copyto(out.view(np.uint16), magnitude, casting="unsafe")
    out[unusual] = for_cast


def _cut_mantissas(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Rounds values [n] in place to `bits` mantissa bits, ties to even."""
    if bits >= FLOAT16_BITS:
        return values
    # Clearing the mantissa of a NaN would turn it into an infinity.
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
