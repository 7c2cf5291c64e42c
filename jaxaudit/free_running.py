"""Tensors of the state that no recording holds, run freely: from their start, step after step, over the gradients."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.conformance import inexact_operations
from jaxaudit.devices import Device
from jaxaudit.floats import Format
from jaxaudit.operations import (
    Float32Operations,
    Formulation,
    Operations,
    compile_exactly,
    numpy_operations,
    operations_of,
)
from jaxaudit.replay import (
    Recorded,
    Replayer,
    SelfTestError,
    differ_in,
    hard_patterns,
    no_subnormals,
    trial_scalars,
    tried_of,
    widened,
)
from jaxaudit.scalars import Rule
from jaxaudit.steps import Scalars, Step


class FreeRun:
    """One run through the windows of a recording.

    What the recording does hold is taken from it, before and after each timestep. As a stage's program, the run
    comes in float32 and in float64, and each is tried on hard inputs before it is used.

    Args:
        replayer: of the recording.
        step: under which arithmetic.
        rule: how its scalars are computed.
        name: of the arithmetic, for people.
        hidden: which tensors are run freely; what else their formulas read must be in the windows.
        formats: of what windows hold, where that is other than what was recorded.

    Raises:
        SelfTestError: the float64 formulation is not exact on this device.
    """

    def __init__(
        self,
        replayer: Replayer,
        step: Step,
        rule: Rule,
        name: str,
        hidden: tuple[str, ...],
        formats: Mapping[str, Format] | None = None,
    ):
        self.step, self.hidden = step, hidden
        self._formats = replayer.formats | dict(formats or {})
        self._state: tuple[Any, ...] | None = None
        self._placement, self._device = replayer.placement, replayer.device
        read = {x.removeprefix("new_") for each in hidden for x in step.reads(each)}
        self._known = {x: self._formats[x] for x in step.state if x in read - {*hidden}}
        verdicts: dict[Formulation, str] = {
            formulation: _verdict(self, replayer, rule, formulation)
            for formulation in ("float64", "float32")
        }
        for formulation, verdict in verdicts.items():
            replayer.note(f"{name} run freely in {formulation}", verdict)
        if verdicts["float64"]:
            device = replayer.device
            inexact = inexact_operations(device, "float64")
            raise SelfTestError(
                f"self-test failed on {device.platform} ({device.device_kind}): a free run of {name} in "
                f"float64: {verdicts['float64']}. Inexact here: {', '.join(inexact) or 'no single operation'}. "
                "Use another backend, for example --backend cpu."
            )
        self._fast = not verdicts["float32"]

    def advance(self, scalars: Scalars, window: Recorded, tail: Any, steps: int) -> dict[str, Any]:
        """Run through a window.

        Returns:
            Patterns of each hidden tensor, (steps + 1, elements), in the step's own format; for the arguments
            see `after`.
        """
        start = dict(zip(self.hidden, self._started(window), strict=True))
        run = self.after(scalars, window, tail, steps)
        join = _join_program(self._device)
        return {name: join(start[name], run[name]) for name in self.hidden}

    def after(
        self,
        scalars: Scalars,
        window: Recorded,
        tail: Any,
        steps: int,
        wanted: tuple[str, ...] | None = None,
    ) -> dict[str, Any]:
        """Run through a window.

        Args:
            scalars: those of the window's steps.
            window: recorded patterns.
            tail: the elements of a vectorised kernel's scalar loop, uint8 (elements,).
            steps: how many of the window's steps are valid.
            wanted: which tensors are returned; by default all hidden ones.

        Returns:
            Patterns of tensors after every step, (steps, elements), in the step's own format.
        """
        state = self._started(window)
        arrays = {name: window[name] for name in sorted({"grad", *self._known})}
        names = self.hidden if wanted is None else wanted
        last, run = self._run(scalars, arrays, tail, state, steps, names)
        # The window may lie in memory that the reader fills anew as soon as this returns.
        jax.block_until_ready((last, run))
        self._state = last
        return run

    def afresh(self) -> "FreeRun":
        """Return a run of its own, not started; what was tried is not tried again."""
        run = copy.copy(self)
        run._state = None
        return run

    def through(
        self,
        formulation: Formulation,
        scalars: Scalars,
        arrays: Recorded,
        tail: Any,
        state: tuple[Any, ...],
        steps: int,
        wanted: tuple[str, ...],
    ) -> tuple[tuple[Any, ...], dict[str, jax.Array], jax.Array]:
        """Run through a window in one formulation.

        Each timestep is a call of its own: XLA:CPU would keep a loop within a program to one core.

        Returns:
            Patterns of each hidden tensor after so many steps; those of the wanted ones after every step; and the
            elements that are infinite or NaN after so many. In float32 these are all at which a number of
            extraordinary size was met.
        """
        given = scalars if formulation == "float32" else widened(scalars)
        programs = {name: self._program(name, formulation) for name in self.hidden}
        tails = {name: tail for name in self.hidden if self.step.reads_tail(name)}
        before, found = dict(zip(self.hidden, state, strict=True)), []
        for k in map(np.int32, range(arrays["grad"].shape[0])):
            at, after = {name: values[k] for name, values in given.items()}, {}
            for name, program in programs.items():
                own = before, dict(after)
                after[name] = program(np.uint32(0), k, at, arrays, tails.get(name), *own)
            found.append(after)
            before = after
        last = tuple(found[steps - 1].values())
        run = {name: _stacked([after[name] for after in found], self._device) for name in wanted}
        formats = tuple(self.step.format_of(name) for name in self.hidden)
        return last, run, _nonfinite_program(formats, self._device)(last)

    def _program(self, name: str, formulation: Formulation) -> Callable:
        known = tuple(self.formats.items())
        return _step_program(self.step, name, self.hidden, known, formulation, self._device)

    @property
    def formats(self) -> dict[str, Format]:
        """Formats of what a window must hold."""
        return self._known | {"grad": self._formats["grad"]}

    def _started(self, window: Recorded) -> tuple[Any, ...]:
        """Return the state before a window, which the first one decides."""
        if self._state is None:
            self._state = self._put(self._start(name, window) for name in self.hidden)
        return self._state

    def _put(self, state: Iterable[NDArray[Any]]) -> tuple[jax.Array, ...]:
        """Hand a state to the device, where the program's own state is: it is compiled anew for any other place."""
        return tuple(self._placement.put_one(each) for each in state)

    def _run(
        self,
        scalars: Scalars,
        arrays: Recorded,
        tail: Any,
        state: tuple[Any, ...],
        steps: int,
        wanted: tuple[str, ...],
    ) -> tuple[tuple[Any, ...], dict[str, jax.Array]]:
        """Run in float32 where no subnormal number is met, else in float64."""
        given = (scalars, arrays, tail, state, steps, wanted)
        if self._fast and no_subnormals(scalars):
            last, run, strays = self.through("float32", *given)
            if not np.asarray(strays).any():
                return last, run
        return self.through("float64", *given)[:2]

    def _start(self, name: str, window: Recorded) -> NDArray[Any]:
        """Return the first state: the recorded one where there is one, else zeros."""
        fmt = self.step.format_of(name)
        if name not in window:
            return np.zeros(window["grad"].shape[1], fmt.pattern_dtype)
        # On the host: a few operations on one row, each of which XLA would compile a program for.
        values = floats.decode(np.asarray(window[name])[0].copy(), self._formats[name])
        return floats.encode(values, fmt)


