"""Float32 operations that round exactly where they say, three times over.

A step of an optimizer is written once, in terms of the operations below, and runs under three of them:

* `Float32Operations`: XLA's own float32 instructions. Fast, and exact as long as no operand and no result
  is subnormal, infinite or NaN (XLA:CPU flushes subnormals to zero). The caller proves that beforehand.
* `Float64Operations`: float32 arithmetic carried out in float64 and in integers, exact for every bit
  pattern on every device whose float64 is IEEE 754. Several times slower.
* `NumpyOperations`: the host's float32, which XLA and its rewrites never touch: the oracle of the self-test.

What XLA would do to the same formulas, and what stands against it here:

* LLVM contracts `a * b + c` to a fused multiply-add wherever it sees the product. `multiply` therefore
  passes its bits through an exclusive or with a zero that is known at run time only; `fma` wants the
  contraction, and writes the expression plainly.
* XLA's algebraic simplifier turns `x / scalar` into `x * (1 / scalar)`: programs made of these operations
  are compiled by `compile_exactly`, without that pass.
* Casts to a narrower format and back may be dropped (XLA counts this as allowed excess precision).
  Rounding is `lax.reduce_precision` or integer arithmetic, which no pass removes.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaudit import floats
from jaxaudit.devices import Device
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format

#: A NumPy or JAX array; each class of operations says which.
Value = Any
Mask = Any

#: How XLA carries out float32 arithmetic: in float32 instructions, or emulated in float64.
Formulation = Literal["float32", "float64"]


class Operations(Protocol):
    """Arithmetic on float32 values; each method rounds once, to nearest with ties to even."""

    def decode(self, patterns: Value, fmt: Format) -> Value: ...
    def encode(self, value: Value, fmt: Format) -> Value: ...
    def round_to(self, value: Value, fmt: Format) -> Value: ...
    def patterns32(self, value: Value) -> Value: ...
    def float64(self, value: Value) -> Value: ...
    def negate(self, a: Value) -> Value: ...
    def add(self, a: Value, b: Value) -> Value: ...
    def subtract(self, a: Value, b: Value) -> Value: ...
    def multiply(self, a: Value, b: Value) -> Value: ...
    def divide(self, a: Value, b: Value) -> Value: ...
    def sqrt(self, a: Value) -> Value: ...
    def fma(self, a: Value, b: Value, c: Value) -> Value: ...
    def where(self, mask: Mask, a: Value, b: Value) -> Value: ...


class NumpyOperations:
    """The host's float32 arithmetic; values are float32 NumPy arrays."""

    def decode(self, patterns: Value, fmt: Format) -> Value:
        return floats.decode(patterns, fmt)

    def encode(self, value: Value, fmt: Format) -> Value:
        return floats.encode(value, fmt)

    def round_to(self, value: Value, fmt: Format) -> Value:
        return floats.round_to(value, fmt)

    def patterns32(self, value: Value) -> Value:
        return np.ascontiguousarray(value, np.float32).view(np.uint32)

    def float64(self, value: Value) -> Value:
        return np.asarray(value, np.float64)

    def negate(self, a: Value) -> Value:
        return -a

    def add(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.add(a, b, dtype=np.float32)

    def subtract(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.subtract(a, b, dtype=np.float32)

    def multiply(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.multiply(a, b, dtype=np.float32)

    def divide(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.divide(a, b, dtype=np.float32)

    def sqrt(self, a: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.sqrt(a, dtype=np.float32)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c once: exact product, sum rounded to odd in float64, then to float32.

        Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms
        using rounding to odd", IEEE Transactions on Computers 57 (2008).
        """
        with np.errstate(all="ignore"):
            product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
            total, error = _two_sum(product, np.asarray(c, np.float64))
            bits = np.asarray(total).view(np.int64)
            step = np.where((error > 0) == (bits >= 0), 1, -1)
            inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
            return np.where(inexact, bits + step, bits).view(np.float64).astype(np.float32)

    def where(self, mask: Mask, a: Value, b: Value) -> Value:
        return np.where(mask, a, b)


class Float32Operations:
    """XLA's float32 instructions; values are float32 JAX arrays.

    Exact while every operand and result is zero or normal and finite.

    Args:
        zero: a uint32 scalar that is 0 at run time and unknown to the compiler.
    """

    def __init__(self, zero: jax.Array):
        self._zero = zero

    def decode(self, patterns: Value, fmt: Format) -> Value:
        return _float(widen_patterns(patterns, fmt))

    def encode(self, value: Value, fmt: Format) -> Value:
        return _narrow(_bits(self.round_to(value, fmt)), fmt)

    def round_to(self, value: Value, fmt: Format) -> Value:
        if fmt is BFLOAT16:
            return lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
        return _float(_round_bits(_bits(value), fmt))

    def patterns32(self, value: Value) -> Value:
        return _bits(value)

    def float64(self, value: Value) -> Value:
        return value.astype(jnp.float64)

    def negate(self, a: Value) -> Value:
        return _float(_bits(a) ^ np.uint32(FLOAT32.sign_bit))

    def add(self, a: Value, b: Value) -> Value:
        return a + b

    def subtract(self, a: Value, b: Value) -> Value:
        return a - b

    def multiply(self, a: Value, b: Value) -> Value:
        return _float(_bits(a * b) ^ self._zero)

    def divide(self, a: Value, b: Value) -> Value:
        return a / b

    def sqrt(self, a: Value) -> Value:
        return jnp.sqrt(a)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c once, where the target has a fused multiply-add (the self-test finds out)."""
        return a * b + c

    def where(self, mask: Mask, a: Value, b: Value) -> Value:
        return jnp.where(mask, a, b)


class Float64Operations:
    """Float32 arithmetic in float64 and integers; values are float64 JAX arrays of float32 values.

    No operand or result is ever a subnormal float64 or float32, so that flushing cannot touch it. Rounding
    a float64 result to float32 a second time is innocuous for + - * / and sqrt (53 >= 2 * 24 + 2; a
    subnormal quotient of float32 values lies at least 2^-49 of itself from any midpoint, a subnormal
    product or sum is exact in float64). Source: Figueroa, "When is double rounding innocuous?", 1995.
    """

    def decode(self, patterns: Value, fmt: Format) -> Value:
        return _float64_of_bits(widen_patterns(patterns, fmt))

    def encode(self, value: Value, fmt: Format) -> Value:
        return narrow_patterns(_bits_of_float64(value), fmt)

    def round_to(self, value: Value, fmt: Format) -> Value:
        if fmt is FLOAT32:
            return value
        return _float64_of_bits(_round_bits(_bits_of_float64(value), fmt))

    def patterns32(self, value: Value) -> Value:
        return _bits_of_float64(value)

    def float64(self, value: Value) -> Value:
        return value

    def negate(self, a: Value) -> Value:
        return -a

    def add(self, a: Value, b: Value) -> Value:
        return _round64(a + b)

    def subtract(self, a: Value, b: Value) -> Value:
        return _round64(a - b)

    def multiply(self, a: Value, b: Value) -> Value:
        return _round64(a * b)

    def divide(self, a: Value, b: Value) -> Value:
        return _round64(a / b)

    def sqrt(self, a: Value) -> Value:
        return _round64(jnp.sqrt(a))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c once: the product is exact in float64, the sum is rounded to odd there."""
        total, error = _two_sum(a * b, c)
        bits = lax.bitcast_convert_type(total, jnp.int64)
        exponent = np.int64(0x7FF0000000000000)
        inexact = (error != 0) & (bits & 1 == 0) & (bits & exponent != exponent)
        step = jnp.where((error > 0) == (bits >= 0), 1, -1)
        return _round64(
            lax.bitcast_convert_type(jnp.where(inexact, bits + step, bits), jnp.float64)
        )

    def where(self, mask: Mask, a: Value, b: Value) -> Value:
        return jnp.where(mask, a, b)


def operations_of(formulation: Formulation, zero: jax.Array) -> Operations:
    """Return XLA's operations in a formulation; `zero` as for `Float32Operations`."""
    return Float32Operations(zero) if formulation == "float32" else Float64Operations()


def compile_exactly(function: Callable, device: Device) -> Callable:
    """Compile without the passes that change the arithmetic that was written.

    On CPU, XLA's algebraic simplifier would turn a division by a broadcast scalar into a multiplication
    by its reciprocal (`HandleDivide` in XLA's algebraic_simplifier.cc).
    """
    options = {"xla_disable_hlo_passes": "algsimp"} if device.platform == "cpu" else None
    return jax.jit(function, compiler_options=options)


def _two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """Return the rounded sum and its exact rounding remainder (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def narrow_patterns(patterns: Value, fmt: Format) -> Value:
    """Round float32 patterns to patterns of `fmt`, to nearest with ties to even."""
    return _narrow(_round_bits(patterns, fmt), fmt)


def _bits(value: Value) -> Value:
    return lax.bitcast_convert_type(value, jnp.uint32)


def _float(bits: Value) -> Value:
    return lax.bitcast_convert_type(bits, jnp.float32)


def widen_patterns(patterns: Value, fmt: Format) -> Value:
    """Turn patterns of `fmt` into float32 patterns, by integer arithmetic alone."""
    if fmt is FLOAT32:
        return patterns
    wide = patterns.astype(jnp.uint32)
    if fmt is BFLOAT16:
        return wide << 16
    sign, magnitude = (wide & 0x8000) << 16, wide & 0x7FFF
    bias = np.uint32((127 - 15) << 23)
    special = jnp.where(magnitude >= FLOAT16.infinity, bias, np.uint32(0))
    subnormal = _bits(magnitude.astype(jnp.float32) * np.float32(2.0**-24))
    return sign | jnp.where(magnitude < 0x400, subnormal, (magnitude << 13) + bias + special)


def _round_bits(bits: Value, fmt: Format) -> Value:
    """Round float32 patterns to the values of `fmt`, to nearest with ties to even."""
    if fmt is FLOAT32:
        return bits
    dropped = FLOAT32.significand_bits - fmt.significand_bits
    sign, magnitude = bits & np.uint32(FLOAT32.sign_bit), bits & np.uint32(0x7FFFFFFF)
    half = np.uint32((1 << (dropped - 1)) - 1)
    kept = np.uint32(0x100000000 - (1 << dropped))
    rounded = (magnitude + half + ((magnitude >> dropped) & 1)) & kept
    if fmt is FLOAT16:
        rounded = jnp.where(rounded >= 0x47800000, np.uint32(FLOAT32.infinity), rounded)
        # Below 2^-14 the spacing is 2^-24 throughout: it is the ulp of float32 numbers in [0.5, 1).
        steps = _bits(_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
        tiny = _bits(steps.astype(jnp.float32) * np.float32(2.0**-24))
        rounded = jnp.where(magnitude < 0x38800000, tiny, rounded)
    return sign | jnp.where(magnitude > FLOAT32.infinity, np.uint32(0x7FC00000), rounded)


def _narrow(bits: Value, fmt: Format) -> Value:
    """Turn float32 patterns whose values `fmt` holds exactly into patterns of `fmt`."""
    if fmt is FLOAT32:
        return bits
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if fmt is BFLOAT16:
        quiet = jnp.where(magnitude > FLOAT32.infinity, np.uint32(0x40), np.uint32(0))
        return ((bits >> 16) | quiet).astype(jnp.uint16)
    sign = (bits >> 16) & 0x8000
    normal = (magnitude - np.uint32((127 - 15) << 23)) >> 13
    # Integer multiples of 2^-24, read off as in _round_bits.
    tiny = _bits(_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    narrow = jnp.where(magnitude < 0x38800000, tiny, normal)
    narrow = jnp.where(magnitude == FLOAT32.infinity, np.uint32(FLOAT16.infinity), narrow)
    narrow = jnp.where(magnitude > FLOAT32.infinity, np.uint32(0x7E00), narrow)
    return (sign | narrow).astype(jnp.uint16)


_SMALLEST_NORMAL = np.float64(2.0**-126)


def _float64_of_bits(bits: Value) -> Value:
    """Decode float32 patterns to float64 without ever forming a subnormal.

    A subnormal is read as if it had a hidden bit, from which 2^-126 is then subtracted.
    """
    wide = bits.astype(jnp.uint64)
    sign, magnitude = (wide >> 31) << 63, wide & 0x7FFFFFFF
    subnormal = magnitude < 0x00800000
    special = magnitude >= FLOAT32.infinity
    bias = jnp.where(special, np.uint64((2047 - 255) << 52), np.uint64((1023 - 127) << 52))
    shifted = jnp.where(subnormal, magnitude + np.uint64(0x00800000), magnitude) << 29
    value = lax.bitcast_convert_type(shifted + bias, jnp.float64)
    value = value - jnp.where(subnormal, _SMALLEST_NORMAL, np.float64(0))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.uint64) | sign, jnp.float64)


def _bits_of_float64(value: Value) -> Value:
    """Round float64 to float32 patterns, once, with gradual underflow on devices that flush.

    Below 2^-126 the spacing of float32 is 2^-149, the ulp of float64 numbers in [2^-97, 2^-96).
    """
    sign = (lax.bitcast_convert_type(value, jnp.uint64) >> 63).astype(jnp.uint32) << 31
    size = jnp.abs(value)
    offset = np.float64(2.0**-97)
    steps = lax.bitcast_convert_type(size + offset, jnp.uint64) - offset.view(np.uint64)
    return sign | jnp.where(
        size < _SMALLEST_NORMAL, steps.astype(jnp.uint32), _bits(size.astype(jnp.float32))
    )


def _round64(value: Value) -> Value:
    return _float64_of_bits(_bits_of_float64(value))
