"""Identify random runs of the real optimizers from their bits alone, and runs that no Adam made.

    python scripts/prove_identification.py
    python scripts/prove_identification.py --recordings 100 --output results/identification-intel.json

For every way of taking a step that the table of makers holds (`torch_runs.MAKERS`), and every format of weights,
so many runs are made as in `prove_arithmetics.py` and written as recordings without any metadata: neither the
implementation, nor the kind of weight decay, amsgrad, maximize, threads, nor the step count is known. By turns
these hold everything; the learning rates as float32 only; a run's very start without its moments (without the
first one, where the second was kept in another format than the weights, which its bits alone tell). Where
weights of more bits were kept than recorded, what was recorded is all of their start as well, and learning rates
are known in full: what is run freely is run with these. The names that fit must contain that of the arithmetic
which made the run.

Then the same runs with usual numbers are spoilt, each in its own way (`SPOILT`), and nothing may fit.

Every element of a run is tried in NumPy (`confirm=False`), so what fits would be confirmed.

Exit status: 0 all is named rightly; 1 something is not; 2 wrong usage, or an output that cannot be written;
130 interrupted.
"""

import argparse
import collections
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from random_runs import Maker, Run, Setting, draw
from reporting import check_output, guarded, machine_facts, notify, positive, write_json

import jaxaudit
from jaxaudit.arithmetics import Arithmetic, Options
from jaxaudit.floats import FORMATS, Format, decode, encode, round_to
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.recorders import write_tensors
from jaxaudit.recording import TENSOR_KEYS

try:
    import torch_runs
except ImportError:
    sys.exit('prove_identification.py: error: torch is missing; pip install "jaxaudit[torch]"')

#: One run in so many is large, and of this size: torch divides it among threads.
LARGE_EVERY, LARGE = 20, 40_009

#: Keys of the recording by the hyperparameters' names.
SCALAR_KEYS = {
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "epsilon": "adam_epsilon",
    "weight_decay": "weight_decay",
}

