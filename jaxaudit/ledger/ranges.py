# ruff: noqa: D102  (the methods are those of `operations.Operations`)
"""Which operations of a formula can meet a subnormal number at all, for inputs of ordinary size.

`Float32Operations` looks at every result, since a device that flushes subnormal numbers gives zero for them. Most of
these looks are in vain: where inputs are zero or of ordinary size, a bound on each result shows it. A formula is run
once on such bounds; what they leave open is looked at as ever, and inputs and stored results are tested for their
size.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format
from jaxaudit.operations import Float32Operations, Mask, Value

#: Exponents between which an ordinary number of each tensor lies, where it is not zero. Second moments are not
#: negative.
ORDINARY = {
    "grad": (-52, 12),
    "exp_avg": (-56, 12),
    "exp_avg_sq": (-112, 20),
    "max_exp_avg_sq": (-112, 20),
    "param": (-60, 12),
    "compensation": (-90, 12),
}

_POSITIVE = ("exp_avg_sq", "max_exp_avg_sq")

#: Below this a float32 result may be subnormal; and what one rounding changes at most, generously.
_LEAST, _SLACK = 2.0**-125, 1 + 2.0**-6


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """What is known of a value: it is zero, or its size is within bounds.

    Attributes:
        low: smallest size of a value that is not zero; infinity where it is always zero.
        high: largest size.
        grain: every value is an integer multiple of this power of two.
        sign: what the signs of are multiplied to its sign: nothing for a value that is not negative, and something
            of its own for one of which nothing is known.
    """

    low: float
    high: float
    grain: float
    sign: frozenset[Any]

    def within(self, other: "Range") -> "Range":
        """Return what is known of a value that lies within another range too."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Range(low, high, max(self.grain, other.grain), self.sign)

    def __ne__(self, other: object) -> Any:  # a mask; see `RangeOperations.where`
        return True


def ordinary(name: str, fmt: Format) -> Range:
    """Return the range of an ordinary tensor in a format."""
    low, high = (math.ldexp(1, e) for e in ORDINARY[name])
    sign = frozenset() if name in _POSITIVE else _unknown()
    return Range(low, high, low * 2.0**-fmt.significand_bits, sign)


def of_scalar(low: float, high: float, positive: bool | None, bits: int = 23) -> Range:
    """Return the range of a scalar that lies within bounds of its size where it is not zero.

    Args:
        low: smallest size; infinity for a scalar that is always zero.
        high: largest size.
        positive: its sign; None where it has either.
        bits: of its significand, without the hidden one.
    """
    grain = _ulp(low, bits) if low < math.inf else 1.0
    sign = _unknown() if positive is None else frozenset() if positive else frozenset({"minus"})
    return Range(low, high, grain, sign)


def _unknown() -> frozenset[Any]:
    return frozenset({object()})


def _ulp(size: float, bits: int) -> float:
    """Return the last place of the smallest number of a range; 2^-1022 where there is nothing to be known."""
    if not 2.0**-900 < size < 2.0**900:
        return 2.0**-1022
    return math.ldexp(1, math.frexp(size)[1] - 1 - bits)


def _range(value: Any) -> Range:
    if isinstance(value, Range):
        return value
    size = abs(float(value))
    return of_scalar(size or math.inf, size, bool(value >= 0))


class RangeOperations:
    """Bounds instead of numbers.

    Attributes:
        unproven: numbers, in order, of the operations whose float32 result may be subnormal.
    """

    def __init__(self) -> None:
        self.unproven: set[int] = set()
        self._calls = 0

    def _result(self, low: float, high: float, grain: float, sign: frozenset[Any]) -> Range:
        """Round a result to float32, and note whether it may be subnormal."""
        low = max(low, grain)
        if low < _LEAST:
            self.unproven.add(self._calls)
            low = 2.0**-149
        self._calls += 1
        return Range(low / _SLACK, high * _SLACK, max(grain, _ulp(low / _SLACK, 23)), sign)

    def round_to(self, value: Value, fmt: Format) -> Range:
        a = _range(value)
        least = 2.0**-24 if fmt is FLOAT16 else 0.0
        grain = max(a.grain, _ulp(a.low / _SLACK, fmt.significand_bits), least)
        return Range(max(a.low / _SLACK, least), a.high * _SLACK, grain, a.sign)

    def negate(self, a: Value) -> Range:
        x = _range(a)
        return Range(x.low, x.high, x.grain, x.sign ^ frozenset({"minus"}))

    def add(self, a: Value, b: Value) -> Range:
        return self._result(*self._sum(_range(a), _range(b)))

    def subtract(self, a: Value, b: Value) -> Range:
        return self._result(*self._sum(_range(a), self.negate(b)))

    def multiply(self, a: Value, b: Value) -> Range:
        product = self._product(_range(a), _range(b))
        return self._result(product.low, product.high, product.grain, product.sign)

    def divide(self, a: Value, b: Value) -> Range:
        x, y = _range(a), _range(b)
        low, high = x.low / max(y.high, 2.0**-1000), x.high / max(min(y.low, 2.0**1000), 2.0**-1000)
        return self._result(low, high, 0.0, _product_sign(x, y))

    def sqrt(self, a: Value) -> Range:
        x = _range(a)
        low = math.sqrt(x.low) / _SLACK
        return Range(low, math.sqrt(x.high) * _SLACK, _ulp(low, 23), frozenset())

    mkl_amd_sqrt = sqrt

    def fma(self, a: Value, b: Value, c: Value) -> Range:
        x, y, z = _range(a), _range(b), _range(c)
        if b is c and x.low == x.high and x.sign == frozenset({"minus"}) and x.high < 1:
            return self._result(y.low * (1 - x.high), y.high, y.grain * x.grain, y.sign)
        return self._result(*self._sum(self._product(x, y), z))

    def where(self, mask: Mask, a: Value, b: Value) -> Range:
        x, y = _range(a), _range(b)
        sign = x.sign if x.sign == y.sign else _unknown()
        return Range(min(x.low, y.low), max(x.high, y.high), min(x.grain, y.grain), sign)

    def less(self, a: Value, b: Value) -> Mask:
        return True

    def is_nan(self, a: Value) -> Mask:
        return False

    def wide(self, a: Value) -> Range:
        return _range(a)

    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Range:
        x = _range(a)
        return self.round_to(self._result(x.low, x.high, x.grain, x.sign), fmt)

    def wide_add(self, a: Value, b: Value) -> Range:
        return self._wide(*self._sum(_range(a), _range(b)))

    def wide_multiply(self, a: Value, b: Value) -> Range:
        x = self._product(_range(a), _range(b))
        return self._wide(x.low, x.high, x.grain, x.sign)

    def wide_fma(self, a: Value, b: Value, c: Value) -> Range:
        return self._wide(*self._sum(self._product(_range(a), _range(b)), _range(c)))

    def _wide(self, low: float, high: float, grain: float, sign: frozenset[Any]) -> Range:
        low = max(low, grain) / _SLACK
        return Range(low, high * _SLACK, max(grain, _ulp(low, 52)), sign)

    def _product(self, x: Range, y: Range) -> Range:
        if math.inf in (x.low, y.low):
            return Range(math.inf, 0.0, 1.0, frozenset())
        return Range(x.low * y.low, x.high * y.high, x.grain * y.grain, _product_sign(x, y))

    def _sum(self, x: Range, y: Range) -> tuple[float, float, float, frozenset[Any]]:
        """Bound a sum: without cancellation where both have the same sign."""
        for one, other in ((x, y), (y, x)):
            if one.low == math.inf:
                return other.low, other.high, other.grain, other.sign
        grain, high = min(x.grain, y.grain), x.high + y.high
        if x.sign == y.sign:
            return min(x.low, y.low), high, grain, x.sign
        return grain, high, grain, _unknown()


