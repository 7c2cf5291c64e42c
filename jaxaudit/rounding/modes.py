"""The ways in which an operation is run: PyTorch, JAX as one writes it, and jaxaudit's own formulations.

A runner takes operands as bit patterns, one array each and all of one shape, and returns what every mode made of
them. It may be called from several threads.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.devices import Device
from jaxaudit.floats import FLOAT32, FLOAT64, Format, Patterns
from jaxaudit.operations import (
    Float32Operations,
    Formulation,
    NumpyOperations,
    Value,
    compile_exactly,
    operations_of,
)
from jaxaudit.rounding.checks import Check, Platform

PYTORCH, REDUCED = "pytorch", "jit-reduced"
JAXAUDIT, JAXAUDIT32, JAXAUDIT64 = "jaxaudit", "jaxaudit-float32", "jaxaudit-float64"

#: Compiler options of the modes that compile what one writes, by name; `REDUCED` sums up after it.
COMPILED: dict[str, dict[str, bool | str]] = {
    "jit": {},
    REDUCED: {},
    "jit-excess-precision-off": {"xla_allow_excess_precision": False},
    "jit-algsimp-off": {"xla_disable_hlo_passes": "algsimp"},
}

#: Every mode, with what it means.
MODES: dict[str, str] = {
    PYTORCH: "PyTorch's kernels on the device",
    "eager": "JAX, operator by operator",
    "jit": "JAX, compiled by jax.jit",
    REDUCED: "JAX, compiled by jax.jit together with a sum over its float32 results",
    "jit-excess-precision-off": "jax.jit with xla_allow_excess_precision=False",
    "jit-algsimp-off": "jax.jit without XLA's algebraic simplifier",
    JAXAUDIT: "as jaxaudit computes it: in float32 where that is exact, else in float64",
    JAXAUDIT32: "jaxaudit's float32 formulation, elements that it hands over to float64 left out",
    JAXAUDIT64: "jaxaudit's float64 formulation",
}


class JaxNotation:
    """JAX's own names of operations; see `checks.Notation`."""

    def cast(self, x: Value, fmt: Format) -> Value:
        return x.astype(fmt.value_dtype)

    def sqrt(self, x: Value) -> Value:
        return jnp.sqrt(x)

    def rsqrt(self, x: Value) -> Value:
        return lax.rsqrt(x)

    def reciprocal(self, x: Value) -> Value:
        return 1 / x

    def square(self, x: Value) -> Value:
        return jnp.square(x)

    def negate(self, x: Value) -> Value:
        return -x

    def absolute(self, x: Value) -> Value:
        return jnp.abs(x)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a mode made of some operands.

    Attributes:
        patterns: results, in the format of `observed_format`.
        left_out: mask of the elements that the mode does not answer for; None for none.
    """

    patterns: Patterns
    left_out: NDArray[np.bool_] | None = None


def observed_format(check: Check, mode: str) -> Format:
    """Tell in which format a mode's results are seen: a sum is wider than what it sums up."""
    if mode != REDUCED:
        return check.result
    return FLOAT64 if check.result is FLOAT64 else FLOAT32


def platform_of(device: Device) -> Platform:
    """Tell which kernels of PyTorch run where JAX does."""
    return "cpu" if device.platform == "cpu" else "cuda"


