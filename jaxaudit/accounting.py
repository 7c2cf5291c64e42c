"""The numbers of an audit, gathered window by window."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from jaxaudit import results, stochastic
from jaxaudit.comparison import (
    NONFINITE,
    TINY,
    UNREPRESENTABLE,
    max_groups,
    sum_groups,
)
from jaxaudit.floats import FLOAT16, Format
from jaxaudit.joint_replay import Measured
from jaxaudit.operations import Formulation, combined, narrow_patterns
from jaxaudit.recording import TENSOR_KEYS, Recording, TokenGroups, Window
from jaxaudit.replay import Program, Recorded
from jaxaudit.steps import STAGES, Stage, Step
from jaxaudit.strips import Countable, keep_first
from jaxaudit.workbench import Candidate, Place, Workbench


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What came of one stage of one window: flags and values, or numbers by row, where anything differs."""

    program: Program
    formulation: Formulation
    flags: NDArray[np.uint8] | None = None
    replayed: jax.Array | None = None
    measured: Measured | None = None

    @property
    def differs(self) -> bool:
        """Tell whether anything differs, or may by chance."""
        return self.flags is not None or self.measured is not None


class Tables(Countable):
    """The numbers of an audit, filled in window by window."""

    MERGED = {
        "mismatches": "sum",
        "distances": "max",
        "first": "first",
        "observed": "sum",
        "predicted": "sum",
        "difference": "sum",
        "product": "sum",
        "roundings": "sum",
        "nonfinite": "sum",
        "unrepresentable": "sum",
    }

    def __init__(
        self,
        recording: Recording,
        groups: TokenGroups,
        candidates: int,
        steps: tuple[int, int],
    ):
        self.groups, self.steps = groups, steps
        self.tensors = [name for name in TENSOR_KEYS if name in recording.formats]
        count = (candidates, steps[1] - steps[0], len(groups.members))
        staged = (count[0], len(STAGES), *count[1:])
        self.mismatches = np.full(staged, results.NOT_AUDITED, np.int64)
        self.distances = np.full(staged, results.NOT_AUDITED, np.int64)
        self.audited = np.zeros(staged[:2], np.int8)
        self.first = np.full((*staged[:2], len(results.MISMATCH_FIELDS)), results.NOT_AUDITED)
        self.observed = np.zeros(count[1:])
        self.predicted, self.difference, self.product = (np.full(count, math.nan) for _ in range(3))
        self.roundings = np.zeros((3, *count, stochastic.BINS))
        self.nonfinite = np.zeros((len(self.tensors), *count[1:]), np.int64)
        self.unrepresentable = np.zeros_like(self.nonfinite)

    def mark_audited(self, a: int, stages: Sequence[Stage]) -> None:
        """Start the counts of an arithmetic's stages at zero."""
        for stage in stages:
            k = STAGES.index(stage)
            self.audited[a, k] = 1
            self.mismatches[a, k] = self.distances[a, k] = 0
            if stage == "param":
                self.predicted[a] = self.difference[a] = self.product[a] = 0

    def keep(self, candidates: Sequence[int]) -> None:
        """Forget all candidates but these."""
        for name in (
            "mismatches",
            "distances",
            "audited",
            "first",
            "predicted",
            "difference",
            "product",
        ):
            setattr(self, name, getattr(self, name)[list(candidates)])
        self.roundings = self.roundings[:, list(candidates)]

    def place(self, window: Window) -> slice:
        """Return the window's place on the timestep axis."""
        return slice(window.first - self.steps[0], window.first - self.steps[0] + window.steps)


