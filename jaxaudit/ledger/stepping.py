"""Steps of all remedies over a block of rows: on the device where it is exact, else on the host.

The device's float32 marks rows in which a number of extraordinary size was met. These are done again: a few of them in
NumPy, which is IEEE 754 arithmetic as it stands; many of them, or all where a device's float32 is not exact, in its
float64 emulation. The device's programs are tried on hard inputs, and held against NumPy, before they are used.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.comparison import fold
from jaxaudit.devices import Device
from jaxaudit.ledger.courses import (
    Before,
    Plan,
    Slot,
    Timestep,
    changes,
    random_bits,
    start_program,
    step_key,
    step_program,
    unpacked,
    unproven,
)
from jaxaudit.ledger.ranges import Envelope
from jaxaudit.operations import Formulation, numpy_operations
from jaxaudit.replay import TRIED, differ_in, hard_patterns, no_subnormals, trial_scalars
from jaxaudit.scalars import Rule
from jaxaudit.steps import Scalars

#: Elements that are done again in NumPy at most, and elements that are then done in float64 at once.
FEW, MANY = 1 << 14, 1 << 16

#: Timesteps of a self-test.
_TRIED_STEPS = 6

#: Different elements of a row of a trial, and rows that are tried at least.
_DISTINCT, _LEAST_ROWS = 16, 16

#: What programs read of a window: see `courses.step_program`.
Inputs = Mapping[str, Any]

State = tuple[Any, ...]


@dataclasses.dataclass
class Counts:
    """What was counted of some rows: arrays of (..., steps, rows).

    Attributes:
        marks: counts of each mark of `courses.changes`, integers (marks, steps, rows).
        chances: sums of the chances to land and to recover, (0 or 2, steps, rows), out of 65,536.
        squares: squared distances from the master, of the recorded weights and of each other remedy.
    """

    marks: NDArray[np.integer]
    chances: NDArray[np.float64]
    squares: NDArray[np.float64]

    def fill_in(self, rows: Any, other: "Counts") -> None:
        """Replace the counts of some rows by the first of another's."""
        for name in ("marks", "chances", "squares"):
            getattr(self, name)[..., rows] = getattr(other, name)[..., : len(rows)]


