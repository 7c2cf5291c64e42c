"""Random runs of an optimizer as raw bits, and the count of what an arithmetic gets wrong in them.

`draw` chooses what a run is given; a maker (`torch_runs`, for one) takes its steps with a library and returns a
`Run`; `compare` replays that in NumPy, every step from the run's own state before it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaudit.arithmetics import (
    Arithmetic,
    Options,
    depends_on_tail,
    make_step,
    tail_elements,
)
from jaxaudit.floats import FLOAT16, Format, decode, differ, round_to
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.operations import numpy_operations
from jaxaudit.scalars import EXACT, Nudge, scalars_of
from jaxaudit.steps import Decay, Step

#: Sizes about those from which PyTorch divides a tensor among its threads.
LARGE = (32767, 32768, 32769, 40009, 65537, 100_003)

BETAS = ((0.9, 0.999), (0.9, 0.95), (0.8, 0.99), (0.5, 0.9), (0.3, 0.999), (0.0, 0.5))
EPSILONS = (1e-8, 1e-8, 1e-5, 1e-15, 0.0, 2.0**-20)
RATES = (1e-3, 1e-3, 0.1, 3.3e-4, 1e-9, 0.0)
DECAYS = (0.1, 0.01, 0.037, 1e-4, 3.0)

#: Steps taken before the run begins; 0 far oftener than the others.
EARLIER = (0, 0, 0, 0, 1, 9, 300, 1500, 99_999)

SPECIAL = (np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -3e-39, 6e-8, 6e4, 3e38, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What a run is given.

    Attributes:
        storage: format of the recorded weights.
        hyperparameters: its numbers, with one learning rate for each step.
        options: the others.
        values: float32 values, not yet rounded to any format: `param`, `exp_avg`, `exp_avg_sq` and
            `max_exp_avg_sq` before the first step, of shape (n,); `grad` of each step, (T, n).
    """

    storage: Format
    hyperparameters: Hyperparameters
    options: Options
    values: Mapping[str, NDArray[np.float32]]

    @property
    def size(self) -> int:
        """Elements of the parameter."""
        return self.values["param"].size

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return len(self.values["grad"])

    @property
    def earlier(self) -> int:
        """Steps before the run."""
        return self.hyperparameters.count.first - 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a library made of a setting.

    Attributes:
        setting: what it was given.
        formats: format in which it held each tensor.
        patterns: bits of each tensor of the state, (T + 1, n), and of `grad`, (T, n).
    """

    setting: Setting
    formats: Mapping[str, Format]
    patterns: Mapping[str, NDArray[np.unsignedinteger]]

    def inputs(self) -> dict[str, NDArray[np.float32]]:
        """Decode what each step reads, and what it leaves behind as `new_...`."""
        decoded = {n: decode(p, self.formats[n]) for n, p in self.patterns.items()}
        before = {n: v if n == "grad" else v[:-1] for n, v in decoded.items()}
        return before | {f"new_{n}": v[1:] for n, v in decoded.items() if n != "grad"}


#: Takes the steps of a setting.
Make = Callable[[Setting], Run]


class Maker(NamedTuple):
    """A way to make runs.

    Attributes:
        make: takes the steps.
        arithmetic: the arithmetic that has to replay them, for weights of a format; None for a format that
            the catalogue has none for.
    """

    make: Make
    arithmetic: Callable[[Format], Arithmetic | None]


class Comparison(NamedTuple):
    """What a replay got wrong.

    Attributes:
        compared: elements compared in each stage, by name.
        different: those of them with other bits, all NaNs being alike.
        nudged: timesteps whose scalars had to be taken a few ulps away (`Arithmetic.nudges`).
    """

    compared: dict[str, int]
    different: dict[str, int]
    nudged: int

    @property
    def agrees(self) -> bool:
        """Tell whether nothing differs."""
        return not any(self.different.values())


def draw(
    rng: np.random.Generator,
    storage: Format,
    number: int,
    arithmetic: Arithmetic,
    *,
    size: int | None = None,
) -> Setting:
    """Choose a setting at random.

    Args:
        rng: decides.
        storage: format of the recorded weights.
        number: of the setting in a series: sizes from 1 to 100 take turns with random ones up to 5,000,
            threads 1 with 2.
        arithmetic: whose options to choose from.
        size: of the parameter, instead.
    """
    size = size or (1 + number // 2 % 100 if number % 2 else round(5000 ** rng.random()))
    steps = int(rng.integers(2, 5))
    decay: Decay = rng.choice(["none", *arithmetic.decays])
    given = _hyperparameters(rng, steps, decay)
    options = Options(
        decoupled=decay != "l2",
        amsgrad=bool(arithmetic.amsgrad and rng.random() < 0.3),
        maximize=bool(arithmetic.maximize and rng.random() < 0.2),
        threads=1 + number // 2 % 2,
    )
    return Setting(
        storage=storage,
        hyperparameters=given,
        options=options,
        values=_values(rng, storage, (steps, size), given),
    )


def _hyperparameters(rng: np.random.Generator, steps: int, decay: Decay) -> Hyperparameters:
    beta1, beta2 = BETAS[rng.integers(len(BETAS))]
    if rng.random() < 0.3:
        beta1, beta2 = rng.random(), 1 - 10 ** -(4 * rng.random())
    scheduled = 10 ** rng.uniform(-7, 0, steps)
    constant = np.full(steps, rng.choice(RATES))
    return Hyperparameters(
        learning_rate=scheduled if rng.random() < 0.4 else constant,
        beta1=float(beta1),
        beta2=float(beta2),
        epsilon=float(rng.choice(EPSILONS)),
        weight_decay=0.0 if decay == "none" else float(rng.choice(DECAYS)),
        count=StepCount(first=1 + int(rng.choice(EARLIER))),
    )


def _values(
    rng: np.random.Generator, storage: Format, shape: tuple[int, int], given: Hyperparameters
) -> dict[str, NDArray[np.float32]]:
    """Draw tensors: most of one scale from 1e-30 to 1e4, some of all scales, some with inf and NaN."""
    kind = rng.choice(["one scale", "usual", "all scales", "special"], p=[0.4, 0.3, 0.15, 0.15])
    # Nothing below 6e-8 is left in float16.
    smallest = -8 if storage is FLOAT16 else -30
    scale = 1e-3 if kind == "usual" else 10 ** rng.uniform(smallest, 4)

    def around(scale: float, shape: Any) -> NDArray[Any]:
        spread = (
            rng.uniform(smallest, 4, shape) if kind == "all scales" else rng.uniform(-3, 0, shape)
        )
        values = rng.normal(size=shape) * 10.0**spread * (1 if kind == "all scales" else scale)
        tiny = 2.0 ** (1 - (1 << storage.exponent_bits - 1) - storage.significand_bits)
        values = np.where(rng.random(shape) < 0.03, tiny * rng.integers(-200, 200, shape), values)
        values = np.where(rng.random(shape) < 0.05, rng.choice([0.0, -0.0], shape), values)
        if kind == "special":
            values = np.where(rng.random(shape) < 0.3, rng.choice(SPECIAL, shape), values)
        return values

    size = shape[1]
    zero = np.zeros(size)
    state = {"exp_avg": zero, "exp_avg_sq": zero, "max_exp_avg_sq": zero}
    with np.errstate(all="ignore"):
        if given.count.first > 1:
            state["exp_avg"] = around(scale, size)
            state["exp_avg_sq"] = np.abs(around(scale, size) * 10 ** rng.uniform(-3, 0) * scale)
            state["max_exp_avg_sq"] = state["exp_avg_sq"] * rng.choice([0.5, 1, 2], size)
        weight = 10 ** rng.uniform(-6, 2) if kind == "one scale" else 0.02
        found = state | {"param": around(weight, size), "grad": around(scale, shape)}
        return {name: value.astype(np.float32) for name, value in found.items()}


def compare(
    run: Run, arithmetic: Arithmetic, *, threads: int | None = None, step: Step | None = None
) -> Comparison:
    """Replay every step of a run from the state before it.

    A kept weight of more bits is compared both as it is and as a recording would hold it.

    Args:
        run: what to replay.
        arithmetic: under what.
        threads: that PyTorch computed with, instead of the setting's.
        step: to replay instead of the arithmetic's own.
    """
    given, options = run.setting.hyperparameters, run.setting.options
    moments = (run.formats["exp_avg"], run.formats["exp_avg_sq"])
    step = step or make_step(arithmetic, run.setting.storage, given, options, moments)
    x: dict[str, Any] = run.inputs()
    x["tail"] = np.uint8(0)
    if depends_on_tail(arithmetic, step):
        elements = np.arange(run.setting.size)
        x["tail"] = tail_elements(
            arithmetic, step.storage, elements, elements.size, threads or options.threads
        )
    compared, different, nudged = {}, {}, 0
    for name in step.state:
        at_most = arithmetic.nudges(given) if name == "param" else (EXACT,)
        first = best = _wrong(run, step, name, arithmetic, at_most[0], x)
        for nudge in at_most[1:]:
            if not best.any():
                break
            best = np.minimum(best, _wrong(run, step, name, arithmetic, nudge, x))
        nudged += int(np.count_nonzero(best < first))
        compared[name] = run.patterns[name][1:].size
        different[name] = int(best.sum())
    return Comparison(compared, different, nudged)


def _wrong(
    run: Run, step: Step, name: str, arithmetic: Arithmetic, nudge: Nudge, x: Mapping[str, Any]
) -> NDArray[np.int64]:
    """Count the elements of a tensor that come out different at each timestep, (T,)."""
    given, steps = run.setting.hyperparameters, run.setting.steps
    scalars = scalars_of(step, arithmetic.rule, given, range(1, steps + 1), [nudge] * steps)
    columns = {key: value[:, None] for key, value in scalars.items()}
    ops = numpy_operations(flushes=step.flushes)
    with np.errstate(all="ignore"):
        found = step.replay(name, ops, columns, x)
        wrong = differ(found.view(np.uint32), x[f"new_{name}"].view(np.uint32))
        if name == "param" and step.keeps_more:
            copy = round_to(x["new_param"], step.recorded_format)
            found = step.replay_recorded("param", ops, columns, x)
            wrong |= differ(found.view(np.uint32), copy.view(np.uint32))
    return wrong.sum(axis=1)
