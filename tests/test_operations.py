"""XLA's operations against the host's, on hard bit patterns."""

import hashlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from jaxaudit.mkl_sqrt import reciprocal_root_steps, root_of_probe
from jaxaudit.operations import (
    Float32Operations,
    Float64Operations,
    NumpyOperations,
    compile_exactly,
    kept,
    narrow_patterns,
    operations_of,
)

DEVICE = jax.devices("cpu")[0]
COUNT = 1 << 18
ARITY = {
    "add": 2,
    "subtract": 2,
    "multiply": 2,
    "divide": 2,
    "sqrt": 1,
    "mkl_amd_sqrt": 1,
    "negate": 1,
    "fma": 3,
}
SPECIAL = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def any_patterns(seed):
    """Uniform patterns, tiny ones, bfloat16 values, near-equal ones, special ones."""
    rng = np.random.default_rng(seed)
    wild = rng.integers(0, 1 << 32, COUNT, dtype=np.uint64).astype(np.uint32)
    kind = rng.integers(0, 5, COUNT)
    signed = np.array([*SPECIAL, *(p | 1 << 31 for p in SPECIAL)], np.uint32)
    near = np.uint32(0x3F800000) + (wild & np.uint32(0x800000FF))
    choices = [wild, wild & 0x80FFFFFF, wild & 0xFFFF0000, near, rng.choice(signed, COUNT)]
    return np.choose(kind, choices).astype(np.uint32)


def ordinary_patterns(seed):
    """Patterns whose sums, products and quotients are normal and finite."""
    wild = any_patterns(seed)
    return (wild & np.uint32(0x80000000)) | (wild % np.uint32(0x18000000) + np.uint32(0x34000000))


