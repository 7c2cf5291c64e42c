"""A recording on a device: what turns the windows of the one into programs of the other."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.arithmetics import (
    Arithmetic,
    Options,
    depends_on_tail,
    make_step,
    tail_elements,
)
from jaxaudit.comparison import Comparison
from jaxaudit.devices import Device, Placement, memory_of
from jaxaudit.floats import FLOAT32, Format
from jaxaudit.free_running import FreeRun
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.joint_replay import MOST_EXACT, JointReplayer, Measured
from jaxaudit.joint_replay import Started as Joint
from jaxaudit.operations import Formulation, numpy_operations
from jaxaudit.recording import Recording, Window
from jaxaudit.replay import OWN_PARAM, Program, Recorded, Replayer
from jaxaudit.scalars import EXACT, Nudge, scalars_of
from jaxaudit.steps import STAGES, Scalars, Stage, Step
from jaxaudit.strips import Strip, strips_of

#: Elements of a window: below this its arrays of 16-bit results stay in memory that malloc keeps.
WINDOW_ELEMENTS = 1 << 22

#: Elements of a window on a device with memory of its own, at most: beyond that, starting a program takes no time worth
#: mentioning, but the host needs memory for several windows. Each has so many bytes of the device's to itself, for what
#: is recorded of three windows and what programs make of one.
_LARGE_WINDOW, _BYTES_PER_ELEMENT = 1 << 25, 512

#: First step and rows of a window.
Place: TypeAlias = tuple[int, tuple[int, int]]

#: What comparing a stage of a window came to: uint8 (steps, elements), non-zero where bits differ, None where
#: none do; and the formulation that found out.
Flags: TypeAlias = tuple[NDArray[np.uint8] | None, Formulation]

#: Windows that are worked on at a time: the next one is started before the last one is done.
WINDOWS_HELD = 2

#: Elements of all windows from which on it is worth compiling a program for stages that are known to differ, and windows
#: in which such a program failed after which it is not tried again.
JOINT_ELEMENTS, _JOINT_FAILURES = 1 << 26, 2

#: Windows whose scalars are kept for the next strip.
_SCALARS_HELD = 1 << 12

#: Elements of a timestep on which uncertain scalars are tried, and timesteps after whose failure no more are.
_SETTLED, _PATIENCE = 1 << 12, 3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An arithmetic with everything that it is replayed under.

    Attributes:
        arithmetic: where it rounds.
        options: kind of weight decay, and the like.
        given: the hyperparameters, as stored or as found to be the ones used.
    """

    arithmetic: Arithmetic
    options: Options
    given: Hyperparameters


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a recording makes of a candidate: see the methods of `Workbench` of these names."""

    step: Step
    stages: tuple[Stage, ...]
    hidden: tuple[str, ...]
    programs: dict[Stage, Program]


class Workbench:
    """A recording, a device, and everything that turns one's windows into the other's numbers."""

    def __init__(
        self,
        recording: Recording,
        devices: tuple[Device, ...],
        steps: tuple[int, int],
        window_steps: int | None,
    ):
        self.recording, self.steps = recording, steps
        self.placement = Placement(devices, recording.width)
        #: The device of everything that is not spread over all.
        self.device = device = self.placement.first
        self.strips = strips_of(recording.tokens, recording.width)
        rows = self.strips[0].rows
        elements = (rows[1] - rows[0]) * recording.width
        self.length = window_steps or max(1, window_elements(devices) // elements)
        self.length = min(self.length, steps[1] - steps[0], recording.longest_run)
        self.comparison = Comparison(device, recording.width)
        shape = (self.length, elements)
        self.replayer = Replayer(self.placement, recording.formats, shape)
        #: Runs steps of windows that lie on the first device, whole.
        self.replayer_together = self.replayer
        if len(devices) > 1:
            alone = Placement(devices[:1], recording.width)
            self.replayer_together = Replayer(alone, recording.formats, shape, self.replayer.note)
        self.moment_formats = _moment_formats(recording, steps)
        #: The ledger asks for scalars and tails from threads of its own.
        self._lock = threading.Lock()
        self._tails: dict[tuple[object, ...], tuple[NDArray[np.uint8], jax.Array]] = {}
        self._scalars: dict[Candidate, dict[int, Scalars]] = {}
        self._known: dict[Candidate, _Facts] = {}
        self._tried_runs: dict[tuple[Candidate, tuple[str, ...]], FreeRun] = {}
        self._runs: dict[tuple[Candidate, tuple[int, int], tuple[str, ...]], FreeRun] = {}
        self._ran: dict[object, tuple[int, dict[str, jax.Array]]] = {}
        self._keys: dict[Place, dict[Any, tuple[Any, tuple[Scalars, jax.Array]]]] = {}
        self._seen: dict[Place, dict[Any, Flags]] = {}
        self._started: dict[Place, dict[Any, jax.Array | None]] = {}
        self._hopeless: dict[Candidate, int] = {}
        self._joint = JointReplayer(self.replayer, self.comparison, recording.width)
        #: What takes care of a stage, and whether it measures it or finds it exact.
        self._joined: dict[Place, dict[Any, tuple[Joint, bool]]] = {}
        self._joint_failures: dict[tuple[Program, ...], set[int]] = {}
        #: Stages that are known to differ: they are measured at once where that can be (`measured`).
        self.differing: set[tuple[Candidate, Stage]] = set()
        self._first_differing: set[tuple[Candidate, Stage]] | None = None
        #: Nudges of scalars that are not known exactly, by candidate and timestep.
        self.nudges: dict[Candidate, dict[int, Nudge]] = {}
        self._first_nudges: dict[Candidate, dict[int, Nudge]] | None = None

    def begin(self) -> None:
        """Forget what was found in a strip: the next one is gone through as if it were the first.

        What was found before any strip, in identifying, is kept.
        """
        if self._first_nudges is None or self._first_differing is None:
            self._first_nudges = {c: dict(found) for c, found in self.nudges.items()}
            self._first_differing = set(self.differing)
        for candidate, found in self.nudges.items():
            if found != self._first_nudges.get(candidate, {}):
                self._scalars.pop(candidate, None)
        self.nudges = {c: dict(found) for c, found in self._first_nudges.items()}
        self.differing = set(self._first_differing)
        for held in (
            self._hopeless,
            self._keys,
            self._tails,
            self._runs,
            self._ran,
            self._seen,
            self._started,
            self._joined,
            self._joint_failures,
        ):
            held.clear()

    def stages(self, candidate: Candidate) -> tuple[Stage, ...]:
        """Stages that the recording holds everything for, or for which the rest can be run freely."""
        return self._facts(candidate).stages

    def hidden(self, candidate: Candidate) -> tuple[str, ...]:
        """Name the tensors that are run freely for the stages of a candidate."""
        return self._facts(candidate).hidden

    def program(self, candidate: Candidate, stage: Stage) -> Program:
        """Say what one of `stages` reads under a candidate."""
        return self._facts(candidate).programs[stage]

    def step(self, candidate: Candidate) -> Step:
        """Fill in a candidate's step."""
        return self._facts(candidate).step

    def _facts(self, candidate: Candidate) -> "_Facts":
        if candidate not in self._known:
            self._known[candidate] = self._find_facts(candidate)
        return self._known[candidate]

    def _find_facts(self, candidate: Candidate) -> "_Facts":
        arithmetic, recorded = candidate.arithmetic, self.recording.formats
        step = make_step(
            arithmetic,
            self.recording.storage,
            candidate.given,
            candidate.options,
            self.moment_formats,
        )
        missing: dict[Stage, set[str]] = {
            stage: each
            for stage in STAGES
            if stage in recorded and self._can_run(step, each := self._missing(step, stage))
        }
        run = {name for each in missing.values() for name in each}
        programs: dict[Stage, Program] = {
            stage: self.replayer.program(step, stage, arithmetic.rule, arithmetic.label)
            for stage in missing
        }
        hidden = tuple(name for name in step.state if name in run)
        return _Facts(step, tuple(missing), hidden, programs)

    def _missing(self, step: Step, stage: Stage) -> set[str]:
        known = {*self.recording.formats} - {*self.replayer.hidden(step)}
        missing: set[str] = set()
        found = _reads(step, stage) - known
        while found - missing:  # what is run freely reads other tensors in turn
            missing |= found
            found = {x for name in missing & {*step.state} for x in _reads(step, name)} - known
        return missing

    def _can_run(self, step: Step, missing: set[str]) -> bool:
        """Tell whether tensors that were not recorded can be had by running freely from the start."""
        fresh = self.recording.first_step == 1 and "grad" in self.recording.formats
        fresh &= self.recording.gaps is None
        return not missing or (fresh and missing <= {*step.state})

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are read."""
        return tuple(self.recording.formats)

    def windows(
        self,
        steps: tuple[int, int],
        strips: Sequence[Strip] | None = None,
        names: tuple[str, ...] | None = None,
        held: int = WINDOWS_HELD,
    ) -> Iterator[Window]:
        """Read windows of the bench's shape.

        Args:
            steps: range of steps.
            strips: which rows; those of several follow one another within the steps of a window. By default all.
            names: which tensors; by default all.
            held: how many windows stay as they are: the latest ones.
        """
        ranges = [(strip.rows, strip.overlap) for strip in strips or self.strips]
        rows, names = ranges[0][0][1] - ranges[0][0][0], names or self.names
        return self.recording.windows(steps, self.length, rows, names, held, ranges)

    def bytes(self, steps: int, rows: int, names: tuple[str, ...] | None = None) -> int:
        """Bytes that so many rows take in so many timesteps; by default of all tensors."""
        formats = self.recording.formats
        each = sum(formats[name].bytes for name in names or self.names)
        return steps * rows * self.recording.width * each

    def put(self, window: Window) -> dict[str, jax.Array]:
        """Hand a window to the devices, flat: without a copy where that is one CPU."""
        return self.placement.put(_flat(window))

    def put_together(
        self, candidate: Candidate | None, window: Window, arrays: Recorded
    ) -> Recorded:
        """Return a window on the first device, whole, with what a candidate reads and the recording does not hold.

        Args:
            candidate: the arithmetic; None for what was recorded alone.
            window: the window.
            arrays: what `put` returned for it.
        """
        found = self.with_hidden(candidate, window, arrays) if candidate else arrays
        if len(self.placement.devices) == 1:
            return found
        elements = (window.rows[1] - window.rows[0]) * self.recording.width
        run = {name: np.asarray(x)[:, :elements] for name, x in found.items() if name not in arrays}
        return jax.device_put({**_flat(window), **run}, self.device)

    def with_hidden(self, candidate: Candidate, window: Window, arrays: Recorded) -> Recorded:
        """Add what the stages of a candidate read and the recording does not hold."""
        hidden = self.hidden(candidate)
        if not hidden:
            return arrays
        found = self.run(candidate, hidden, window, arrays)
        places = {OWN_PARAM if name == "param" else name: found[name] for name in hidden}
        return {**places, **arrays}

    def run(
        self, candidate: Candidate, hidden: tuple[str, ...], window: Window, arrays: Recorded
    ) -> dict[str, jax.Array]:
        """Run tensors of the state freely through the next window; see `FreeRun.advance`.

        Asked again for the same window, it returns the same arrays.
        """
        key = (candidate, window.rows, hidden)
        if key not in self._ran or self._ran[key][0] != window.first:
            run, scalars, tail = self._run_of(candidate, hidden, window)
            self._ran[key] = window.first, run.advance(scalars, arrays, tail, window.steps)
        return self._ran[key][1]

    def run_weights(self, candidate: Candidate, window: Window, arrays: Recorded) -> jax.Array:
        """Run the whole state freely through the next window; return the weights after each step."""
        state = self.step(candidate).state
        if self.hidden(candidate) == state:  # it is run for the stages, too
            return self.run(candidate, state, window, arrays)["param"][1:]
        run, scalars, tail = self._run_of(candidate, state, window)
        return run.after(scalars, arrays, tail, window.steps, ("param",))["param"]

    def _run_of(
        self, candidate: Candidate, hidden: tuple[str, ...], window: Window
    ) -> tuple[FreeRun, Scalars, jax.Array]:
        """Return the free run through a range of rows, with the scalars and the tail of a window."""
        key = (candidate, window.rows, hidden)
        if key not in self._runs:
            tried = candidate, hidden
            if tried not in self._tried_runs:
                arithmetic = candidate.arithmetic
                self._tried_runs[tried] = FreeRun(
                    self.replayer, self.step(candidate), arithmetic.rule, arithmetic.label, hidden
                )
            self._runs[key] = self._tried_runs[tried].afresh()
        tail = self._tail(candidate, window.rows)[1]
        return self._runs[key], self.scalars(candidate, window), tail

    def scalars(self, candidate: Candidate, window: Window) -> Scalars:
        """Return the scalars of a window's steps; beyond the last step they are repeated."""
        with self._lock:
            known = self._scalars.setdefault(candidate, {})
            if window.first not in known:
                while len(known) >= _SCALARS_HELD:
                    del known[next(iter(known))]
                index = [min(window.first + k, self.steps[1] - 1) for k in range(self.length)]
                known[window.first] = self.scalars_at(candidate, index)
            return known[window.first]

    def scalars_at(
        self, candidate: Candidate, timesteps: Sequence[int], nudges: Sequence[Nudge] | None = None
    ) -> Scalars:
        """Compute the scalars of some timesteps of the recording."""
        given, found = candidate.given, self.nudges.get(candidate, {})
        rates = given.learning_rate[np.array(timesteps) - 1]
        given = dataclasses.replace(given, learning_rate=rates)
        nudges = nudges or [found.get(t, EXACT) for t in timesteps]
        rule = candidate.arithmetic.rule
        return scalars_of(self.step(candidate), rule, given, timesteps, nudges)

    def certain(self, candidate: Candidate) -> bool:
        """Tell whether all scalars of a candidate are known exactly."""
        return len(candidate.arithmetic.nudges(candidate.given)) == 1

    def nudge(self, candidate: Candidate, nudges: dict[int, Nudge]) -> None:
        """Set the nudges of some timesteps."""
        self.nudges.setdefault(candidate, {}).update(nudges)
        with self._lock:
            self._scalars.pop(candidate, None)
        self._keys.clear()

    def tail(self, candidate: Candidate, rows: tuple[int, int]) -> NDArray[np.uint8]:
        """Mark the elements of a vectorised kernel's scalar loop, where that matters."""
        return self._tail(candidate, rows)[0]

    def _tail(
        self, candidate: Candidate, rows: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], jax.Array]:
        """Return the elements of the scalar loop on the host and on the devices."""
        arithmetic, step = candidate.arithmetic, self.step(candidate)
        matters = depends_on_tail(arithmetic, step)
        kind = (arithmetic.tail, candidate.options.threads, step.storage)
        key = (*rows, *(kind if matters else ()))
        with self._lock:
            if key not in self._tails:
                found = self._tail_of(candidate, rows, matters=matters)
                self._tails[key] = found, self.placement.put_one(found)
            return self._tails[key]

    def _tail_of(
        self, candidate: Candidate, rows: tuple[int, int], *, matters: bool
    ) -> NDArray[np.uint8]:
        width, arithmetic = self.recording.width, candidate.arithmetic
        if not matters:
            return np.zeros((rows[1] - rows[0]) * width, np.uint8)
        elements, size = self.recording.parameter_elements()
        elements = elements[rows[0] * width : rows[1] * width]
        storage, threads = self.step(candidate).storage, candidate.options.threads
        return tail_elements(arithmetic, storage, elements, size, threads)

    def start(
        self, candidates: Sequence[Candidate], window: Window, arrays: Recorded
    ) -> frozenset[Stage]:
        """Start to compare a window, for `measured` and `flags` to take up; the device goes on meanwhile.

        Returns:
            The stages that are measured under some candidate.
        """
        started, joined = _of_window(self._started, window), _of_window(self._joined, window)
        measured: set[Stage] = set()
        # What is run freely must have come so far first.
        candidates = [candidate for candidate in candidates if not self.hidden(candidate)]
        for stage in STAGES:
            asked = [candidate for candidate in candidates if stage in self.stages(candidate)]
            if self._start_joint(asked, stage, window, arrays):
                measured.add(stage)
        for candidate in candidates:
            for stage in self.stages(candidate):
                program = self.program(candidate, stage)
                key, given = self._flags_key(candidate, program, window)
                if key not in started and key not in joined:
                    started[key] = self.replayer.start(program, given[0], arrays, given[1])
        return frozenset(measured)

    def _start_joint(
        self, candidates: Sequence[Candidate], stage: Stage, window: Window, arrays: Recorded
    ) -> bool:
        """Start to measure the candidates that are known to differ in a stage, and exact ones along with them."""
        measured, exact = {}, {}
        for candidate in candidates:
            program = self.program(candidate, stage)
            if not self._joint.can_run(program):
                continue
            key, given = self._flags_key(candidate, program, window)
            if (candidate, stage) not in self.differing:
                exact.setdefault(key, (program, *given))
            elif self._worth_measuring(candidate):
                measured.setdefault(key, (program, *given))
        joined = _of_window(self._joined, window)
        for key, (program, scalars, tail) in measured.items():
            free = [k for k in exact if k not in measured and k not in joined]
            beside = [k for k in free if exact[k][2] is tail][:MOST_EXACT]
            members = [(program, scalars), *(exact[k][:2] for k in beside)]
            failed = self._joint_failures.get(tuple(member[0] for member in members), ())
            if len(failed) < _JOINT_FAILURES and (
                begun := self._joint.start(members, arrays, tail)
            ):
                joined[key] = begun, True
                joined |= dict.fromkeys(beside, (begun, False))
        return any(key in joined for key in measured)

    def _worth_measuring(self, candidate: Candidate) -> bool:
        recording = self.recording
        elements = (self.steps[1] - self.steps[0]) * recording.tokens * recording.width
        return self.certain(candidate) and elements >= JOINT_ELEMENTS

    def measured(self, candidate: Candidate, stage: Stage, window: Window) -> Measured | None:
        """Return what a stage that is known to differ came to, where it was measured and nothing stood in the way."""
        key, _ = self._flags_key(candidate, self.program(candidate, stage), window)
        joint, measures = _of_window(self._joined, window).get(key, (None, False))
        return self._finished(joint, window) if joint and measures else None

    def first_difference(
        self, candidate: Candidate, stage: Stage, window: Window, t: int, row: int
    ) -> tuple[int, int]:
        """Find the first element of a row in which a stage differs, in NumPy: its column and replayed pattern.

        Args:
            candidate: the arithmetic.
            stage: the stage.
            window: the window.
            t: which of its steps.
            row: which of its rows; something differs in it.
        """
        program, width = self.program(candidate, stage), self.recording.width
        ops = numpy_operations(flushes=program.step.flushes)
        names = {stage, *(i.tensor for i in program.inputs)}
        cut = {name: window.tensors[name][t : t + 1 + (name != "grad"), row] for name in names}
        scalars = {name: x[t : t + 1] for name, x in self.scalars(candidate, window).items()}
        tail = self.tail(candidate, window.rows)[row * width : (row + 1) * width]
        found = np.ascontiguousarray(program.replay(ops, scalars, cut, 1, tail)[0], np.float32)
        recorded = floats.decode(cut[stage][1], program.recorded)
        differs = floats.differ(found.view(np.uint32), recorded.view(np.uint32))
        column = int(np.argmax(differs))
        return column, int(floats.encode(found, program.result)[column])

    def _finished(self, joint: Joint, window: Window) -> Measured | None:
        found = joint.finish(window.steps)
        if found is None:
            self._joint_failures.setdefault(joint.team.members, set()).add(window.first)
        return found

    def flags(self, candidate: Candidate, stage: Stage, window: Window, arrays: Recorded) -> Flags:
        """Compare one stage of a window under a candidate; see `Replayer.flags`.

        Where a timestep's weights differ, and scalars are not known exactly, other values of these are tried,
        and kept from then on if they fit.
        """
        program = self.program(candidate, stage)
        flags, formulation = self._flags(candidate, program, window, arrays)
        if stage == "param" and self._settle(candidate, program, window, arrays, flags):
            flags, formulation = self._flags(candidate, program, window, arrays)
        return flags, formulation

    def _flags(
        self, candidate: Candidate, program: Program, window: Window, arrays: Recorded
    ) -> Flags:
        """Compare, or remember: candidates that are alike in a stage have the same flags there."""
        seen, started = _of_window(self._seen, window), _of_window(self._started, window)
        key, (scalars, tail) = self._flags_key(candidate, program, window)
        joint, measures = _of_window(self._joined, window).get(key, (None, False))
        if key not in seen and joint and not measures and self._finished(joint, window):
            seen[key] = None, "float32"
        if key not in seen:
            begun = started.pop(key, None)
            found, formulation = self.replayer.flags(program, scalars, arrays, tail, begun)
            elements = (window.rows[1] - window.rows[0]) * self.recording.width
            found = found if found is None else found[: window.steps, :elements]
            seen[key] = found if found is not None and found.any() else None, formulation
        return seen[key]

    def _flags_key(
        self, candidate: Candidate, program: Program, window: Window
    ) -> tuple[Any, tuple[Scalars, jax.Array]]:
        """Return what the flags of a stage depend on in a window, and the scalars and tail in it."""
        known, asked = _of_window(self._keys, window), (candidate, program.stage)
        if asked not in known:
            scalars, tail = self.scalars(candidate, window), self._tail(candidate, window.rows)[1]
            bits = tuple(scalars[name].tobytes() for name in program.scalars)
            own = candidate if self.hidden(candidate) else None
            known[asked] = (program, bits, id(tail), own), (scalars, tail)
        return known[asked]

    def _settle(
        self,
        candidate: Candidate,
        program: Program,
        window: Window,
        arrays: Recorded,
        flags: NDArray[np.uint8] | None,
    ) -> bool:
        """Look for better values of scalars that are not known exactly; tell whether some were found."""
        nudges, settled = candidate.arithmetic.nudges(candidate.given), {}
        if self.certain(candidate) or flags is None:
            return False
        for k in np.flatnonzero(flags.any(axis=1)).tolist():
            if self._hopeless.get(candidate, 0) >= _PATIENCE:
                break
            timestep = window.first + k
            counts = self._tried(candidate, program, timestep, k, arrays, flags[k], window.rows)
            best = min(nudges, key=lambda nudge: counts[nudge])
            if counts[best]:
                self._hopeless[candidate] = self._hopeless.get(candidate, 0) + 1
            if counts[best] < counts[EXACT]:
                settled[timestep] = best
        self.nudge(candidate, settled)
        return bool(settled)

    def _tried(
        self,
        candidate: Candidate,
        program: Program,
        timestep: int,
        k: int,
        arrays: Recorded,
        flags: NDArray[np.uint8],
        rows: tuple[int, int],
    ) -> dict[Nudge, int]:
        """Count the mismatches among some elements of a timestep under each nudge, in NumPy."""
        usual = np.linspace(0, flags.size - 1, min(flags.size, _SETTLED)).astype(np.int64)
        chosen = np.union1d(np.flatnonzero(flags)[:_SETTLED], usual)
        cut = {
            i.tensor: np.asarray(arrays[i.tensor][k : k + 1 + (i.tensor != "grad")])[:, chosen]
            for i in program.inputs
        }
        ops = numpy_operations(flushes=program.step.flushes)
        tail = self.tail(candidate, rows)[chosen]
        recorded = floats.decode(
            np.asarray(arrays[program.stage][k + 1])[chosen][None], program.recorded
        )
        counts = {}
        for nudge in candidate.arithmetic.nudges(candidate.given):
            scalars = self.scalars_at(candidate, [timestep], [nudge])
            found = program.replay(ops, scalars, cut, 1, tail)
            patterns = (
                np.ascontiguousarray(v, np.float32).view(np.uint32) for v in (found, recorded)
            )
            counts[nudge] = int(program.step.differs(program.stage, *patterns).sum())
            if not counts[nudge]:
                break
        return dict.fromkeys(candidate.arithmetic.nudges(candidate.given), flags.size) | counts

    def results(
        self,
        candidate: Candidate,
        stage: Stage,
        window: Window,
        arrays: Recorded,
        formulation: Formulation,
    ) -> jax.Array:
        """Compute one stage's values for a window under a candidate; see `Replayer.results`."""
        scalars, tail = self.scalars(candidate, window), self._tail(candidate, window.rows)[1]
        program = self.program(candidate, stage)
        return self.replayer.results(program, scalars, arrays, tail, formulation)


