"""Elements of packed rows in Triton, from and to float32.

What a GPU or the interpreter may round in its own way is computed on the bits of float32 numbers: bfloat16, which NaN,
and e4m3, which sm_80 has no instruction for and gfx942 has in another encoding.
"""

# Kernels have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)


@triton.jit
def load(pointers, mask, TYPE: tl.constexpr):
    """Return elements as float32."""
    values = tl.load(pointers, mask=mask, other=0)
    if TYPE == "bfloat16":  # the upper half of a float32
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == "float16":
        values = values.to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def store(pointers, values, mask, TYPE: tl.constexpr):
    """Store float32 values in a type; there is one NaN, and what is finite stays so in float16."""
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where((bits & MAGNITUDE) > INFINITY, NAN, bits)
    if TYPE == "bfloat16":
        # No carry reaches the sign: infinity and the NaN have no bits to round.
        tl.store(pointers, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), mask=mask)
    elif TYPE == "float16":
        bounded = tl.minimum(tl.maximum(values, -65504.0), 65504.0)
        halves = tl.where((bits & MAGNITUDE) == INFINITY, values, bounded).to(tl.float16)
        halves_bits = tl.where(bits == NAN, 0x7E00, halves.to(tl.int16, bitcast=True))
        tl.store(pointers, halves_bits.to(tl.int16), mask=mask)
    else:
        tl.store(pointers, bits.to(tl.float32, bitcast=True), mask=mask)


@triton.jit
def encode(values, FORM: tl.constexpr):
    """Return float32 values of at most 448 as e4m3 bytes, or of at most 127 as int8 bytes, in int32.

    Adding a power of two rounds to the last bit that its sum can hold: a unit, or 2^-9, the step of e4m3's subnormals.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitude_bits = bits & MAGNITUDE
    magnitude = magnitude_bits.to(tl.float32, bitcast=True)
    if FORM == "int8":
        whole = (magnitude + 8388608.0).to(tl.int32, bitcast=True) & 0x7F
        code = tl.where(bits < 0, -whole, whole) & 0xFF
    else:
        # Three bits of the mantissa stay, and the exponent counts from -7 instead of -127.
        normal = ((magnitude_bits + 0x7FFFF + ((magnitude_bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(magnitude_bits < (121 << 23), subnormal, normal) | ((bits >> 24) & 0x80)
    return code


@triton.jit
def decode(codes, FORM: tl.constexpr):
    """Return the values of bytes as float32."""
    if FORM == "int8":
        values = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        wide = codes.to(tl.int32)
        # With its bits in the place of a float16's, e4m3 is 2^-8 of itself, subnormals too.
        halves = ((wide & 0x7F) << 7 | (wide & 0x80) << 8).to(tl.int16).to(tl.float16, bitcast=True)
        values = halves.to(tl.float32) * 256.0
    return values
