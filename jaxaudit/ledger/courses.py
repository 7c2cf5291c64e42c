"""All remedies at once, timestep by timestep: what they carry, how they take a step, what is counted of it.

A timestep is written once, on values of any class of operations: XLA's float32, exact float64 emulation, NumPy for
the self-test, and bounds (`ranges`). What several remedies compute alike is written once too, or falls together in
the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.comparison import fold, fold_together
from jaxaudit.devices import Device
from jaxaudit.floats import BFLOAT16, FLOAT32, Format
from jaxaudit.ledger.ranges import Envelope, Range, RangeOperations, SparingOperations, ordinary
from jaxaudit.ledger.remedies import Chance
from jaxaudit.operations import (
    Formulation,
    Operations,
    Value,
    approximates,
    compile_exactly,
    kept,
    operations_of,
)
from jaxaudit.steps import Step

#: What moments follow, where not the weights of a remedy of that number: no weights; the recorded weights; or the
#: recorded state, from which they are one step ahead.
NOTHING, RECORDED_WEIGHTS, RECORDED_STATE = -1, -2, -3

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

_PACKED = 255  # widest row whose counts are packed into bytes


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor that a remedy carries from step to step.

    Attributes:
        name: one of `steps.STATE`.
        recipe: number of the arithmetic that it follows.
        follows: of moments, see `NOTHING`; else the number of the remedy.
    """

    name: str
    recipe: int
    follows: int


@dataclasses.dataclass(frozen=True)
class Course:
    """How a remedy takes a step.

    Attributes:
        weight: number of the arithmetic of its weight.
        ahead: the moments that it reads one step ahead of the recorded weights.
        free: the moments that it reads left to itself.
        chance: how its weight is rounded.
    """

    weight: int
    ahead: tuple[Slot, ...]
    free: tuple[Slot, ...]
    chance: Chance


@dataclasses.dataclass(frozen=True)
class Plan:
    """All remedies of a recording: what a program depends on.

    Attributes:
        steps: the arithmetics.
        single: number of the arithmetic and name of every float32 scalar.
        double: likewise of those that stay doubles.
        courses: of the remedies.
        formats: of the recorded state that is read, and of `grad`.
        width: elements of a row.
        master: number of the remedy that distances are taken from; None for the recorded weights.
        base: number of the arithmetic whose moments the recorded ones are as long as it replays them; None for
            none, or where it did not.
    """

    steps: tuple[Step, ...]
    single: tuple[tuple[int, str], ...]
    double: tuple[tuple[int, str], ...]
    courses: tuple[Course, ...]
    formats: tuple[tuple[str, Format], ...]
    width: int
    master: int | None
    base: int | None

    @property
    def storage(self) -> Format:
        """Format of the recorded weights."""
        return dict(self.formats)["param"]

    @property
    def carried(self) -> tuple[Slot, ...]:
        """Name everything that is carried from step to step, but for what the recording has."""
        found: list[Slot] = []
        for r, course in enumerate(self.courses):
            found += [slot for slot in (*course.ahead, *course.free) if not self.is_recorded(slot)]
            found.append(self.own("param", r))
            if self.steps[course.weight].compensation:
                found.append(self.own("compensation", r))
        return tuple(dict.fromkeys(found))

    @property
    def proofs(self) -> tuple[Slot, ...]:
        """Name the moments that are taken from the recording for as long as they are the remedies' own."""
        slots = (s for course in self.courses for s in (*course.ahead, *course.free))
        own = (s for s in slots if s.follows == NOTHING and s.recipe == self.base)
        return tuple(dict.fromkeys(own))

    def own(self, name: str, r: int) -> Slot:
        """Return the slot of a remedy's weight, or of its compensation."""
        return Slot(name, self.courses[r].weight, r)

    def is_proved(self, slot: Slot) -> bool:
        """Tell whether a moment after a step is the recorded one, of which each step gives proof."""
        own = dataclasses.replace(slot, follows=NOTHING)
        return self.is_recorded(slot) and own in self.proofs

    def is_recorded(self, slot: Slot) -> bool:
        """Tell whether a moment before a step is a recorded one."""
        taken = slot.follows == NOTHING and slot.recipe == self.base
        return slot.follows == RECORDED_STATE or taken

    def own_format(self, slot: Slot) -> Format:
        """Tell in which format a remedy keeps a tensor."""
        if slot.name == "param" and self.courses[slot.follows].chance == "drawn":
            return BFLOAT16
        return self.steps[slot.recipe].format_of(slot.name)

    @property
    def marks(self) -> int:
        """Number of marks of an element (see `Changes`)."""
        expected = sum(course.chance == "expected" for course in self.courses)
        return 2 + 3 * len(self.courses) - 2 * expected

    @property
    def chances(self) -> int:
        """Number of sums that are made of the expectation of chance."""
        return 2 * any(course.chance == "expected" for course in self.courses)

    def pairs(self, own: Sequence[Value], recorded: Value) -> list[tuple[Value, Value]]:
        """Pair weights, the recorded ones first, with those that their distance is taken from."""
        if self.master is None:
            return [(weight, recorded) for weight in own]
        others = (recorded, *(weight for r, weight in enumerate(own) if r != self.master))
        return [(weight, own[self.master]) for weight in others]


