"""Float32 operations that round exactly where they say, three times over.

A step of an optimizer is written once, in terms of the operations below, and runs under three of them:

* `Float32Operations`: XLA's own float32 instructions. Fast, and exact where no operand and no result is
  subnormal (XLA:CPU flushes these to zero); it marks the elements at which one was met.
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

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaudit import floats
from jaxaudit.devices import Device
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Format
from jaxaudit.mkl_sqrt import reciprocal_root_steps

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
    def mkl_amd_sqrt(self, a: Value) -> Value: ...
    def fma(self, a: Value, b: Value, c: Value) -> Value: ...
    def where(self, mask: Mask, a: Value, b: Value) -> Value: ...
    def less(self, a: Value, b: Value) -> Mask: ...
    def is_nan(self, a: Value) -> Mask: ...

    # Arithmetic in double, for implementations that leave some of it there: each operation rounds to float64.
    def wide(self, a: Value) -> Value: ...
    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Value: ...
    def wide_add(self, a: Value, b: Value) -> Value: ...
    def wide_multiply(self, a: Value, b: Value) -> Value: ...
    def wide_fma(self, a: Value, b: Value, c: Value) -> Value: ...


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
        with np.errstate(all="ignore"):
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

    def mkl_amd_sqrt(self, a: Value) -> Value:
        return _mkl_amd_sqrt(self, a, np.take)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c once: exact product, sum rounded to odd in float64, then to float32.

        Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms
        using rounding to odd", IEEE Transactions on Computers 57 (2008).
        """
        with np.errstate(all="ignore"):
            return _fma_rounded_to_odd(a, b, c).astype(np.float32)

    def where(self, mask: Mask, a: Value, b: Value) -> Value:
        return np.where(mask, a, b)

    def less(self, a: Value, b: Value) -> Mask:
        return np.less(a, b)

    def is_nan(self, a: Value) -> Mask:
        return np.isnan(a)

    def wide(self, a: Value) -> Value:
        with np.errstate(all="ignore"):  # a signalling NaN
            return np.asarray(a, np.float64)

    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Value:
        with np.errstate(all="ignore"):
            rounded = np.asarray(a, np.float64).astype(np.float32)
            if fmt is FLOAT32:
                return rounded
            odd = _odd_bits(a, np.float64(rounded), rounded.view(np.uint32), np.where)
        return floats.round_to(odd.view(np.float32), fmt)

    def wide_add(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.add(a, b, dtype=np.float64)

    def wide_multiply(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return np.multiply(a, b, dtype=np.float64)

    def wide_fma(self, a: Value, b: Value, c: Value) -> Value:
        with np.errstate(all="ignore"):
            return _wide_fma(
                a,
                b,
                c,
                lambda x: x,
                lambda x: np.asarray(x, np.float64).view(np.int64),
                lambda x: np.asarray(x, np.int64).view(np.float64),
                np.where,
            )


class Float32Operations:
    """XLA's float32 instructions; values are float32 JAX arrays.

    Exact unless a subnormal number is met, as an operand or as the exact result of an operation; where that
    happened `strays` says, element by element. XLA:CPU takes subnormal operands for zero and returns zero for
    a subnormal result. What was decoded is looked at once, and each result where it is zero: marked unless it
    must be. (A sum that cancels exactly within a fused multiply-add is marked without need.)

    Args:
        zero: a uint32 scalar that is 0 at run time and unknown to the compiler.
        wide: quotients and roots are taken in float64 and rounded, where the device's own are approximations. A
            quotient or root of float32 numbers rounded to 53 bits first is rounded to 24 as if at once (53 >= 2 *
            24 + 2; Figueroa, "When is double rounding innocuous?", 1995).
        number: of these operations, where a program has several: products that are fused are never one and the same.

    Attributes:
        strays: mask of the elements at which a subnormal number was met, so far; False for none.
    """

    def __init__(self, zero: jax.Array, *, wide: bool = False, number: int = 0):
        self._zero, self._wide = zero, wide
        self.strays: Any = False
        self._calls = 8 * number

    def decode(self, patterns: Value, fmt: Format) -> Value:
        if fmt is FLOAT64:
            return lax.bitcast_convert_type(patterns, jnp.float64)
        return _float(widen_patterns(patterns, fmt))

    def watch(self, value: Value) -> Value:
        """Mark what is subnormal, infinite or NaN in an operand or in a last result."""
        # Zero wraps around to the largest integer; a special value's exponent is beyond all others.
        magnitude = (_bits(value) << 1) - np.uint32(1)
        self._mark(magnitude < np.uint32((1 << 24) - 1))
        self._mark((_bits(value) & np.uint32(FLOAT32.infinity)) == np.uint32(FLOAT32.infinity))
        return value

    def _mark(self, stray: Mask) -> None:
        self.strays = stray | self.strays

    def _mark_zero(self, result: Value, *expected: Mask) -> Value:
        """Mark where a result is zero without one of the reasons that it may have."""
        reason = functools.reduce(lambda a, b: a | b, expected)
        self._mark(_is_zero(result) & ~reason)
        return result

    def encode(self, value: Value, fmt: Format) -> Value:
        if fmt is FLOAT64:
            return lax.bitcast_convert_type(value.astype(jnp.float64), jnp.uint64)
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
        opposite = _bits(a) == (_bits(b) ^ np.uint32(FLOAT32.sign_bit))
        return self._mark_zero(a + b, opposite, _is_zero(a) & _is_zero(b))

    def subtract(self, a: Value, b: Value) -> Value:
        return self._mark_zero(a - b, _bits(a) == _bits(b), _is_zero(a) & _is_zero(b))

    def multiply(self, a: Value, b: Value) -> Value:
        return self._mark_zero(self._guarded(a * b), _is_zero(a), _is_zero(b))

    def divide(self, a: Value, b: Value) -> Value:
        if self._wide:
            quotient = (self._widened(a) / b.astype(jnp.float64)).astype(jnp.float32)
        else:
            quotient = a / b
        # A look at an unguarded quotient would keep LLVM from vectorising the division.
        return self._mark_zero(self._guarded(quotient), _is_zero(a), _is_infinite(b))

    def sqrt(self, a: Value) -> Value:
        return jnp.sqrt(self._widened(a)).astype(jnp.float32) if self._wide else jnp.sqrt(a)

    def mkl_amd_sqrt(self, a: Value) -> Value:
        return _mkl_amd_sqrt(self, a, _take)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c once, where the target has a fused multiply-add (the self-test finds out)."""
        # LLVM fuses a product with the sum only where nothing else uses it: each call has one of its own.
        self._calls += 1
        own = _float(_bits(a) ^ (self._zero << np.uint32(self._calls % 31 + 1)))
        return self._mark_zero(own * b + c, _is_zero(c) & (_is_zero(a) | _is_zero(b)))

    def where(self, mask: Mask, a: Value, b: Value) -> Value:
        return jnp.where(mask, a, b)

    def less(self, a: Value, b: Value) -> Mask:
        return a < b

    def is_nan(self, a: Value) -> Mask:
        return jnp.isnan(a)

    def wide(self, a: Value) -> Value:
        return a.astype(jnp.float64)

    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Value:
        rounded = self._mark_zero(self._guarded(a.astype(jnp.float32)), a == 0)
        if fmt is FLOAT32:
            return rounded
        odd = _odd_bits(a, rounded.astype(jnp.float64), _bits(rounded), jnp.where)
        return self.round_to(_float(odd), fmt)

    def wide_add(self, a: Value, b: Value) -> Value:
        return a + b

    def wide_multiply(self, a: Value, b: Value) -> Value:
        return _guarded64(a * b, self._zero)

    def wide_fma(self, a: Value, b: Value, c: Value) -> Value:
        return a * b + c

    def _widened(self, a: Value) -> Value:
        """Return a float64 value of which the compiler does not know that it is one of float32."""
        return _guarded64(a.astype(jnp.float64), self._zero)

    def _guarded(self, value: Value) -> Value:
        """Return a value that the compiler cannot connect with the operation that it came from."""
        return _float(_bits(value) ^ self._zero)


class Float64Operations:
    """Float32 arithmetic in float64 and integers; values are float64 JAX arrays of float32 values.

    No operand or result is ever a subnormal float64 or float32, so that flushing cannot touch it. Rounding
    a float64 result to float32 a second time is innocuous for + - * / and sqrt (53 >= 2 * 24 + 2; a
    subnormal quotient of float32 values lies at least 2^-49 of itself from any midpoint, a subnormal
    product or sum is exact in float64). Source: Figueroa, "When is double rounding innocuous?", 1995.

    Args:
        zero: a uint32 scalar that is 0 at run time and unknown to the compiler.
    """

    def __init__(self, zero: jax.Array):
        self._zero = zero

    def decode(self, patterns: Value, fmt: Format) -> Value:
        if fmt is FLOAT64:
            return lax.bitcast_convert_type(patterns, jnp.float64)
        return _float64_of_bits(widen_patterns(patterns, fmt))

    def encode(self, value: Value, fmt: Format) -> Value:
        if fmt is FLOAT64:
            return lax.bitcast_convert_type(value, jnp.uint64)
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
        return self._rounded(a + b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self._rounded(a - b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._rounded(a * b)

    def divide(self, a: Value, b: Value) -> Value:
        return self._rounded(a / b)

    def sqrt(self, a: Value) -> Value:
        return self._rounded(jnp.sqrt(a))

    def mkl_amd_sqrt(self, a: Value) -> Value:
        return _mkl_amd_sqrt(self, a, _take)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c once: the product is exact in float64, the sum is rounded to odd there."""
        total, error = _two_sum(a * b, c)
        bits = lax.bitcast_convert_type(total, jnp.int64)
        exponent = np.int64(0x7FF0000000000000)
        inexact = (error != 0) & (bits & 1 == 0) & (bits & exponent != exponent)
        step = jnp.where((error > 0) == (bits >= 0), 1, -1)
        return self._rounded(
            lax.bitcast_convert_type(jnp.where(inexact, bits + step, bits), jnp.float64)
        )

    def _rounded(self, value: Value) -> Value:
        """Round a float64 result to float32."""
        return _round64(value)

    def where(self, mask: Mask, a: Value, b: Value) -> Value:
        return jnp.where(mask, a, b)

    def less(self, a: Value, b: Value) -> Mask:
        return a < b

    def is_nan(self, a: Value) -> Mask:
        return jnp.isnan(a)

    def wide(self, a: Value) -> Value:
        return a

    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Value:
        bits = _bits_of_float64(a)
        if fmt is FLOAT32:
            return _float64_of_bits(bits)
        return self.round_to(
            _float64_of_bits(_odd_bits(a, _float64_of_bits(bits), bits, jnp.where)), fmt
        )

    def wide_add(self, a: Value, b: Value) -> Value:
        return a + b

    def wide_multiply(self, a: Value, b: Value) -> Value:
        return _guarded64(a * b, self._zero)

    def wide_fma(self, a: Value, b: Value, c: Value) -> Value:
        """Round a * b + c to float64 once, from products and sums that are each guarded."""
        return _wide_fma(
            a, b, c,
            lambda x: _guarded64(x, self._zero),
            lambda x: lax.bitcast_convert_type(x, jnp.int64),
            lambda x: lax.bitcast_convert_type(x, jnp.float64),
            jnp.where,
        )  # fmt: skip


class ExactOperations(Float64Operations):
    """The same formulas before any rounding: in float64 throughout, nothing narrowed.

    Products are kept from being fused with sums, so that every device gives the bits that NumPy's float64 does.
    """

    def round_to(self, value: Value, fmt: Format) -> Value:
        return value

    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Value:
        return a

    def multiply(self, a: Value, b: Value) -> Value:
        return _guarded64(a * b, self._zero)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.multiply(a, b) + c

    def wide_fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.multiply(a, b) + c

    def mkl_amd_sqrt(self, a: Value) -> Value:
        return self.sqrt(a)

    def _rounded(self, value: Value) -> Value:
        return value


#: A result below this is 2^-126 only after it was rounded to the spacing of subnormal numbers. x86 calls it tiny
#: all the same, since it rounds below 2^-126 to 24 bits.
_TINY = np.float64(2.0**-126 - 2.0**-151)


class FlushingNumpyOperations(NumpyOperations):
    """The host's float32 arithmetic with subnormal operands and results taken for zero, as XLA:CPU computes."""

    def add(self, a: Value, b: Value) -> Value:
        # Operands are multiples of 2^-149, so a tiny sum is exact.
        return self._flushed(super().add(self._flushed(a), self._flushed(b)))

    def subtract(self, a: Value, b: Value) -> Value:
        return self._flushed(super().subtract(self._flushed(a), self._flushed(b)))

    def multiply(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return self._rounded(self._wide(a) * self._wide(b))

    def divide(self, a: Value, b: Value) -> Value:
        with np.errstate(all="ignore"):
            return self._rounded(self._wide(a) / self._wide(b))

    def sqrt(self, a: Value) -> Value:
        return super().sqrt(self._flushed(a))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self._rounded(_fma_rounded_to_odd(*(self._wide(x) for x in (a, b, c))))

    def _wide(self, a: Value) -> Value:
        with np.errstate(all="ignore"):  # a signalling NaN
            return self._flushed(a).astype(np.float64)

    def _rounded(self, value: Value) -> Value:
        with np.errstate(all="ignore"):
            rounded = np.asarray(value, np.float64).astype(np.float32)
        zero = np.copysign(np.float32(0), rounded)
        return np.where(np.abs(value) < _TINY, zero, rounded)

    def _flushed(self, a: Value) -> Value:
        a = np.asarray(a, np.float32)
        return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


class FlushingFloat64Operations(Float64Operations):
    """As `FlushingNumpyOperations`, in float64 on any device."""

    def decode(self, patterns: Value, fmt: Format) -> Value:
        return self._zeroed(super().decode(patterns, fmt), _SMALLEST_NORMAL)

    def _rounded(self, value: Value) -> Value:
        return jnp.where(jnp.abs(value) < _TINY, self._zeroed(value, _TINY), _round64(value))

    def _zeroed(self, value: Value, limit: np.float64) -> Value:
        """Replace what is smaller than a limit by zero of its sign."""
        bits = lax.bitcast_convert_type(value, jnp.uint64) & np.uint64(1 << 63)
        zero = lax.bitcast_convert_type(bits, jnp.float64)
        return jnp.where(jnp.abs(value) < limit, zero, value)


def numpy_operations(*, flushes: bool = False) -> NumpyOperations:
    """Return the host's operations, with or without subnormal numbers."""
    return FlushingNumpyOperations() if flushes else NumpyOperations()


def approximates(device: Device) -> bool:
    """Tell whether XLA's float32 quotients and roots are approximations on a device.

    For NVIDIA's GPUs XLA asks for `div.full` and `sqrt.approx`; its float64 ones are correctly rounded.
    """
    return device.platform == "gpu"


def operations_of(
    formulation: Formulation,
    zero: jax.Array,
    *,
    flushes: bool = False,
    device: Device | None = None,
) -> Operations:
    """Return XLA's operations in a formulation.

    Args:
        formulation: which one.
        zero: as for `Float32Operations`.
        device: where quotients and roots are taken; none for formulas that take none.
        flushes: what is replayed took subnormal numbers for zero. In float32 there is nothing to do: these
            elements are marked in any case.
    """
    if formulation == "float32":
        return Float32Operations(zero, wide=device is not None and approximates(device))
    return FlushingFloat64Operations(zero) if flushes else Float64Operations(zero)


def compile_exactly(function: Callable, device: Device) -> Callable:
    """Compile without the passes that change the arithmetic that was written.

    On CPU, XLA's algebraic simplifier would turn a division by a broadcast scalar into a multiplication
    by its reciprocal (`HandleDivide` in XLA's algebraic_simplifier.cc).
    """
    return jax.jit(function, compiler_options=_cpu_options() if device.platform == "cpu" else None)


def kept(value: Value) -> Value:
    """Return a value that a program computes once and keeps in memory, however often it is used.

    XLA:CPU computes what several results or reductions have in common once for each of them, but where it ends in a
    division or a root. It respects a barrier, unless the pass that takes these away runs before it looks for what to
    compute together. Elsewhere the value is the same.
    """
    return lax.optimization_barrier(value)


@functools.cache
def _cpu_options() -> dict[str, Any]:
    """Return the options of `compile_exactly`: barriers are left in (see `kept`) where this XLA can run them."""
    # XLA uses half of AVX-512's width unless it is told otherwise; elsewhere the width is what there is.
    usual = {"xla_disable_hlo_passes": "algsimp", "xla_cpu_prefer_vector_width": 512}
    options = usual | {"xla_disable_hlo_passes": "algsimp,cse_barrier_expander"}
    program = jax.jit(lambda x: kept(x + 1) * 2, compiler_options=options)
    try:
        host = jax.local_devices(backend="cpu")[0]
        held = np.asarray(program(jax.device_put(np.arange(4, dtype=np.int32), host)))
    except Exception:  # XLA's, of another version
        return usual
    return options if held.tolist() == [2, 4, 6, 8] else usual


def any_bits(flags: jax.Array) -> jax.Array:
    """Combine all flags by bitwise or, in a program."""
    return lax.reduce(flags, flags.dtype.type(0), lax.bitwise_or, range(flags.ndim))


def combined(flags: jax.Array) -> int:
    """Combine the flags that a program returned, one or many."""
    return int(np.bitwise_or.reduce(np.asarray(flags), axis=None))


def _fma_rounded_to_odd(a: Value, b: Value, c: Value) -> Value:
    """Round a * b + c to odd in float64."""
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        total, error = _two_sum(product, np.asarray(c, np.float64))
        bits = np.asarray(total).view(np.int64)
        step = np.where((error > 0) == (bits >= 0), 1, -1)
        inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        return np.where(inexact, bits + step, bits).view(np.float64)


def _mkl_amd_sqrt(ops: Operations, a: Value, take: Callable[[Value, Value], Value]) -> Value:
    """Take the square root as Intel's MKL does on AMD processors: not correctly rounded.

    With an estimate y of 1 / sqrt(x), every operation rounded to float32 and none fused:

        s = x * y;  h = y / 2;  e = 1/2 - s * h;  s = s * e + s;  h = h * e + h;  r = (x - s * s) * h + s

    MKL takes the correctly rounded root where x is zero, subnormal, infinite, NaN, negative, or one of
    the 4096 largest numbers. Elsewhere the formula commutes with factors of 4 in x: it is evaluated on
    [1, 4), where no intermediate result is subnormal.

    Source: the kernel `sSqrt_EXHAynn` of MKL 2024.2, which is not documented; this restatement agrees
    with it for every pattern (`scripts/prove_square_root.py`). `mkl_sqrt` has the estimate.
    """
    bits = ops.patterns32(a)
    fraction = (bits - 0x3F800000) & 0x00FFFFFF
    estimate = take(reciprocal_root_steps(), fraction >> 11).astype(np.uint32)
    x = ops.decode(fraction + 0x3F800000, FLOAT32)
    y = ops.decode((estimate << 11) + 0x3F000000, FLOAT32)
    s, h, half = ops.multiply(x, y), ops.multiply(y, np.float32(0.5)), np.float32(0.5)
    e = ops.subtract(half, ops.multiply(s, h))
    s, h = ops.add(ops.multiply(s, e), s), ops.add(ops.multiply(h, e), h)
    r = ops.add(ops.multiply(ops.subtract(x, ops.multiply(s, s)), h), s)
    # Half of the exponent that was taken off; the bias keeps it from becoming negative.
    scaled = ops.patterns32(r) + ((bits - fraction) >> 1) - (0x3F800000 >> 1)
    refined = bits - 0x00800000 < 0x7F7FF000 - 0x00800000
    return ops.where(refined, ops.decode(scaled, FLOAT32), ops.sqrt(a))


def _odd_bits(
    value: Value, rounded: Value, bits: Value, where: Callable[[Mask, Value, Value], Value]
) -> Value:
    """Return the float32 bits of a float64 value rounded to odd, from those of its nearest float32.

    Rounding them once more, to 16 bits, is rounding the value (Boldo and Melquiond, as in `NumpyOperations.fma`).

    Args:
        value: float64.
        rounded: the nearest float32, as float64.
        bits: of it.
        where: of NumPy or JAX.
    """
    inexact = (rounded < value) | (rounded > value)  # false for NaN
    step = where(abs(value) > abs(rounded), np.uint32(1), np.uint32(0xFFFFFFFF))
    return where(inexact & (bits & np.uint32(1) == 0), bits + step, bits)


def _take(table: Value, index: Value) -> Value:
    return jnp.take(jnp.asarray(table), index, mode="clip")  # without the test for bounds


def _two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """Return the rounded sum and its exact rounding remainder (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _guarded64(value: Value, zero: Value) -> Value:
    """Return a float64 value that the compiler cannot connect with the operation that it came from."""
    bits = lax.bitcast_convert_type(value, jnp.uint64) ^ zero.astype(jnp.uint64)
    return lax.bitcast_convert_type(bits, jnp.float64)


def _wide_fma(
    a: Value,
    b: Value,
    c: Value,
    guarded: Callable[[Value], Value],
    to_bits: Callable[[Value], Value],
    from_bits: Callable[[Value], Value],
    where: Callable[[Mask, Value, Value], Value],
) -> Value:
    """Round a * b + c to float64 once.

    The product and its rounding error (Dekker), added to c with its error (Knuth): the sum of both errors is
    rounded to odd before it is added, so that the last rounding is that of the exact sum (Boldo and
    Melquiond, as in `NumpyOperations.fma`). Exact for normal results and products within 2^+-900, where the
    error of the product is no subnormal number; beyond, and for infinities and NaNs, the plain expression.
    """

    def split(x: Value) -> tuple[Value, Value]:
        large = guarded(x * 134217729.0)
        high = large - guarded(large - x)
        return high, x - high

    def product(x: Value, y: Value) -> Value:
        return guarded(x * y)

    high = product(a, b)
    (a1, a2), (b1, b2) = split(a), split(b)
    low = ((product(a1, b1) - high) + product(a1, b2) + product(a2, b1)) + product(a2, b2)
    upper, upper_error = _two_sum(c, low)
    total, total_error = _two_sum(high, upper)
    rest, rest_error = _two_sum(upper_error, total_error)
    bits = to_bits(rest)
    odd = (rest_error != 0) & (bits & 1 == 0)
    step = where((rest_error > 0) == (bits >= 0), 1, -1)
    exact = total + from_bits(where(odd, bits + step, bits))
    plain = high + c
    usual = (abs(plain) < 2.0**900) & (abs(high) < 2.0**900) & (abs(high) > 2.0**-900)
    return where(usual & (abs(a) < 2.0**900) & (abs(b) < 2.0**900), exact, plain)


def narrow_patterns(patterns: Value, fmt: Format) -> Value:
    """Round float32 patterns to patterns of `fmt`, to nearest with ties to even."""
    return _narrow(_round_bits(patterns, fmt), fmt)


def _is_zero(value: Value) -> Mask:
    return _bits(value) << 1 == 0


def _is_infinite(value: Value) -> Mask:
    return _bits(value) & np.uint32(0x7FFFFFFF) == FLOAT32.infinity


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