def advance(
    step: Step,
    hidden: tuple[str, ...],
    ops: Operations,
    scalars: Mapping[str, Any],
    x: Mapping[str, Any],
    recorded: Mapping[str, Any],
) -> dict[str, Any]:
    """Compute the hidden tensors after a timestep, as `Step.advance` does, and nothing that they do not depend on.

    Args:
        step: under which arithmetic.
        hidden: which tensors.
        ops: the operations.
        scalars: those of the timestep.
        x: the tensors before it that their formulas read.
        recorded: those after it.
    """
    after, found = dict(recorded), {}
    for name in (name for name in step.state if name in hidden):
        known = {**x, **{f"new_{key}": value for key, value in after.items()}}
        after[name] = found[name] = step.replay(name, ops, scalars, known)
    return found


def _verdict(run: FreeRun, replayer: Replayer, rule: Rule, formulation: Formulation) -> str:
    """Try the compiled run on hard inputs in its own shapes; return "" or what came out wrong."""
    step, (steps, elements) = run.step, replayer.shape
    tried, rng = tried_of(replayer.shape), np.random.default_rng(21)
    scalars, size = trial_scalars(step, rule, steps), rng.integers(-26, -4, tried)
    window, state = {}, {}
    for name, fmt in run.formats.items():
        rows = steps + (name != "grad")
        window[name] = np.zeros((rows, elements), fmt.pattern_dtype)
        window[name][:, :tried] = hard_patterns(rng, name, fmt, rows, size, formulation)
    for name in run.hidden:
        fmt = step.format_of(name)
        state[name] = np.zeros(elements, fmt.pattern_dtype)
        state[name][:tried] = hard_patterns(rng, name, fmt, 1, size, formulation)[0]
    tail = (np.arange(elements) % 2 == 0).astype(np.uint8)
    try:
        placed, place = replayer.placement.put(window), replayer.placement.put_one
        start = tuple(place(each) for each in state.values())
        given = (scalars, placed, place(tail), start, steps, run.hidden)
        _, found, strays = run.through(formulation, *given)
        strays = np.asarray(strays)[:tried]
    except Exception as error:  # a device without float64, say, fails to compile
        return f"it does not run ({str(error).splitlines()[0][:200]})"
    if formulation == "float32" and strays.mean() > 0.5:
        return "it takes ordinary numbers for subnormal ones"
    cut = {name: values[:, :tried] for name, values in window.items()}
    started = {name: values[:tried] for name, values in state.items()}
    expected = _expected(run, scalars, cut, started, tail[:tried])
    for name, patterns in found.items():
        fmt = step.format_of(name)
        wrong = differ_in(np.asarray(patterns)[:, :tried], expected[name], fmt, fmt) & ~strays
        if wrong.any():
            t, k = np.argwhere(wrong)[0]
            got = np.asarray(patterns)[t, k]
            return (
                f"{name} of step {t + 1} came out as {got:#x}, expected {expected[name][t, k]:#x}"
            )
    return ""


