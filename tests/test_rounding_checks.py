"""The operations of the rounding certificate, as they are written down."""

from fractions import Fraction

import jax
import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.floats import FLOAT32
from jaxaudit.rounding import exact, operands
from jaxaudit.rounding.certificate import ieee
from jaxaudit.rounding.checks import all_checks
from jaxaudit.rounding.modes import JaxNotation, formulated_in_numpy

PLATFORMS = ["cpu", "cuda"]
CHECKS = {f"{p}: {check.name}": check for p in PLATFORMS for check in all_checks(p)}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_names_are_unique_and_can_be_listed_between_commas(platform):
    names = [check.name for check in all_checks(platform)]
    assert len(set(names)) == len(names) > 80
    assert not any("," in name for name in names)


def test_every_part_of_the_certificate_is_there():
    names = [check.name for check in all_checks("cpu")]
    for fmt in ("bfloat16", "float16"):
        for unary in ("sqrt", "rsqrt", "reciprocal", "negate", "absolute", "square"):
            assert f"{fmt} {unary}" in names
    for fmt in ("bfloat16", "float32"):
        for binary in ("add", "subtract", "multiply", "divide"):
            assert f"{fmt} {binary}" in names
        for part in ("lerp", "addcmul", "addcdiv", "multiply by a scalar", "add a scalar"):
            assert f"{fmt} {part}" in names and f"{fmt} foreach {part}" in names
        for stage in ("exp_avg", "exp_avg_sq", "param"):
            assert f"{fmt} Adam: {stage}" in names
    for pair in (
        "float32 to bfloat16",
        "float32 to float16",
        "float64 to float32",
        "float64 to bfloat16",
    ):
        assert pair in names


@pytest.mark.parametrize("name", CHECKS)
def test_the_neutral_operands_give_zero(name):
    """So that a sum over a result and this one is the result."""
    check = CHECKS[name]
    neutral = [
        np.array([v]).astype(f.value_dtype)
        for v, f in zip(check.neutral, check.formats, strict=True)
    ]
    with jax.enable_x64(True), np.errstate(all="ignore"):
        written = check.natural(JaxNotation(), *map(jax.numpy.asarray, neutral))
        assert float(np.asarray(written).astype(np.float64)[0]) == 0
        assert written.dtype == check.result.value_dtype


#: 2^32 patterns or pairs, and what else a full certificate tries of these.
EXHAUSTIVE = {
    "float32 to bfloat16", "float32 to float16", "float32 to float64", "float32 sqrt",
    "float32 to bfloat16 and back", "float32 to float16 and back",
    "bfloat16 add", "bfloat16 subtract", "bfloat16 multiply", "bfloat16 divide",
}  # fmt: skip


def test_a_full_certificate_tries_all_operands_where_that_is_promised():
    for check in all_checks("cpu"):
        full, quick = check.full(), check.quick()
        assert len(full.block(0)) == len(check.formats) and quick.count <= full.count
        shapes = {p.shape for p in (*full.block(0), *quick.block(0))}
        assert len(shapes) == 1, "programs are compiled once for both"
        if check.name in EXHAUSTIVE:
            assert full.count == 1 << 32 and full.coverage.startswith("all 4,294,967,296")
        elif check.formats == (FLOAT32, FLOAT32) and check.family == "binary":
            assert full.count == 1 << 30
        elif len(check.formats) == 1 and check.formats[0].width == 16:
            assert full.coverage == "all 65,536 patterns"
        else:
            assert full.count >= 1 << 19


def rational(check, values):
    """Evaluate the formulas of PyTorch's CUDA kernels in fractions, rounding where they say."""
    c = Fraction(float(check.scalars["c"]))
    single = lambda x: rounded(x, FLOAT32)  # noqa: E731
    x = [Fraction(v) for v in values]
    return {
        "addcmul": lambda: single(c * single(x[1] * x[2]) + x[0]),
        "addcdiv": lambda: single(c * single(x[1] / x[2]) + x[0]),
        "lerp": lambda: single(c * single(x[1] - x[0]) + x[0]),
        "add a multiple": lambda: single(c * x[1] + x[0]),
        "divide by a scalar": lambda: single(x[0] * c),
    }[check.name.split(" ", 1)[1].removeprefix("foreach ")]()


def rounded(value, fmt):
    """Round a fraction to a format whose range it does not leave."""
    exponent = -200
    while abs(value) >= Fraction(2) ** (exponent + fmt.significand_bits + 1):
        exponent += 1
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


@pytest.mark.parametrize("fmt", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "part", ["addcmul", "addcdiv", "lerp", "add a multiple", "divide by a scalar"]
)
def test_formulas_of_cuda_kernels_round_where_they_say(fmt, part):
    check = CHECKS[f"cuda: {fmt} {part}"]
    rng = np.random.default_rng(4)
    values = np.ldexp(1 + rng.random((len(check.formats), 300)), rng.integers(-8, 8, 300))
    values = (values * rng.choice([-1, 1], values.shape)).astype(np.float32)
    patterns = [floats.encode(v, check.result) for v in values]
    numbers = [floats.decode(p, check.result).astype(float).tolist() for p in patterns]
    expected = [rounded(rational(check, row), check.result) for row in zip(*numbers, strict=True)]
    found = floats.decode(formulated_in_numpy(check, patterns), check.result)
    assert [Fraction(float(v)) for v in found] == expected


@pytest.mark.parametrize("name", [n for n, c in CHECKS.items() if c.exact and n.startswith("cpu")])
def test_the_formula_is_the_exact_operation(name):
    """NumPy's float32 arithmetic against the oracle, which has none."""
    check = CHECKS[name]
    given = check.quick().block(0)
    wanted = ieee(check, given).patterns
    found = formulated_in_numpy(check, given)
    nans = floats.is_nan(found, check.result) & floats.is_nan(wanted, check.result)
    wrong = (found != wanted) & ~nans
    assert not wrong.any(), [hex(p[wrong][0]) for p in (*given, wanted, found)]


def test_composed_operations_are_not_said_to_be_single_ones():
    for check in all_checks("cpu"):
        assert bool(check.exact) == (
            check.family in ("casts", "unary", "binary") or "sqrt" in check.name
        )
        assert not check.exact or check.exact in exact.EXACT


def test_operands_differ_between_blocks_and_not_between_calls():
    check = CHECKS["cpu: float32 lerp"]
    one, other = check.full(), check.full()
    np.testing.assert_array_equal(one.block(3)[0], other.block(3)[0])
    assert (one.block(3)[0] != one.block(4)[0]).any()
    assert operands.BLOCK == one.block(0)[0].size