def window_elements(devices: tuple[Device, ...]) -> int:
    """Return how many elements windows have on devices, in all timesteps."""
    memory = memory_of(devices)
    if memory is None:
        return WINDOW_ELEMENTS
    return max(min(memory // _BYTES_PER_ELEMENT, _LARGE_WINDOW), WINDOW_ELEMENTS)


def _flat(window: Window) -> dict[str, NDArray[Any]]:
    return {name: array.reshape(array.shape[0], -1) for name, array in window.tensors.items()}


_Held = TypeVar("_Held")


def _of_window(held: dict[Place, dict[Any, _Held]], window: Window) -> dict[Any, _Held]:
    """Return what is held of a window; of earlier ones only the latest are kept."""
    place = (window.first, window.rows)
    if place not in held:
        while len(held) >= WINDOWS_HELD:
            del held[next(iter(held))]
        held[place] = {}
    return held[place]


def _reads(step: Step, name: str) -> set[str]:
    """Name the tensors that the formula of a tensor reads, before or after the step."""
    return {x.removeprefix("new_") for x in step.reads(name)}


def _moment_formats(recording: Recording, steps: tuple[int, int]) -> tuple[Format, Format]:
    """Tell in which formats the moments were kept: the weight's, unless their bits say float32."""
    found = []
    for name in ("exp_avg", "exp_avg_sq"):
        stored = recording.formats.get(name, recording.storage)
        if stored is FLOAT32 and recording.storage is not FLOAT32:
            stored = _shown_format(recording, name, steps)
        found.append(stored)
    return found[0], found[1]


def _shown_format(recording: Recording, name: str, steps: tuple[int, int]) -> Format:
    """Look whether most values of a float32 tensor at three timesteps are beyond the weight's format.

    Of true float32 moments hardly one in 256 is a bfloat16 value; a few wrong bits are no other format.
    """
    beyond = looked = 0
    storage, rows = recording.storage, max(1, min(recording.tokens, (1 << 20) // recording.width))
    for step in sorted({steps[0], sum(steps) // 2, steps[1] - 1}):
        for window in recording.windows((step, step + 1), 1, rows, (name,)):
            values = floats.decode(window.tensors[name][1], FLOAT32)
            told = np.isfinite(values) & (values != 0)
            beyond += int(np.count_nonzero(told & (floats.round_to(values, storage) != values)))
            looked += int(np.count_nonzero(told))
            break
    return FLOAT32 if beyond > looked / 2 else storage


def check_steps(recording: Recording, steps: tuple[int, int] | None) -> tuple[int, int]:
    """Return a range of steps as the recording counts them, checked against it.

    Args:
        recording: which.
        steps: range of steps; of a recording with gaps, as numbers of the run's steps.

    Raises:
        ValueError: the range is empty or outside.
    """
    end = recording.number_of(recording.steps) + 1
    start, stop = steps or (1, end)
    if not 1 <= start < stop <= end:
        raise ValueError(
            f"steps {start}:{stop} are outside the recording, which holds 1:{end} (the end not included)."
        )
    if recording.gaps is None:
        return start, stop
    first, last = np.searchsorted(recording.gaps.numbers, (start, stop)).tolist()
    if first == last:
        raise ValueError(f"steps {start}:{stop}: none of them was recorded.")
    return first + 1, last + 1
