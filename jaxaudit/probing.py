"""A few elements of a few timesteps, on which NumPy tries many candidates in little time.

What NumPy finds is exact for every input, so a candidate that gets a bit of a probe wrong is out. One that gets
all of it right must still replay the whole recording.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats, stochastic
from jaxaudit.arithmetics import chunk_tails, depends_on_tail, tail_elements
from jaxaudit.operations import numpy_operations
from jaxaudit.recording import Recording
from jaxaudit.scalars import EXACT, Nudge, scalars_of
from jaxaudit.steps import Scalars, Stage, Step
from jaxaudit.stochastic import LEAST_P_VALUE
from jaxaudit.workbench import Candidate, Workbench

#: Largest part of a timestep that is read to choose elements from.
_READ = 1 << 22

#: Recordings of less timesteps than this are looked at in all of them.
_SHORT = 16

#: Values of each tensor in a thorough probe of a small parameter.
_LARGEST = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Elements of some timesteps.

    Attributes:
        bench: of the recording.
        timesteps: which timesteps, ascending.
        positions: position of each element within the whole parameter, (n,).
        parameter_size: elements of the whole parameter.
        before: decoded float32 values (timesteps, n) of each recorded tensor before each timestep; `grad` too.
        after: the same after each timestep; param, moments and so on.
        contiguous: the timesteps are the recording's first ones, so that what was not recorded can be run.
    """

    bench: Workbench
    timesteps: tuple[int, ...]
    positions: NDArray[np.int64]
    parameter_size: int
    before: Mapping[str, NDArray[np.float32]]
    after: Mapping[str, NDArray[np.float32]]
    contiguous: bool
    _memory: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Elements compared in each stage."""
        return len(self.timesteps) * self.positions.size

    def mismatches(self, candidate: Candidate, stage: Stage, *, settle: bool = True) -> int:
        """Count the elements that a candidate gets wrong in a stage; exact for every input.

        Args:
            candidate: what to try.
            stage: which stage.
            settle: where scalars are not known exactly, let each timestep count under the best of their
                values, as long as there is one that fits.
        """
        wrong = self.wrong(candidate, stage).sum(axis=1)
        nudges = candidate.arithmetic.nudges(candidate.given)
        free = self._runs_freely(self.bench.step(candidate), stage)
        if not settle or stage != "param" or len(nudges) == 1 or free:
            return int(wrong.sum())
        for k in sorted(np.flatnonzero(wrong), key=lambda k: wrong[k]):
            alone = self._alone(int(k))
            if all(alone.wrong(candidate, stage, nudge).any() for nudge in nudges):
                break
            wrong[k] = 0
        return int(wrong.sum())

    def _alone(self, k: int) -> "Probe":
        """Return the probe of one timestep."""
        if ("alone", k) not in self._memory:
            self._memory["alone", k] = dataclasses.replace(
                self,
                timesteps=self.timesteps[k : k + 1],
                before={name: values[k : k + 1] for name, values in self.before.items()},
                after={name: values[k : k + 1] for name, values in self.after.items()},
                contiguous=False,
                _memory={},
            )
        return self._memory["alone", k]

    def wrong(self, candidate: Candidate, stage: Stage, nudge: Nudge = EXACT) -> NDArray[np.bool_]:
        """Mark the elements that a candidate gets wrong, (timesteps, n)."""
        step = self.bench.step(candidate)
        if not depends_on_tail(candidate.arithmetic, step):
            return self._wrong(candidate, step, stage, nudge, None)
        tail = self.tail(candidate, step)
        if self._runs_freely(step, stage):
            return self._wrong(candidate, step, stage, nudge, tail)
        # Which elements are in the tail depends on the threads, of which many numbers are tried.
        inside, outside = (
            self._wrong(candidate, step, stage, nudge, np.full(tail.shape, bit, np.uint8))
            for bit in (1, 0)
        )
        return np.where(tail != 0, inside, outside)

    def tail(self, candidate: Candidate, step: Step) -> NDArray[np.uint8]:
        """Mark the elements of a vectorised kernel's scalar loop, (n,)."""
        return tail_elements(
            candidate.arithmetic,
            step.storage,
            self.positions,
            self.parameter_size,
            candidate.options.threads,
        )

    def scalars(self, candidate: Candidate, nudge: Nudge = EXACT) -> Scalars:
        """Compute the scalars of the probe's timesteps."""
        given, step = candidate.given, self.bench.step(candidate)
        formats = (step.storage, step.exp_avg_format, step.exp_avg_sq_format)
        key = (candidate.arithmetic.rule, given, formats, step.square_root, nudge)
        if key not in self._memory:
            rates = given.learning_rate[np.array(self.timesteps) - 1]
            self._memory[key] = scalars_of(
                step,
                candidate.arithmetic.rule,
                dataclasses.replace(given, learning_rate=rates),
                self.timesteps,
                [nudge] * len(self.timesteps),
            )
        return self._memory[key]

    def inputs(self, candidate: Candidate, stage: Stage) -> dict[str, NDArray[Any]]:
        """Return what a stage of a candidate reads, run freely where it was not recorded."""
        step = self.bench.step(candidate)
        found: dict[str, NDArray[Any]] = dict(self.before)
        found |= {f"new_{name}": values for name, values in self.after.items()}
        if self._runs_freely(step, stage):
            found |= self._run_once(candidate, step)
        return found

    def recorded(self, stage: Stage) -> NDArray[np.float32]:
        """Return the recorded values that a stage is compared with, (timesteps, n)."""
        return self.after[stage]

    def replay(
        self,
        step: Step,
        stage: Stage,
        scalars: Scalars,
        x: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float32]:
        """Compute a stage in NumPy."""
        columns = {name: value[:, None] for name, value in scalars.items()}
        with np.errstate(all="ignore"):
            ops = numpy_operations(flushes=step.flushes)
            return np.asarray(step.replay_recorded(stage, ops, columns, x))

    def _wrong(
        self,
        candidate: Candidate,
        step: Step,
        stage: Stage,
        nudge: Nudge,
        tail: NDArray[np.uint8] | None,
    ) -> NDArray[np.bool_]:
        scalars = self.scalars(candidate, nudge)
        free = self._runs_freely(step, stage)
        read = step.state if free else (stage,)
        names = sorted({name for each in read for name in step.reads_scalars(each)})
        bits = b"".join(scalars[name].tobytes() for name in names)
        key = (
            step if free else step.stripped(stage),
            stage,
            bits,
            None if tail is None else tail.tobytes(),
        )
        if key not in self._memory:
            x = self.inputs(candidate, stage)
            x["tail"] = np.zeros(1, np.uint8) if tail is None else tail
            found = self.replay(step, stage, scalars, x)
            a, b = (np.ascontiguousarray(v).view(np.uint32) for v in (found, self.recorded(stage)))
            self._memory[key] = step.differs(stage, a, b)
            if step.stochastic and stage == "param":
                self._memory[key] |= stochastic.p_value(*stochastic.tally(a, b)) < LEAST_P_VALUE
        return self._memory[key]

    def _runs_freely(self, step: Step, stage: Stage) -> bool:
        hidden = {*self.bench.replayer.hidden(step)}
        return bool(hidden & {name.removeprefix("new_") for name in step.reads(stage)})

    def _run_once(self, candidate: Candidate, step: Step) -> dict[str, NDArray[Any]]:
        """Run what was not recorded; candidates that are alike share a run, and only the last one is kept."""
        scalars = self.scalars(candidate)
        names = sorted({name for each in step.state for name in step.reads_scalars(each)})
        tail = (
            self.tail(candidate, step).tobytes()
            if depends_on_tail(candidate.arithmetic, step)
            else b""
        )
        key = (step, tail, *(scalars[name].tobytes() for name in names))
        if self._memory.get("run", (None,))[0] != key:
            self._memory["run"] = (key, self._run(candidate, step))
        return self._memory["run"][1]

    def _run(self, candidate: Candidate, step: Step) -> dict[str, NDArray[Any]]:
        """Run what was not recorded from its start, as `replay.FreeRun` does."""
        assert self.contiguous  # the probe was chosen so
        hidden = self.bench.replayer.hidden(step)
        scalars = self.scalars(candidate)
        depends = depends_on_tail(candidate.arithmetic, step)
        tail = self.tail(candidate, step) if depends else np.uint8(0)
        state = {name: self._start(step, name) for name in hidden}
        before: dict[str, list[Any]] = {name: [] for name in hidden}
        after: dict[str, list[Any]] = {name: [] for name in hidden}
        for k in range(len(self.timesteps)):
            known = {name: values[k] for name, values in self.before.items()}
            x = known | state | {"tail": tail}
            recorded = {n: v[k] for n, v in self.after.items() if n not in hidden}
            at = {name: value[k] for name, value in scalars.items()}
            with np.errstate(all="ignore"):
                ops = numpy_operations(flushes=step.flushes)
                new = step.advance(ops, at, x, recorded)
            for name in hidden:
                before[name].append(state[name])
                after[name].append(new[name])
            state = {name: new[name] for name in hidden}
        found = {name: np.stack(values) for name, values in before.items()}
        return found | {f"new_{name}": np.stack(values) for name, values in after.items()}

    def _start(self, step: Step, name: str) -> NDArray[np.float32]:
        if name in self.before:
            return floats.round_to(self.before[name][0], step.format_of(name))
        return np.zeros(self.positions.size, np.float32)


