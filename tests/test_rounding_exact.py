"""The oracle of a rounding certificate against exact rationals, and against the host's own float32."""

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from jaxaudit.rounding import exact

NARROW = [BFLOAT16, FLOAT16]
ALL = [*NARROW, FLOAT32]
CODES = np.arange(1 << 16, dtype=np.uint16)
SIDES = {"below": -1, "midway": 0, "above": 1}


def by_name(x):
    return getattr(x, "name", str(x))


# A slow reference, which shares nothing with what it judges. A value is (negative, size), or None for NaN; the
# size is a Fraction or math.inf.


def bias(fmt):
    return 2 ** (fmt.exponent_bits - 1) - 1


def value_of(pattern, fmt):
    pattern = int(pattern)
    fraction = pattern % 2**fmt.significand_bits
    exponent = pattern // 2**fmt.significand_bits % 2**fmt.exponent_bits
    negative = pattern >= 2 ** (fmt.width - 1)
    if exponent == 2**fmt.exponent_bits - 1:
        return None if fraction else (negative, math.inf)
    significand = fraction + (2**fmt.significand_bits if exponent else 0)
    return negative, significand * power(max(exponent, 1) - bias(fmt) - fmt.significand_bits)


def power(exponent):
    return Fraction(2**exponent) if exponent >= 0 else Fraction(1, 2**-exponent)


def quiet_nan(fmt):
    return 2**fmt.width // 2 - 2 ** (fmt.significand_bits - 1)


def reference(value, fmt):
    """Return the pattern of the nearest number, whether it is a tie, and whether it is tiny."""
    if value is None:
        return quiet_nan(fmt), False, False
    negative, size = value
    top = (2**fmt.exponent_bits - 1) * 2**fmt.significand_bits
    pattern, tie, tiny = (top, False, False) if size == math.inf else nearest(size, fmt)
    return negative * 2 ** (fmt.width - 1) + min(pattern, top), tie, tiny


def nearest(size, fmt):
    if size == 0:
        return 0, False, False
    least = 1 - bias(fmt)
    over, under = size.as_integer_ratio()
    exponent = over.bit_length() - under.bit_length()
    exponent -= over << max(-exponent, 0) < under << max(exponent, 0)
    binade = max(exponent, least)
    shift = fmt.significand_bits - binade
    over, under = over << max(shift, 0), under << max(-shift, 0)
    steps, rest = divmod(over, under)
    tie = 2 * rest == under
    steps += steps % 2 if tie else 2 * rest > under
    pattern = (binade - least) * 2**fmt.significand_bits + steps
    return pattern, tie and binade <= bias(fmt), exponent < least


def plus(x, y):
    if x is None or y is None or (x[1] == y[1] == math.inf and x[0] != y[0]):
        return None
    if math.inf in (x[1], y[1]):
        return x if x[1] == math.inf else y
    total = (-x[1] if x[0] else x[1]) + (-y[1] if y[0] else y[1])
    return (total < 0 if total else x[0] and y[0]), abs(total)


def minus(x, y):
    return plus(x, opposite(y))


def times(x, y):
    if x is None or y is None or {x[1], y[1]} == {0, math.inf}:
        return None
    infinite = math.inf in (x[1], y[1])
    return x[0] != y[0], math.inf if infinite else x[1] * y[1]


def over(x, y):
    if x is None or y is None or (x[1] == y[1] and x[1] in (0, math.inf)):
        return None
    if x[1] == math.inf or y[1] == 0:
        return x[0] != y[0], math.inf
    return x[0] != y[0], Fraction(0) if y[1] == math.inf else x[1] / y[1]


def root(x):
    """Return a square root, or where it is irrational a number between the same multiples of 2^-300."""
    if x is None or (x[0] and x[1]):
        return None
    if x[1] in (0, math.inf):
        return x
    scaled, rest = divmod(x[1].numerator << 600, x[1].denominator)
    whole = math.isqrt(scaled)
    irrational = rest != 0 or whole * whole != scaled
    return False, Fraction(2 * whole + irrational, 1 << 301)