class Stepper:
    """Takes steps of all remedies, exactly.

    Args:
        device: where to.
        rules: how the scalars of each arithmetic are computed; for the self-test.
        note: takes the verdict of a self-test, "" or what came out wrong.
    """

    def __init__(self, device: Device, rules: Sequence[Rule], note: Callable[[str, str], None]):
        self._device, self._rules, self._note = device, rules, note
        self._verdicts: dict[Any, str] = {}
        self._envelope = Envelope()
        self._open: dict[Plan, frozenset[int]] = {}
        self._alike: tuple[int, ...] | None = None

    def take(
        self, plan: Plan, rows: tuple[int, int], inputs: Inputs, state: State, steps: int
    ) -> tuple[State, Counts]:
        """Take steps of a block of rows.

        Args:
            plan: what the remedies do.
            rows: the first row, and how many.
            inputs: of the whole window.
            state: patterns of `Plan.carried` before the window, of the block.
            steps: how many of the window's steps are valid.

        Returns:
            The state after them, and what was counted.
        """
        self._prove(plan, inputs)
        self._alike = _alike(np.asarray(inputs["single"]), self._alike)
        ordinary = no_subnormals({"": inputs["single"]})
        if ordinary and not self._verdict(plan, "float32", rows[1], inputs):
            new, found = self._on_device(plan, "float32", rows, inputs, state, steps)
            again = np.flatnonzero(found.marks[-1].any(axis=0))
            found.marks = found.marks[:-1]
            if again.size:
                new = self._again(plan, rows[0], again, inputs, (state, new), found, steps)
            return new, found
        if not self._verdict(plan, "float64", rows[1], inputs):
            return self._on_device(plan, "float64", rows, inputs, state, steps)
        columns = np.arange(rows[1] * plan.width) + rows[0] * plan.width
        return in_numpy(plan, _cut(inputs, columns), tuple(map(np.asarray, state)), steps)

    def _prove(self, plan: Plan, inputs: Inputs) -> None:
        """Bound the scalars, and find the operations whose results need to be looked at."""
        held = [
            self._envelope.holds(name, inputs[kind][:, j])
            for kind in ("single", "double")
            for j, name in enumerate(getattr(plan, kind))
        ]
        if not all(held):
            self._open = {}
        if plan not in self._open:
            self._open[plan] = unproven(plan, self._envelope)

    def _on_device(
        self,
        plan: Plan,
        formulation: Formulation,
        rows: tuple[int, int],
        inputs: Inputs,
        state: State,
        steps: int,
    ) -> tuple[State, Counts]:
        """Take steps in a formulation; in float32 the last mark is that of extraordinary numbers."""
        (first, count), single = rows, formulation == "float32"
        marks, points = plan.marks + single, self._open[plan] if single else frozenset()
        assert self._alike is not None
        step = step_program(plan, formulation, points, self._alike, count, self._device)
        if not single:
            inputs = {**inputs, "single": np.asarray(inputs["single"], np.float64)}
        found, zero, row = [], np.uint32(0), np.int32(first)
        begin = (
            start_program(plan, count, self._device)(zero, row, inputs, state) if single else None
        )
        for k in map(np.int32, range(steps)):
            state, *counts = step(zero, k, row, inputs, state)
            found.append(counts)
        packed, numbers = (
            np.stack([np.asarray(each) for each in kind], 1) for kind in zip(*found, strict=True)
        )
        numbers = numbers[: plan.chances], numbers[plan.chances :]
        counts = Counts(unpacked(packed, marks, plan.width), *numbers)
        if begin is not None:
            counts.marks[-1, 0] |= np.asarray(begin) != 0
        return state, counts

    def _again(
        self,
        plan: Plan,
        first: int,
        again: NDArray[np.int64],
        inputs: Inputs,
        states: tuple[State, State],
        found: Counts,
        steps: int,
    ) -> State:
        """Do some rows of a block again; return the block's state with theirs.

        Args:
            plan: what the remedies do.
            first: the block's first row.
            again: rows, counted from there.
            inputs: of the whole window.
            states: of the block before the window, and after it, where these rows mean nothing.
            found: what was counted of the block; these rows are replaced.
            steps: how many.
        """
        width, before = plan.width, [np.asarray(patterns) for patterns in states[0]]
        merged = [np.array(np.asarray(patterns)) for patterns in states[1]]
        many = again.size * width > FEW
        size = max(1, min(before[0].size // width, MANY // width)) if many else again.size
        for k in range(0, again.size, size):
            rows = again[k : k + size]
            padded = np.pad(rows, (0, size - rows.size), mode="edge")
            columns = (padded[:, None] * width + np.arange(width)).reshape(-1)
            cut = _cut(inputs, columns + first * width)
            state = tuple(patterns[columns] for patterns in before)
            if many and not self._verdict(plan, "float64", size, cut):
                state, counts = self._on_device(plan, "float64", (0, size), cut, state, steps)
            else:
                state, counts = in_numpy(plan, cut, state, steps)
            found.fill_in(rows, counts)
            kept = columns[: rows.size * width]
            for whole, part in zip(merged, state, strict=True):
                whole[kept] = np.asarray(part)[: kept.size]
        return tuple(jax.device_put(patterns, self._device) for patterns in merged)

    def _verdict(self, plan: Plan, formulation: Formulation, count: int, inputs: Inputs) -> str:
        """Try the programs on hard inputs, once for each shape; return "" or what came out wrong."""
        shapes = tuple((name, np.shape(inputs[name])) for name in sorted(inputs) if name != "tails")
        tails = tuple(np.shape(tail) for tail in inputs["tails"])
        points = self._open[plan] if formulation == "float32" else None
        key = (plan, formulation, points, self._alike, count, shapes, tails)
        if key not in self._verdicts:
            self._verdicts[key] = self._try(plan, formulation, count, inputs)
            self._note(f"remedies in {formulation}", self._verdicts[key])
        return self._verdicts[key]

    def _try(self, plan: Plan, formulation: Formulation, count: int, inputs: Inputs) -> str:
        trial = _Trial(plan, formulation, count, inputs, self._rules, self._alike or ())
        given = (trial.inputs, trial.state, trial.steps)
        try:
            state, found = self._on_device(plan, formulation, (0, count), *given)
        except Exception as error:  # a device without float64, say, fails to compile
            return f"it does not run ({str(error).splitlines()[0][:200]})"
        usable = np.ones(trial.rows, bool)
        if formulation == "float32":
            usable = ~np.any(found.marks[-1][:, : trial.rows], axis=0)
            found.marks = found.marks[:-1]
            if usable.mean() < 0.5:
                return "it takes ordinary numbers for extraordinary ones"
        return trial.compare(state, found, usable)


def in_numpy(plan: Plan, inputs: Inputs, state: State, steps: int) -> tuple[State, Counts]:
    """Take steps on the host; arguments and results as for `Stepper.take`, of all elements that there are."""
    ops, formats, n = numpy_operations(), dict(plan.formats), state[0].size
    values = {
        slot: floats.decode(patterns, plan.own_format(slot))
        for slot, patterns in zip(plan.carried, state, strict=True)
    }
    decoded = {name: floats.decode(inputs[name], fmt) for name, fmt in formats.items()}
    marks, chances, squares = [], [], []
    for k in range(steps):
        bits = random_bits(inputs["keys"][k], inputs["low"], inputs["high"])
        recorded = {name: each[k] for name, each in decoded.items()}
        after = {name: each[k + 1] for name, each in decoded.items() if name != "grad"}
        lost, weight = inputs["lost"][k] != 0, after["param"]
        with np.errstate(all="ignore"):
            scalars = _scalars_at(plan, inputs, k)
            before = Before(scalars, recorded, values, inputs["tails"], bits, after)
            at = Timestep(plan, ops, before)
            found = changes(at, before, weight, lost)
            values = {slot: np.asarray(value, np.float32) for slot, value in at.state.items()}
            own = [values[plan.own("param", r)] for r in range(len(plan.courses))]
            wide = [[np.asarray(x, np.float64) for x in pair] for pair in plan.pairs(own, weight)]
            apart = [weight - target for weight, target in wide]
            squares.append([_by_row(each * each, plan.width) for each in apart])
        marks.append(
            [_by_row(np.broadcast_to(mark, n).astype(np.int32), plan.width) for mark in found.marks]
        )
        if found.chance is not None:
            chance = found.chance.astype(np.float64)
            chances.append([_by_row(chance, plan.width), _by_row(chance * lost, plan.width)])
    patterns = tuple(floats.encode(values[slot], plan.own_format(slot)) for slot in plan.carried)
    columns = (np.array(each).swapaxes(0, 1) if each else [] for each in (marks, chances, squares))
    return patterns, _counts(*columns)


def _alike(values: NDArray[Any], known: tuple[int, ...] | None) -> tuple[int, ...]:
    """Give each column the number of the first one that has had the same values so far."""
    keys = [column.tobytes() for column in values.T]
    if known is not None:
        keys = list(zip(keys, known, strict=True))
    return tuple(keys.index(key) for key in keys)


def _counts(marks: Any, chances: Any, squares: Any) -> Counts:
    shape = marks.shape[1:]
    numbers = [np.array(x, np.float64).reshape(-1, *shape) for x in (chances, squares)]
    return Counts(marks, *numbers)


def _scalars_at(plan: Plan, inputs: Inputs, k: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in plan.steps]
    for kind in ("single", "double"):
        for j, (recipe, name) in enumerate(getattr(plan, kind)):
            found[recipe][name] = np.asarray(inputs[kind])[k, j]
    return found


def _by_row(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Add up the rows in the order in which the device does."""
    lanes = values.reshape(-1, width)
    while lanes.shape[1] > 1:
        lanes = np.asarray(fold(lanes, np.add))
    return lanes[:, 0]


def columns(plan: Plan, scalars: Sequence[Scalars]) -> dict[str, NDArray[Any]]:
    """Put the scalars of each arithmetic side by side, (steps, scalars)."""
    steps, found = len(next(iter(scalars[0].values()))), {}
    for kind, dtype in (("single", np.float32), ("double", np.float64)):
        names = getattr(plan, kind)
        each = [scalars[recipe][name] for recipe, name in names]
        found[kind] = np.stack(each, 1) if each else np.zeros((steps, 0), dtype)
    return found


def _cut(inputs: Inputs, elements: NDArray[np.int64]) -> dict[str, Any]:
    """Take elements of a window, on the host; what all elements have in common stays as it is."""
    found = {}
    for name, value in inputs.items():
        if name == "tails":
            found[name] = [_taken(np.asarray(tail), elements) for tail in value]
        elif name in ("single", "double", "keys"):
            found[name] = np.asarray(value)
        else:
            found[name] = _taken(np.asarray(value), elements)
    return found


def _taken(array: NDArray[Any], elements: NDArray[np.int64]) -> NDArray[Any]:
    return array if array.shape == (1,) else np.ascontiguousarray(array[..., elements])


class _Trial:
    """Hard inputs for the programs of a plan, in their own shapes, and what must come out."""

    def __init__(
        self,
        plan: Plan,
        formulation: Formulation,
        count: int,
        inputs: Inputs,
        rules: Sequence[Rule],
        alike: Sequence[int],
    ):
        self._plan, self._rng = plan, np.random.default_rng(22)
        self._formulation: Formulation = formulation
        length, elements = np.shape(inputs["lost"])
        # Programs take one timestep; from hard inputs, every row meets something extraordinary before long.
        self.steps = min(length, _TRIED_STEPS)
        self._distinct = min(plan.width, _DISTINCT)
        most = min(TRIED // self._distinct, 4 * TRIED // plan.width)
        self.rows = min(count, max(_LEAST_ROWS, most))
        n = self.rows * plan.width
        sizes = self._rng.integers(-26, -4, (self.rows, self._distinct))
        lost = np.zeros((length, elements), np.uint8)
        lost[: self.steps] = self._rng.integers(0, 2, (self.steps, elements), np.uint8)
        arrays = {
            name: self._hard(name, fmt, (length + (name != "grad"), elements), sizes)
            for name, fmt in plan.formats
        }
        states = [
            self._hard(slot.name, plan.own_format(slot), (1, count * plan.width), sizes)[0]
            for slot in plan.carried
        ]
        scalars = [
            trial_scalars(s, rule, length) for s, rule in zip(plan.steps, rules, strict=True)
        ]
        numbers = {
            "low": np.arange(elements, dtype=np.uint32),
            "high": np.zeros(np.shape(inputs["high"]), np.uint32),
            "keys": np.stack([step_key(0, k) for k in range(length)]),
            "tails": [(np.arange(np.size(x)) % 2 == 1).astype(np.uint8) for x in inputs["tails"]],
        }
        values = columns(plan, scalars)
        values["single"] = values["single"][:, list(alike)]
        self.inputs = values | arrays | numbers | {"lost": lost}
        self.state = tuple(states)
        own = tuple(patterns[:n] for patterns in states)
        self._expected = in_numpy(plan, _cut(self.inputs, np.arange(n)), own, self.steps)

    def _hard(
        self, name: str, fmt: floats.Format, shape: tuple[int, int], sizes: NDArray[np.integer]
    ) -> NDArray[Any]:
        """Draw a few elements for each row, and repeat them: where all of many differ, no row is ordinary throughout."""
        patterns, width = np.zeros(shape, fmt.pattern_dtype), self._plan.width
        steps = min(shape[0], self.steps + 1)
        hard = hard_patterns(self._rng, name, fmt, steps, sizes.reshape(-1), self._formulation)
        columns = np.arange(self.rows)[:, None] * self._distinct + np.arange(width) % self._distinct
        patterns[:steps, : self.rows * width] = hard[:, columns.reshape(-1)]
        return patterns

    def compare(self, state: State, found: Counts, usable: Any) -> str:
        """Return "" or what came out wrong in the rows that can be used."""
        plan, (expected_state, expected) = self._plan, self._expected
        elements = np.repeat(usable, plan.width)
        for slot, got, wanted in zip(plan.carried, state, expected_state, strict=True):
            fmt, got = plan.own_format(slot), np.asarray(got)[: elements.size]
            wrong = differ_in(got, wanted, fmt, fmt) & elements
            if wrong.any():
                k = int(np.argmax(wrong))
                return f"{_named(slot)} came out as {got[k]:#x}, expected {wanted[k]:#x}"
        for what in ("marks", "chances", "squares"):
            got, wanted = (getattr(each, what)[..., : self.rows] for each in (found, expected))
            if not np.array_equal(
                got[..., usable], wanted[..., usable], equal_nan=what == "squares"
            ):
                return f"the {what} of rows are not those of their elements"
        return ""


def _named(slot: Slot) -> str:
    return f"{slot.name} of arithmetic {slot.recipe}"
