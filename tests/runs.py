"""Runs as recordings without metadata: real ones of torch, and made-up ones, stepped in NumPy."""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

import jaxaudit
from jaxaudit.arithmetics import Arithmetic, Options, make_step
from jaxaudit.floats import Format, decode, encode, round_to
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.operations import numpy_operations
from jaxaudit.recorders import write_tensors
from jaxaudit.scalars import scalars_of
from jaxaudit.steps import Step

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
random_runs, torch_runs, prove = (
    importlib.import_module(name) for name in ("random_runs", "torch_runs", "prove_identification")
)

MAKERS, Run, Setting = torch_runs.MAKERS, random_runs.Run, random_runs.Setting


def numbers(steps: int, **given: Any) -> Hyperparameters:
    """Return usual hyperparameters, with some replaced; `rate` is constant, `rates` one each."""
    rates = given.pop("rates", None)
    rates = np.full(steps, given.pop("rate", 3.3e-3)) if rates is None else np.asarray(rates)
    usual: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.0}
    return Hyperparameters(learning_rate=rates, **(usual | given))


def setting(
    fmt: Format, size: int = 600, steps: int = 4, options: Options | None = None, **given: Any
) -> Any:
    """Return a run's start and gradients of usual sizes; with `first`, after that many steps less one."""
    rng = np.random.default_rng(size + steps)
    first = given.pop("first", 1)
    hyperparameters = numbers(steps, count=StepCount(first=first), **given)
    values = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), np.zeros(size))
    if first > 1:
        values["exp_avg"] = rng.normal(0, 3e-3, size)
        values["exp_avg_sq"] = values["max_exp_avg_sq"] = rng.normal(0, 1e-2, size) ** 2
    values["param"] = round_to(rng.normal(0, 0.02, size).astype(np.float32), fmt)
    values["grad"] = rng.normal(0, 1e-2, (steps, size))
    return Setting(
        storage=fmt,
        hyperparameters=hyperparameters,
        options=options or Options(),
        values={name: value.astype(np.float32) for name, value in values.items()},
    )


def take(
    given: Any,
    arithmetic: Arithmetic,
    *,
    step: Step | None = None,
    random: np.random.Generator | None = None,
) -> Any:
    """Take a setting's steps in NumPy under an arithmetic, one after the other.

    Args:
        given: the setting.
        arithmetic: whose rule computes the scalars.
        step: to take instead of the arithmetic's own.
        random: rounds the weights to bfloat16 by chance, as torchao does: adds 16 bits and truncates.
    """
    numbers, fmt = given.hyperparameters, given.storage
    step = step or make_step(arithmetic, fmt, numbers, given.options)
    scalars = scalars_of(step, arithmetic.rule, numbers, range(1, given.steps + 1))
    ops = numpy_operations(flushes=step.flushes)
    formats = {name: step.format_of(name) for name in step.state} | {"grad": fmt}
    if random:
        formats["param"] = fmt
    zero = np.zeros(given.size, np.float32)
    state = {name: round_to(given.values.get(name, zero), formats[name]) for name in step.state}
    gradients = round_to(given.values["grad"], fmt)
    rows = {name: [values] for name, values in state.items()}
    for k in range(given.steps):
        x = state | {"grad": gradients[k], "tail": np.zeros(given.size, np.uint8)}
        at = {name: value[k] for name, value in scalars.items()}
        with np.errstate(all="ignore"):
            state = {
                name: np.asarray(value, np.float32)
                for name, value in step.advance(ops, at, x, {}).items()
            }
        if random:
            state["param"] = by_chance(state["param"], random)
        for name, values in state.items():
            rows[name].append(values)
    patterns = {name: encode(np.stack(values), formats[name]) for name, values in rows.items()}
    return Run(setting=given, formats=formats, patterns=patterns | {"grad": encode(gradients, fmt)})


def by_chance(values: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """Round to bfloat16 by chance, as torchao does: add 16 random bits and truncate."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    added = bits + random.integers(0, 1 << 16, bits.shape, np.uint32)
    return (added & np.uint32(0xFFFF0000)).view(np.float32)


def save(
    path: Path,
    run: Any,
    *,
    drop: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
    rates: Any = np.float64,
    change: Mapping[str, NDArray[Any]] | None = None,
    **stored: Any,
) -> Path:
    """Write a run as a recording.

    Args:
        path: of the recording.
        run: what to record.
        drop: tensors to leave out.
        metadata: what the trainer claims; by default nothing.
        rates: dtype of the stored learning rates.
        change: tensors to write instead of the run's.
        stored: hyperparameters to store instead of the run's.
    """
    given = dataclasses.replace(run.setting.hyperparameters, **stored)
    arrays = prove.arrays_of(run, given, np.dtype(rates)) | dict(change or {})
    kept = {name: array for name, array in arrays.items() if name not in drop}
    write_tensors(path, kept, metadata=metadata, overwrite=True)
    return path


def weights(run: Any) -> NDArray[np.float32]:
    """Return a run's weights as recorded, (T + 1, n)."""
    found = decode(run.patterns["param"], run.formats["param"])
    return round_to(found, run.setting.storage)


def identify(path: Path, **how: Any) -> xr.Dataset:
    """Identify on the CPU, on the probes alone."""
    with jaxaudit.open_recording(path) as recording:
        return jaxaudit.identify(recording, **({"backend": "cpu", "confirm": False} | how))


def named(found: xr.Dataset) -> list[str]:
    """Name what fits."""
    return [str(name) for name in found.arithmetic.values[found.fits.values == 1]]


def replay(run: Any, arithmetic: Arithmetic, step: Step) -> NDArray[np.float32]:
    """Compute every new weight of a run from the recorded state before it, (T, n), in the step's format."""
    x = run.inputs() | {"tail": np.uint8(0)}
    steps = range(1, run.setting.steps + 1)
    scalars = scalars_of(step, arithmetic.rule, run.setting.hyperparameters, steps)
    columns = {name: value[:, None] for name, value in scalars.items()}
    with np.errstate(all="ignore"):
        ops = numpy_operations(flushes=step.flushes)
        return np.ascontiguousarray(step.replay("param", ops, columns, x), np.float32)


def element(
    arithmetic: Arithmetic,
    step: Step,
    stage: str,
    given: Hyperparameters,
    timestep: int,
    x: Mapping[str, Any],
) -> np.float32:
    """Compute one element of a stage at a timestep."""
    rates = given.learning_rate[timestep - 1 : timestep]
    given = dataclasses.replace(given, learning_rate=rates)
    scalars = scalars_of(step, arithmetic.rule, given, [timestep])
    inputs = {name: np.full(1, value, np.float32) for name, value in x.items()}
    with np.errstate(all="ignore"):
        ops = numpy_operations(flushes=step.flushes)
        found = step.replay_recorded(stage, ops, scalars, inputs | {"tail": np.zeros(1, np.uint8)})
    return np.float32(np.asarray(found).ravel()[0])