def one_over(x):
    return over((False, Fraction(1)), x)


def one_over_root(x):
    if x is None or (x[0] and x[1]):
        return None
    return root(one_over(x)) if x[1] else one_over(x)


def opposite(x):
    return x and (not x[0], x[1])


REFERENCES = {
    "add": plus,
    "subtract": minus,
    "multiply": times,
    "divide": over,
    "sqrt": root,
    "rsqrt": one_over_root,
    "reciprocal": one_over,
    "square": lambda x: times(x, x),
    "negate": opposite,
    "absolute": lambda x: x and (False, x[1]),
    "same": lambda x: x,
}
BINARY = ["add", "subtract", "multiply", "divide"]


def assert_rounds_as_reference(name, operands, fmt, result_fmt):
    """Compare an operation on patterns with the reference: patterns, ties and tiny results."""
    result = exact.rounded(
        exact.EXACT[name](*(exact.decode64(x, fmt) for x in operands)), result_fmt
    )
    expected = [
        reference(REFERENCES[name](*(value_of(p, fmt) for p in patterns)), result_fmt)
        for patterns in zip(*operands, strict=True)
    ]
    assert_found(result, expected, result_fmt)


def assert_found(result, expected, fmt):
    patterns, ties, tiny = zip(*expected, strict=True)
    np.testing.assert_array_equal(result.patterns, np.array(patterns, fmt.pattern_dtype))
    np.testing.assert_array_equal(result.tie, ties)
    np.testing.assert_array_equal(result.tiny, tiny)
    assert result.patterns.dtype == fmt.pattern_dtype


# Operands


