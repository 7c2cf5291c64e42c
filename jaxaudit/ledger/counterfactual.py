"""The recorded gradients under other arithmetics: one step ahead of the recorded state, and left to themselves.

Every remedy (see `remedies`) goes through the recording twice. One step ahead, each step starts from the recorded
weights, and counts what it would have changed. Left to itself, a remedy starts where the recording does and then sees
nothing but the gradients. These are the recorded ones in both: how a run would have gone on, whose gradients would
soon have been others, nothing here can tell.

All remedies advance together (see `courses`), a block of rows at a time. As everywhere, the programs come in float32,
which marks the rows in which a number of extraordinary size was met, and in exact float64 emulation, in which such
rows are done again; each is tried on hard inputs first.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.comparison import sum_groups
from jaxaudit.ledger.courses import (
    MOMENTS,
    NOTHING,
    RECORDED_STATE,
    RECORDED_WEIGHTS,
    Course,
    Plan,
    Slot,
    step_key,
)
from jaxaudit.ledger.remedies import MASTER, RECORDED, Remedy, base_of, remedies_of
from jaxaudit.ledger.stepping import Counts, Stepper, columns
from jaxaudit.ledger.subject import Seen, Subject
from jaxaudit.ledger.variables import COUNTERFACTUAL
from jaxaudit.recording import Window
from jaxaudit.replay import trial_scalars
from jaxaudit.results import label
from jaxaudit.scalars import EXACT
from jaxaudit.steps import Scalars, Step
from jaxaudit.strips import Countable
from jaxaudit.workbench import Candidate

#: Elements of a block.
BLOCK = 1 << 19

_SAID = (
    "the gradients are the recorded ones under every remedy: this says what would have been stored had the gradients "
    "been the same, not how the run would have gone on"
)


class Counterfactual(Countable):
    """Runs every remedy over a recording, window by window.

    Args:
        subject: the recording and the arithmetic that made it.
        beta2: values of beta2 to try.
        seed: of the draw of stochastic rounding.
    """

    MERGED = {
        "_landed": "sum",
        "_recovered": "sum",
        "_squares": "sum",
        "_free_landed": "sum",
        "_moving": "sum",
        "_last_move": "rows",
    }

    def __init__(self, subject: Subject, *, beta2: Sequence[float] = (0.95,), seed: int = 0):
        recording = subject.bench.recording
        self._subject, self._seed = subject, seed
        self._base = base_of(subject.candidate, recording)
        self.remedies = remedies_of(subject.candidate, recording, beta2, seed)
        self._recipes: list[Candidate] = []
        self._plans: dict[tuple[int, int], Plan] = {}
        self._states: dict[tuple[int, int], list[tuple[jax.Array, ...]]] = {}
        self._steps: list[Step] = []
        self._plan = self._first_plan()
        self._apart = dataclasses.replace(self._plan, base=None)
        rules = [candidate.arithmetic.rule for candidate in self._recipes]
        bench = subject.bench
        self._stepper = Stepper(bench.device, rules, bench.replayer.note)
        self._scalars: tuple[int, dict[str, Any]] | None = None
        self._inputs: dict[tuple[int, int], dict[str, Any]] = {}
        self._last: dict[tuple[int, int], NDArray[Any]] = {}
        names, shape = [RECORDED, *(remedy.name for remedy in self.remedies)], subject.counts
        self._names = names
        table = (len(names), *shape)
        self._landed, self._recovered, self._squares = (np.zeros(table) for _ in range(3))
        self._free_landed, self._moving = (np.zeros(table, np.int64) for _ in range(2))
        self._last_move = np.zeros((len(names), recording.tokens), np.int64)

    def forget(self) -> None:
        """Forget a strip's rows, and what the remedies carry."""
        self._plans.clear()
        self._states.clear()
        self._inputs.clear()
        self._last.clear()

    @staticmethod
    def possible(subject: Subject) -> bool:
        """Tell whether there are gradients and numbers, and a state to start from."""
        recording = subject.bench.recording
        if subject.chosen is None or not {"grad", "param"} <= {*recording.formats}:
            return False
        if recording.gaps is not None:  # remedies run on from step to step
            return False
        started = subject.steps[0] == 1 and recording.first_step == 1
        names = MOMENTS if subject.chosen.options.amsgrad else MOMENTS[:2]
        return started or set(names) <= {*recording.formats}

    def take(self, seen: Seen, lost: jax.Array) -> None:
        """Take a window into account.

        Args:
            seen: the window.
            lost: where the recorded update was lost, uint8 (length, elements), on the device.
        """
        window = seen.window
        rows = window.rows
        inputs = self._inputs_of(seen, lost)
        if rows not in self._states:
            self._plans[rows] = self._plan if self._starts_alike(seen) else self._apart
            self._states[rows] = self._start(seen, self._plans[rows])
        before = self._states[rows]
        found = self._run(rows, inputs, window)
        if self._plans[rows].base is not None and found.marks[-1].any():
            self._leave_recording(rows, seen, before)
            found = self._run(rows, inputs, window)
        if window.range[1] == self._subject.steps[1]:
            self._last[rows] = np.array(np.asarray(seen.arrays["param"])[window.steps])
        seen.later(lambda: self._enter(window, seen.members, found))

    def dataset(self) -> xr.Dataset:
        """Label what was found."""
        arrays = {
            "landed_count": self._landed,
            "recovered_count": self._recovered,
            "free_landed_count": self._free_landed,
            "free_distance": np.sqrt(self._squares),
            "free_moving_tokens": self._moving,
            "last_move": self._last_move,
        }
        coordinates = self._subject.coordinates()
        tokens = np.arange(self._subject.bench.recording.tokens, dtype=np.int64)
        coordinates |= {"remedy": self._names, "token": tokens}
        return label(arrays, coordinates, self._attributes(), COUNTERFACTUAL)

    def final_weights(self, remedy: str) -> NDArray[np.unsignedinteger]:
        """Return the patterns of a remedy's own weights after the last step, (tokens, width)."""
        width, parts, end = self._subject.bench.recording.width, [], 0
        for rows in sorted(self._states):
            plan = self._plans[rows]
            if remedy == RECORDED:
                found = self._last[rows]
            else:
                slot = plan.own("param", self._names.index(remedy) - 1)
                k = plan.carried.index(slot)
                found = self._whole(rows, [state[k] for state in self._states[rows]])
            parts.append(found.reshape(-1, width)[end - rows[0] :])
            end = rows[1]
        return np.concatenate(parts)

    def _attributes(self) -> dict[str, Any]:
        arithmetic = self._subject.candidate.arithmetic
        first = {
            "summary": "what happened",
            "arithmetic": arithmetic.label,
            "formula": arithmetic.formula,
        }
        said = {remedy.name: remedy.describe(self._base) for remedy in self.remedies}
        master = self._plan.master is not None
        what = "of float32-master" if master else "recorded, as the run was in float32 already"
        return {
            "remedies": json.dumps({RECORDED: first} | said),
            "gradients": _SAID,
            "free_distance_from": f"the weights {what}",
        }

    # What the remedies are made of.

    def _first_plan(self) -> Plan:
        bench, base = self._subject.bench, self._recipe(self._base)
        courses = [self._course(remedy, r) for r, remedy in enumerate(self.remedies)]
        formats = {"param": bench.recording.storage, "grad": bench.recording.formats["grad"]}
        for name in self._steps[base].state:
            if name in MOMENTS and self._subject.holds([name]):
                formats[name] = self._subject.source(name)[1]
        masters = [r for r, remedy in enumerate(self.remedies) if remedy.name == MASTER]
        single, double = self._numbers()
        # What the recording holds can be taken for the remedies' own moments only where these are made like it.
        alike = self._base is self._subject.candidate
        return Plan(
            steps=tuple(self._steps),
            single=single,
            double=double,
            courses=tuple(courses),
            formats=tuple(formats.items()),
            width=bench.recording.width,
            master=masters[0] if masters else None,
            base=base if alike and {*self._moments(base)} <= {*formats} else None,
        )

    def _recipe(self, candidate: Candidate) -> int:
        if candidate not in self._recipes:
            self._recipes.append(candidate)
            self._steps.append(self._subject.bench.step(candidate))
        return self._recipes.index(candidate)

    def _moments(self, recipe: int) -> list[str]:
        return [name for name in self._steps[recipe].state if name in MOMENTS]

    def _course(self, remedy: Remedy, r: int) -> Course:
        """Say which moments a remedy reads: L2 decay makes them depend on the weights."""
        first, second = self._recipe(remedy.first), self._recipe(remedy.second)
        weight = self._recipe(remedy.weight)
        held = self._subject.holds(self._moments(second))
        coupled = self._steps[second].decay == "l2"
        ahead = RECORDED_WEIGHTS if coupled else NOTHING

        def slots(follows: int) -> tuple[Slot, ...]:
            recipes = {"exp_avg": first}
            return tuple(
                Slot(name, recipes.get(name, second), follows) for name in self._moments(second)
            )

        return Course(
            weight=weight,
            ahead=slots(RECORDED_STATE if remedy.keeps_moments and held else ahead),
            free=slots(r if coupled else NOTHING),
            chance=remedy.chance,
        )

    def _numbers(self) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]:
        """Name the scalars that are read, float32 ones and doubles."""
        single, double = [], []
        for recipe, (candidate, step) in enumerate(zip(self._recipes, self._steps, strict=True)):
            read = {x for name in step.state for x in step.reads_scalars(name)}
            trial = trial_scalars(step, candidate.arithmetic.rule, 1)
            for name in sorted(read):
                where = single if trial[name].dtype == np.float32 else double
                where.append((recipe, name))
        return tuple(single), tuple(double)

    # What a window is read with.

    def _inputs_of(self, seen: Seen, lost: Any) -> dict[str, Any]:
        """Gather what the programs read of a window."""
        rows = seen.window.rows
        if rows not in self._inputs:
            self._inputs[rows] = self._elements(rows) | {"tails": self._tails(rows)}
        arrays = {
            name: seen.arrays[self._subject.source(name)[0] if name in MOMENTS else name]
            for name, _ in self._plan.formats
        }
        return self._inputs[rows] | self._numbers_of(seen.window) | arrays | {"lost": lost}

    def _starts_alike(self, seen: Seen) -> bool:
        """Tell whether the recorded first moments are numbers of the format in which the arithmetic keeps them."""
        known = dict(self._plan.formats)
        for slot in self._plan.proofs:
            key, fmt = self._subject.source(slot.name)[0], self._plan.own_format(slot)
            values = floats.decode(np.asarray(seen.arrays[key])[0], known[slot.name])
            kept = floats.round_to(values, fmt)
            if np.any(floats.differ(kept.view(np.uint32), values.view(np.uint32))):
                return False
        return True

    def _elements(self, rows: tuple[int, int]) -> dict[str, Any]:
        """Return the numbers of a range of rows' elements, in two words."""
        width, device = self._subject.bench.recording.width, self._subject.bench.device
        numbers = np.arange(rows[0] * width, rows[1] * width, dtype=np.uint64)
        high = (numbers >> np.uint64(32)).astype(np.uint32)
        if not np.any(high != high[0]):
            high = high[:1]
        low = numbers.astype(np.uint32)
        return {"low": jax.device_put(low, device), "high": jax.device_put(high, device)}

    def _tails(self, rows: tuple[int, int]) -> list[Any]:
        """Mark, for each arithmetic, the elements of a vectorised kernel's scalar loop, where that matters."""
        bench = self._subject.bench
        nothing, found = jax.device_put(np.zeros(1, np.uint8), bench.device), []
        for candidate in self._recipes:
            tail = bench.tail(candidate, rows)
            found.append(jax.device_put(tail, bench.device) if tail.any() else nothing)
        return found

    def _numbers_of(self, window: Window) -> dict[str, Any]:
        """Return the scalars and keys of a window's steps; beyond the last step they are repeated."""
        if self._scalars is None or self._scalars[0] != window.first:
            bench = self._subject.bench
            last = bench.steps[1] - 1
            timesteps = [min(window.first + k, last) for k in range(bench.length)]
            keys = np.stack([step_key(self._seed, t) for t in timesteps])
            scalars = [self._scalars_at(candidate, timesteps) for candidate in self._recipes]
            self._scalars = window.first, columns(self._plan, scalars) | {"keys": keys}
        return self._scalars[1]

    def _scalars_at(self, candidate: Candidate, timesteps: list[int]) -> Scalars:
        bench = self._subject.bench
        known = bench.nudges.get(self._subject.candidate, {})
        alike = candidate.arithmetic.rule is self._subject.candidate.arithmetic.rule
        nudges = [known.get(t, EXACT) if alike else EXACT for t in timesteps]
        return bench.scalars_at(candidate, timesteps, nudges)

    # Running.

    def _start(self, seen: Seen, plan: Plan) -> list[tuple[jax.Array, ...]]:
        """Return what every block starts from: the recorded state where there is one, else zeros."""
        found = []
        for block in self._blocks(seen.window.rows):
            elements = slice(block[0] * plan.width, block[1] * plan.width)
            found.append(tuple(self._first(seen, plan, slot, elements) for slot in plan.carried))
        return found

    def _first(self, seen: Seen, plan: Plan, slot: Slot, elements: slice) -> jax.Array:
        fmt, device = plan.own_format(slot), self._subject.bench.device
        known = dict(plan.formats)
        if slot.name not in known:
            size = elements.stop - elements.start
            return jax.device_put(np.zeros(size, fmt.pattern_dtype), device)
        key = self._subject.source(slot.name)[0] if slot.name in MOMENTS else slot.name
        values = floats.decode(np.asarray(seen.arrays[key])[0, elements], known[slot.name])
        return jax.device_put(np.array(floats.encode(values, fmt)), device)

    def _blocks(self, rows: tuple[int, int]) -> list[tuple[int, int]]:
        """Split a range of rows, counted from its start, into blocks of one size; the last one may overlap."""
        count = rows[1] - rows[0]
        most = max(1, BLOCK // self._plan.width)
        size = -(-count // -(-count // most))
        starts = [min(k, count - size) for k in range(0, count, size)]
        return [(start, start + size) for start in starts]

    def _whole(self, rows: tuple[int, int], parts: Sequence[Any]) -> NDArray[Any]:
        """Put the blocks' parts of an array together; rows are its last axis, elements for a state."""
        blocks = self._blocks(rows)
        each = np.asarray(parts[0]).shape[-1] // (blocks[0][1] - blocks[0][0])
        first = np.asarray(parts[0])
        whole = np.empty((*first.shape[:-1], (rows[1] - rows[0]) * each), first.dtype)
        for (begin, end), part in zip(blocks, parts, strict=True):
            whole[..., begin * each : end * each] = part
        return whole

    def _run(self, rows: tuple[int, int], inputs: Mapping[str, Any], window: Window) -> Counts:
        """Take a window's steps, block by block."""
        blocks, found, after = self._blocks(rows), [], []
        for (begin, end), state in zip(blocks, self._states[rows], strict=True):
            where = (begin, end - begin)
            new, counts = self._stepper.take(self._plans[rows], where, inputs, state, window.steps)
            after.append(new)
            found.append(counts)
        self._states[rows] = after
        return Counts(
            self._whole(rows, [each.marks for each in found]),
            self._whole(rows, [each.chances for each in found]),
            self._whole(rows, [each.squares for each in found]),
        )

    def _leave_recording(
        self, rows: tuple[int, int], seen: Seen, before: list[tuple[Any, ...]]
    ) -> None:
        """Go on without recorded moments from the state before the window, up to which they were the remedies' own."""
        old, plan = self._plans[rows], self._apart
        fresh = self._start(seen, plan)
        self._states[rows] = [
            tuple(
                state[old.carried.index(slot)] if slot in old.carried else first
                for slot, first in zip(plan.carried, block, strict=True)
            )
            for state, block in zip(before, fresh, strict=True)
        ]
        self._plans[rows] = plan

    # What is told of it.

    def _enter(self, window: Window, members: list[NDArray[np.int64]], found: Counts) -> None:
        """Add up a window's rows by token group."""
        place, plan = self._subject.place(window), self._plan
        inside = np.zeros((window.rows[1] - window.rows[0], len(members)))
        for g, tokens in enumerate(members):
            inside[tokens, g] = 1
        # Numbers below 2^53 have exact sums in any order.
        counts = found.marks[:-1].astype(np.float64) @ inside
        chances = found.chances / 65536 @ inside
        apart = iter(_by_group(found.squares, members))
        self._landed[0, place] += counts[0]
        self._enter_moves(0, place, window, found.marks[0], counts[0], inside)
        if plan.master is not None:
            self._squares[0, place] += next(apart)
        mark = 1
        for r, course in enumerate(plan.courses, 1):
            expected = course.chance == "expected"
            landed, recovered = chances if expected else counts[mark : mark + 2]
            mark += 0 if expected else 2
            self._landed[r, place] += landed
            self._recovered[r, place] += recovered
            self._enter_moves(r, place, window, found.marks[mark], counts[mark], inside)
            mark += 1
            if r - 1 != plan.master:
                self._squares[r, place] += next(apart)

    def _enter_moves(
        self,
        r: int,
        place: slice,
        window: Window,
        changed: NDArray[np.integer],
        counts: NDArray[np.float64],
        inside: NDArray[np.float64],
    ) -> None:
        """Take a remedy's changed weights, by row, (steps, rows), and by group into account."""
        moved = changed > 0
        self._free_landed[r, place] += counts.astype(np.int64)
        self._moving[r, place] += (moved.astype(np.float64) @ inside).astype(np.int64)
        since = np.argmax(moved[::-1], axis=0)
        last = np.where(moved.any(axis=0), window.range[1] - 1 - since, 0)
        tokens = self._last_move[r, slice(*window.rows)]
        np.maximum(tokens, last, out=tokens)


def _by_group(values: NDArray[np.float64], members: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Add up (..., steps, rows) over each group's rows; (..., steps, groups)."""
    sums = sum_groups(values.reshape(-1, values.shape[-1]), members)
    return sums.reshape(*values.shape[:-1], len(members))
