"""Floating-point formats as bit patterns: decoding, rounding, and distance in ulp, in NumPy.

bfloat16 and float16 values are held as `uint16` bit patterns, float32 values as `uint32` and float64 values
as `uint64` ones, so that nothing between the file and the arithmetic can round them. Everything here is exact for every pattern:
normal, subnormal, signed zero, infinity and NaN.
"""

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FormatName = Literal["bfloat16", "float16", "float32", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A binary interchange format of at most 64 bits.

    Attributes:
        name: as NumPy, JAX and PyTorch call it.
        safetensors: the dtype string of a safetensors header.
        exponent_bits: width of the exponent field.
        significand_bits: width of the stored significand, without the hidden bit.
    """

    name: FormatName
    safetensors: str
    exponent_bits: int
    significand_bits: int

    @property
    def width(self) -> int:
        """Bits of one value."""
        return 1 + self.exponent_bits + self.significand_bits

    @property
    def bytes(self) -> int:
        """Bytes of one value."""
        return self.width // 8

    @property
    def pattern_dtype(self) -> np.dtype:
        """Unsigned integer dtype that holds one bit pattern."""
        return np.dtype(f"uint{self.width}")

    @property
    def value_dtype(self) -> np.dtype:
        """Floating-point dtype of the decoded value."""
        return np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(self.name, self.name))

    @property
    def bias(self) -> int:
        """What is added to an exponent to store it, which is also the largest exponent of a finite number."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def sign_bit(self) -> int:
        """Pattern of -0."""
        return 1 << (self.width - 1)

    @property
    def infinity(self) -> int:
        """Pattern of +infinity."""
        return ((1 << self.exponent_bits) - 1) << self.significand_bits


BFLOAT16 = Format(name="bfloat16", safetensors="BF16", exponent_bits=8, significand_bits=7)
FLOAT16 = Format(name="float16", safetensors="F16", exponent_bits=5, significand_bits=10)
FLOAT32 = Format(name="float32", safetensors="F32", exponent_bits=8, significand_bits=23)
FLOAT64 = Format(name="float64", safetensors="F64", exponent_bits=11, significand_bits=52)

#: Every format in which a parameter may be stored, by the dtype string of a safetensors header.
FORMATS = {fmt.safetensors: fmt for fmt in (BFLOAT16, FLOAT16, FLOAT32)}

Patterns = NDArray[np.unsignedinteger]


def decode(patterns: Patterns, fmt: Format) -> NDArray[Any]:
    """Widen bit patterns to the float32 values they stand for (exact for every pattern); float64 ones stay."""
    if fmt in (FLOAT32, FLOAT64):
        return np.ascontiguousarray(patterns, fmt.pattern_dtype).view(fmt.value_dtype)
    if fmt is BFLOAT16:
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(patterns, np.uint16).view(np.float16).astype(np.float32)


def encode(values: NDArray[np.float32], fmt: Format) -> Patterns:
    """Round float32 values to `fmt`, to nearest with ties to even, and return the bit patterns.

    float64 takes every value as it is.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        given = np.ascontiguousarray(values, None if fmt is FLOAT64 else np.float32)
        narrowed = given.astype(fmt.value_dtype)
    return narrowed.view(fmt.pattern_dtype)


def round_to(values: NDArray[np.float32], fmt: Format) -> NDArray[np.float32]:
    """Round float32 values to `fmt`, to nearest with ties to even; the dtype stays float32."""
    return values if fmt is FLOAT32 else decode(encode(values, fmt), fmt)


def round_scalar(value: float, fmt: Format) -> np.floating:
    """Round a Python float the way PyTorch rounds a scalar operand: to float32, then to `fmt`; float64 keeps it.

    Source: `c10::Scalar::to<c10::BFloat16>` converts through float, so that the value is rounded twice.
    """
    if fmt is FLOAT64:
        return np.float64(value)
    with np.errstate(over="ignore", under="ignore"):
        return round_to(np.array([value], np.float64).astype(np.float32), fmt)[0]


def is_nan(patterns: Any, fmt: Format) -> Any:
    """Tell which patterns are NaNs, whatever their payload."""
    return (patterns & (fmt.sign_bit - 1)) > fmt.infinity


def differ(a: Any, b: Any, fmt: Format = FLOAT32) -> Any:
    """Tell which patterns differ, all NaNs being alike; NumPy and JAX arrays alike."""
    return (a != b) & ~(is_nan(a, fmt) & is_nan(b, fmt))


def is_nonfinite(patterns: Patterns, fmt: Format) -> NDArray[np.bool_]:
    """Tell which patterns are NaNs or infinities."""
    return (patterns & (fmt.sign_bit - 1)) >= fmt.infinity


def ordered(patterns: Patterns, fmt: Format) -> NDArray[np.int64]:
    """Place patterns on the line of integers on which neighbouring values are 1 apart.

    Both zeros are 0; infinity follows the largest finite value; every NaN lies one step beyond the
    infinity of the positive side, so that a NaN is 0 from a NaN and far from everything else.
    """
    magnitude = (patterns & (fmt.sign_bit - 1)).astype(np.int64)
    line = np.where(patterns >= fmt.sign_bit, -magnitude, magnitude)
    return np.where(magnitude > fmt.infinity, fmt.infinity + 1, line)


def ulp_distance(a: Patterns, b: Patterns, fmt: Format) -> NDArray[np.int64]:
    """Count the steps between two patterns on the ordered line of `fmt`."""
    return np.abs(ordered(a, fmt) - ordered(b, fmt))