def edges(fmt):
    """Return both signs of the patterns at which something changes."""
    one, least, top = bias(fmt) << fmt.significand_bits, 1 << fmt.significand_bits, fmt.infinity
    sizes = {0, 1, 2, 3, least // 2, quiet_nan(fmt), top, top + 1, top - 1}
    sizes |= {p + d for p in (least, 2 * least, one, one + least, top - least) for d in (-1, 0, 1)}
    sizes |= {top - 2, fmt.sign_bit - 1}
    patterns = np.array(sorted(sizes), fmt.pattern_dtype)
    return np.concatenate([patterns, patterns | fmt.sign_bit])


def random_patterns(rng, fmt, count):
    return rng.integers(0, 1 << fmt.width, count, dtype=np.uint64).astype(fmt.pattern_dtype)


def short_patterns(rng, fmt, count):
    """Return patterns with half of the significand bits, whose products and sums are often ties."""
    kept = -1 << fmt.significand_bits // 2
    return random_patterns(rng, fmt, count) & (kept % (1 << fmt.width))


def near(rng, patterns, fmt, binades):
    """Return patterns of a random sign a few binades away, of few bits or one: ties and cancellations."""
    exponents = (patterns & fmt.infinity) >> fmt.significand_bits
    moved = exponents.astype(np.int64) + rng.integers(-binades, binades + 1, len(patterns))
    moved = moved.clip(0, 2**fmt.exponent_bits - 2).astype(fmt.pattern_dtype)
    bits = rng.choice(np.array([0, 0, 1, 2, -1]), len(patterns)) % (1 << fmt.significand_bits)
    signs = rng.integers(0, 2, len(patterns)).astype(fmt.pattern_dtype) << (fmt.width - 1)
    return (moved << fmt.significand_bits) | bits.astype(fmt.pattern_dtype) | signs


def pairs(fmt, seed):
    rng = np.random.default_rng(seed)
    edge = edges(fmt)
    a, b = (x.reshape(-1) for x in np.meshgrid(edge, edge))
    firsts = [
        a,
        *(random_patterns(rng, fmt, 500) for _ in range(2)),
        short_patterns(rng, fmt, 1500),
    ]
    seconds = [
        b,
        random_patterns(rng, fmt, 500),
        rng.choice(edge, 500),
        short_patterns(rng, fmt, 1500),
    ]
    for reach in (3, fmt.significand_bits + 3):
        firsts.append(random_patterns(rng, fmt, 700))
        seconds.append(near(rng, firsts[-1], fmt, reach))
    firsts.append(random_patterns(rng, fmt, 100))
    seconds.append(firsts[-1] ^ fmt.sign_bit)  # cancels
    return np.concatenate(firsts), np.concatenate(seconds)


def midpoints(fmt, count, seed):
    """Return midpoints of neighbouring numbers in float64, at edges and at random, of either sign."""
    rng = np.random.default_rng(seed)
    lower = np.concatenate([edges(fmt), random_patterns(rng, fmt, count)]) & (fmt.sign_bit - 1)
    lower = lower[lower < fmt.infinity]
    # The line of patterns goes on beyond the largest finite number for a format with one more exponent bit.
    above = [value_of(p + 1, fmt)[1] for p in lower.tolist()]
    above = [power(bias(fmt) + 1) if x == math.inf else x for x in above]
    sizes = [float((value_of(p, fmt)[1] + x) / 2) for p, x in zip(lower, above, strict=True)]
    return np.array(sizes) * rng.choice([-1.0, 1.0], len(sizes))


# Tests


@pytest.mark.parametrize("fmt", ALL, ids=by_name)
def test_decoding_is_exact(fmt):
    rng = np.random.default_rng(0)
    patterns = CODES if fmt.width == 16 else np.append(edges(fmt), random_patterns(rng, fmt, 20000))
    for pattern, found in zip(patterns, exact.decode64(patterns, fmt).tolist(), strict=True):
        expected = value_of(pattern, fmt)
        if expected is None:
            assert math.isnan(found)
        else:
            assert abs(found) == expected[1] and (math.copysign(1, found) < 0) == expected[0]


def test_float64_is_decoded_by_its_bits():
    patterns = edges(FLOAT64)
    np.testing.assert_array_equal(exact.decode64(patterns, FLOAT64).view(np.uint64), patterns)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(
    ("fmt", "result_fmt"),
    [
        (BFLOAT16, BFLOAT16),
        (FLOAT16, FLOAT16),
        (FLOAT32, FLOAT32),
        (FLOAT32, FLOAT16),
        (BFLOAT16, FLOAT32),
    ],
    ids=by_name,
)
def test_binary_operations_round_as_rationals(name, fmt, result_fmt):
    assert_rounds_as_reference(name, pairs(fmt, 1), fmt, result_fmt)


@pytest.mark.parametrize("fmt", ALL, ids=by_name)
def test_operands_meet_every_kind_of_result(fmt):
    """Guards the test above: ties, tiny ties and overflow are among its results."""
    a, b = (exact.decode64(x, fmt) for x in pairs(fmt, 1))
    for name in ("add", "multiply"):
        result = exact.rounded(exact.EXACT[name](a, b), fmt)
        assert result.tie.sum() > 100
    for name in ("multiply", "divide"):
        result = exact.rounded(exact.EXACT[name](a, b), fmt)
        assert (result.tie & result.tiny).sum() > 5
        finite = np.isfinite(a) & np.isfinite(b) & (b != 0)
        assert ((result.patterns & fmt.infinity == fmt.infinity) & finite).sum() > 100


@pytest.mark.parametrize("fmt", ALL, ids=by_name)
def test_quotients_beside_midpoints_round_as_rationals(fmt):
    """Quotients of the numbers that are nearest to the product of a midpoint and a divisor."""
    rng = np.random.default_rng(2)
    middle = midpoints(fmt, 3000, 3)
    divisors = random_patterns(rng, fmt, len(middle))
    divisors[::3] = near(
        rng, np.full(len(divisors[::3]), bias(fmt) << fmt.significand_bits), fmt, 9
    )
    with np.errstate(all="ignore"):
        products = exact.rounded(middle * exact.decode64(divisors, fmt), fmt).patterns
    assert_rounds_as_reference("divide", (products, divisors), fmt, fmt)


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_float32_roots_beside_midpoints_round_as_rationals(step):
    """Roots of the numbers that are nearest to the square of a midpoint, and of their neighbours."""
    middle = midpoints(FLOAT32, 3000, 4)
    squares = exact.rounded(middle * middle, FLOAT32).patterns
    squares = np.append(edges(FLOAT32), (squares + np.uint32(step % 2**32)) & 0x7FFFFFFF)
    assert_rounds_as_reference("sqrt", (squares,), FLOAT32, FLOAT32)


@pytest.mark.parametrize("name", ["reciprocal", "square", "negate", "absolute", "same"])
def test_float32_unary_operations_round_as_rationals(name):
    rng = np.random.default_rng(5)
    patterns = [
        edges(FLOAT32),
        random_patterns(rng, FLOAT32, 2000),
        short_patterns(rng, FLOAT32, 2000),
    ]
    assert_rounds_as_reference(name, (np.concatenate(patterns),), FLOAT32, FLOAT32)


@pytest.mark.parametrize("name", ["sqrt", "rsqrt", "reciprocal", "square"])
@pytest.mark.parametrize("fmt", NARROW, ids=by_name)
def test_unary_operations_round_as_rationals_for_every_pattern(name, fmt):
    """All patterns, to each format. What is positive goes by the reference, the others by symmetry."""
    values = exact.EXACT[name](exact.decode64(CODES, fmt))
    expected = [REFERENCES[name](value_of(p, fmt)) for p in CODES[:0x8000]]
    edge = [REFERENCES[name](value_of(p, fmt)) for p in edges(fmt)]
    for result_fmt in ALL:
        found = exact.rounded(values[:0x8000], result_fmt)
        assert_found(found, [reference(x, result_fmt) for x in expected], result_fmt)
        at_edges = exact.rounded(values[edges(fmt)], result_fmt)
        assert_found(at_edges, [reference(x, result_fmt) for x in edge], result_fmt)
    if name in ("reciprocal", "square"):
        sign = -1 if name == "reciprocal" else 1
        np.testing.assert_array_equal(values[0x8000:], sign * values[:0x8000])
    else:
        assert np.isnan(values[0x8001:]).all()


@pytest.mark.parametrize("result_fmt", ALL, ids=by_name)
@pytest.mark.parametrize("fmt", NARROW, ids=by_name)
def test_casts_round_as_rationals_for_every_pattern(fmt, result_fmt):
    assert_rounds_as_reference("same", (CODES,), fmt, result_fmt)


@pytest.mark.parametrize("fmt", NARROW, ids=by_name)
def test_signs_change_in_every_pattern(fmt):
    values = exact.decode64(CODES, fmt)
    numbers = ~np.isnan(values)
    negated, absolute = (
        exact.rounded(exact.EXACT[name](values), fmt).patterns for name in ("negate", "absolute")
    )
    np.testing.assert_array_equal(negated[numbers], CODES[numbers] ^ 0x8000)
    np.testing.assert_array_equal(absolute[numbers], CODES[numbers] & 0x7FFF)
    assert (negated[~numbers] == quiet_nan(fmt)).all()


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("fmt", ALL, ids=by_name)
def test_casts_of_float64_beside_midpoints(fmt, side):
    """Midpoints of all sizes, with the float64 numbers next to them."""
    middle = midpoints(fmt, 2500, 6)
    values = np.nextafter(middle, side * np.inf) if side else middle
    expected = [reference(value_of(p, FLOAT64), fmt) for p in values.view(np.uint64)]
    result = exact.rounded(values, fmt)
    assert_found(result, expected, fmt)
    assert result.tie.all() if side == 0 else not result.tie.any()


@pytest.mark.parametrize("fmt", ALL, ids=by_name)
def test_casts_of_float64_at_random(fmt):
    rng = np.random.default_rng(7)
    scales = rng.integers(-bias(fmt) - fmt.significand_bits - 3, bias(fmt) + 3, 4000)
    values = np.ldexp(rng.normal(size=4000), scales)
    patterns = [values.view(np.uint64), edges(FLOAT64), random_patterns(rng, FLOAT64, 1000)]
    # The same with a lower half of zeros or of a single bit, and the numbers of the format.
    patterns += [patterns[0] & 0xFFFFFFFF00000000, patterns[0] & 0xFFFFFFFF00000000 | 1]
    patterns.append(exact.decode64(edges(fmt), fmt).view(np.uint64))
    assert_rounds_as_reference("same", (np.concatenate(patterns),), FLOAT64, fmt)


@pytest.mark.parametrize("fmt", NARROW, ids=by_name)
def test_casts_of_float32(fmt):
    rng = np.random.default_rng(8)
    middle = exact.rounded(midpoints(fmt, 1500, 9), FLOAT32).patterns
    near_ties = [middle + np.uint32(step % 2**32) for step in (-1, 0, 1)]
    patterns = [edges(FLOAT32), random_patterns(rng, FLOAT32, 2000), *near_ties]
    assert_rounds_as_reference("same", (np.concatenate(patterns),), FLOAT32, fmt)


def test_casts_to_float64_change_only_nans():
    rng = np.random.default_rng(10)
    patterns = np.append(edges(FLOAT64), random_patterns(rng, FLOAT64, 3000))
    assert_rounds_as_reference("same", (patterns,), FLOAT64, FLOAT64)


@pytest.mark.parametrize("name", [*BINARY, "sqrt"])
def test_float32_agrees_with_the_host(name):
    rng = np.random.default_rng(11)
    a = random_patterns(rng, FLOAT32, 1 << 20)
    b = np.where(
        rng.random(1 << 20) < 0.5, near(rng, a, FLOAT32, 30), random_patterns(rng, FLOAT32, 1 << 20)
    )
    operands = (a,) if name == "sqrt" else (a, b)
    with np.errstate(all="ignore"):
        host = getattr(np, name)(*(x.view(np.float32) for x in operands))
    values = exact.EXACT[name](*(exact.decode64(x, FLOAT32) for x in operands))
    expected = np.where(np.isnan(host), np.uint32(quiet_nan(FLOAT32)), host.view(np.uint32))
    np.testing.assert_array_equal(exact.rounded(values, FLOAT32).patterns, expected)


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("add", (1.5, -1.5), 0.0),
        ("add", (-0.0, -0.0), -0.0),
        ("add", (-0.0, 0.0), 0.0),
        ("subtract", (-0.0, 0.0), -0.0),
        ("subtract", (-1.5, -1.5), 0.0),
        ("multiply", (-0.0, 2.0), -0.0),
        ("multiply", (-(2.0**-140), 2.0**-140), -0.0),
        ("divide", (1.0, -0.0), -math.inf),
        ("sqrt", (-0.0,), -0.0),
        ("rsqrt", (-0.0,), -math.inf),
        ("rsqrt", (0.0,), math.inf),
        ("reciprocal", (-math.inf,), -0.0),
    ],
)
def test_signs_of_zeros_and_infinities(name, operands, expected):
    result = exact.rounded(exact.EXACT[name](*(np.array([x]) for x in operands)), FLOAT32)
    found = exact.decode64(result.patterns, FLOAT32)
    assert found == expected and np.signbit(found) == np.signbit(expected)