def _expected(
    run: FreeRun,
    scalars: Scalars,
    window: Mapping[str, NDArray[Any]],
    state: Mapping[str, NDArray[Any]],
    tail: NDArray[np.uint8],
) -> dict[str, NDArray[Any]]:
    """Run in NumPy; patterns of each hidden tensor after each step."""
    step, formats = run.step, run.formats
    ops = numpy_operations(flushes=step.flushes)
    x = {name: floats.decode(patterns, step.format_of(name)) for name, patterns in state.items()}
    decoded = {name: floats.decode(patterns, formats[name]) for name, patterns in window.items()}
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in run.hidden}
    for k in range(len(window["grad"])):
        before = {name: values[k] for name, values in decoded.items()}
        after = {name: values[k + 1] for name, values in decoded.items() if name != "grad"}
        at = {name: value[k] for name, value in scalars.items()}
        with np.errstate(all="ignore"):
            x = advance(step, run.hidden, ops, at, before | x | {"tail": tail}, after)
        for name in run.hidden:
            found[name].append(floats.encode(x[name], step.format_of(name)))
    return {name: np.stack(values) for name, values in found.items()}


@functools.lru_cache(maxsize=8)
def _join_program(device: Device) -> Callable:
    return compile_exactly(lambda first, rest: jnp.concatenate([first[None], rest]), device)


#: Timesteps that one program puts together; the time that XLA needs to compile it grows faster than their number.
_TOGETHER = 32


def _stacked(rows: list[jax.Array], device: Device) -> jax.Array:
    """Put arrays of each timestep together, (steps, elements)."""
    stack, append = _together_program(device), _append_program(device)
    parts = [stack(rows[k : k + _TOGETHER]) for k in range(0, len(rows), _TOGETHER)]
    while len(parts) > 1:
        parts = [append(parts[k : k + _TOGETHER]) for k in range(0, len(parts), _TOGETHER)]
    return parts[0]


@functools.lru_cache(maxsize=8)
def _together_program(device: Device) -> Callable:
    return compile_exactly(jnp.stack, device)


@functools.lru_cache(maxsize=8)
def _append_program(device: Device) -> Callable:
    return compile_exactly(jnp.concatenate, device)


@functools.lru_cache(maxsize=64)
def _nonfinite_program(formats: tuple[Format, ...], device: Device) -> Callable:
    """Mark the elements that are infinite or NaN in any tensor of the state."""

    def whole(state: tuple[Any, ...]) -> jax.Array:
        found = [
            (patterns & fmt.pattern_dtype.type(fmt.sign_bit - 1))
            >= fmt.pattern_dtype.type(fmt.infinity)
            for patterns, fmt in zip(state, formats, strict=True)
        ]
        return functools.reduce(jnp.bitwise_or, found)

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=256)
def _step_program(
    step: Step,
    name: str,
    hidden: tuple[str, ...],
    known: tuple[tuple[str, Format], ...],
    formulation: Formulation,
    device: Device,
) -> Callable:
    """Take one hidden tensor through one timestep of a window; see `FreeRun.through`.

    A program has one result: XLA would compute what two have in common twice. In float32 a NaN stands for what is
    not to be trusted; whoever reads it marks it in turn, so that the last state tells of all steps.
    """
    formats, fmt = dict(known), step.format_of(name)

    def whole(
        zero: Any, k: Any, s: Any, window: Any, tail: Any, before: Any, after: Any
    ) -> jax.Array:
        ops = operations_of(formulation, zero, flushes=step.flushes, device=device)
        x = {}
        for read in step.reads(name):
            tensor, new = read.removeprefix("new_"), read.startswith("new_")
            if tensor in hidden:
                x[read] = ops.decode((after if new else before)[tensor], step.format_of(tensor))
            else:
                at = jax.lax.dynamic_index_in_dim(window[tensor], k + int(new), keepdims=False)
                x[read] = ops.decode(at, formats[tensor])
        found = step.replay(name, ops, s, x | {"tail": tail})
        patterns = ops.encode(found, fmt)
        if isinstance(ops, Float32Operations):
            for value in (*x.values(), found):
                ops.watch(value)
            patterns = jnp.where(ops.strays, fmt.pattern_dtype.type(fmt.infinity + 1), patterns)
        return patterns

    return compile_exactly(whole, device)