def probe(bench: Workbench, timesteps: Sequence[int], count: int) -> Probe:
    """Read a probe.

    Args:
        bench: of the recording.
        timesteps: which timesteps of the recording.
        count: about how many elements of each.
    """
    recording = bench.recording
    spans = _spans(recording)
    chosen = _choose(recording, spans, count)
    order = tuple(sorted({*timesteps}))
    positions, size = recording.parameter_elements()
    before: dict[str, list[Any]] = {name: [] for name in recording.formats}
    after: dict[str, list[Any]] = {name: [] for name in recording.formats if name != "grad"}
    for t in order:
        parts = [_read(recording, t, span, chosen) for span in spans]
        for name in recording.formats:
            values = np.concatenate([part[name] for part in parts], axis=-1)
            before[name].append(values[0])
            if name != "grad":
                after[name].append(values[1])
    return Probe(
        bench,
        order,
        positions[chosen],
        size,
        {name: np.stack(values) for name, values in before.items()},
        {name: np.stack(values) for name, values in after.items()},
        order == tuple(range(1, len(order) + 1)),
    )


def scattered(bench: Workbench, elements: int) -> tuple[int, ...]:
    """Choose early, middle and late timesteps; all of a short recording, and more where these are small.

    The first ones tell most about the bias corrections.

    Args:
        bench: of the recording.
        elements: how many are to be looked at in each timestep.
    """
    first, last = bench.steps[0], bench.steps[1] - 1
    if last - first < _SHORT:
        return tuple(range(first, last + 1))
    found = {first, first + 1, first + 2, first + 9, (first + last) // 2, last - 1, last}
    count = _LARGEST // bench.recording.step_elements if elements > _LARGEST // _SHORT else 0
    found |= {*np.linspace(first, last, min(count, last - first + 1)).astype(int).tolist()}
    return tuple(sorted(found))


def _spans(recording: Recording) -> list[tuple[int, int]]:
    """Choose the row ranges to read: all, or the first, some in the middle, and the last."""
    if recording.step_elements <= _READ:
        return [(0, recording.tokens)]
    rows = max(1, _READ // 3 // recording.width)
    starts = sorted({0, (recording.tokens - rows) // 2, recording.tokens - rows})
    return [(max(start, 0), min(start + rows, recording.tokens)) for start in starts]


def _choose(
    recording: Recording, spans: Sequence[tuple[int, int]], count: int
) -> NDArray[np.int64]:
    """Choose elements: all over, and those at the ends of tensor and chunks, where kernels differ."""
    width = recording.width
    there = np.concatenate([np.arange(a * width, b * width) for a, b in spans])
    if there.size <= count:
        return there
    rng = np.random.default_rng(11)
    usual = rng.choice(there, count, replace=False)
    special = there[_special(recording, there)]
    if special.size > count:
        special = rng.choice(special, count, replace=False)
    return np.unique(np.concatenate([usual, special, there[:64], there[-64:]]))


def _special(recording: Recording, elements: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the elements that are at the end of a thread's chunk for some number of threads."""
    given = recording.hyperparameters
    positions, size = recording.parameter_elements()
    if given is None or given.weight_decay == 0 or recording.storage is floats.FLOAT32:
        return np.zeros(elements.size, bool)
    chunks = {min(threads, -(-size // 32768)) for threads in range(1, 65)}
    marks = (chunk_tails(positions[elements], size, threads) != 0 for threads in sorted(chunks))
    return functools.reduce(np.logical_or, marks)


def _read(
    recording: Recording, t: int, span: tuple[int, int], chosen: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    window, width = recording.at(t, span), recording.width
    begin, end = np.searchsorted(chosen, (span[0] * width, span[1] * width))
    index = chosen[begin:end] - span[0] * width
    return {
        name: floats.decode(
            np.ascontiguousarray(array.reshape(array.shape[0], -1)[:, index]),
            recording.formats[name],
        )
        for name, array in window.tensors.items()
    }