def test_every_operation_has_a_name():
    assert exact.EXACT.keys() == REFERENCES.keys()


@pytest.mark.parametrize("fmt", [*ALL, FLOAT64], ids=by_name)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (5, 1 << 15)])
def test_shapes_are_kept(fmt, shape):
    """Also of what is worked on in several blocks."""
    values = np.random.default_rng(12).normal(size=shape)
    result = exact.rounded(exact.add(values, -np.ones(shape)), fmt)
    assert result.patterns.shape == result.tie.shape == result.tiny.shape == shape
    assert exact.decode64(result.patterns, fmt).shape == shape
    assert exact.binade_of(result.patterns, fmt).shape == shape


@pytest.mark.parametrize("fmt", ALL, ids=by_name)
def test_blocks_and_threads_change_nothing(fmt):
    rng = np.random.default_rng(13)
    a, b = (exact.decode64(random_patterns(rng, fmt, (1 << 17) + 5), fmt) for _ in range(2))

    def work(where):
        return exact.rounded(exact.add(a[where], b[where]), fmt)

    whole = work(slice(None))
    parts = [slice(start, start + 30011) for start in range(0, len(a), 30011)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(work, parts))
    for field in ("patterns", "tie", "tiny"):
        joined = np.concatenate([getattr(x, field) for x in found])
        np.testing.assert_array_equal(joined, getattr(whole, field))