Arrays = dict[str, NDArray[Any]]
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    default = Path("results/identification.json")
    result.add_argument("--output", type=Path, default=default, help="to write (%(default)s)")
    result.add_argument("--overwrite", action="store_true", help="replace an existing output")
    result.add_argument(
        "--recordings", type=positive, default=6, help="runs of each kind (%(default)s)"
    )
    result.add_argument("--seed", type=int, default=0, help="of the runs (%(default)s)")
    result.add_argument(
        "--only", default="", metavar="TEXT", help="makers whose names contain this (all)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Identify; 0 if all is named rightly, 1 if not, 2 if it could not be done."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Identify runs of every kind, and spoilt ones; write, print."""
    check_output(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(arguments, Path(folder) / "run.safetensors"))
    agree = all(
        row["named"] == row["recordings"] and not sum(row["spoilt_named"].values()) for row in found
    )
    report = {
        "machine": machine_facts(),
        "against": torch_runs.AGAINST,
        "seed": arguments.seed,
        "agree": agree,
        "seconds": round(time.monotonic() - start, 1),
        "recordings": sum(row["recordings"] for row in found),
        "named": sum(row["named"] for row in found),
        "spoilt": sum(sum(row["spoilt"].values()) for row in found),
        "spoilt_named": sum(sum(row["spoilt_named"].values()) for row in found),
        "identified": found,
    }
    write_json(arguments.output, report)
    print(table(found))
    print(f"Written to {arguments.output}")
    return 0 if agree else 1


def rows(arguments: argparse.Namespace, path: Path) -> Iterator[Row]:
    """Identify runs of every maker and format, as far as the catalogue has an arithmetic for them."""
    for name, maker in torch_runs.MAKERS.items():
        for fmt in FORMATS.values():
            arithmetic = maker.arithmetic(fmt)
            if arithmetic is not None and arguments.only in name:
                notify(f"{name}, {fmt.name}: {arithmetic.label}")
                seeds = [arguments.seed, *f"{name}, {fmt.name}".encode()]
                many = range(arguments.recordings)
                sets = [named(maker, arithmetic, fmt, n, [*seeds, n], path) for n in many]
                spoilt = {kind: 0 for kind in SPOILT}
                wrong = collections.Counter()
                for n in many:
                    kind = list(SPOILT)[(n + sum(seeds)) % len(SPOILT)]  # another one in each row
                    spoilt[kind] += 1
                    wrong[kind] += bool(named_spoilt(maker, fmt, kind, [*seeds, n], path))
                yield {
                    "made_by": name,
                    "arithmetic": arithmetic.name,
                    "variant": arithmetic.variant,
                    "format": fmt.name,
                    "recordings": len(sets),
                    "named": sum(arithmetic.name in names for names in sets),
                    "mean_names": round(float(np.mean([len(names) for names in sets])), 2),
                    "named_alone": sum(names == [arithmetic.name] for names in sets),
                    "spoilt": spoilt,
                    "spoilt_named": {kind: wrong[kind] for kind in SPOILT},
                }


def named(
    maker: Maker,
    arithmetic: Arithmetic,
    fmt: Format,
    number: int,
    seeds: Sequence[int],
    path: Path,
) -> list[str]:
    """Make one run, record it in one of three ways, and name what fits."""
    size = LARGE if (number + 1) % LARGE_EVERY == 0 else None
    setting = draw(np.random.default_rng(seeds), fmt, number, arithmetic, size=size)
    way, master = number % 3, arithmetic.weight == "master"
    if master or way == 2:
        setting = afresh(setting, rounded=master)
    run = maker.make(setting)
    if (
        run.formats["exp_avg_sq"] is not run.formats["exp_avg"]
        and not run.patterns["exp_avg_sq"].any()
    ):
        # Second moments that are all zero do not show which format they are kept in.
        return named(maker, arithmetic, fmt, number, [*seeds, 0], path)
    arrays = arrays_of(run, rates=np.dtype(np.float32 if way == 1 and not master else np.float64))
    if way == 2:
        # Which format the second moment had, its own bits alone can tell.
        tells = run.formats["exp_avg_sq"] is not run.formats["exp_avg"]
        for key in ("momentum_W",) if tells else ("momentum_W", "variance_W", "max_variance_W"):
            arrays.pop(key, None)
    names = fitting(path, arrays)
    if arithmetic.name not in names:
        notify(f"  not named, {seeds}: {setting.hyperparameters}, {setting.options}: {names}")
    return names


def named_spoilt(
    maker: Maker, fmt: Format, kind: str, seeds: Sequence[int], path: Path
) -> list[str]:
    """Make one usual run, spoil it, and name what fits none the less."""
    rng = np.random.default_rng([*seeds, 1])
    arrays = SPOILT[kind](arrays_of(maker.make(usual(rng, fmt))), fmt, rng)
    names = fitting(path, arrays)
    if names:
        notify(f"  {kind}, {seeds}: {names}")
    return names


def afresh(setting: Setting, *, rounded: bool) -> Setting:
    """Let a run begin with its first step: with moments of zero, and with weights that the recording holds."""
    values = dict(setting.values)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        values[name] = np.zeros_like(values[name])
    if rounded:
        values["param"] = round_to(values["param"], setting.storage)
    given = dataclasses.replace(setting.hyperparameters, count=StepCount())
    return dataclasses.replace(setting, values=values, hyperparameters=given)


def usual(rng: np.random.Generator, fmt: Format, size: int = 1500, steps: int = 4) -> Setting:
    """Choose a run of the usual numbers, whose bits tell everything."""
    zero = np.zeros(size, np.float32)
    given = Hyperparameters(
        learning_rate=np.full(steps, 3.3e-3),
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=float(rng.choice([0.0, 0.1])),
    )
    values: dict[str, NDArray[np.float32]] = {}
    values |= dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), zero)
    values["param"] = round_to(rng.normal(0, 0.02, size).astype(np.float32), fmt)
    values["grad"] = rng.normal(0, 1e-2, (steps, size)).astype(np.float32)
    options = Options(decoupled=bool(rng.integers(2)))
    return Setting(storage=fmt, hyperparameters=given, options=options, values=values)


def arrays_of(
    run: Run,
    stored: Hyperparameters | None = None,
    rates: np.dtype | None = None,
) -> Arrays:
    """Return a run as the tensors of a recording, with rows of one element.

    Args:
        run: what to record.
        stored: hyperparameters to store, instead of those of the run.
        rates: dtype of the stored learning rates; float64 by default.
    """
    given, storage = stored or run.setting.hyperparameters, run.setting.storage
    found: Arrays = {}
    for name, patterns in run.patterns.items():
        fmt = run.formats[name]
        if name == "grad":
            patterns = np.concatenate([np.zeros_like(patterns[:1]), patterns])
        elif name == "param" and fmt is not storage:
            patterns, fmt = encode(decode(patterns, fmt), storage), storage
        found[TENSOR_KEYS[name]] = np.ascontiguousarray(patterns[..., None]).view(fmt.value_dtype)
    rows = np.concatenate([given.learning_rate[:1], given.learning_rate])
    found["learning_rate"] = rows.astype(rates or np.float64)
    return found | {key: np.array(getattr(given, name)) for name, key in SCALAR_KEYS.items()}


def fitting(path: Path, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Write a recording without metadata, and name what fits it."""
    write_tensors(path, arrays, overwrite=True)
    with jaxaudit.open_recording(path) as recording:
        found = jaxaudit.identify(recording, backend="cpu", confirm=False)
    return [str(name) for name in found.arithmetic.values[found.fits.values == 1]]


def shuffled(key: str) -> Callable[[Arrays, Format, np.random.Generator], Arrays]:
    """Give every element of a tensor to another one, timestep by timestep."""

    def spoil(arrays: Arrays, fmt: Format, rng: np.random.Generator) -> Arrays:
        return arrays | {key: rng.permuted(arrays[key].view(fmt.pattern_dtype), axis=1).view(fmt.value_dtype)}  # fmt: skip

    return spoil


def other_rate(factor: float) -> Callable[[Arrays, Format, np.random.Generator], Arrays]:
    """Store another learning rate than the run had."""

    def spoil(arrays: Arrays, fmt: Format, rng: np.random.Generator) -> Arrays:
        return arrays | {"learning_rate": arrays["learning_rate"] * factor}

    return spoil


def random_bits(arrays: Arrays, fmt: Format, rng: np.random.Generator) -> Arrays:
    """Replace weights by random bits."""
    patterns = rng.integers(0, 1 << fmt.width, arrays["W"].shape, np.uint64)
    return arrays | {"W": patterns.astype(fmt.pattern_dtype).view(fmt.value_dtype)}


def descent(arrays: Arrays, fmt: Format, rng: np.random.Generator) -> Arrays:
    """Take the steps of stochastic gradient descent with momentum over the same gradients."""
    weights, gradients = (
        decode(arrays[key].view(fmt.pattern_dtype), fmt).copy() for key in ("W", "grad_W")
    )
    rate, momentum = np.float32(arrays["learning_rate"][0]), np.zeros_like(weights)
    for t in range(1, len(weights)):
        momentum[t] = round_to(np.float32(0.9) * momentum[t - 1] + gradients[t], fmt)
        weights[t] = round_to(weights[t - 1] - rate * momentum[t], fmt)
    found = {"W": weights, "momentum_W": momentum}
    kept = {key: values for key, values in arrays.items() if key != "variance_W"}
    return kept | {key: encode(values, fmt).view(fmt.value_dtype) for key, values in found.items()}


#: Ways to make of a run one that no Adam can have made.
SPOILT: dict[str, Callable[[Arrays, Format, np.random.Generator], Arrays]] = {
    "weights shuffled": shuffled("W"),
    "gradients shuffled": shuffled("grad_W"),
    "learning rate of 1.01 times": other_rate(1.01),
    "learning rate of 2 times": other_rate(2),
    "gradient descent with momentum": descent,
    "random bits": random_bits,
}


def table(found: Sequence[Row]) -> str:
    """Lay the counts out in columns."""
    lines = [
        f"{'made by':<33}{'format':<10}{'runs':>6}{'named':>7}{'alone':>7}{'names':>7}{'spoilt':>8}{'named':>7}"
    ]
    for row in found:
        lines.append(
            f"{row['made_by']:<33}{row['format']:<10}{row['recordings']:>6}{row['named']:>7}"
            f"{row['named_alone']:>7}{row['mean_names']:>7}{sum(row['spoilt'].values()):>8}"
            f"{sum(row['spoilt_named'].values()):>7}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