@dataclasses.dataclass(frozen=True)
class Before:
    """What is known before a timestep, as values.

    Attributes:
        scalars: those of each arithmetic.
        recorded: the recorded state, and `grad`.
        state: what the remedies carry.
        tails: for each arithmetic, the elements of a vectorised kernel's scalar loop.
        bits: 16 random bits for each element, uint32.
        after: recorded moments after the timestep, those of `Plan.proofs`.
    """

    scalars: Sequence[Mapping[str, Value]]
    recorded: Mapping[str, Value]
    state: Mapping[Slot, Value]
    tails: Sequence[Value]
    bits: Value
    after: Mapping[str, Value]


#: Takes a slot and its value after the step.
Keep = Callable[[Slot, Value], Value]


class Timestep:
    """One timestep of every remedy, on values of any class of operations.

    A moment that the recording proves is read as it was recorded, and computed only to be compared with that:
    where it is another one, nothing of the timestep counts.

    Args:
        plan: what the remedies do.
        ops: the operations.
        before: what is known.
        keep: takes everything that is carried, as soon as it is computed; what it returns is used from then on.

    Attributes:
        proofs: what is computed of each of `Plan.proofs`.
        state: everything that is carried, after the step.
        ahead: each remedy's weight, one step from the recorded state.
    """

    def __init__(self, plan: Plan, ops: Any, before: Before, keep: Keep = lambda _, value: value):
        self.plan, self.ops, self._before, self._keep = plan, ops, before, keep
        self._moments: dict[Slot, Value] = {}
        self._carried = plan.carried
        self.proofs = {slot: self._replay_moment(slot) for slot in plan.proofs}
        self.state = self._advance()
        self.ahead = [self._ahead(r) for r in range(len(plan.courses))]

    def _ahead(self, r: int) -> Value:
        """Return a remedy's new weight, one step from the recorded state; the expected one before it is rounded."""
        course = self.plan.courses[r]
        weight = self._before.recorded["param"]
        found = self._replay("param", course.weight, course.ahead, weight, np.float32(0))
        return self._drawn(found) if course.chance == "drawn" else found

    def _advance(self) -> dict[Slot, Value]:
        """Return everything that is carried, after the step."""
        weights: dict[Slot, Value] = {}
        for r, course in enumerate(self.plan.courses):
            param, compensation = self.plan.own("param", r), self.plan.own("compensation", r)
            before, lost = self._before.state[param], self._before.state.get(compensation)
            own = course.weight, course.free, before, lost
            found = self._replay("param", *own)
            found = self._drawn(found) if course.chance == "drawn" else found
            weights[param] = self._keep(param, found)
            if lost is not None:
                found = self._replay("compensation", *own)
                weights[compensation] = self._keep(compensation, found)
        return {s: weights[s] if s in weights else self.moment(s) for s in self._carried}

    def moment(self, slot: Slot) -> Value:
        """Return a moment after the step."""
        if self.plan.is_proved(slot):
            return self._before.after[slot.name]
        if self.plan.is_recorded(slot):
            slot = dataclasses.replace(slot, follows=RECORDED_STATE)
        if slot not in self._moments:
            found = self._replay_moment(slot)
            if isinstance(self.ops, RangeOperations):  # those that are not ordinary are marked
                found = found.within(ordinary(slot.name, self.plan.own_format(slot)))
            self._moments[slot] = self._keep(slot, found) if slot in self._carried else found
        return self._moments[slot]

    def _replay_moment(self, slot: Slot) -> Value:
        weight = self._before.recorded["param"]
        if slot.follows >= 0:
            weight = self._before.state[self.plan.own("param", slot.follows)]
        others = [dataclasses.replace(slot, name=name) for name in MOMENTS]
        return self._replay(slot.name, slot.recipe, others, weight, None)

    def results(self) -> Iterator[tuple[str, Value]]:
        """Go through everything that was computed as a tensor of a state, with its name."""
        yield from ((slot.name, value) for slot, value in self._moments.items())
        others = (slot for slot in self.state if slot not in self._moments)
        yield from ((slot.name, self.state[slot]) for slot in others)

    def _drawn(self, weight: Value) -> Value:
        if isinstance(self.ops, RangeOperations):
            return self.ops.round_to(weight, BFLOAT16)
        rounded = self.ops.decode(drawn(self.ops.patterns32(weight), self._before.bits), FLOAT32)
        return self.ops.where(self.ops.is_nan(weight), weight, rounded)

    def _replay(
        self, name: str, recipe: int, moments: Sequence[Slot], weight: Value, lost: Value | None
    ) -> Value:
        """Replay a tensor of the state from moments, a weight and what Kahan's sum has lost."""
        before, step = self._before, self.plan.steps[recipe]
        slots = {slot.name: slot for slot in moments}
        x: dict[str, Value] = {"tail": before.tails[recipe]}
        known = {"grad": before.recorded["grad"], "param": weight, "compensation": lost}
        for read in step.reads(name):
            tensor = read.removeprefix("new_")
            if tensor not in slots:
                x[read] = known[tensor]
            elif read != tensor:
                x[read] = self.moment(slots[tensor])
            elif self.plan.is_recorded(slots[tensor]):
                x[read] = before.recorded[tensor]
            else:
                x[read] = before.state[slots[tensor]]
        return step.replay(name, self.ops, before.scalars[recipe], x)


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is counted of a timestep's elements.

    Attributes:
        marks: booleans; for each remedy, landed, recovered (not with the expectation of chance) and changed when left
            to itself, after whether the recorded weight changed; last, whether a moment that the recording should
            hold is another one there.
        chance: how many of 65,536 draws change the weight, uint32; None without.
    """

    marks: list[Value]
    chance: Value | None


def changes(at: Timestep, before: Before, after: Value, lost: Value) -> Changes:
    """Compare a timestep of every remedy with the recording; NumPy or JAX.

    Args:
        at: the timestep.
        before: what it started from.
        after: the recorded weight after it.
        lost: where the recorded update was lost.
    """
    plan, ops, weight = at.plan, at.ops, before.recorded["param"]
    marks, chance = [_differ(ops, after, weight)], None
    for r, course in enumerate(plan.courses):
        if course.chance == "expected":
            chance = chance_of_change(ops.patterns32(at.ahead[r]), ops.patterns32(weight))
        else:
            landed = _differ(ops, at.ahead[r], weight)
            marks += [landed, landed & lost]
        slot = plan.own("param", r)
        marks.append(_differ(ops, at.state[slot], before.state[slot]))
    wrong = [
        floats.differ(ops.patterns32(found), ops.patterns32(before.after[slot.name]))
        for slot, found in at.proofs.items()
    ]
    marks.append(functools.reduce(lambda a, b: a | b, wrong, marks[0] & False))
    return Changes(marks, chance)


def _differ(ops: Any, a: Value, b: Value) -> Value:
    """Mark weights of different values; zeros are alike, and so are NaNs."""
    if isinstance(ops, SparingOperations):
        return a != b  # a NaN is no ordinary number
    return (a != b) & ~(ops.is_nan(a) & ops.is_nan(b))


def drawn(weight: Value, bits: Value) -> Value:
    """Round float32 patterns to bfloat16 by chance, as torchao does: add 16 random bits, and clear the lower 16.

    Args:
        weight: float32 patterns, uint32.
        bits: uint32 below 2^16.
    """
    return (weight + bits) & np.uint32(0xFFFF0000)


def chance_of_change(weight: Value, before: Value) -> Value:
    """Return how many of 65,536 draws round a weight to another value than it had, uint32; NumPy or JAX.

    Args:
        weight: float32 patterns.
        before: float32 patterns of bfloat16 values.
    """
    where = jnp.where if isinstance(weight, jax.Array) else np.where
    all_draws = np.uint32(0x10000)
    away = weight & np.uint32(0xFFFF)
    nearer = weight - away

    def was(neighbour: Value) -> Value:
        return (neighbour == before) | ((neighbour | before) << 1 == 0)

    chance = where(was(nearer), away, where(was(nearer + all_draws), all_draws - away, all_draws))
    nan, was_nan = (floats.is_nan(patterns, FLOAT32) for patterns in (weight, before))
    return where(nan, where(was_nan, np.uint32(0), all_draws), chance)


def random_bits(key: Value, low: Value, high: Value) -> Value:
    """Return 16 random bits for each element of a timestep, uint32; NumPy or JAX.

    The element's number and one half of the timestep's key go through a permutation of 32-bit integers that
    spreads every bit, and the result with the other half once more: elements and timesteps each have bits of
    their own, whatever is computed together.

    Args:
        key: of the timestep, uint32 (2,); see `step_key`.
        low: lower 32 bits of each element's number.
        high: upper 32 bits.
    """
    mixed = _scrambled(low ^ key[0]) + high * np.uint32(0x9E3779B9)
    return _scrambled(mixed ^ key[1]) >> 16


def _scrambled(x: Value) -> Value:
    """Permute 32-bit integers. Source: C. Wellons, "Hash Prospector", the best one found of its form."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def step_key(seed: int, timestep: int) -> NDArray[Any]:
    """Return the key of a timestep's random bits, uint32 (2,), by NumPy's `SeedSequence`."""
    return np.random.SeedSequence((seed, timestep)).generate_state(2, np.uint32)