def expected_class(values, formats, tie, tiny):
    sizes = [value and value[1] for value in values]
    if None in sizes:
        return "nan"
    if math.inf in sizes:
        return "infinity"
    least = [power(1 - bias(fmt)) for fmt in formats]
    if tiny or any(0 < size < bound for size, bound in zip(sizes, least, strict=True)):
        return "subnormal"
    return "zero" if 0 in sizes else "tie" if tie else "normal"


@pytest.mark.parametrize(
    "formats", [(BFLOAT16, BFLOAT16), (FLOAT16, FLOAT32), (FLOAT64,)], ids=lambda f: str(len(f))
)
def test_classes_follow_their_order(formats):
    rng = np.random.default_rng(14)
    operands = [np.append(edges(f), short_patterns(rng, f, 4000))[:4000] for f in formats]
    operands = [rng.permutation(x) for x in operands]
    flags = rng.random((2, 4000)) < 0.3
    result = exact.Rounded(operands[0], *flags)
    found = exact.class_of(operands, formats, result)
    assert found.dtype == np.uint8
    expected = [
        expected_class(
            [value_of(p, f) for p, f in zip(patterns, formats, strict=True)], formats, *flag
        )
        for *patterns, flag in zip(*operands, flags.T, strict=True)
    ]
    np.testing.assert_array_equal(np.array(exact.INPUT_CLASSES)[found], expected)
    assert set(expected) == set(exact.INPUT_CLASSES)


