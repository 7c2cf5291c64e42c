"""Single operations of a device: healthy ones pass, broken ones are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaudit
from jaxaudit import conformance
from jaxaudit.conformance import inexact_in_float64, inexact_operations
from jaxaudit.floats import BFLOAT16, FLOAT32
from jaxaudit.operations import ExactOperations, Float32Operations, Float64Operations
from jaxaudit.replay import SelfTestError

CPU = jax.devices("cpu")[0]
FORMULATIONS = ("float32", "float64")


@pytest.fixture(autouse=True)
def _forget():
    """Results are remembered by device; what a test breaks must not outlive it."""
    inexact_operations.cache_clear()
    inexact_in_float64.cache_clear()
    with jax.enable_x64(True):
        yield
    inexact_operations.cache_clear()
    inexact_in_float64.cache_clear()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_this_cpu_computes_exactly(formulation):
    assert inexact_operations(CPU, formulation) == ()


def truncated(ops, value, fmt):
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    kept = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
    return kept.astype(value.dtype)


#: Method, what is put in its place, and the names that must come out of it, of all those of `_CASES`.
FLOAT32_FAULTS = {
    "addition": ("add", lambda ops, a, b: ops.subtract(a, ops.negate(b)) * np.float32(1 + 2**-23)),
    "subtraction": ("subtract", lambda ops, a, b: (a - b) * np.float32(1 - 2**-24)),
    "multiplication": ("multiply", lambda ops, a, b: truncated(ops, a * b, None)),
    "division": ("divide", lambda ops, a, b: a * (np.float32(1) / b)),
    "square root": ("sqrt", lambda ops, a: a * jax.lax.rsqrt(a)),
    "fused multiply-add": ("fma", lambda ops, a, b, c: ops.add(ops.multiply(a, b), c)),
    "rounding to bfloat16": ("round_to", lambda ops, a, fmt: truncated(ops, a, fmt)),
    "negation": ("negate", lambda ops, a: a),
}

#: What uses an operation that is broken is named with it.
USERS = {
    "addition": {"a product and a sum that are not fused"},
    "multiplication": {"a product and a sum that are not fused"},
    "division": {"division by a scalar"},
    "rounding to bfloat16": {"rounding to float16"},
}


@pytest.mark.parametrize("fault", FLOAT32_FAULTS)
def test_fault_of_float32_is_named(fault, monkeypatch):
    method, broken = FLOAT32_FAULTS[fault]
    monkeypatch.setattr(Float32Operations, method, broken)
    assert {*inexact_operations(CPU, "float32")} == {fault, *USERS.get(fault, ())}


def rounded_twice(ops, a, b, c):
    """Take a product and a sum for one operation in float64, whose second rounding to float32 can err."""
    wide = [x.astype(jnp.float64) for x in (a, b, c)]
    return (wide[0] * wide[1] + wide[2]).astype(jnp.float32).astype(a.dtype)


def test_fused_multiply_add_by_way_of_float64_is_named(monkeypatch):
    """It errs only where the sum in float64 is a tie: the inputs must hold such sums."""
    monkeypatch.setattr(Float32Operations, "fma", rounded_twice)
    assert inexact_operations(CPU, "float32") == ("fused multiply-add",)
    inexact_operations.cache_clear()
    monkeypatch.setattr(Float64Operations, "fma", rounded_twice)
    assert any(name.startswith("fused multiply-add") for name in inexact_operations(CPU, "float64"))


def flushed(value):
    return jnp.where(jnp.abs(value) < 2.0**-126, 0 * value, value)


FLOAT64_FAULTS = {
    "addition of subnormal numbers": (
        "add",
        lambda ops, a, b: ops._rounded(flushed(a) + flushed(b)),
    ),  # fmt: skip
    "multiplication": ("multiply", lambda ops, a, b: truncated(ops, a * b, None)),
    "division": ("divide", lambda ops, a, b: ops._rounded(a * ops._rounded(1 / b))),
    "square root": ("sqrt", lambda ops, a: ops._rounded(a * ops._rounded(1 / jnp.sqrt(a)))),
    "negation": ("negate", lambda ops, a: 0 - a),
}


@pytest.mark.parametrize("fault", FLOAT64_FAULTS)
def test_fault_of_float64_is_named(fault, monkeypatch):
    method, broken = FLOAT64_FAULTS[fault]
    monkeypatch.setattr(Float64Operations, method, broken)
    found = inexact_operations(CPU, "float64")
    assert any(name.startswith(fault) for name in found), found
    users = {*USERS.get(fault, ()), "a product and a sum that are not fused"}
    for name in found:
        assert name.startswith((fault, *users)), name


def test_operations_that_cannot_be_compiled_are_named(monkeypatch):
    def fail(*_):
        raise RuntimeError("this device has no square root\nand says so at length")

    monkeypatch.setattr(Float32Operations, "sqrt", fail)
    assert inexact_operations(CPU, "float32") == ("everything (this device has no square root)",)


def test_results_are_remembered(monkeypatch):
    assert inexact_operations(CPU, "float32") == ()
    monkeypatch.setattr(Float32Operations, "sqrt", lambda ops, a: a)
    assert inexact_operations(CPU, "float32") == ()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_inputs_are_hard(formulation):
    """Ties in every narrowing, cancellation and, where float64 must bear them, all special numbers."""
    patterns = conformance._hard_patterns(formulation)
    assert len(patterns) == 3 and all(p.dtype == np.uint32 for p in patterns)
    low = patterns[0] & np.uint32(0xFFFF)
    assert np.count_nonzero(low == 0x8000) > 100  # of bfloat16
    with np.errstate(all="ignore"):
        a, b, _ = (p.view(np.float32).astype(np.float64) for p in patterns)
        assert np.count_nonzero(np.abs(a - b) < 2.0**-20 * np.abs(a)) > 10
    magnitudes = np.concatenate(patterns) & np.uint32(0x7FFFFFFF)
    special = [magnitudes > FLOAT32.infinity, magnitudes == FLOAT32.infinity, magnitudes == 0, (0 < magnitudes) & (magnitudes < 1 << 23)]  # fmt: skip
    for kind in special:
        assert (np.count_nonzero(kind) > 100) == (formulation == "float64")


def test_a_second_rounding_would_show():
    """Products and sums that rounding to float64 turns into ties of float32."""
    from fractions import Fraction

    patterns = conformance._nearly_ties(np.random.default_rng(0), 50)
    ties = 0
    for a, b, c in zip(*(p.view(np.float32).tolist() for p in patterns), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        once, twice = np.float32(a * b + c), exact
        below, above = np.nextafter(once, np.float32(-np.inf)), np.nextafter(once, np.float32(np.inf))  # fmt: skip
        nearest = min((below, once, above), key=lambda x: abs(Fraction(float(x)) - twice))
        ties += nearest != once
    assert ties > 5


def test_formats_have_their_own_rounding(monkeypatch):
    """A fault in one format's rounding names that format alone."""
    right = Float32Operations.round_to
    monkeypatch.setattr(
        Float32Operations,
        "round_to",
        lambda ops, a, fmt: truncated(ops, a, fmt) if fmt is BFLOAT16 else right(ops, a, fmt),
    )
    assert inexact_operations(CPU, "float32") == ("rounding to bfloat16",)


def test_float64_of_this_device_is_numpys():
    assert inexact_in_float64(CPU) == ()


@pytest.mark.parametrize(
    ("operation", "wrong", "name"),
    [
        ("multiply", lambda self, a, b: a * b, "a product and a sum that are not fused"),
        ("sqrt", lambda self, a: jnp.sqrt(a) * (1 + 2.0**-52), "square root"),
        ("add", lambda self, a, b: a + b * (1 + 2.0**-52), "addition"),
    ],
)
def test_inexact_float64_is_named_and_stops_the_ledger(monkeypatch, operation, wrong, name):
    monkeypatch.setattr(ExactOperations, operation, wrong)
    assert name in inexact_in_float64(CPU)
    with jaxaudit.open_recording(jaxaudit.sample_paths()[0]) as recording:
        with pytest.raises(SelfTestError, match=f"float64.*{name}.*--only accounting"):
            jaxaudit.audit_tree(
                recording, arithmetics="torch-cpu-loop", backend="cpu", steps=(1, 3)
            )
