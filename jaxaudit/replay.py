"""Recorded steps, run again: the jitted step, vmapped over the timesteps of a window.

Each stage of a step (`exp_avg`, `exp_avg_sq`, `param`) is a program of its own, teacher-forced: step t starts
from the recorded state of step t-1. A program comes in two formulations: float32 instructions, for windows in
which these are exact, and float64 emulation for all others. Each is tried on hard inputs before it is used.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.conformance import inexact_operations
from jaxaudit.devices import Device, Placement, on_host
from jaxaudit.floats import FLOAT16, FLOAT32, Format
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import (
    Float32Operations,
    Formulation,
    NumpyOperations,
    Operations,
    any_bits,
    combined,
    compile_exactly,
    numpy_operations,
    operations_of,
)
from jaxaudit.scalars import Rule, scalars_of
from jaxaudit.steps import Scalars, Step

#: Recorded patterns of a window, by tensor: flat, (steps + 1, elements); `grad` (steps, elements).
Recorded = Mapping[str, Any]

#: Bits of an element's flags.
DIFFERS = np.uint8(1)
STRAY = np.uint8(2)

#: Elements of each timestep that the self-test tries at most, and how many results it chooses them from.
TRIED, _DRAWN = 1 << 12, 1 << 18

#: How many elements it tries at most in all timesteps, short of one in each.
_TRIED_IN_ALL = 1 << 17


class SelfTestError(RuntimeError):
    """The device computes something else than IEEE 754 arithmetic asks for."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Where a stage finds what it reads: a recorded tensor, and the row offset against the step."""

    name: str
    tensor: str
    offset: int
    format: Format


@dataclasses.dataclass(frozen=True)
class Program:
    """One stage of a step on one recording's formats: what gets compiled.

    Attributes:
        step: without what the stage does not depend on.
        stage: which stage; also the recorded tensor that it is compared with.
        inputs: what it reads.
        recorded: format in which its result was recorded.
        rule: how its scalars are computed; the self-test needs some.
        name: of an arithmetic that it belongs to, for people.
    """

    step: Step
    stage: str
    inputs: tuple[Input, ...]
    recorded: Format
    rule: Rule = dataclasses.field(compare=False)
    name: str = dataclasses.field(compare=False)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.step, self.stage, self.inputs, self.recorded))

    @property
    def result(self) -> Format:
        """Format of what it computes."""
        return self.step.result_format(self.stage)

    @functools.cached_property
    def scalars(self) -> tuple[str, ...]:
        """Name the scalars that it reads."""
        return self.step.reads_scalars(self.stage)

    def values(self, ops: Operations, window: Recorded, steps: int, tail: Any) -> dict[str, Any]:
        """Decode the inputs of all the window's steps."""
        found = {
            i.name: ops.decode(window[i.tensor][i.offset : i.offset + steps], i.format)
            for i in self.inputs
        }
        return found | {"tail": tail}

    def replay(
        self, ops: Operations, scalars: Scalars, window: Recorded, steps: int, tail: Any
    ) -> NDArray[np.float32]:
        """Compute all the window's steps in NumPy, as they were recorded."""
        values = self.values(ops, window, steps, tail)
        columns = {name: scalar[:, None] for name, scalar in scalars.items()}
        with np.errstate(all="ignore"):
            return self.step.replay_recorded(self.stage, ops, columns, values)


#: Name in a window of the weight that a step keeps to itself, where the recorded one is a copy of it.
OWN_PARAM = "own param"


