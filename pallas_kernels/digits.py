"""Rows as digits of 8 bits in the Triton language: tensor cores multiply them with 8-bit data, nothing is widened."""

import triton
import triton.language as tl


@triton.jit
def power_of_two(x):
    """(the power of two at or below the largest magnitude of each row of x [R, D] float32, its inverse), [R] each.

    2^-95 at least; NaN for a row that holds NaN or infinity.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1) & 0x7F800000  # as integers NaN is the largest
    bits = tl.maximum(bits, 0x10000000)
    power = tl.where(bits == 0x7F800000, float("nan"), bits.to(tl.float32, bitcast=True))
    return power, (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _cut(x):
    """x, float32 below 256, cut to what e4m3 holds: four bits, or multiples of 2^-9 below 2^-6."""
    four_bits = (x.to(tl.int32, bitcast=True) & -(1 << 20)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, tl.floor(x * 512.0) * 0.001953125, four_bits)


@triton.jit
def e4m3_digit(x, digit, DIGITS: tl.constexpr):
    """Digit number ``digit`` (an int32 tensor beside x) of x, float32 below 256: x is the sum of digit i / 16^i.

    Two digits hold bfloat16's eight bits and three float16's eleven, of all but values below 2^-6.
    """
    for number in tl.static_range(DIGITS - 1):
        x = tl.where(digit > number, (x - _cut(x)) * 16.0, x)
    return _cut(x).to(tl.float8e4nv)
