"""What the ledger follows: one recording under one arithmetic, window by window."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxaudit.arithmetics import make_step
from jaxaudit.devices import Device
from jaxaudit.floats import FLOAT64, Format
from jaxaudit.operations import Operations, Value
from jaxaudit.recording import TokenGroups, Window
from jaxaudit.replay import OWN_PARAM, Recorded
from jaxaudit.scalars import EXACT, Moment, Rule, scalars_of
from jaxaudit.steps import Scalars, Step, Tensors
from jaxaudit.workbench import Candidate, Workbench


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerOptions:
    """What can be asked of a ledger.

    Attributes:
        beta2: values of beta2 to try as remedies.
        seed: of the draw of stochastic rounding.
        per_token: store the displacement of each token in each step; by default where that is a small table.
    """

    beta2: Sequence[float] = (0.95,)
    seed: int = 0
    per_token: bool | None = None

    def __post_init__(self) -> None:
        wrong = [value for value in self.beta2 if not 0 <= value < 1]
        if wrong:
            raise ValueError(f"beta2 is {wrong[0]:g}; needed 0 <= beta2 < 1.")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A recording on a bench, under the arithmetic that made it, or the nearest one.

    Attributes:
        bench: recording and device.
        chosen: the arithmetic with its options and numbers; None where the recording does not tell them.
        groups: what is counted by.
        steps: range of steps.
    """

    bench: Workbench
    chosen: Candidate | None
    groups: TokenGroups
    steps: tuple[int, int]

    @property
    def candidate(self) -> Candidate:
        """Return the arithmetic; only parts of the ledger that need none work without."""
        assert self.chosen is not None
        return self.chosen

    @property
    def step(self) -> Step:
        """Return the arithmetic's step."""
        return self.bench.step(self.candidate)

    @property
    def counts(self) -> tuple[int, int]:
        """Shape of what is told for each timestep and token group."""
        return self.steps[1] - self.steps[0], len(self.groups.members)

    def source(self, name: str) -> tuple[str, Format]:
        """Tell under which key of `Seen.arrays` a tensor of the state is, and in which format.

        It is the recorded one where there is one; but for the weight of an arithmetic that keeps a more precise
        one (float32 masters), which is run freely.
        """
        recorded, step = self.bench.recording.formats, self.step
        if name == "param" and step.keeps_more and name in self.bench.hidden(self.candidate):
            return OWN_PARAM, step.param_format
        return name, recorded[name] if name in recorded else step.format_of(name)

    def holds(self, names: Iterable[str]) -> bool:
        """Tell whether tensors were recorded, or are run freely."""
        known = {*self.bench.recording.formats}
        known |= {*self.bench.hidden(self.chosen)} if self.chosen else set()
        return known.issuperset(names)

    def before(self, seen: "Seen", name: str) -> tuple[Any, Format]:
        """Return a tensor's patterns before each step of a window, (length, elements), and their format."""
        key, fmt = self.source(name)
        patterns = seen.arrays[key]
        return (patterns if name == "grad" else patterns[:-1]), fmt

    def place(self, window: Window) -> slice:
        """Return a window's place on the timestep axis."""
        return slice(window.first - self.steps[0], window.first - self.steps[0] + window.steps)

    def coordinates(self) -> dict[str, Any]:
        """Return the coordinates that all groups of the ledger have in common."""
        timesteps = np.arange(*self.steps, dtype=np.int64)
        return {"timestep": timesteps, "token_group": self.groups.names}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One window, on the device.

    Attributes:
        window: what was read.
        arrays: recorded patterns, flat: (length + 1, elements), `grad` (length, elements), with the tensors of the
            state that were not recorded, run freely. Entries beyond `window.steps` mean nothing.
        members: each group's rows within the window.
        later: takes a function that turns results of the device into numbers on the host; it runs while the
            device goes on, and before the next window is read.
    """

    window: Window
    arrays: Recorded
    members: list[NDArray[np.int64]]
    later: Callable[[Callable[[], None]], None]


class Aside:
    """Runs work on the host beside the device's, on one thread, in order.

    JAX's settings belong to threads: work runs under those that the audit itself runs under.
    """

    def __init__(self, device: Device):
        self._device = device
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "ledger")

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, work: Callable[[], None]) -> concurrent.futures.Future[None]:
        """Start work as soon as what came before it is done."""
        return self._pool.submit(self._run, work)

    def _run(self, work: Callable[[], None]) -> None:
        with jax.enable_x64(True), jax.default_device(self._device):
            work()


class Errands:
    """What is to be done of one window; `finish` waits for it."""

    def __init__(self) -> None:
        self._running: list[concurrent.futures.Future[None]] = []

    def later(self, aside: Aside, work: Callable[[], None]) -> None:
        """Start work as soon as a thread is through with what it was given before."""
        self._running.append(aside.start(work))

    def finish(self) -> None:
        """Wait until nothing is left; what the work raised is raised here."""
        while self._running:  # work may start more work
            self._running.pop(0).result()


@dataclasses.dataclass(frozen=True)
class ExactUpdate:
    """What a step does before anything is rounded; see `ExactRule`.

    Attributes:
        exp_avg: first moment after the step.
        exp_avg_sq: second moment after the step.
        second: what the denominator is made of: that, or the largest so far (amsgrad).
        change: of the weight, with decoupled decay.
        decay: the part of decoupled decay in it; None without.
    """

    exp_avg: Value
    exp_avg_sq: Value
    second: Value
    change: Value
    decay: Value | None


class ExactRule:
    """An arithmetic's own formulas in float64, with its scalars in double, and nothing rounded on the way.

    The change of the weight is computed as such, not as a difference of weights: it keeps its 53 bits however
    small it is beside the weight.
    """

    #: Name among the scalars of minus learning rate times decoupled weight decay.
    DECAY = "exact decay"

    def __init__(self, subject: Subject):
        self._bench, self._candidate = subject.bench, subject.candidate
        arithmetic = dataclasses.replace(
            self._candidate.arithmetic, weight="storage", moments="storage", reads_stored=True
        )
        step = make_step(arithmetic, FLOAT64, self._candidate.given, self._candidate.options)
        step = dataclasses.replace(step, rounds_operators=False, square_root="ieee")
        if step.interpolation != "mixed":
            # Its scalars decide by the double 1 - beta1, an implementation's by its float32.
            at_end = 1 - self._candidate.given.beta1 >= 0.5
            step = dataclasses.replace(step, interpolation="end" if at_end else "start")
        self.step: Step = step

    def scalars(self, window: Window) -> Scalars:
        """Return the scalars of a window's steps, float64; beyond the last step they are repeated."""
        bench, candidate = self._bench, self._candidate
        timesteps = [min(window.first + k, bench.steps[1] - 1) for k in range(bench.length)]
        rates = candidate.given.learning_rate[np.array(timesteps) - 1]
        given = dataclasses.replace(candidate.given, learning_rate=rates)
        nudges = [bench.nudges.get(candidate, {}).get(t, EXACT) for t in timesteps]
        rule = _with_decay(candidate.arithmetic.rule)
        return scalars_of(self.step, rule, given, timesteps, nudges)

    @property
    def reads(self) -> tuple[str, ...]:
        """Name the tensors before a step that it reads."""
        found = {x for name in self.step.state for x in self.step.reads(name)}
        return tuple(sorted(x for x in found if not x.startswith("new_")))

    def update(self, ops: Operations, s: Mapping[str, Value], x: Tensors) -> ExactUpdate:
        """Compute a step.

        Args:
            ops: `operations.ExactOperations`, or a NumPy equivalent.
            s: scalars of the timestep.
            x: the tensors that `reads` names before it, `grad` and `tail`.
        """
        return exact_update(self.step, ops, s, x)