class Runner:
    """Runs one operation in every mode.

    Args:
        check: the operation.
        device: where JAX runs.
        torch: the module, or None for no PyTorch.
        trial: operands on which the float32 formulation is tried before its first use, as the audit does.
    """

    def __init__(self, check: Check, device: Device, torch: Any, trial: Sequence[Patterns]):
        self._check = check
        self._device = device
        self._torch = torch
        self._notation = JaxNotation()
        natural = functools.partial(check.natural, self._notation)
        self._compiled = {
            mode: jax.jit(self._summed if mode == REDUCED else natural, compiler_options=options)
            for mode, options in COMPILED.items()
        }
        self._formulated = {
            name: compile_exactly(functools.partial(_formulated, check, name, device), device)
            for name in ("float32", "float64")
        }
        self.float32_is_exact = self._try_float32(trial)

    def __call__(self, operands: Sequence[Patterns]) -> dict[str, Found]:
        """Run every mode; "pytorch" only where it is there."""
        found = {}
        if self._torch is not None:
            found[PYTORCH] = Found(self._run_torch(operands))
        with jax.enable_x64(True), jax.default_device(self._device):
            arrays = self._arrays(operands)
            found["eager"] = self._found(self._check.natural(self._notation, *arrays), "eager")
            for mode, compiled in self._compiled.items():
                given = self._arrays(self._paired(operands)) if mode == REDUCED else arrays
                found[mode] = self._found(compiled(*given), mode)
            return found | self._run_formulations(operands)

    def _arrays(self, operands: Sequence[Patterns]) -> list[jax.Array]:
        formats = self._check.formats
        values = [p.view(f.value_dtype) for p, f in zip(operands, formats, strict=True)]
        return [jax.device_put(value, self._device) for value in values]

    def _paired(self, operands: Sequence[Patterns]) -> list[Patterns]:
        """Put beside each operand one of a result that is zero, so that a sum over both is the result."""
        pairs = []
        for patterns, fmt, neutral in zip(
            operands, self._check.formats, self._check.neutral, strict=True
        ):
            pair = np.empty((patterns.size, 2), patterns.dtype)
            pair[:, 0] = patterns
            pair[:, 1] = np.array(neutral).astype(fmt.value_dtype).view(patterns.dtype)
            pairs.append(pair)
        return pairs

    def _summed(self, *arrays: Value) -> Value:
        wide = observed_format(self._check, REDUCED).value_dtype
        return self._check.natural(self._notation, *arrays).astype(wide).sum(axis=-1)

    def _found(self, result: jax.Array, mode: str) -> Found:
        fmt = observed_format(self._check, mode)
        return Found(np.asarray(result).view(fmt.pattern_dtype))

    def _run_formulations(self, operands: Sequence[Patterns]) -> dict[str, Found]:
        """Run jaxaudit's own: what float32 marks, float64 computes."""
        exact, _ = self._formulate("float64", operands)
        fast, marked = self._formulate("float32", operands)
        own = np.where(marked, exact, fast) if self.float32_is_exact else exact
        return {
            JAXAUDIT: Found(own),
            JAXAUDIT32: Found(fast, marked),
            JAXAUDIT64: Found(exact),
        }

    def _formulate(
        self, formulation: Formulation, operands: Sequence[Patterns]
    ) -> tuple[Patterns, NDArray[np.bool_]]:
        given = self._check.scalars
        wide = formulation == "float64"
        scalars = {name: np.float64(c) if wide else c for name, c in given.items()}
        patterns, marked = self._formulated[formulation](np.uint32(0), scalars, *operands)
        return np.asarray(patterns), np.asarray(marked)

    def _try_float32(self, trial: Sequence[Patterns]) -> bool:
        """Tell whether what the float32 formulation does not mark is right on the trial's operands."""
        with jax.enable_x64(True), jax.default_device(self._device):
            found, marked = self._formulate("float32", trial)
        wanted = formulated_in_numpy(self._check, trial)
        return not (floats.differ(found, wanted, self._check.result) & ~marked).any()

    def _run_torch(self, operands: Sequence[Patterns]) -> Patterns:
        torch, check = self._torch, self._check
        place = platform_of(self._device)
        tensors = [
            torch.from_numpy(p.view(f"int{f.width}")).view(getattr(torch, f.name)).to(place)
            for p, f in zip(operands, check.formats, strict=True)
        ]
        with torch.no_grad():
            result = check.torch(torch, *tensors).cpu()
        bits = result.view(getattr(torch, f"int{check.result.width}"))
        return bits.numpy().view(check.result.pattern_dtype)


def _formulated(
    check: Check,
    formulation: Formulation,
    device: Device,
    zero: Any,
    scalars: Mapping[str, Any],
    *operands: Any,
) -> tuple[Any, Any]:
    """Compute a formula as the replay does; return patterns and the mask of marked elements."""
    ops = operations_of(formulation, zero, device=device)
    values = [ops.decode(p, fmt) for p, fmt in zip(operands, check.formats, strict=True)]
    value = check.formula(ops, scalars, *values)
    marked: Any = False
    if check.result is not FLOAT64:
        value = ops.round_to(value, check.result)
    patterns = ops.encode(value, check.result)
    if isinstance(ops, Float32Operations):
        singles = [v for v, fmt in zip(values, check.formats, strict=True) if fmt is not FLOAT64]
        for single in (*singles, value):
            ops.watch(single)
        marked = ops.strays
    return patterns, jnp.broadcast_to(jnp.asarray(marked, bool), patterns.shape)


def formulated_in_numpy(check: Check, operands: Sequence[Patterns]) -> Patterns:
    """Compute a formula with the host's float32 arithmetic."""
    ops = NumpyOperations()
    return ops.encode(formula_in_numpy(check, operands), check.result)


def formula_in_numpy(check: Check, operands: Sequence[Patterns]) -> NDArray[Any]:
    """Compute a formula with the host's float32 arithmetic, not yet rounded to the result's format."""
    ops = NumpyOperations()
    values = [floats.decode(p, fmt) for p, fmt in zip(operands, check.formats, strict=True)]
    with np.errstate(all="ignore"):
        return check.formula(ops, check.scalars, *values)
