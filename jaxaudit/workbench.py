"""A recording on a device: what turns the windows of the one into programs of the other."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from numpy.typing import NDArray

from jaxaudit.arithmetics import (
    STAGES,
    Arithmetic,
    Options,
    Scalars,
    Stage,
    Step,
    make_step,
    scalar_rule_elements,
    scalars_of,
)
from jaxaudit.comparison import Comparison
from jaxaudit.devices import Device
from jaxaudit.floats import FLOAT32, Format
from jaxaudit.operations import Formulation
from jaxaudit.recording import Recording, Window
from jaxaudit.replay import Program, Recorded, Replayer

#: Elements of a window: below this its arrays of 16-bit results stay in memory that malloc keeps.
WINDOW_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An arithmetic with the options to replay it under."""

    arithmetic: Arithmetic
    options: Options


class Workbench:
    """A recording, a device, and everything that turns one's windows into the other's numbers."""

    def __init__(
        self,
        recording: Recording,
        device: Device,
        steps: tuple[int, int],
        window_steps: int | None,
    ):
        self.recording, self.device, self.steps = recording, device, steps
        self.rows = max(1, min(recording.tokens, 4 * WINDOW_ELEMENTS // recording.width))
        elements = self.rows * recording.width
        self.length = min(window_steps or max(1, WINDOW_ELEMENTS // elements), steps[1] - steps[0])
        if self.rows < recording.tokens:
            self.length = 1
        second = "max_exp_avg_sq" if recording.flag("amsgrad") else "exp_avg_sq"
        self._replayers: dict[Format, Replayer] = {}
        self._shape = (self.length, elements)
        self.comparison = Comparison(device, recording.width)
        self.second_moment = second
        self._rules: dict[tuple[int, int, int], NDArray[np.uint8]] = {}
        self._scalars: dict[Step, tuple[int, Scalars]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are read."""
        wanted = {"param", "grad", "exp_avg", "exp_avg_sq"} | {self.second_moment}
        return tuple(name for name in self.recording.formats if name in wanted)

    def stages(self) -> tuple[Stage, ...]:
        """Stages that the recording holds everything for."""
        needs: dict[Stage, set[str]] = {
            "exp_avg": {"grad", "exp_avg"},
            "exp_avg_sq": {"grad", "exp_avg_sq"},
            "param": {"exp_avg", self.second_moment},
        }
        present = set(self.recording.formats)
        if self.free_running:
            needs["param"] = {"grad"}
        return tuple(stage for stage in STAGES if needs[stage] <= present)

    @property
    def free_running(self) -> bool:
        """Whether moments that were not recorded can be had by running from zero over the gradients."""
        present = set(self.recording.formats)
        fresh = self.recording.first_step == 1 and self.second_moment == "exp_avg_sq"
        return fresh and "grad" in present and not {"exp_avg", "exp_avg_sq"} <= present

    def replayer(self, step: Step) -> Replayer:
        """Return the replayer for a step: without recorded moments, these take the step's own format."""
        missing = dict.fromkeys(("exp_avg", "exp_avg_sq"), step.operator_format)
        key = step.operator_format if self.free_running else FLOAT32
        if key not in self._replayers:
            formats = (missing if self.free_running else {}) | self.recording.formats
            self._replayers[key] = Replayer(self.device, formats, self._shape, self.second_moment)
        return self._replayers[key]

    def self_tests(self) -> dict[str, str]:
        """Report every self-test that was made."""
        return {
            k: v for replayer in self._replayers.values() for k, v in replayer.self_tests().items()
        }

    def windows(self, steps: tuple[int, int]) -> Iterator[Window]:
        """Read windows of the bench's shape."""
        return self.recording.windows(steps, self.length, self.rows, self.names)

    def bytes(self, steps: tuple[int, int]) -> int:
        """Bytes that `windows` hands out in all, short last windows counted whole."""
        count = -(-(steps[1] - steps[0]) // self.length)
        each = self.recording.step_elements
        sizes = {name: self.recording.formats[name].bytes for name in self.names}
        return count * sum(
            each * size * (self.length + (name != "grad")) for name, size in sizes.items()
        )

    def put(self, window: Window) -> dict[str, jax.Array]:
        """Hand a window to the device, flat: without a copy where the device is the CPU."""
        flat = {name: array.reshape(array.shape[0], -1) for name, array in window.tensors.items()}
        return {name: jax.device_put(array, self.device) for name, array in flat.items()}

    def scalars(self, step: Step, window: Window) -> Scalars:
        """Return the scalars of a window's steps; beyond the last step they are repeated."""
        known = self._scalars.get(step)
        if known is None or known[0] != window.first:
            known = self._scalars[step] = (window.first, self._compute_scalars(step, window))
        return known[1]

    def _compute_scalars(self, step: Step, window: Window) -> Scalars:
        given = self.recording.hyperparameters
        assert given is not None  # there are no stages without hyperparameters
        index = [min(window.first + k, self.steps[1] - 1) for k in range(self.length)]
        rates = given.learning_rate[np.array(index) - 1]
        given = dataclasses.replace(given, learning_rate=rates)
        return scalars_of(step, given, [t + self.recording.first_step - 1 for t in index])

    def rule(self, step: Step, options: Options, rows: tuple[int, int]) -> NDArray[np.uint8]:
        """Mark the elements that follow PyTorch's scalar loop, where that matters."""
        threads = options.threads if step.decay == "l2" else 0
        key = (threads, *rows)
        if key not in self._rules:
            self._rules[key] = self._compute_rule(threads, rows)
        return self._rules[key]

    def _compute_rule(self, threads: int, rows: tuple[int, int]) -> NDArray[np.uint8]:
        width = self.recording.width
        if not threads:
            return np.zeros((rows[1] - rows[0]) * width, np.uint8)
        elements, size = self.recording.parameter_elements()
        return scalar_rule_elements(elements[rows[0] * width : rows[1] * width], size, threads)

    def flags(
        self, candidate: Candidate, stage: Stage, window: Window, arrays: Recorded
    ) -> tuple[NDArray[np.uint8], Formulation]:
        """Compare one stage of a window under a candidate; see `Replayer.flags`."""
        step = self.step(candidate)
        replayer = self.replayer(step)
        scalars, rule = self.scalars(step, window), self.rule(step, candidate.options, window.rows)
        flags, formulation = replayer.flags(replayer.program(step, stage), scalars, arrays, rule)
        return flags[: window.steps], formulation

    def results(
        self,
        candidate: Candidate,
        stage: Stage,
        window: Window,
        arrays: Recorded,
        formulation: Formulation,
    ) -> jax.Array:
        """Compute one stage's values for a window under a candidate; see `Replayer.results`."""
        step = self.step(candidate)
        replayer = self.replayer(step)
        scalars, rule = self.scalars(step, window), self.rule(step, candidate.options, window.rows)
        return replayer.results(replayer.program(step, stage), scalars, arrays, rule, formulation)

    def program(self, candidate: Candidate, stage: Stage) -> Program:
        """Say what a stage reads under a candidate."""
        step = self.step(candidate)
        return self.replayer(step).program(step, stage)

    def step(self, candidate: Candidate) -> Step:
        """Fill in a candidate's step."""
        given = self.recording.hyperparameters
        assert given is not None
        return make_step(candidate.arithmetic, self.recording.storage, given, candidate.options)


def check_steps(recording: Recording, steps: tuple[int, int] | None) -> tuple[int, int]:
    """Return a range of steps, checked against the recording.

    Raises:
        ValueError: the range is empty or outside.
    """
    start, stop = steps or (1, recording.steps + 1)
    if not 1 <= start < stop <= recording.steps + 1:
        raise ValueError(
            f"steps {start}:{stop} are outside the recording, which holds 1:{recording.steps + 1} (the end "
            "not included)."
        )
    return start, stop