def unproven(plan: Plan, envelope: Envelope) -> frozenset[int]:
    """Number the operations of a timestep whose result may be subnormal for ordinary inputs (see `ranges`)."""
    ops, scalars = RangeOperations(), _by_recipe(plan, envelope.ranges())
    formats = dict(plan.formats)
    recorded: dict[str, Range] = {name: ordinary(name, fmt) for name, fmt in formats.items()}
    state = {slot: ordinary(slot.name, plan.own_format(slot)) for slot in plan.carried}
    tails = [np.zeros(1, np.uint8)] * len(plan.steps)
    after = {slot.name: recorded[slot.name] for slot in plan.proofs}
    Timestep(plan, ops, Before(scalars, recorded, state, tails, None, after))
    return frozenset(ops.unproven)


def _by_recipe(plan: Plan, values: Mapping[tuple[int, str], Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in plan.steps]
    for (recipe, name), value in values.items():
        found[recipe][name] = value
    return found


#: What a program reads of a window: see `step_program`.
Inputs = Mapping[str, Any]


@functools.lru_cache(maxsize=64)
def step_program(
    plan: Plan,
    formulation: Formulation,
    open_points: frozenset[int],
    alike: tuple[int, ...],
    rows: int,
    device: Device,
) -> Callable:
    """Take one timestep of a block of rows.

    Scalars of the same number, column by column in `alike`, have the same values: what is computed of them is computed
    once.

    The program takes a zero, the step's place in the window, the block's first row, the inputs (`single` and
    `double` scalars, `keys`, `low` and `high` words of the elements' numbers, `tails`, `lost`, and the recorded
    tensors by name, all of the whole window), and the patterns of `Plan.carried`. It returns these after the
    step, and what was counted by row, two arrays of (numbers, rows): counts of marks (packed, see `unpacked`), in
    float32 one more than `Plan.marks`; and `Plan.chances` chances with the squared distances after them.
    """

    def one_step(zero: Any, k: Any, row: Any, inputs: Inputs, state: Any) -> Any:
        ops = _operations(formulation, zero, open_points, device)
        before, after, lost = _inputs(plan, ops, alike, rows, k, row, inputs, state)
        patterns: dict[Slot, Value] = {}

        def keep(slot: Slot, value: Value) -> Value:
            fmt = plan.own_format(slot)
            patterns[slot] = kept(ops.stored(value, fmt) if sparing else ops.encode(value, fmt))
            return ops.decode(patterns[slot], fmt)

        sparing = isinstance(ops, SparingOperations)
        at = Timestep(plan, ops, before, keep)
        found = changes(at, before, after, lost)
        marks = list(found.marks)
        if sparing:
            # What was before the step was after the one before it, or at the window's start (`start_program`).
            given = {"grad": before.recorded["grad"], "param": after} | dict(before.after)
            for name, value in (*given.items(), *at.results()):
                ops.watch_size(value, name)
            marks.append(ops.strays)
        codes = [kept(code) for code in _packed([mark.astype(jnp.uint32) for mark in marks], 1)]
        chances = [] if found.chance is None else _chances(kept(found.chance), lost)
        counts = [_by_row(each, plan.width) for each in _countable(codes, len(marks), plan.width)]
        own = [at.state[plan.own("param", r)] for r in range(len(plan.courses))]
        distances = [_squared(ops, *pair, zero) for pair in plan.pairs(own, after)]
        terms = tuple(term.reshape(-1, plan.width) for term in (*chances, *distances))
        numbers = fold_together(terms, plan.width)
        carried = tuple(patterns[slot] for slot in plan.carried)
        return carried, jnp.stack(_combined(counts)), jnp.stack(numbers)

    return compile_exactly(one_step, device)


def _by_row(values: Value, width: int) -> Value:
    return fold(values.reshape(-1, width), jnp.add)


def _chances(chance: Value, lost: Value) -> list[Value]:
    """Return the chance to land, and that to recover."""
    wide = chance.astype(jnp.float64)
    return [wide, jnp.where(lost, wide, 0.0)]


@functools.lru_cache(maxsize=64)
def start_program(plan: Plan, rows: int, device: Device) -> Callable:
    """Mark the rows of a block that do not start a window with ordinary numbers alone, uint32 (rows,).

    The program takes a zero, the block's first row, the inputs and the state, as `step_program`.
    """
    n = rows * plan.width

    def whole(zero: Any, row: Any, inputs: Inputs, state: Any) -> jax.Array:
        ops = SparingOperations(zero, frozenset())
        for name, fmt in plan.formats:
            if name != "grad":
                first = lax.dynamic_slice(inputs[name], (np.int32(0), row * plan.width), (1, n))[0]
                ops.watch_size(ops.decode(first, fmt), name)
        for slot, patterns in zip(plan.carried, state, strict=True):
            ops.watch_size(ops.decode(patterns, plan.own_format(slot)), slot.name)
        return _by_row(ops.strays.astype(jnp.uint32), plan.width).max(axis=-1)

    return compile_exactly(whole, device)


def _operations(
    formulation: Formulation, zero: Any, open_points: frozenset[int], device: Device
) -> Any:
    if formulation == "float32":
        return SparingOperations(zero, open_points, wide=approximates(device))
    return operations_of(formulation, zero, device=device)


def _packed(words: Sequence[Value], bits: int) -> list[Value]:
    """Put small numbers side by side into words of 32 bits."""
    each = 32 // bits
    return [
        functools.reduce(
            lambda a, b: a | b,
            [word << np.uint32(bits * j) for j, word in enumerate(words[k : k + each])],
        )
        for k in range(0, len(words), each)
    ]


def _inputs(
    plan: Plan,
    ops: Operations,
    alike: tuple[int, ...],
    rows: int,
    k: Any,
    row: Any,
    inputs: Inputs,
    state: Any,
) -> tuple[Before, Value, Value]:
    """Decode what a block's timestep reads: before it, the weight after it, and where its update was lost."""
    n, start = rows * plan.width, row * plan.width

    def part(values: Any) -> Any:
        return values if values.shape == (1,) else lax.dynamic_slice(values, (start,), (n,))

    def cut(name: str, k: Any) -> Any:
        return lax.dynamic_slice(inputs[name], (k, start), (1, n))[0]

    formats = dict(plan.formats)
    recorded = {name: ops.decode(cut(name, k), fmt) for name, fmt in formats.items()}
    later = dict.fromkeys(("param", *(slot.name for slot in plan.proofs)))
    after = {name: ops.decode(cut(name, k + 1), formats[name]) for name in later}
    weight = after.pop("param")
    columns = {j: inputs["single"][k, j] for j in dict.fromkeys(alike)}
    numbers = {name: columns[j] for name, j in zip(plan.single, alike, strict=True)}
    numbers |= {name: inputs["double"][k, j] for j, name in enumerate(plan.double)}
    values = {
        slot: ops.decode(patterns, plan.own_format(slot))
        for slot, patterns in zip(plan.carried, state, strict=True)
    }
    bits = random_bits(inputs["keys"][k], part(inputs["low"]), part(inputs["high"]))
    bits = kept(bits.astype(jnp.uint16)).astype(jnp.uint32)
    tails = [part(tail) for tail in inputs["tails"]]
    before = Before(_by_recipe(plan, numbers), recorded, values, tails, bits, after)
    return before, weight, cut("lost", k) != 0


def _countable(codes: Sequence[Value], marks: int, width: int) -> list[Value]:
    """Turn codes of 32 marks into words that can be added up: four marks in a byte each, where a row's counts fit."""
    if width > _PACKED:
        return [(codes[j // 32] >> np.uint32(j % 32)) & np.uint32(1) for j in range(marks)]
    four = [(codes[j // 32] >> np.uint32(j % 32)) & np.uint32(15) for j in range(0, marks, 4)]
    # Of the four products of a bit, that of its own byte's place is the only one to be kept.
    return [(bits * np.uint32(0x00204081)) & np.uint32(0x01010101) for bits in four]


def _squared(ops: Operations, a: Value, b: Value, zero: Value) -> Value:
    """Square a difference in float64, kept from being fused with the sum that it goes into."""
    apart = ops.float64(a) - ops.float64(b)
    bits = lax.bitcast_convert_type(apart * apart, jnp.uint64) ^ zero.astype(jnp.uint64)
    return lax.bitcast_convert_type(bits, jnp.float64)


def _combined(counts: list[Any]) -> list[Any]:
    """Add up the lanes of several counts, all at once: of integers the order does not matter."""
    zeros = tuple(each.dtype.type(0) for each in counts)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return list(lax.reduce(tuple(counts), zeros, add, (1,)))


def unpacked(counts: NDArray[Any], marks: int, width: int) -> NDArray[Any]:
    """Return the counts of each mark, integers (marks, ...), of a program's packed ones, (words, ...)."""
    if width > _PACKED:
        return counts
    # Bytes of a word, the lowest first on any machine.
    each = np.ascontiguousarray(counts, "<u4").view(np.uint8).reshape(*counts.shape, 4)
    return np.moveaxis(each, -1, 1).reshape(-1, *counts.shape[1:])[:marks]