def _product_sign(x: Range, y: Range) -> frozenset[Any]:
    return x.sign ^ y.sign


class SparingOperations(Float32Operations):
    """XLA's float32 instructions, of whose results only those are looked at that bounds do not settle.

    Args:
        zero: as for `Float32Operations`.
        unproven: numbers of these operations, from `RangeOperations`.
        wide: as for `Float32Operations`.
    """

    def __init__(self, zero: jax.Array, unproven: frozenset[int], *, wide: bool = False):
        super().__init__(zero, wide=wide)
        self._unproven, self._number, self._looks = unproven, 0, True

    def _mark_zero(self, result: Value, *expected: Mask) -> Value:
        if self._looks:
            self._number += 1
            if self._number - 1 in self._unproven:
                return super()._mark_zero(result, *expected)
        return result

    def mkl_amd_sqrt(self, a: Value) -> Value:
        self._looks = False  # nothing in it is subnormal
        root = super().mkl_amd_sqrt(a)
        self._looks = True
        return root

    def stored(self, value: Value, fmt: Format) -> Value:
        """Return the patterns of a value that a format holds; NaNs mean nothing, as they are marked."""
        if fmt is not BFLOAT16:
            return self.encode(value, fmt)
        return (lax.bitcast_convert_type(value, np.uint32) >> 16).astype(np.uint16)

    def watch_size(self, value: Value, name: str) -> None:
        """Mark a tensor's elements that are not ordinary."""
        low, high = (np.uint32((127 + e) << 23) for e in ORDINARY[name])
        bits = lax.bitcast_convert_type(value, np.uint32)
        size = bits if name in _POSITIVE else bits & np.uint32(0x7FFFFFFF)
        self._mark((size - low >= high - low) & (bits << 1 != 0))


class Envelope:
    """Bounds on scalars, wide enough for steps to come.

    Attributes:
        bounds: of each scalar: its smallest size that is not zero, its largest size, and whether it is positive.
    """

    #: By how much the bounds of a scalar that changes are widened.
    MARGIN = 2.0**8

    def __init__(self) -> None:
        self.bounds: dict[Any, tuple[float, float, bool | None]] = {}
        self._doubles: set[Any] = set()

    def holds(self, name: Any, values: Any) -> bool:
        """Tell whether values of a scalar lie within the bounds; widen these where they do not."""
        sizes = np.abs(np.asarray(values, np.float64))
        usual = sizes[(sizes > 0) & np.isfinite(sizes)]
        low, high = (float(usual.min()), float(usual.max())) if usual.size else (math.inf, 0.0)
        negative = bool(np.any(np.asarray(values) < 0))
        positive = None if negative and bool(np.any(np.asarray(values) > 0)) else not negative
        known = self.bounds.get(name)
        if np.asarray(values).dtype == np.float64:
            self._doubles.add(name)
        if known is None:
            self.bounds[name] = self._widened(low, high, positive)
            return False
        if known[0] <= low and high <= known[1] and (known[2] in (None, positive) or not high):
            return True
        sign = positive if positive is known[2] else None
        self.bounds[name] = self._widened(min(low, known[0]), max(high, known[1]), sign)
        return False

    def ranges(self) -> dict[Any, Range]:
        """Return each scalar's range."""
        return {
            name: of_scalar(*bounds, 52 if name in self._doubles else 23)
            for name, bounds in self.bounds.items()
        }

    def _widened(
        self, low: float, high: float, positive: bool | None
    ) -> tuple[float, float, bool | None]:
        if low == high:
            return low, high, positive
        return low / self.MARGIN, high * self.MARGIN, positive
