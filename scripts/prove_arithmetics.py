"""Replay random runs of the real optimizers under the catalogue's arithmetics, and count every bit that differs.

    python scripts/prove_arithmetics.py
    python scripts/prove_arithmetics.py --recordings 2000 --output results/arithmetics-intel.json

For every way of taking a step that the tables of makers hold (`MAKERS`), and every format of weights, so many
runs of 2 to 4 steps are made: parameters of 1 to 5,000 elements, and some of 32,767 and more, on one thread and
on two; weights, gradients and starting states of one scale between 1e-30 and 1e4, of all scales at once, with
subnormal numbers, zeros of both signs, infinities and NaNs; at step counts up to 100,000; with each kind of
weight decay, amsgrad, maximize, constant and scheduled learning rates. Each step is replayed in NumPy from the
run's own state before it, and every tensor of the new state is compared bit for bit, all NaNs being alike.

Beside torch.optim, the packages that are installed of optax, torch-optimi and torchao are run, and our restatement of
torchdistx's AnyPrecisionAdamW. What compiles anew for every size (optax, and torchao where it is compiled) is run in
few sizes; a step that is compiled as a whole has numbers and options as constants, and few sets of these
(`third_party_runs.PROGRAMS`). The output lists the sizes and counts the sets of numbers of every row.

PyTorch picks its kernels when it is imported, so those without fused multiply-add are run in a second process
(ATEN_CPU_CAPABILITY=default). The catalogue names no variant for some of them; these are not run.

Exit status: 0 no difference; 1 differences; 2 wrong usage, or an output that cannot be written; 3 the second
process failed; 130 interrupted.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from random_runs import LARGE, Comparison, Maker, Setting, compare, draw
from reporting import Failure, check_output, guarded, machine_facts, notify, positive, write_json

from jaxaudit.arithmetics import Arithmetic
from jaxaudit.floats import FORMATS, Format

try:
    import third_party_runs
    import torch
    import torch_runs
except ImportError:
    sys.exit('prove_arithmetics.py: error: torch is missing; pip install "jaxaudit[torch]"')

#: Tables of ways to take a step, by what they compare with. Another library is another entry.
MAKERS: dict[str, dict[str, Maker]] = {
    torch_runs.AGAINST: torch_runs.MAKERS
} | third_party_runs.MAKERS

#: One run in so many is large.
LARGE_EVERY = 40

#: Whether a setting has an option, by the option's name.
OPTIONS = {
    "no weight decay": lambda s: s.hyperparameters.weight_decay == 0,
    "decoupled": lambda s: s.hyperparameters.weight_decay != 0 and s.options.decoupled,
    "l2": lambda s: s.hyperparameters.weight_decay != 0 and not s.options.decoupled,
    "amsgrad": lambda s: s.options.amsgrad,
    "maximize": lambda s: s.options.maximize,
    "scheduled learning rate": lambda s: np.unique(s.hyperparameters.learning_rate).size > 1,
    "two threads": lambda s: s.options.threads == 2,
    "32,767 elements or more": lambda s: s.size >= min(LARGE),
    "infinities or NaNs": lambda s: not all(np.isfinite(v).all() for v in s.values.values()),
}

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    default = Path("results/arithmetics.json")
    result.add_argument("--output", type=Path, default=default, help="to write (%(default)s)")
    result.add_argument("--overwrite", action="store_true", help="replace an existing output")
    result.add_argument(
        "--recordings", type=positive, default=200, help="runs of each kind (%(default)s)"
    )
    result.add_argument(
        "--largest", type=positive, default=max(LARGE), help="elements of a run (%(default)s)"
    )
    result.add_argument("--seed", type=int, default=0, help="of the runs (%(default)s)")
    result.add_argument(
        "--only", default="", metavar="TEXT", help="makers whose names contain this (all)"
    )
    result.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 0 if nothing differs, 1 if something does, 2 or 3 if it could not be done."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Compare with the kernels of this machine and with those without fused multiply-add; write, print."""
    if arguments.rows:
        print(json.dumps(list(rows(arguments))))
        return 0
    check_output(arguments)
    for package in third_party_runs.MISSING:
        notify(f"{package} is not installed: left out.")
    start = time.monotonic()
    found = list(rows(arguments))
    if torch_runs.fuses():
        found += rows_without_fma(arguments)
    agree = not any(any(row["different"].values()) for row in found)
    capability = torch.backends.cpu.get_cpu_capability()
    report = {
        "machine": machine_facts() | {"torch_cpu_capability": capability},
        "square_root_of_float32": torch_runs.root(),
        "seed": arguments.seed,
        "agree": agree,
        "seconds": round(time.monotonic() - start, 1),
        "compared": found,
    }
    write_json(arguments.output, report)
    print(table(found))
    print(f"Written to {arguments.output}")
    return 0 if agree else 1