class Divergence(Countable):
    """How far each arithmetic, left to itself, gets from the recording.

    It starts from the recorded weights and moments and sees nothing but the gradients from then on.
    """

    MERGED = {"mismatches": "sum", "distances": "max", "squares": "sum"}

    def __init__(self, bench: Workbench, tables: Tables, candidates: Sequence[Candidate]):
        self._bench, self._tables, self._candidates = bench, tables, candidates
        count = (len(candidates), tables.steps[1] - tables.steps[0], len(tables.groups.members))
        self.runs = [self._can_run(candidate) for candidate in candidates]
        kept = np.array(self.runs)[:, None, None]
        self.mismatches = np.where(kept, np.zeros(count, np.int64), results.NOT_AUDITED)
        self.distances = self.mismatches.copy()
        self.squares = np.where(kept, np.zeros(count), math.nan)
        self._apart: set[tuple[int, tuple[int, int]]] = set()

    def forget(self) -> None:
        """Forget what has parted from the recording in a strip."""
        self._apart.clear()

    def follow(
        self,
        a: int,
        window: Window,
        arrays: Recorded,
        members: list[NDArray[np.int64]],
        *,
        exact: bool,
        tiny: bool,
    ) -> None:
        """Take a window into account.

        Args:
            a: number of the candidate.
            window: the window.
            arrays: its recorded patterns.
            members: each group's rows in it.
            exact: every stage was audited in it and came out bit for bit.
            tiny: there are recorded weights that float32 sums do not do justice to.
        """
        candidate, key = self._candidates[a], (a, window.rows)
        step = self._bench.step(candidate)
        # As long as each step leads from the recorded state to the recorded state, its own state is that one.
        if not self.runs[a] or (key not in self._apart and exact and self._proves(step)):
            return
        self._apart.add(key)
        run = self._bench.run_weights(candidate, window, arrays)
        recorded, storage = arrays["param"], self._bench.recording.storage
        fmt: Format = step.param_format
        formulation: Formulation = "float64" if tiny else "float32"
        if step.keeps_more:
            run, fmt = narrow_patterns(run, storage), storage
        comparison, place = self._bench.comparison, self._tables.place(window)
        counts, distances = comparison.mismatches(run, fmt, recorded, storage)
        squares = comparison.inner_products(run, fmt, recorded, storage, formulation)[1]
        self.mismatches[a, place] += sum_groups(counts[: window.steps], members)
        self.distances[a, place] = np.maximum(
            self.distances[a, place], max_groups(distances[: window.steps], members)
        )
        self.squares[a, place] += sum_groups(squares[: window.steps], members)

    def keep(self, candidates: Sequence[int]) -> None:
        """Forget all candidates but these."""
        self.runs = [self.runs[k] for k in candidates]
        for name in ("mismatches", "distances", "squares"):
            setattr(self, name, getattr(self, name)[list(candidates)])

    def _can_run(self, candidate: Candidate) -> bool:
        recording, step = self._bench.recording, self._bench.step(candidate)
        started = self._tables.steps[0] == 1 and recording.first_step == 1
        known = all(name in recording.formats for name in step.state) and not step.keeps_more
        whole = "grad" in recording.formats and recording.gaps is None
        return whole and not step.stochastic and (started or known)

    def _proves(self, step: Step) -> bool:
        """Tell whether the audited stages are all of a step's state."""
        return {*step.state} <= {*STAGES} and not self._bench.replayer.hidden(step)


