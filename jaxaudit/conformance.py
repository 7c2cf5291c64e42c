"""Which operations a device computes otherwise than IEEE 754 asks for, one by one.

A program that fails its self-test is known by its result alone; this tells what in it went wrong.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.devices import Device
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32
from jaxaudit.operations import (
    ExactOperations,
    Float32Operations,
    Formulation,
    NumpyOperations,
    Operations,
    Value,
    compile_exactly,
    operations_of,
)

#: Each operation under its name for people, on three operands.
_CASES: dict[str, Callable[[Operations, Value, Value, Value], Value]] = {
    "addition": lambda ops, a, b, c: ops.add(a, b),
    "subtraction": lambda ops, a, b, c: ops.subtract(a, b),
    "multiplication": lambda ops, a, b, c: ops.multiply(a, b),
    "division": lambda ops, a, b, c: ops.divide(a, b),
    "division by a scalar": lambda ops, a, b, c: ops.divide(a, b[:1]),
    "square root": lambda ops, a, b, c: ops.sqrt(a),
    "fused multiply-add": lambda ops, a, b, c: ops.fma(a, b, c),
    "a product and a sum that are not fused": lambda ops, a, b, c: ops.add(ops.multiply(a, b), c),
    "rounding to bfloat16": lambda ops, a, b, c: ops.round_to(a, BFLOAT16),
    "rounding to float16": lambda ops, a, b, c: ops.round_to(a, FLOAT16),
    "negation": lambda ops, a, b, c: ops.negate(a),
}

_TRIED = 1 << 14


@functools.lru_cache(maxsize=16)
def inexact_operations(device: Device, formulation: Formulation) -> tuple[str, ...]:
    """Name the operations whose results are not those of IEEE 754 on a device.

    In float32 elements that the operations mark themselves do not count, nor do subnormal operands.

    Returns:
        Names for people, with the kind of operand where only special ones fail.
    """
    patterns = _hard_patterns(formulation)
    expected = _run(NumpyOperations(), [floats.decode(p, FLOAT32) for p in patterns])
    program = compile_exactly(functools.partial(_all_cases, formulation, device), device)
    try:
        found, strays = program(np.uint32(0), *patterns)
    except Exception as error:  # whatever a device without float64, say, raises
        return (f"everything ({str(error).splitlines()[0][:80]})",)
    names = []
    for name, wanted in expected.items():
        wrong = floats.differ(np.asarray(found[name]), wanted) & ~np.asarray(strays[name])
        if wrong.any():
            names.append(name + _kind(patterns, wrong))
    return tuple(names)


#: Operations of `ExactOperations`, and what NumPy's float64 makes of them.
_EXACT_CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "addition": (lambda ops, a, b, c: ops.add(a, b), lambda a, b, c: a + b),
    # Not the product of the last case: what is used twice is not fused.
    "multiplication": (lambda ops, a, b, c: ops.multiply(b, c), lambda a, b, c: b * c),
    "division": (lambda ops, a, b, c: ops.divide(a, b), lambda a, b, c: a / b),
    "square root": (lambda ops, a, b, c: ops.sqrt(a * a), lambda a, b, c: np.sqrt(a * a)),
    "a product and a sum that are not fused": (
        lambda ops, a, b, c: ops.add(ops.multiply(a, b), c),
        lambda a, b, c: a * b + c,
    ),
}


@functools.lru_cache(maxsize=16)
def inexact_in_float64(device: Device) -> tuple[str, ...]:
    """Name the operations of `ExactOperations` whose results are not NumPy's float64, on numbers of usual sizes."""
    rng = np.random.default_rng(4)
    values = rng.normal(0, 1, (3, _TRIED)) * np.exp2(rng.integers(-60, 60, (3, _TRIED)))
    values[2, ::2] = -(values[0] * values[1])[
        ::2
    ]  # what is left of the product is its rounding error

    def every(zero: Any, a: Any, b: Any, c: Any) -> dict[str, jax.Array]:
        return {
            name: case(ExactOperations(zero), a, b, c) for name, (case, _) in _EXACT_CASES.items()
        }

    try:
        found = compile_exactly(every, device)(np.uint32(0), *values)
    except Exception as error:  # whatever a device without float64 raises
        return (f"everything ({str(error).splitlines()[0][:80]})",)
    expected = {name: plain(*values) for name, (_, plain) in _EXACT_CASES.items()}
    return tuple(
        name for name, wanted in expected.items() if not np.array_equal(found[name], wanted)
    )