def rows_without_fma(arguments: argparse.Namespace) -> list[Row]:
    """Compare in a process of its own, whose torch takes kernels without fused multiply-add."""
    command = [sys.executable, __file__, "--rows", "--recordings", str(arguments.recordings)]
    command += ["--seed", str(arguments.seed), "--only", arguments.only]
    command += ["--largest", str(arguments.largest)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise Failure(f"the process without FMA ended with status {done.returncode}.", 3)
    return json.loads(done.stdout)


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Compare with every maker and format, as far as the catalogue has an arithmetic for them."""
    large = [size for size in LARGE if size <= arguments.largest]
    for against, makers in MAKERS.items():
        for name, maker in makers.items():
            for fmt in FORMATS.values():
                arithmetic = maker.arithmetic(fmt)
                if arithmetic is not None and arguments.only in name:
                    notify(f"{name}, {fmt.name}: {arithmetic.label}")
                    facts = {"against": against, "made_by": name}
                    seeds = [arguments.seed, *f"{name}, {fmt.name}".encode()]
                    many = range(arguments.recordings)
                    sizes = third_party_runs.SIZES.get(name, ())
                    few = [size for size in sizes if size <= arguments.largest] or sizes[:1]
                    if few:
                        notify(f"    each size is compiled: only {', '.join(map(str, few))}")
                    start = time.monotonic()
                    runs = [attempt(maker, arithmetic, fmt, n, seeds, large, few) for n in many]
                    seconds = {"seconds": round(time.monotonic() - start, 1)}
                    yield facts | row(arithmetic, fmt, runs) | seconds


def row(arithmetic: Arithmetic, fmt: Format, runs: Sequence[tuple[Setting, Comparison]]) -> Row:
    """Add up what was compared."""
    compared, different = collections.Counter(), collections.Counter()
    for _, found in runs:
        compared.update(found.compared)
        different.update(found.different)
    return {
        "arithmetic": arithmetic.name,
        "variant": arithmetic.variant,
        "format": fmt.name,
        "recordings": len(runs),
        "timesteps": sum(setting.steps for setting, _ in runs),
        "sizes": sizes_of([setting for setting, _ in runs]),
        "sets_of_numbers": len({numbers_of(setting) for setting, _ in runs}),
        "recordings_with": {
            n: sum(has(setting) for setting, _ in runs) for n, has in OPTIONS.items()
        },
        "timesteps_with_scalars_ulps_away": sum(found.nudged for _, found in runs),
        "elements": sum(compared.values()),
        "compared": dict(compared),
        "different": {name: different[name] for name in compared},
    }


def sizes_of(settings: Sequence[Setting]) -> dict[str, int] | str:
    """Count the recordings of each size where they are few, and tell how far they go where they are many."""
    counts = collections.Counter(setting.size for setting in settings)
    if len(counts) > 10:
        return f"{len(counts)} from {min(counts)} to {max(counts)}"
    return {str(size): count for size, count in sorted(counts.items())}


def numbers_of(setting: Setting) -> tuple[object, ...]:
    """Return what a compiled step has as constants, but for a learning rate."""
    given = setting.hyperparameters
    numbers = (given.beta1, given.beta2, given.epsilon, given.weight_decay)
    return *numbers, setting.options.decoupled, setting.options.amsgrad


def attempt(
    maker: Maker,
    arithmetic: Arithmetic,
    fmt: Format,
    number: int,
    seeds: Sequence[int],
    large: Sequence[int],
    few: Sequence[int],
) -> tuple[Setting, Comparison]:
    """Make one run, now and then a large one or of a few sizes in turn, and replay it."""
    turn, last = divmod(number + 1, LARGE_EVERY)
    size = large[(turn - 1) % len(large)] if large and last == 0 else None
    size = few[number % len(few)] if few else size
    rng = np.random.default_rng([*seeds, number])
    setting = draw(rng, fmt, number, arithmetic, size=size)
    run = maker.make(setting)
    return run.setting, compare(run, arithmetic)


def table(found: Sequence[Row]) -> str:
    """Lay the counts out in columns."""
    lines = [
        f"{'made by':<45}{'format':<10}{'runs':>6}{'elements':>12}{'different':>11}  replayed as"
    ]
    for each in found:
        label = each["arithmetic"] + (f" ({each['variant']})" if each["variant"] else "")
        lines.append(
            f"{each['made_by']:<45}{each['format']:<10}{each['recordings']:>6}{each['elements']:>12}"
            f"{sum(each['different'].values()):>11}  {label}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