def exact_update(step: Step, ops: Operations, s: Mapping[str, Value], x: Tensors) -> ExactUpdate:
    """Compute a step before anything is rounded; see `ExactRule.update`.

    Args:
        step: that of an `ExactRule`.
        ops: `operations.ExactOperations`, or a NumPy equivalent.
        s: scalars of the timestep.
        x: the tensors that the rule reads before it, `grad` and `tail`.
    """
    known = dict(x)
    for name in step.state:
        if name not in ("param", "compensation"):
            known[f"new_{name}"] = step.replay(name, ops, s, known)
    nothing = known["param"] * 0.0
    change = step.replay("param", ops, s, {**known, "param": nothing})
    decay = None
    if step.decay == "decoupled":
        decay = ops.multiply(s[ExactRule.DECAY], x["param"])
        change = ops.add(change, decay)
    second = known["new_max_exp_avg_sq" if step.amsgrad else "new_exp_avg_sq"]
    return ExactUpdate(known["new_exp_avg"], known["new_exp_avg_sq"], second, change, decay)


def _with_decay(rule: Rule) -> Rule:
    """Add the factor of decoupled decay, of the learning rate that the other scalars are made of."""

    def with_decay(moment: Moment) -> dict[str, float]:
        return rule(moment) | {ExactRule.DECAY: -(moment.rate * moment.given.weight_decay)}

    return with_decay