def _all_cases(
    formulation: Formulation, device: Device, zero: Any, *patterns: Any
) -> tuple[dict, dict]:
    found, strays = {}, {}
    for name, case in _CASES.items():
        ops = operations_of(formulation, zero, device=device)
        a, b, c = (ops.decode(p, FLOAT32) for p in patterns)
        if isinstance(ops, Float32Operations):
            for value in (a, b, c):
                ops.watch(value)
        found[name] = ops.patterns32(case(ops, a, b, c))
        marked = ops.strays if isinstance(ops, Float32Operations) else False
        strays[name] = jax.numpy.broadcast_to(jax.numpy.asarray(marked), found[name].shape)
    return found, strays


def _run(ops: Operations, values: list[NDArray[np.float32]]) -> dict[str, NDArray[np.uint32]]:
    return {name: ops.patterns32(case(ops, *values)) for name, case in _CASES.items()}


def _hard_patterns(formulation: Formulation) -> list[NDArray[np.uint32]]:
    """Draw operands whose terms meet: ties, cancellation, edges of binades; in float64 anything at all."""
    rng = np.random.default_rng(3)
    shape = (3, _TRIED)
    significand = rng.integers(0, 1 << 23, shape) & rng.choice(
        [0x7FFFFF, 0x7F0000, 0x7FE000, 0], shape
    )
    significand |= rng.choice([0, 0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], shape)
    exponent = 127 + rng.integers(-30, 31, _TRIED) + rng.integers(-3, 4, shape)
    patterns = (rng.integers(0, 2, shape) << 31 | exponent << 23 | significand).astype(np.uint32)
    if formulation == "float64":
        anything = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
        tiny = anything & np.uint32(0x81FFFFFF)
        special = rng.choice(np.array([0, 1 << 31, 0x7F800000, 0x7FC00000, 1], np.uint32), shape)
        kind = rng.integers(0, 5, shape)
        patterns = np.select([kind == 0, kind == 1, kind == 2], [anything, tiny, special], patterns)
    patterns[:, : _TRIED // 8] = _nearly_ties(rng, _TRIED // 8)
    return list(patterns)


def _nearly_ties(rng: np.random.Generator, count: int) -> NDArray[np.uint32]:
    """Draw a, b, c for which a * b + c is so near to a tie that rounding it to float64 first makes it one.

    a * b is (1 + 2^-23)(1 - 2^-23) = 1 - 2^-46 times half an ulp of c, or a little more than half an ulp.
    """
    one, low, high = 127, rng.integers(-10, 11, count), rng.integers(-10, 11, count)
    up = np.full(count, 1)
    down = np.full(count, (1 << 23) - 2)  # of the binade below: 1 - 2^-23
    more = rng.integers(0, 2, count) == 0
    a = (one + low) << 23 | up
    b = np.where(more, (one + high) << 23 | up, (one + high - 1) << 23 | down)
    c = (one + low + high + 24) << 23 | rng.integers(0, 1 << 23, count)
    sign = rng.integers(0, 2, (2, count)) << 31
    return np.stack([a | sign[0], b, c | sign[1]]).astype(np.uint32)


def _kind(patterns: list[NDArray[np.uint32]], wrong: NDArray[np.bool_]) -> str:
    """Say of which operands the wrong results are, where they are all of one kind."""
    magnitudes = np.stack(patterns)[:, wrong] & np.uint32(0x7FFFFFFF)
    subnormal = ((magnitudes < 0x00800000) & (magnitudes > 0)).any(axis=0)
    special = (magnitudes >= FLOAT32.infinity).any(axis=0)
    if subnormal.all():
        return " of subnormal numbers"
    return " of infinities and NaNs" if special.all() else ""
