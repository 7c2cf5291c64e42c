"""XLA's operations against the host's, on hard bit patterns."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32
from jaxaudit.mkl_sqrt import reciprocal_root_steps, root_of_probe
from jaxaudit.operations import (
    Float32Operations,
    Float64Operations,
    NumpyOperations,
    compile_exactly,
    narrow_patterns,
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
    program = compile_exactly(lambda *p: apply(Float64Operations(), name, p), DEVICE)
    assert_same(program(*patterns), apply(NumpyOperations(), name, patterns))


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
    from fractions import Fraction

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
        ops = Float32Operations(zero) if formulation == "float32" else Float64Operations()
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
        fast, exact = Float32Operations(zero), Float64Operations()
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
    program = compile_exactly(lambda p: apply(Float64Operations(), "mkl_amd_sqrt", [p]), DEVICE)
    assert_same(program(patterns), apply(NumpyOperations(), "mkl_amd_sqrt", [patterns]))


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