class Replayer:
    """Runs steps of one recording on one device, in windows of one shape.

    Args:
        placement: where the programs run.
        formats: recorded format of each tensor (see `Recording.formats`).
        shape: (steps, elements) of a window.
        note: takes the verdicts of other self-tests; by default they go into its own report alone.
    """

    def __init__(
        self,
        placement: Placement,
        formats: Mapping[str, Format],
        shape: tuple[int, int],
        note: Callable[[str, str], None] | None = None,
    ):
        self.placement, self.device = placement, placement.first
        self.formats = dict(formats)
        self.shape = shape[0], placement.padded(shape[1])
        self._verdicts: dict[tuple[Program, Formulation], str] = {}
        self._others: dict[str, str] = {}
        self._note = note

    def hidden(self, step: Step) -> tuple[str, ...]:
        """Name the tensors of a step's state that the recording does not hold."""
        return tuple(
            name
            for name in step.state
            if name not in self.formats or (name == "param" and step.keeps_more)
        )

    def program(self, step: Step, stage: str, rule: Rule, name: str) -> Program:
        """Say what a stage of a step reads from this recording.

        Args:
            step: under which arithmetic.
            stage: which tensor of the state.
            rule: how the scalars are computed.
            name: of the arithmetic, for people.
        """
        inputs = tuple(self._input(step, read) for read in step.reads(stage))
        recorded = self.formats.get(stage, step.format_of(stage))
        return Program(step.stripped(stage), stage, inputs, recorded, rule, name)

    def _input(self, step: Step, read: str) -> Input:
        tensor = read.removeprefix("new_")
        hidden = tensor in self.hidden(step)
        fmt = step.format_of(tensor) if hidden else self.formats[tensor]
        place = OWN_PARAM if hidden and tensor == "param" else tensor
        return Input(read, place, int(tensor != read), fmt)

    def start(
        self, program: Program, scalars: Scalars, window: Recorded, tail: Any
    ) -> jax.Array | None:
        """Start to compare a stage in float32, for `flags` to take up; None where float32 cannot be used."""
        if no_subnormals(scalars) and not self._verdict(program, "float32"):
            return self._summary(program, "float32", scalars, window, tail)
        return None

    def flags(
        self,
        program: Program,
        scalars: Scalars,
        window: Recorded,
        tail: Any,
        started: jax.Array | None = None,
    ) -> tuple[NDArray[np.uint8] | None, Formulation]:
        """Compare a stage with the recording, element by element.

        Args:
            program: the stage.
            scalars: those of the window's steps.
            window: recorded patterns.
            tail: the elements of a vectorised kernel's scalar loop, uint8 (elements,).
            started: what `start` returned for these arguments.

        Returns:
            uint8 (steps, elements), non-zero where the bits differ (all NaNs are alike), or None where none
            do, and the formulation that found out.

        Raises:
            SelfTestError: neither formulation is exact on this device.
        """
        given = (scalars, window, tail)
        started = self.start(program, *given) if started is None else started
        if started is not None:
            found = combined(started)
            if not found & STRAY:
                return (
                    self._whole(program, "float32", started, *given) if found else None
                ), "float32"
        self.require(program, "float64")
        started = self._summary(program, "float64", *given)
        found = combined(started)
        return (self._whole(program, "float64", started, *given) if found else None), "float64"

    def _summary(self, program: Program, formulation: Formulation, *given: Any) -> jax.Array:
        """Return the flags, or, where they would have to leave the device, all of them in one."""
        compiled = _flags_program(program, formulation, self.device, not on_host(self.device))
        return compiled(*self._arguments(program, formulation, *given), given[1][program.stage])

    def _whole(
        self, program: Program, formulation: Formulation, summary: jax.Array, *given: Any
    ) -> NDArray[np.uint8]:
        if on_host(self.device):
            return np.asarray(summary)
        return self._flags(program, formulation, *given)

    def results(
        self,
        program: Program,
        scalars: Scalars,
        window: Recorded,
        tail: Any,
        formulation: Formulation,
    ) -> jax.Array:
        """Compute a stage's new values, as patterns of `program.result`, (steps, elements).

        Args:
            program: the stage.
            scalars: those of the window's steps.
            window: recorded patterns.
            tail: the elements of a vectorised kernel's scalar loop, uint8 (elements,).
            formulation: the one that `flags` returned for this window.
        """
        compiled = _results_program(program, formulation, self.device)
        return compiled(*self._arguments(program, formulation, scalars, window, tail))

    def note(self, what: str, verdict: str) -> None:
        """Take the verdict of another self-test into the report: "" or what came out wrong."""
        if self._note:
            self._note(what, verdict)
        self._others[what] = verdict

    def self_tests(self) -> dict[str, str]:
        """Report every self-test that was made: "passed", or what came out wrong."""
        found = {
            f"{program.name} {program.stage} in {formulation}": verdict or "passed"
            for (program, formulation), verdict in self._verdicts.items()
        } | {what: verdict or "passed" for what, verdict in self._others.items()}
        for formulation in sorted({f for (_, f), verdict in self._verdicts.items() if verdict}):
            inexact = inexact_operations(self.device, formulation)
            found[f"operations in {formulation}"] = f"inexact: {', '.join(inexact) or 'none'}"
        return found

    def _flags(self, program: Program, formulation: Formulation, *rest: Any) -> NDArray[np.uint8]:
        compiled = _flags_program(program, formulation, self.device, False)
        target = rest[1][program.stage]
        return np.asarray(compiled(*self._arguments(program, formulation, *rest), target))

    def _arguments(
        self, program: Program, formulation: Formulation, scalars: Scalars, window: Recorded, tail: Any
    ) -> tuple[Any, ...]:  # fmt: skip
        converted = scalars if formulation == "float32" else widened(scalars)
        return np.uint32(0), converted, {i.tensor: window[i.tensor] for i in program.inputs}, tail

    def _placed(
        self, window: Mapping[str, NDArray[Any]], tail: NDArray[np.uint8]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Put a trial's inputs where a recording's are: a program is compiled anew for any other place."""
        return self.placement.put(window), self.placement.put_one(tail)

    def require(self, program: Program, formulation: Formulation) -> None:
        """Make sure that a program is exact on this device.

        Raises:
            SelfTestError: with the first input that comes out wrong.
        """
        verdict = self._verdict(program, formulation)
        if verdict:
            inexact = inexact_operations(self.device, formulation)
            raise SelfTestError(
                f"self-test failed on {self.device.platform} ({self.device.device_kind}): {program.stage} of "
                f"{program.name} in {formulation}: {verdict}. Inexact here: "
                f"{', '.join(inexact) or 'no single operation'}. Use another backend, for example "
                "--backend cpu."
            )

    def _verdict(self, program: Program, formulation: Formulation) -> str:
        key = (program, formulation)
        if key not in self._verdicts:
            self._verdicts[key] = self._try(program, formulation)
        return self._verdicts[key]

    def _try(self, program: Program, formulation: Formulation) -> str:
        """Run the compiled programs on hard inputs; return "" or the first wrong result."""
        tried = tried_of(self.shape)
        trial = Trial(program, formulation, self.shape, tried)
        try:
            window, tail = self._placed(trial.window, trial.tail)
            arguments = (program, trial.scalars, window, tail)
            flags = self._flags(program, formulation, *arguments[1:])[:, :tried]
            results = np.asarray(self.results(*arguments, formulation))[:, :tried]
        except Exception as error:
            # A device without float64, say, fails to compile; whatever it raises, it cannot be used.
            return f"it does not run ({str(error).splitlines()[0][:200]})"
        wrong = differ_in(results, trial.expected, program.result, program.result)
        wrong |= (flags & DIFFERS != 0) != trial.differs
        # What the program itself hands over to float64 need not be right.
        wrong &= flags & STRAY == 0
        if np.mean(flags & STRAY != 0) > 0.5:
            return "it takes ordinary numbers for subnormal ones"
        if wrong.any():
            return trial.describe(tuple(np.argwhere(wrong)[0]), results)
        if not on_host(self.device) and not self._summarises(program, formulation, trial):
            return "flags that are combined on the device are not those of each element"
        # What is left may be too rare for a trial: a double rounding of a fused multiply-add, say.
        inexact = formulation == "float64" and inexact_operations(self.device, formulation)
        return "a single operation gives other than the expected results" if inexact else ""

    def _summarises(self, program: Program, formulation: Formulation, trial: "Trial") -> bool:
        """Tell whether the program that combines all flags finds a difference if, and only if, there is one."""
        given = (program, formulation, trial.scalars)
        window, tail = self._placed(trial.window, trial.tail)
        differs = combined(self._summary(*given, window, tail)) & DIFFERS
        if program.recorded not in (program.result, FLOAT32):
            return bool(differs)  # the recording cannot hold what would agree
        agreeing, tail = trial.agreeing()
        flags = self._flags(*given, *self._placed(agreeing, tail))
        clean = np.flatnonzero(~np.any(flags & STRAY, axis=0))
        if not clean.size:
            return False
        chosen = clean[np.arange(flags.shape[1]) % clean.size]
        agreeing = {name: patterns[:, chosen] for name, patterns in agreeing.items()}
        return bool(differs) and not combined(
            self._summary(*given, *self._placed(agreeing, tail[chosen]))
        )


class Trial:
    """Hard inputs for a program, in its own shapes, and what must come out."""

    def __init__(
        self, program: Program, formulation: Formulation, shape: tuple[int, int], tried: int
    ):
        self._program = program
        steps, elements = shape
        rng = np.random.default_rng(20)
        self.scalars = trial_scalars(program.step, program.rule, steps)
        self.tail = np.zeros(elements, np.uint8)
        self.tail[:tried:2] = 1
        self.window: dict[str, NDArray[Any]] = {}
        for name, hard in self._draw(formulation, steps, tried).items():
            self.window[name] = np.zeros((hard.shape[0], elements), hard.dtype)
            self.window[name][:, :tried] = hard
        cut = {name: values[:, :tried] for name, values in self.window.items()}
        ops = numpy_operations(flushes=program.step.flushes)
        self.expected = self._compute(ops, cut, steps, self.tail[:tried])
        self.differs = self._plant(rng, steps, tried)

    def _draw(self, formulation: Formulation, steps: int, tried: int) -> dict[str, NDArray[Any]]:
        """Draw many columns, and keep first those whose result shows where a product is not fused.

        Rounding to 16 bits hides most of that: a few in a million results of random inputs show it.
        """
        program = self._program
        formats = {i.tensor: i.format for i in program.inputs} | {program.stage: program.recorded}
        drawn = tried * max(1, -(-_DRAWN // (tried * steps)))
        window = {
            name: _hard_columns(name, fmt, steps + (name != "grad"), drawn, formulation)
            for name, fmt in formats.items()
        }
        tail = (np.arange(drawn) % 2 == 0).astype(np.uint8)
        fused, unfused = (
            self._compute(ops, window, steps, tail)
            for ops in (numpy_operations(flushes=program.step.flushes), _Unfused())
        )
        silent = ~np.any(differ_in(fused, unfused, program.result, program.result), axis=0)
        chosen = np.empty(tried, np.int64)
        # Columns keep their parity, by which the trial decides what is in the tail.
        for k in (0, 1):
            count = chosen[k::2].size
            chosen[k::2] = np.argsort(silent[k::2], kind="stable")[:count] * 2 + k
        return {name: patterns[:, chosen] for name, patterns in window.items()}

    def _compute(
        self, ops: Operations, window: Recorded, steps: int, tail: NDArray[np.uint8]
    ) -> NDArray[Any]:
        result = self._program.replay(ops, self.scalars, window, steps, tail)
        return ops.encode(result, self._program.result)

    def _plant(self, rng: np.random.Generator, steps: int, tried: int) -> NDArray[np.bool_]:
        """Record the expected results for half the elements of the last step; tell what differs."""
        program, target = self._program, self.window[self._program.stage][:, :tried]
        if program.recorded in (program.result, FLOAT32):
            # The last row is read by no program as an input of the step that it is the result of.
            same = rng.integers(0, 2, tried).astype(bool)
            values = floats.decode(self.expected[-1], program.result)
            target[-1] = np.where(same, floats.encode(values, program.recorded), target[-1])
        wide_a = floats.decode(self.expected, program.result).view(np.uint32)
        wide_b = floats.decode(target[1:], program.recorded).view(np.uint32)
        return np.asarray(program.step.differs(program.stage, wide_a, wide_b))

    def agreeing(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        """Return a window and a tail of which every step leads to what was recorded, column after column."""
        program, steps, elements = self._program, len(self.expected), self.tail.size
        tried, ops = self.expected.shape[1], numpy_operations(flushes=self._program.step.flushes)
        window = {name: np.array(patterns[:, :tried]) for name, patterns in self.window.items()}
        tail = self.tail[:tried]
        for t in range(steps):
            cut = {name: rows[t : t + 1 + (name != "grad")] for name, rows in window.items()}
            at = {name: scalar[t : t + 1] for name, scalar in self.scalars.items()}
            result = program.replay(ops, at, cut, 1, tail)[0]
            window[program.stage][t + 1] = floats.encode(result, program.recorded)
        columns = np.arange(elements) % tried
        return {name: rows[:, columns] for name, rows in window.items()}, tail[columns]

    def describe(self, where: tuple[Any, ...], results: NDArray[Any]) -> str:
        """Name one wrong element's inputs, result and expectation, as bit patterns."""
        t, k = where
        inputs = ", ".join(
            f"{i.name}={self.window[i.tensor][t + i.offset, k]:#x}" for i in self._program.inputs
        )
        return f"{inputs} gave {results[t, k]:#x}, expected {self.expected[t, k]:#x}"


class _Unfused(NumpyOperations):
    """Two roundings where there should be one."""

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.add(self.multiply(a, b), c)


def differ_in(
    a: NDArray[Any], b: NDArray[Any], a_format: Format, b_format: Format
) -> NDArray[np.bool_]:
    """Mark patterns of two formats that are not of the same float32 bits; all NaNs are alike."""
    wide_a = floats.decode(a, a_format).view(np.uint32)
    wide_b = floats.decode(b, b_format).view(np.uint32)
    return floats.differ(wide_a, wide_b)


def trial_scalars(step: Step, rule: Rule, steps: int) -> Scalars:
    """Compute the scalars of a self-test: everyday hyperparameters, at step counts far apart."""
    given = Hyperparameters(
        learning_rate=np.full(steps, 1e-3),
        beta1=0.3 if step.interpolation == "end" else 0.9,
        beta2=0.999,
        epsilon=1e-4 if step.storage is FLOAT16 else 1e-8,  # float16 would make it 0
        weight_decay=0.01,
    )
    return scalars_of(step, rule, given, [1 + 37 * k for k in range(steps)])


def tried_of(shape: tuple[int, int]) -> int:
    """Return how many elements of each timestep a self-test tries, of a window of (steps, elements)."""
    steps, elements = shape
    return min(TRIED, elements, max(_TRIED_IN_ALL // steps, 1))


def no_subnormals(scalars: Scalars) -> bool:
    """Tell whether a device that takes subnormal numbers for zero sees all scalars as they are."""
    sizes = [np.abs(value) for value in scalars.values() if value.dtype == np.float32]
    return all(np.all((size == 0) | (size >= np.float32(2.0**-126))) for size in sizes)


def widened(scalars: Scalars) -> dict[str, NDArray[np.float64]]:
    """Turn scalars into the values that the float64 formulation takes."""
    return {name: value.astype(np.float64) for name, value in scalars.items()}


def hard_patterns(
    rng: np.random.Generator,
    name: str,
    fmt: Format,
    rows: int,
    size: NDArray[np.integer],
    formulation: Formulation,
) -> NDArray[Any]:
    """Draw patterns with ties, binade edges, cancellation and zeros; for float64 anything at all."""
    shape = (rows, size.size)
    squared = name in ("exp_avg_sq", "max_exp_avg_sq")
    exponent = {"param": rng.integers(-12, 3, shape)}.get(
        name, (2 * size if squared else size) + rng.integers(-4, 4, shape)
    )
    significand = rng.integers(0, 1 << 23, shape)
    significand &= rng.choice([0x7FFFFF, 0x7F0000, 0x700000, 0x7F8000, 0], shape)
    significand |= rng.choice([0, 0, 1, 0x7FFF, 0x8001], shape)
    values = np.ldexp(1 + significand / (1 << 23), exponent) * (rng.random(shape) > 0.03)
    if not squared:
        values *= rng.choice([-1.0, 1.0], shape)
    with np.errstate(over="ignore", under="ignore"):
        patterns = floats.encode(values.astype(np.float32), fmt)
    if formulation == "float32":
        return patterns
    anything = rng.integers(0, 1 << fmt.width, shape).astype(fmt.pattern_dtype)
    tiny = anything & fmt.pattern_dtype.type(fmt.sign_bit | ((1 << (fmt.significand_bits + 2)) - 1))
    special = rng.choice([0, fmt.sign_bit, fmt.infinity, fmt.infinity + 1, 1], shape)
    choice = rng.integers(0, 5, shape)
    return np.select(
        [choice == 0, choice == 1, choice == 2],
        [anything, tiny, special.astype(fmt.pattern_dtype)],
        patterns,
    )


@functools.lru_cache(maxsize=16)
def _hard_columns(
    name: str, fmt: Format, rows: int, columns: int, formulation: Formulation
) -> NDArray[Any]:
    """Draw the patterns of a tensor once for all programs that read it, read-only."""
    # The size is common to a column of all tensors, so that its terms meet.
    size = np.random.default_rng(20).integers(-26, -4, columns)
    rng = np.random.default_rng((20, *name.encode()))
    found = hard_patterns(rng, name, fmt, rows, size, formulation)
    found.flags.writeable = False
    return found


@functools.lru_cache(maxsize=512)
def _flags_program(
    program: Program, formulation: Formulation, device: Device, together: bool
) -> Callable:
    """Compile what flags each element, or, `together`, what combines all flags into one on the device."""

    def whole(zero: Any, scalars: Any, window: Any, tail: Any, target: Any) -> jax.Array:
        def one_step(s: Any, x: Any, recorded: Any) -> jax.Array:
            ops = operations_of(formulation, zero, flushes=program.step.flushes, device=device)
            replayed = program.step.replay_recorded(program.stage, ops, s, x | {"tail": tail})
            patterns = ops.patterns32(replayed), ops.patterns32(recorded)
            differs = program.step.differs(program.stage, *patterns)
            flags = differs.astype(jnp.uint8) * DIFFERS
            if isinstance(ops, Float32Operations):
                for value in (*x.values(), replayed):
                    ops.watch(value)
                flags |= ops.strays.astype(jnp.uint8) * STRAY
            return flags

        ops = operations_of(formulation, zero, flushes=program.step.flushes, device=device)
        values = program.values(ops, window, target.shape[0] - 1, tail)
        del values["tail"]
        # What was recorded is compared as it is, subnormal or not.
        recorded = operations_of(formulation, zero).decode(target[1:], program.recorded)
        flags = jax.vmap(one_step)(scalars, values, recorded)
        return any_bits(flags) if together else flags

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=512)
def _results_program(program: Program, formulation: Formulation, device: Device) -> Callable:
    def whole(zero: Any, scalars: Any, window: Any, tail: Any) -> jax.Array:
        ops = operations_of(formulation, zero, flushes=program.step.flushes, device=device)

        def one_step(s: Any, x: Any) -> jax.Array:
            replayed = program.step.replay_recorded(program.stage, ops, s, x | {"tail": tail})
            return ops.encode(replayed, program.result)

        values = program.values(ops, window, next(iter(scalars.values())).shape[0], tail)
        del values["tail"]
        return jax.vmap(one_step)(scalars, values)

    return compile_exactly(whole, device)