def assert_same(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    both_nan = floats.is_nan(found, FLOAT32) & floats.is_nan(expected, FLOAT32)
    wrong = np.flatnonzero((found != expected) & ~both_nan)
    assert wrong.size == 0, (wrong.size, [hex(a[wrong[0]]) for a in (found, expected)])


def apply(ops, name, patterns):
    values = [ops.decode(p, FLOAT32) for p in patterns]
    return ops.patterns32(getattr(ops, name)(*values))


@pytest.mark.parametrize("name", ARITY)
def test_float64_emulation_is_exact_for_every_kind_of_number(name):
    patterns = [any_patterns(seed) for seed in range(ARITY[name])]
    if name == "fma":  # cancellation: c = -(a * b), and a little beside it
        product = apply(NumpyOperations(), "multiply", patterns[:2])
        half = COUNT // 2
        offset = np.random.default_rng(9).integers(0, 3, half).astype(np.uint32)
        patterns[2][:half] = (product[:half] ^ np.uint32(1 << 31)) + offset
    program = compile_exactly(lambda z, *p: apply(Float64Operations(z), name, p), DEVICE)
    assert_same(program(np.uint32(0), *patterns), apply(NumpyOperations(), name, patterns))


@pytest.mark.parametrize("name", ARITY)
def test_float32_instructions_are_exact_for_ordinary_numbers(name):
    patterns = [ordinary_patterns(seed) for seed in range(ARITY[name])]
    program = compile_exactly(lambda z, *p: apply(Float32Operations(z), name, p), DEVICE)
    assert_same(program(np.uint32(0), *patterns), apply(NumpyOperations(), name, patterns))


def test_a_product_is_rounded_before_it_is_added():
    a, b, c = (ordinary_patterns(seed) for seed in range(3))

    def formula(ops, *patterns):
        x, y, z = (ops.decode(p, FLOAT32) for p in patterns)
        return ops.patterns32(ops.add(ops.multiply(x, y), z))

    program = compile_exactly(lambda zero, *p: formula(Float32Operations(zero), *p), DEVICE)
    assert_same(program(np.uint32(0), a, b, c), formula(NumpyOperations(), a, b, c))


def test_what_is_kept_is_computed_once():
    """XLA sets a barrier between a kept value and its uses: two results and a reduction read it from memory."""

    def whole(x):
        value = kept(x * x + 1)
        return value, value * 3, jnp.sum(value)

    x = np.arange(1000, dtype=np.int32)
    program = compile_exactly(whole, DEVICE)
    assert "opt-barrier(" in program.lower(x).compile().as_text()
    for found, expected in zip(
        program(x), (x * x + 1, 3 * (x * x + 1), (x * x + 1).sum()), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_the_contraction_that_this_guards_against_is_real():
    """Without the guard LLVM fuses the sum: were this ever to stop, `fma` would need another form."""
    a, b, c = (floats.decode(ordinary_patterns(seed), FLOAT32) for seed in range(3))
    fused = np.asarray(compile_exactly(lambda a, b, c: a * b + c, DEVICE)(a, b, c))
    ops = NumpyOperations()
    assert np.array_equal(fused, ops.fma(a, b, c))
    assert not np.array_equal(fused, ops.add(ops.multiply(a, b), c))


def test_division_by_a_scalar_is_a_division():
    patterns = ordinary_patterns(3)[: 1 << 16]
    divisors = np.linspace(0.03, 0.999, 16).astype(np.float32)
    divide = lambda ops, x, d: ops.patterns32(ops.divide(ops.decode(x, FLOAT32), d))  # noqa: E731
    program = compile_exactly(
        lambda z, x, d: jax.vmap(lambda s: divide(Float32Operations(z), x, s))(d), DEVICE
    )
    expected = divide(NumpyOperations(), patterns[None], divisors[:, None])
    assert_same(program(np.uint32(0), patterns, divisors), expected)


def test_numpy_fma_is_the_exact_one():
    """Against integer arithmetic in Python, on numbers that plain float64 double-rounds."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(1 << 23, 1 << 24, 3000).astype(np.float32) for _ in range(2))
    exponents = rng.integers(-60, -20, 3000)
    c = np.ldexp(rng.choice([-1.0, 1.0], 3000), exponents).astype(np.float32)
    a[:1000] = np.float32((1 << 23) + 1) + rng.integers(0, 64, 1000).astype(np.float32)
    b[:1000] = np.float32(1 << 23) + 2 * rng.integers(0, 64, 1000).astype(np.float32)
    found = NumpyOperations().fma(a, b, c)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        candidates = [
            np.nextafter(got, s * np.float32(np.inf)) for s in (np.float32(-1), np.float32(1))
        ]
        distance = abs(exact - Fraction(float(got)))
        for other in candidates:
            further = abs(exact - Fraction(float(other)))
            even = int(got.view(np.uint32)) % 2 == 0
            assert distance < further or (distance == further and even)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda f: f.name)
@pytest.mark.parametrize("formulation", ["float32", "float64"])
def test_every_pattern_survives_decoding_and_encoding(fmt, formulation):
    codes = np.arange(1 << 16, dtype=np.uint16)

    def round_trip(zero, p):
        ops = operations_of(formulation, zero)
        return ops.encode(ops.decode(p, fmt), fmt), ops.patterns32(ops.decode(p, fmt))

    back, wide = compile_exactly(round_trip, DEVICE)(np.uint32(0), codes)
    numbers = ~floats.is_nan(codes, fmt)
    assert np.array_equal(np.asarray(back)[numbers], codes[numbers])
    assert floats.is_nan(np.asarray(back)[~numbers], fmt).all()
    assert_same(wide, floats.decode(codes, fmt).view(np.uint32))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda f: f.name)
@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF])
def test_rounding_beside_every_boundary(fmt, low):
    """All 2^16 upper halves with low halves that lie on ties, beside them and far from them."""
    wide = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(low)
    expected = floats.encode(floats.decode(wide, FLOAT32), fmt)

    def both(zero, p):
        fast, exact = Float32Operations(zero), Float64Operations(zero)
        return (
            fast.encode(fast.decode(p, FLOAT32), fmt),
            fast.patterns32(fast.round_to(fast.decode(p, FLOAT32), fmt)),
            exact.encode(exact.decode(p, FLOAT32), fmt),
            exact.patterns32(exact.round_to(exact.decode(p, FLOAT32), fmt)),
            narrow_patterns(p, fmt),
        )

    numbers = ~floats.is_nan(wide, FLOAT32)
    for found in compile_exactly(both, DEVICE)(np.uint32(0), wide):
        found = np.asarray(found)
        if found.dtype == np.uint32:
            assert_same(found, floats.decode(expected, fmt).view(np.uint32))
        else:
            assert np.array_equal(found[numbers], expected[numbers])
            assert floats.is_nan(found[~numbers], fmt).all()


def test_roundings_survive_a_following_reduction():
    """Where plain casts vanish: a sum over the rounded values, in the same program."""
    patterns = ordinary_patterns(5).reshape(-1, 64)

    def total(zero, p):
        ops = Float32Operations(zero)
        return jnp.sum(ops.float64(ops.round_to(ops.decode(p, FLOAT32), BFLOAT16)), axis=-1)

    found = np.asarray(compile_exactly(total, DEVICE)(np.uint32(0), patterns))
    values = floats.round_to(floats.decode(patterns, FLOAT32), BFLOAT16).astype(np.float64)
    # 64 bfloat16 values within 2^48 of one another do not all fit 53 bits: allow the summation's own
    # rounding, 63 additions of at most half an ulp of the sum of magnitudes.
    bound = 64 * 2.0**-53 * np.abs(values).sum(axis=-1)
    assert (np.abs(found - values.sum(axis=-1)) <= bound).all()


# --- what float32 instructions mark as beyond them ---


def beside_the_limits(seed):
    """Every binade, thickly around those whose products and quotients are the smallest normal numbers."""
    rng = np.random.default_rng(seed)
    exponents = rng.choice([0, 1, 2, 63, 64, 65, 126, 127, 128, 190, 191, 253, 254, 255], COUNT)
    exponents = np.where(rng.random(COUNT) < 0.3, rng.integers(0, 256, COUNT), exponents)
    significands = rng.integers(0, 1 << 23, COUNT) * (rng.random(COUNT) < 0.8)
    significands |= rng.choice([0, 0, 1, 0x7FFFFF, 0x7FFFFE, 0x400000], COUNT)
    signs = rng.integers(0, 2, COUNT)
    return ((signs << 31) | (exponents << 23) | significands).astype(np.uint32)


def sums(seed):
    """Pairs that cancel, to zero, to subnormal numbers and to a little more."""
    first = beside_the_limits(seed)
    offset = np.random.default_rng(seed + 1).choice([0, 0, 1, 2, 3, 1 << 12, 1 << 23], COUNT)
    return first, (first ^ np.uint32(1 << 31)) + offset.astype(np.uint32)


CHAINS = {
    "negate": lambda o, a, b, c: o.negate(a),
    "add": lambda o, a, b, c: o.add(a, b),
    "subtract": lambda o, a, b, c: o.subtract(a, b),
    "multiply": lambda o, a, b, c: o.multiply(a, b),
    "divide": lambda o, a, b, c: o.divide(a, b),
    "fma": lambda o, a, b, c: o.fma(a, b, c),
    "sqrt": lambda o, a, b, c: o.sqrt(a),
    "mkl_amd_sqrt": lambda o, a, b, c: o.mkl_amd_sqrt(a),
    "a product in a sum": lambda o, a, b, c: o.add(o.multiply(a, b), c),
    "a product's root": lambda o, a, b, c: o.sqrt(o.multiply(a, b)),
    "a product's other root": lambda o, a, b, c: o.mkl_amd_sqrt(o.multiply(a, a)),
    "a sum divided": lambda o, a, b, c: o.divide(o.add(a, b), c),
    "a difference in a fused sum": lambda o, a, b, c: o.fma(c, o.subtract(a, b), b),
    "a fused sum in a sum": lambda o, a, b, c: o.add(o.fma(a, b, c), c),
    "a quotient's quotient": lambda o, a, b, c: o.divide(a, o.divide(b, c)),
    "a comparison": lambda o, a, b, c: o.where(o.less(o.multiply(a, b), c), a, b),
    "a NaN or none": lambda o, a, b, c: o.where(o.is_nan(o.subtract(a, b)), c, a),
    "bfloat16": lambda o, a, b, c: o.add(o.round_to(o.multiply(a, b), BFLOAT16), c),
    "float16": lambda o, a, b, c: o.multiply(o.round_to(o.multiply(a, b), FLOAT16), c),
    "double": lambda o, a, b, c: o.narrow(o.wide_multiply(o.wide(a), o.wide(b))),
    "double in a sum": lambda o, a, b, c: o.add(
        o.narrow(o.wide_add(o.wide_multiply(o.wide(a), o.wide(b)), o.wide(c))), c
    ),
}


def run_marked(chain, patterns):
    """Return what a chain gives in float32, where it marked it, and what is right."""

    def whole(zero, *patterns):
        ops = Float32Operations(zero)
        values = [ops.watch(ops.decode(p, FLOAT32)) for p in patterns]
        result = ops.watch(CHAINS[chain](ops, *values))
        return ops.patterns32(result), jnp.broadcast_to(ops.strays, patterns[0].shape)

    found, marked = compile_exactly(whole, DEVICE)(np.uint32(0), *patterns)
    numpy = NumpyOperations()
    expected = CHAINS[chain](numpy, *(numpy.decode(p, FLOAT32) for p in patterns))
    expected = numpy.patterns32(expected)
    return np.asarray(found), np.asarray(marked), expected


@pytest.mark.parametrize("chain", CHAINS)
def test_whatever_float32_gets_wrong_is_marked(chain):
    """Hard inputs, and a result that may be the operand of anything else: subnormal ones count as wrong."""
    draws = [
        [beside_the_limits(seed) for seed in range(3)],
        [*sums(4), beside_the_limits(7)],
        [any_patterns(seed) for seed in range(3)],
    ]
    product = apply(NumpyOperations(), "multiply", draws[0][:2])
    draws.append([*draws[0][:2], sums(9)[1] - sums(9)[0] + (product ^ np.uint32(1 << 31))])
    found, marked, expected = run_marked(
        chain, [np.concatenate(d) for d in zip(*draws, strict=True)]
    )
    wrong = floats.differ(found, expected)
    assert not (wrong & ~marked).any(), hex(found[wrong & ~marked][0])
    magnitude = expected & np.uint32(0x7FFFFFFF)
    assert marked[(magnitude > 0) & (magnitude < 0x00800000)].all()
    assert marked[magnitude >= FLOAT32.infinity].all()
    assert marked.any() and not marked.all()


@pytest.mark.parametrize("chain", CHAINS)
def test_hardly_any_ordinary_number_is_marked(chain):
    """Zeros among the operands, and sums that cancel to zero, are ordinary."""
    rng = np.random.default_rng(3)
    patterns = [ordinary_patterns(seed) for seed in range(3)]
    patterns = [np.where(rng.random(COUNT) < 0.05, p & np.uint32(1 << 31), p) for p in patterns]
    patterns[1] = np.where(rng.random(COUNT) < 0.05, patterns[0], patterns[1])
    patterns[2] = np.where(rng.random(COUNT) < 0.05, patterns[1], patterns[2])
    found, marked, expected = run_marked(chain, patterns)
    # Infinite quotients by zero, and NaNs, are no ordinary numbers; neither is what is made of them.
    numpy = NumpyOperations()
    with np.errstate(all="ignore"):
        by_zero = [(p & np.uint32(0x7FFFFFFF)) == 0 for p in patterns]
        a, b, c = (numpy.decode(p, FLOAT32) for p in patterns)
    special = {
        "divide": by_zero[1],
        "sqrt": a < 0,
        "mkl_amd_sqrt": a < 0,
        "a product's root": (a < 0) != (b < 0),
        "a sum divided": by_zero[2],
        "a quotient's quotient": by_zero[1] | by_zero[2],
        "float16": abs(a.astype(np.float64) * b) >= 65520,
    }.get(chain, np.zeros(COUNT, bool))
    usual = (expected & np.uint32(0x7FFFFFFF)) < FLOAT32.infinity
    assert (marked & usual & ~special).mean() < 2e-3
    assert not (floats.differ(found, expected) & ~marked).any()


def test_fused_sums_that_cancel_are_marked_without_need_and_others_are_not():
    """The price of not looking at the product: a zero of a fused sum is marked, nothing else is."""
    a = ordinary_patterns(1)
    b = np.full_like(a, 0x3F800000)
    c = np.where(np.arange(COUNT) % 2 == 0, a ^ np.uint32(1 << 31), ordinary_patterns(2))
    found, marked, expected = run_marked("fma", [a, b, c])
    assert_same(found, expected)
    assert np.array_equal(marked, expected << 1 == 0)


# --- arithmetic in double ---


def hard_doubles(count=3000):
    """Triples for a * b + c: sums that cancel, that lie on ties and beside them, and far-apart terms."""
    rng = np.random.default_rng(8)

    def draw(low, high):
        significand = 1 + rng.integers(0, 1 << 52, count) / (1 << 52)
        significand = np.where(rng.random(count) < 0.3, significand.astype(np.float32), significand)
        return np.ldexp(significand * rng.choice([-1, 1], count), rng.integers(low, high, count))

    a, b, c = draw(-40, 40), draw(-40, 40), draw(-90, 90)
    product, part = a * b, rng.integers(0, 6, count)
    # The rounded product's negative, a few ulps beside it, and the negative with a little more.
    c = np.where(part == 0, -product, c)
    c = np.where(part == 1, -product + np.spacing(product) * rng.integers(-3, 4, count), c)
    c = np.where(part == 2, -product * (1 + 2.0 ** rng.integers(-60, -1, count)), c)
    # Ties: a product of half an ulp of c, of which one more bit lies up to 100 bits further down.
    tie = part == 3
    c = np.where(tie, np.ldexp(1 + rng.integers(0, 1 << 52, count) / (1 << 52), 10), c)
    half = np.ldexp(rng.choice([-1.0, 1.0, 3.0], count), 10 - 53)
    beside = 1 + rng.choice([0, 0, 1, -1], count) * np.ldexp(1.0, -rng.integers(1, 53, count))
    a, b = np.where(tie, half, a), np.where(tie, beside, b)
    # A product's own error decides: (1 + 2^-k)(1 - 2^-k) = 1 - 2^-2k beside a tie with c.
    own = part == 4
    k = rng.integers(27, 53, count)
    a = np.where(own, np.ldexp(1 + np.ldexp(1.0, -k), -43), a)
    b = np.where(own, 1 - np.ldexp(1.0, -k), b)
    c = np.where(own, np.ldexp(1 + rng.integers(0, 1 << 52, count) / (1 << 52), 10), c)
    return a, b, c


def in_double(formula, arguments, formulation):
    """Evaluate in NumPy or in a compiled program; arguments and result are doubles, or float32 values."""
    if formulation == "numpy":
        return np.asarray(formula(NumpyOperations(), *arguments))
    program = compile_exactly(lambda z, *x: formula(operations_of(formulation, z), *x), DEVICE)
    return np.asarray(program(np.uint32(0), *arguments))


FORMULATIONS = ["numpy", "float32", "float64"]


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_sums_and_products_in_double_are_rounded_once(formulation):
    a, b, c = hard_doubles()
    exact = [[Fraction(x) for x in values.tolist()] for values in (a, b, c)]
    for name, expected, arguments in [
        ("wide_fma", [float(x * y + z) for x, y, z in zip(*exact, strict=True)], (a, b, c)),
        ("wide_multiply", [float(x * y) for x, y in zip(*exact[:2], strict=True)], (a, b)),
        ("wide_add", [float(x + z) for x, z in zip(exact[0], exact[2], strict=True)], (a, c)),
    ]:
        found = in_double(lambda o, *x, n=name: getattr(o, n)(*x), arguments, formulation)
        assert found.dtype == np.float64
        wrong = np.flatnonzero(found != np.array(expected))
        assert wrong.size == 0, (name, wrong.size, [x[wrong[0]].hex() for x in (a, b, c)])


def test_the_hard_doubles_are_hard():
    """A product rounded on its own, and one rounded to double-double and added carelessly, both fail."""
    a, b, c = hard_doubles()
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(*(v.tolist() for v in (a, b, c)), strict=True)]  # fmt: skip
    assert (a * b + c != exact).mean() > 0.2
    error = [float(Fraction(x) * Fraction(y) - Fraction(x * y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]  # fmt: skip
    assert ((a * b + c) + np.array(error) != exact).mean() > 0.05


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_product_in_double_is_rounded_before_it_is_added(formulation):
    a, b, c = hard_doubles()
    found = in_double(
        lambda o, a, b, c: o.wide_add(o.wide_multiply(a, b), c), (a, b, c), formulation
    )
    assert np.array_equal(found, a * b + c)


def nearest_float32(value):
    """Round a fraction to the nearest float32 number, ties to even, in integers."""
    size, exponent = abs(value), -149
    while size >= Fraction(2) ** (exponent + 24):
        exponent += 1
    steps = round(size / Fraction(2) ** exponent)  # to even where it is in the middle
    large = steps * Fraction(2) ** exponent >= Fraction(2) ** 128
    return float("inf") if large else float(steps * Fraction(2) ** exponent)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_doubles_are_narrowed_once(formulation):
    """Ties between float32 numbers, normal and subnormal, and doubles right beside them."""
    rng = np.random.default_rng(12)
    exponents = rng.choice([-150, -149, -148, -140, -127, -126, -125, -3, 0, 5, 126, 127], 3000)
    ulp = np.ldexp(1.0, np.maximum(exponents, -126) - 23)
    low = np.ldexp(1.0 + rng.integers(0, 1 << 23, 3000) / (1 << 23), exponents) // ulp * ulp
    values = low + ulp * rng.choice([0, 0.5, 0.25, 0.75], 3000)
    values = np.nextafter(values, values * rng.choice([0, 1, 2], 3000))
    values *= rng.choice([-1, 1], 3000)
    expected = [np.copysign(nearest_float32(Fraction(v)), v) for v in values.tolist()]
    expected = np.array(expected).astype(np.float32).view(np.uint32)

    def formula(ops, x):
        result = ops.narrow(x)
        marked = ops.strays if isinstance(ops, Float32Operations) else False
        return jnp.stack([ops.patterns32(result), jnp.zeros(3000, jnp.uint32) + marked])

    if formulation == "numpy":
        ops = NumpyOperations()
        found, marked = ops.patterns32(ops.narrow(values)), np.zeros(3000, np.uint32)
    else:
        found, marked = in_double(formula, (values,), formulation)
    wrong = (found != expected) & (marked == 0)
    assert not wrong.any(), values[wrong][0].hex()
    if formulation == "float32":
        tiny = (np.abs(values) < 2.0**-126 * (1 - 2.0**-25)) & (expected << 1 != 0)
        assert (marked[tiny] != 0).all() and not marked[np.abs(values) > 2.0**-125].any()


def nearest(value, fmt):
    """Round a fraction to the nearest number of a format, ties to even, in integers."""
    bias = (1 << (fmt.exponent_bits - 1)) - 1
    size, exponent = abs(value), 1 - bias - fmt.significand_bits
    while size >= Fraction(2) ** (exponent + fmt.significand_bits + 1):
        exponent += 1
    rounded = round(size / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return float("inf") if rounded >= Fraction(2) ** (bias + 1) else float(rounded)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda f: f.name)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_doubles_are_narrowed_to_16_bits_in_one_rounding(formulation, fmt):
    """Midpoints of the format, and doubles so near to them that float32 cannot tell."""
    rng = np.random.default_rng(13)
    codes = rng.integers(0, fmt.infinity, 4000).astype(np.uint16)
    low = floats.decode(codes, fmt).astype(np.float64)
    high = floats.decode(codes + np.uint16(1), fmt).astype(np.float64)
    values = np.where(
        np.isinf(high), low + (low - floats.decode(codes - np.uint16(1), fmt)) / 2, (low + high) / 2
    )
    values *= 1 + rng.choice([0, 2.0**-52, -(2.0**-52), 2.0**-40, -(2.0**-30), 2.0**-12], 4000)
    values *= rng.choice([-1, 1], 4000)
    values[:4] = [np.inf, -np.inf, np.nan, 1e300]
    numbers = [Fraction(v) if np.isfinite(v) else v for v in values.tolist()]
    expected = [nearest(v, fmt) if isinstance(v, Fraction) else abs(v) for v in numbers]
    expected = floats.encode(np.copysign(expected, values).astype(np.float32), fmt)

    def formula(ops, x):
        patterns = ops.encode(ops.narrow(x, fmt), fmt)
        marked = ops.strays if isinstance(ops, Float32Operations) else False
        return jnp.stack([patterns, jnp.zeros(4000, jnp.uint16) + marked])

    if formulation == "numpy":
        ops = NumpyOperations()
        found, marked = ops.encode(ops.narrow(values, fmt), fmt), np.zeros(4000, np.uint16)
    else:
        program = compile_exactly(lambda z, x: formula(operations_of(formulation, z), x), DEVICE)
        found, marked = map(np.asarray, program(np.uint32(0), values))
    nans = floats.is_nan(found, fmt) & floats.is_nan(expected, fmt)
    wrong = (found != expected) & ~nans & (marked == 0)
    assert not wrong.any(), values[wrong][0].hex()
    assert np.mean(marked != 0) < 0.05
    with np.errstate(over="ignore"):
        through_float32 = floats.encode(values.astype(np.float32), fmt)
    assert (through_float32 != expected).sum() > 500  # the cases are hard


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_float64_patterns_are_decoded_and_encoded_as_they_are(formulation):
    doubles = np.array([1.5, -0.0, np.inf, 2.0**-1000, 1 + 2.0**-52]).view(np.uint64)
    singles = np.array([1.5, -0.0, -np.inf, 2.0**-126, 3e38], np.float32)

    def formula(ops, x, y):
        return ops.encode(ops.decode(x, FLOAT64), FLOAT64), ops.encode(
            ops.decode(y, FLOAT32), FLOAT64
        )

    if formulation == "numpy":
        found = formula(NumpyOperations(), doubles, singles.view(np.uint32))
    else:
        program = compile_exactly(
            lambda z, x, y: formula(operations_of(formulation, z), x, y), DEVICE
        )
        found = program(np.uint32(0), doubles, singles.view(np.uint32))
    same = doubles, singles.astype(np.float64).view(np.uint64)
    for a, b in zip(found, same, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_widening_is_exact_and_comparisons_are_those_of_ieee_754(formulation):
    a, b = any_patterns(1), any_patterns(2)
    b[::5] = a[::5]
    b[1::5] = a[1::5] ^ np.uint32(1 << 31)
    if formulation == "float32":  # it takes subnormal numbers for zero, which `watch` marks
        for p in (a, b):
            p[(p & np.uint32(0x7F800000)) == 0] &= np.uint32(1 << 31)

    def formula(ops, a, b):
        a, b = ops.decode(a, FLOAT32), ops.decode(b, FLOAT32)
        return [ops.wide(a), ops.less(a, b), ops.less(b, a), ops.is_nan(a), ops.is_nan(b)]

    if formulation == "numpy":
        found = formula(NumpyOperations(), a, b)
    else:
        found = compile_exactly(
            lambda z, a, b: formula(operations_of(formulation, z), a, b), DEVICE
        )(np.uint32(0), a, b)
    wide, below, above, nan_a, nan_b = map(np.asarray, found)
    # Ordered integers instead of comparisons of floating-point numbers.
    nans = floats.is_nan(a, FLOAT32), floats.is_nan(b, FLOAT32)
    lines = floats.ordered(a, FLOAT32), floats.ordered(b, FLOAT32)
    numbers = ~nans[0] & ~nans[1]
    assert np.array_equal(below, numbers & (lines[0] < lines[1]))
    assert np.array_equal(above, numbers & (lines[0] > lines[1]))
    assert np.array_equal(nan_a, nans[0]) and np.array_equal(nan_b, nans[1])
    assert wide.dtype == np.float64
    with np.errstate(invalid="ignore"):
        back = wide.astype(np.float32).view(np.uint32)
    assert_same(back, a)
    assert np.array_equal(np.isnan(wide), nans[0])
    assert (np.frexp(wide[~nans[0] & np.isfinite(wide)])[0] * 2**24 % 1 == 0).all()


# --- the square root of MKL on AMD processors ---


def root_patterns():
    """Both ends of every cell of the estimate, all exponents, the limits of what MKL refines."""
    rng = np.random.default_rng(11)
    cells = np.uint32(0x3F800000) + (np.arange(1 << 13, dtype=np.uint32) << 11)
    within = rng.integers(0, 1 << 11, (30, cells.size), dtype=np.uint32)
    exponents = np.arange(256, dtype=np.uint32)[:, None] << 23
    wild = rng.integers(0, 1 << 23, (256, 2048), dtype=np.uint32)
    edges = [0x00800000, 0x01000000, 0x7F7FF000, 0x7F800000]
    beside = np.arange(-300, 300)[:, None] + np.array(edges)
    parts = [cells, cells + 0x7FF, cells + within, exponents | wild, beside, SPECIAL]
    positive = np.concatenate([np.ravel(part).astype(np.uint32) for part in parts])
    return np.concatenate([positive, positive[::7] | np.uint32(1 << 31)])


def probe_digest(root):
    i = np.arange(4096, dtype=np.uint32)
    vector = (0x3F800000 + 4096 * i + 1103 * i % 4096).astype(np.uint32).view(np.float32)
    return hashlib.sha256(root(vector).astype("<f4").tobytes()).hexdigest()


def test_mkl_s_root_on_amd_processors_is_torch_s():
    torch = pytest.importorskip("torch")
    torch.sqrt(torch.ones(1))  # MKL's first call in a process must not be one of many threads
    root = lambda x: torch.sqrt(torch.from_numpy(x)).numpy()  # noqa: E731
    if root_of_probe(probe_digest(root)) != "mkl-amd":
        pytest.skip("torch's float32 square root is another one here: no AMD processor, or no MKL")
    patterns = root_patterns()
    expected = root(patterns.view(np.float32)).view(np.uint32)
    assert_same(apply(NumpyOperations(), "mkl_amd_sqrt", [patterns]), expected)
    for size in range(1, 71):  # nothing depends on a number's place in the vector
        part = patterns[size * size : size * size + size].view(np.float32)
        assert_same(
            NumpyOperations().mkl_amd_sqrt(part).view(np.uint32), root(part).view(np.uint32)
        )


def test_xla_takes_mkl_s_root_in_float64_for_every_kind_of_number():
    patterns = root_patterns()
    program = compile_exactly(lambda z, p: apply(Float64Operations(z), "mkl_amd_sqrt", [p]), DEVICE)
    assert_same(
        program(np.uint32(0), patterns), apply(NumpyOperations(), "mkl_amd_sqrt", [patterns])
    )


def test_xla_takes_mkl_s_root_in_float32_for_zero_and_every_normal_number():
    patterns = root_patterns()
    magnitude = patterns & np.uint32(0x7FFFFFFF)
    patterns = patterns[(magnitude == 0) | (magnitude >= 0x00800000)]
    program = compile_exactly(lambda z, p: apply(Float32Operations(z), "mkl_amd_sqrt", [p]), DEVICE)
    expected = apply(NumpyOperations(), "mkl_amd_sqrt", [patterns])
    assert_same(program(np.uint32(0), patterns), expected)


def test_mkl_s_root_is_one_ulp_off_where_it_is_off_and_ieee_at_the_ends_of_the_range():
    patterns = root_patterns()
    found = apply(NumpyOperations(), "mkl_amd_sqrt", [patterns])
    ieee = apply(NumpyOperations(), "sqrt", [patterns])
    refined = (patterns >= 0x00800000) & (patterns < 0x7F7FF000)
    distance = floats.ulp_distance(found, ieee, FLOAT32)
    assert distance[refined].max() == 1 and 0.1 < distance[refined].mean() < 0.3
    assert (distance[~refined] == 0).all()


def test_the_estimate_is_the_one_that_was_read_off_a_processor():
    steps = reciprocal_root_steps()
    digest = hashlib.sha256(steps.astype("<u2").tobytes()).hexdigest()
    assert digest == "94e56241acd3430ca4c3ac428d7e3e65a51b310fc0bf64f0fe713ec8d94ac527"
    lower = (np.uint32(0x3F800000) + (np.arange(1 << 13, dtype=np.uint32) << 11)).view(np.float32)
    # The bound that Intel and AMD document for the instruction.
    exact = 1 / np.sqrt(lower.astype(np.float64))
    assert np.abs((0.5 + steps / 8192) / exact - 1).max() < 1.5 * 2.0**-12


def test_a_recording_s_probe_tells_the_root():
    assert root_of_probe(probe_digest(np.sqrt)) == "ieee"
    assert root_of_probe(probe_digest(NumpyOperations().mkl_amd_sqrt)) == "mkl-amd"
    assert root_of_probe(probe_digest(lambda x: x)) is None


def test_the_recorder_s_probe_is_understood():
    torch = pytest.importorskip("torch")
    from jaxaudit.recorders import pytorch

    probe = pytorch.probe_sqrt(torch.device("cpu"))
    vector = pytorch.probe_vector()
    assert hashlib.sha256(np.sqrt(vector).astype("<f4").tobytes()).hexdigest() == probe_digest(
        np.sqrt
    )
    assert (root_of_probe(str(probe["sha256"])) == "ieee") == (probe["differ_from_ieee"] == 0)