def test_classes_of_operands_that_broadcast():
    a, b = edges(BFLOAT16), CODES[::7]
    values = exact.decode64(a, BFLOAT16)[:, None], exact.decode64(b, BFLOAT16)
    result = exact.rounded(exact.multiply(*values), BFLOAT16)
    whole = [np.ascontiguousarray(x) for x in np.broadcast_arrays(a[:, None], b)]
    np.testing.assert_array_equal(
        exact.class_of([a[:, None], b], [BFLOAT16] * 2, result),
        exact.class_of(whole, [BFLOAT16] * 2, result),
    )


@pytest.mark.parametrize("fmt", [*ALL, FLOAT64], ids=by_name)
def test_binades_are_floored_logarithms(fmt):
    rng = np.random.default_rng(15)
    patterns = CODES if fmt.width == 16 else np.append(edges(fmt), random_patterns(rng, fmt, 3000))
    if fmt is FLOAT64:
        sizes = 2.0 ** np.arange(-160, 140)
        patterns = np.concatenate(
            [patterns, *(x.view(np.uint64) for x in (sizes, np.nextafter(sizes, 0)))]
        )
    found = exact.binade_of(patterns, fmt)
    assert found.dtype == np.int16
    for pattern, binade in zip(patterns, found.tolist(), strict=True):
        value = value_of(pattern, fmt)
        if value is None or value[1] == math.inf:
            assert binade == 128
        elif value[1] < power(-149):
            assert binade == -150
        else:
            assert binade == min(math.frexp(float(value[1]))[1] - 1, 128)