class Accountant:
    """Takes windows, one after the other, into the tables."""

    def __init__(
        self,
        bench: Workbench,
        tables: Tables,
        candidates: Sequence[Candidate],
        divergence: Divergence | None = None,
    ):
        self._bench, self._tables = bench, tables
        self._candidates, self._divergence = candidates, divergence
        self._started: dict[Place, tuple[jax.Array, jax.Array | None]] = {}
        #: Whether steps before the audited ones must be read for what was not recorded.
        self.needs_run_up = any(bench.hidden(candidate) for candidate in candidates)
        for a, candidate in enumerate(candidates):
            tables.mark_audited(a, bench.stages(candidate))

    def start(self, window: Window, arrays: Recorded) -> None:
        """Start what the device has to do for a window, which `account` must follow.

        The next window may be started before this one is accounted for: the device goes on with it while the host
        looks at this one's results.

        Args:
            window: the window.
            arrays: its recorded patterns, on the device.
        """
        bench, storage = self._bench, self._bench.recording.storage
        param = bench.comparison.start_inspection(arrays["param"], storage, storage)
        squares = None
        if "param" not in bench.start(self._candidates, window, arrays):
            squares = bench.comparison.start_squared_norms(arrays["param"], storage, "float32")
        self._started[window.first, window.rows] = param, squares

    def account(self, window: Window, arrays: Recorded, members: list[NDArray[np.int64]]) -> None:
        """Compare one window, started before, under every arithmetic.

        Args:
            window: the window.
            arrays: its recorded patterns, on the device.
            members: each group's rows in it.
        """
        looked, squares = self._started.pop((window.first, window.rows))
        param = combined(looked)
        tiny = bool(param & TINY)
        observed = self._observe(window, arrays, members, squares, tiny=tiny)
        clean: set[str] = set()
        for a, candidate in enumerate(self._candidates):
            read = self._bench.with_hidden(candidate, window, arrays)
            stages, differing = self._bench.stages(candidate), False
            for stage in stages:
                outcome = self._replay(candidate, stage, window, read, tiny=tiny)
                if outcome.differs:
                    differing = True
                    self._bench.differing.add((candidate, stage))
                self._enter(a, stage, outcome, window, arrays, members)
                clean |= self._proved(outcome)
                if stage == "param":
                    own = tiny or outcome.formulation == "float64"
                    self._enter_norms(a, outcome, window, arrays, members, observed, own)
            if self._divergence:
                exact = not differing and stages == STAGES
                self._divergence.follow(a, window, arrays, members, exact=exact, tiny=tiny)
        self._look_at_values(window, arrays, members, param, clean)

    def run_up(self, window: Window) -> None:
        """Take a window before the audited steps into what was not recorded."""
        arrays = self._bench.put(window)
        for candidate in self._candidates:
            self._bench.with_hidden(candidate, window, arrays)

    def _replay(
        self, candidate: Candidate, stage: Stage, window: Window, arrays: Recorded, *, tiny: bool
    ) -> _Outcome:
        bench, program = self._bench, self._bench.program(candidate, stage)
        # The sums of what was measured are of float32 differences, which do no justice to tiny weights.
        measured = None if tiny and stage == "param" else bench.measured(candidate, stage, window)
        if measured:
            differs = measured.counts.any()
            return _Outcome(program, "float32", measured=measured if differs else None)
        flags, formulation = bench.flags(candidate, stage, window, arrays)
        chance = stage == "param" and program.step.stochastic
        if flags is None and not chance:
            return _Outcome(program, formulation)
        replayed = bench.results(candidate, stage, window, arrays, formulation)
        if flags is None:
            elements = (window.rows[1] - window.rows[0]) * bench.recording.width
            flags = np.zeros((window.steps, elements), np.uint8)
        return _Outcome(program, formulation, flags, replayed)

    def _enter(
        self,
        a: int,
        stage: Stage,
        outcome: _Outcome,
        window: Window,
        arrays: Recorded,
        members: list[NDArray[np.int64]],
    ) -> None:
        if not outcome.differs:
            return
        tables, place, s = self._tables, self._tables.place(window), STAGES.index(stage)
        if outcome.measured:
            counts, distances = outcome.measured.counts, outcome.measured.distances
        else:
            counts, distances = self._bench.comparison.mismatches(
                outcome.replayed, outcome.program.result, arrays[stage], outcome.program.recorded
            )
        if outcome.flags is not None and stage == "param" and outcome.program.step.stochastic:
            rows = window.rows[1] - window.rows[0]
            wrong = outcome.flags.reshape(window.steps, rows, -1) != 0
            counts[: window.steps, :rows] = wrong.sum(axis=-1)
            distances[: window.steps, :rows][~wrong.any(axis=-1)] = 0
            self._enter_roundings(a, outcome, window, arrays, members)
            if not wrong.any():
                return
        tables.mismatches[a, s, place] += sum_groups(counts[: window.steps], members)
        tables.distances[a, s, place] = np.maximum(
            tables.distances[a, s, place], max_groups(distances[: window.steps], members)
        )
        known = tables.first[a, s]
        if known[0] == results.NOT_AUDITED or window.first <= known[0]:  # in an earlier strip
            candidate = self._candidates[a]
            keep_first(known, self._locate(candidate, stage, outcome, window))

    def _enter_roundings(
        self,
        a: int,
        outcome: _Outcome,
        window: Window,
        arrays: Recorded,
        members: list[NDArray[np.int64]],
    ) -> None:
        found = self._bench.comparison.roundings(outcome.replayed, arrays["param"])
        place = self._tables.place(window)
        for table, rows in zip(self._tables.roundings, found, strict=True):
            for b in range(rows.shape[-1]):
                table[a, place, :, b] += sum_groups(rows[: window.steps, :, b], members)

    def _locate(
        self, candidate: Candidate, stage: Stage, outcome: _Outcome, window: Window
    ) -> list[int]:
        """Describe the first differing element as `results.MISMATCH_FIELDS`."""
        width = self._bench.recording.width
        if outcome.measured:
            wrong = outcome.measured.counts != 0
            t, row = divmod(int(np.argmax(wrong.reshape(-1))), wrong.shape[1])
            column, replayed = self._bench.first_difference(candidate, stage, window, t, row)
        else:
            assert outcome.flags is not None and outcome.replayed is not None
            t, k = divmod(int(np.argmax(outcome.flags.reshape(-1) != 0)), outcome.flags.shape[1])
            row, column = divmod(k, width)
            replayed = int(np.asarray(outcome.replayed[t])[k])
        recorded = int(window.tensors[stage][t + 1].reshape(-1, width)[row, column])
        return [window.first + t, window.rows[0] + row, column, recorded, replayed]

    def _observe(
        self,
        window: Window,
        arrays: Recorded,
        members: list[NDArray[np.int64]],
        squares: jax.Array | None,
        *,
        tiny: bool,
    ) -> NDArray[np.float64]:
        """Enter the squared norms of the recorded change; in float64 where weights are tiny."""
        comparison, storage = self._bench.comparison, self._bench.recording.storage
        measured = None if tiny or squares is not None else self._measured_weights(window)
        if measured:
            rows = measured.squares[-1]
        elif tiny or squares is None:
            formulation: Formulation = "float64" if tiny else "float32"
            rows = comparison.squared_norms(arrays["param"], storage, formulation)
        else:
            rows = comparison.finished(squares)
        sums = sum_groups(rows[: window.steps], members)
        self._tables.observed[self._tables.place(window)] += sums
        return sums

    def _measured_weights(self, window: Window) -> Measured | None:
        """Return what was measured of the weights under any arithmetic."""
        auditing = (c for c in self._candidates if "param" in self._bench.stages(c))
        found = (self._bench.measured(c, "param", window) for c in auditing)
        return next(filter(None, found), None)

    def _enter_norms(
        self,
        a: int,
        outcome: _Outcome,
        window: Window,
        arrays: Recorded,
        members: list[NDArray[np.int64]],
        observed: NDArray[np.float64],
        tiny: bool,
    ) -> None:
        tables, place = self._tables, self._tables.place(window)
        if not outcome.differs:  # the replayed change is the recorded one, to the bit
            tables.predicted[a, place] += observed
            tables.product[a, place] += observed
            return
        program = outcome.program
        if outcome.measured:
            rows = outcome.measured.squares[:3]
        else:
            rows = self._bench.comparison.inner_products(
                outcome.replayed,
                program.result,
                arrays["param"],
                program.recorded,
                "float64" if tiny else "float32",
            )
        targets = (tables.predicted, tables.difference, tables.product)
        for table, values in zip(targets, rows, strict=True):
            table[a, place] += sum_groups(values[: window.steps], members)

    def _proved(self, outcome: _Outcome) -> set[str]:
        """Name the tensors that a stage without strays or mismatches proves finite and representable.

        A float16 result may be infinite although every operand was ordinary.
        """
        program, storage = outcome.program, self._bench.recording.storage
        ordinary = not outcome.differs and outcome.formulation == "float32"
        if not ordinary or storage is FLOAT16:
            return set()
        proved = {"grad"} & {i.tensor for i in program.inputs}
        return proved | {program.stage} if program.result is storage else proved

    def _look_at_values(
        self,
        window: Window,
        arrays: Recorded,
        members: list[NDArray[np.int64]],
        param: int,
        clean: set[str],
    ) -> None:
        """Count infinities, NaNs and values beyond the storage format, where there may be any."""
        recording, comparison = self._bench.recording, self._bench.comparison
        tables, place = self._tables, self._tables.place(window)
        for name, array in arrays.items():
            if name in clean and name != "param":
                continue
            fmt, at = recording.formats[name], tables.tensors.index(name)
            found = param if name == "param" else comparison.inspect(array, fmt, recording.storage)
            for bit, table in (
                (NONFINITE, tables.nonfinite),
                (UNREPRESENTABLE, tables.unrepresentable),
            ):
                if found & bit:
                    rows = comparison.tally(array, fmt, recording.storage, bit)
                    rows = rows if name == "grad" else rows[1:]
                    table[at, place] += sum_groups(rows[: window.steps], members)
