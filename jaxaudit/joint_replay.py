"""A stage that is known to differ, replayed beside those that are not: compared and reduced without a stop in memory.

`Replayer.flags` tells where bits differ, which is all that there is to do where none do. Where many do, the values are wanted
too, and their counts, distances and norms: each would be a pass over memory, and the step computed twice. Here one program
replays the measured arithmetic together with exact ones that read the same tensors, so that what they have in common is
computed once, and reduces what it finds.

It knows float32 instructions only, and takes it for granted that nothing is subnormal, infinite or NaN and that the exact
arithmetics are exact. It tells where that is not so; then everything is done over again, one by one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.comparison import Comparison, distance
from jaxaudit.devices import Device, on_host
from jaxaudit.floats import BFLOAT16, FLOAT32, Format
from jaxaudit.operations import (
    Float32Operations,
    approximates,
    compile_exactly,
    narrow_patterns,
    numpy_operations,
    operations_of,
    widen_patterns,
)
from jaxaudit.replay import TRIED, Program, Recorded, Replayer, Trial, no_subnormals
from jaxaudit.steps import Scalars

#: Exact programs that one program takes along: as many as there are bytes for their counts.
MOST_EXACT = 2

#: Columns that are reduced to one number at most: their count must fit a byte.
_CHUNK = 64

#: Columns that are computed side by side; see `comparison.lanes_of`.
_LANES = 16

#: Byte of the strays in a packed count, after those of the measured program and of the exact ones.
_STRAY = 1 + MOST_EXACT


@dataclasses.dataclass(frozen=True)
class Team:
    """Programs of one stage that are run together.

    Attributes:
        measured: what is known to differ.
        exact: what is not; the same program can come twice, with other scalars.
        places: for each of `members`, where its scalars are among those of all.
    """

    measured: Program
    exact: tuple[Program, ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def members(self) -> tuple[Program, ...]:
        """All programs, the measured one first."""
        return (self.measured, *self.exact)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that they read."""
        return tuple(sorted({i.tensor for program in self.members for i in program.inputs}))

    def scalars_of(self, m: int, arrays: Sequence[Any]) -> dict[str, Any]:
        """Return a member's scalars by name, from those of all."""
        return {
            name: arrays[k] for name, k in zip(self.members[m].scalars, self.places[m], strict=True)
        }

    def __str__(self) -> str:
        beside = ", ".join(dict.fromkeys(program.name for program in self.exact))
        return f"{self.measured.name} {self.measured.stage}" + (
            f" beside {beside}" if beside else ""
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a stage that is known to differ came to, row by row.

    Attributes:
        counts: differing elements, (steps, rows).
        distances: largest distances in ulp, (steps, rows).
        squares: of weights: sums of squares of the replayed change, of squares of the difference of both, of their
            products, and of squares of the recorded change, each (steps, rows).
    """

    counts: NDArray[np.int64]
    distances: NDArray[np.int64]
    squares: tuple[NDArray[np.float64], ...] = ()


class Started:
    """What was started for a team in a window; the device goes on with it until `finish`."""

    def __init__(self, team: Team, arrays: tuple[jax.Array, ...], width: int):
        self.team, self._arrays, self._width = team, arrays, width
        self._found: Measured | None = None
        self._finished = False

    def finish(self, steps: int) -> Measured | None:
        """Return what was found in so many steps; None where one of them was not as was taken for granted."""
        if not self._finished:
            self._found = self._finish(steps)
            self._finished, self._arrays = True, ()
        return self._found

    def _finish(self, steps: int) -> Measured | None:
        found = tuple(np.asarray(array)[:steps] for array in self._arrays)
        if self.team.measured.stage == "param":
            counts, distances, *squares = found
            # What was marked is NaN, and so is every sum that it is in.
            if np.isnan(squares[1]).any():
                return None
            return Measured(_int64(counts), _int64(distances), tuple(squares))
        packed, distances = found
        if np.bitwise_or.reduce(packed, axis=None) >> 8:
            return None
        chunks = self._width // chunk_of(self._width)
        if chunks > 1:
            packed = packed.reshape(steps, -1, chunks).sum(axis=-1)
            distances = distances.reshape(steps, -1, chunks).max(axis=-1)
        return Measured(_int64(packed), _int64(distances))


def _int64(values: NDArray[Any]) -> NDArray[np.int64]:
    return values.astype(np.int64)


def chunk_of(width: int) -> int:
    """Tell how many columns of rows of so many are reduced to one number; 0 where that is not done.

    Each of its slices is a formula of its own, which takes its time to compile: hence not the whole row.
    """
    found = [k for k in range(_LANES, _CHUNK + 1, _LANES) if width % k == 0]
    return max(found, default=0)


class JointReplayer:
    """Runs teams on windows of one shape; see `Replayer`."""

    def __init__(self, replayer: Replayer, comparison: Comparison, width: int):
        self._replayer, self._comparison, self._width = replayer, comparison, width
        self._verdicts: dict[Team, str] = {}
        self._teams: dict[tuple[Program, ...], Team] = {}

    def can_run(self, program: Program) -> bool:
        """Tell whether a program can be one of a team at all."""
        stochastic = program.stage == "param" and program.step.stochastic
        one_host = on_host(self._replayer.device) and len(self._replayer.placement.devices) == 1
        shaped = program.stage == "param" or chunk_of(self._width)
        return one_host and bool(shaped) and not stochastic

    def start(
        self, members: Sequence[tuple[Program, Scalars]], window: Recorded, tail: Any
    ) -> Started | None:
        """Start what a team has to do for a window; None where it cannot do it.

        Args:
            members: the measured program and the exact ones, each with the scalars of the window's steps.
            window: recorded patterns.
            tail: the elements of a vectorised kernel's scalar loop, uint8 (elements,).
        """
        for program, scalars in members:
            if not no_subnormals({name: scalars[name] for name in program.scalars}):
                return None
        team, arrays = self._team(members)
        if self._verdict(team):
            return None
        return Started(team, self._started(team, arrays, window, tail), self._width)

    def _started(
        self, team: Team, arrays: tuple[Any, ...], window: Recorded, tail: Any
    ) -> tuple[jax.Array, ...]:
        device, measured = self._replayer.device, team.measured
        read = {name: window[name] for name in team.tensors}
        given = (np.uint32(0), arrays, read, tail, window[measured.stage])
        if measured.stage != "param":
            return _tally_program(team, chunk_of(self._width), device)(*given)
        replayed = _marked_program(team, device)(*given)
        return self._comparison.start_changes(
            replayed, measured.result, window["param"], measured.recorded
        )

    def _team(self, members: Sequence[tuple[Program, Scalars]]) -> tuple[Team, tuple[Any, ...]]:
        """Return the team, and the scalars of all: those that are alike at every step only once.

        What members have in common is computed once only if it has the same scalars. Should these part in a later window,
        the team is another one.
        """
        programs = tuple(program for program, _ in members)
        known = self._teams.get(programs)
        found = _share(members)
        if known:
            arrays = _placed(known, members)
            if arrays is not None:
                return known, arrays
        team = Team(programs[0], programs[1:], found)
        self._teams[programs] = team
        arrays = _placed(team, members)
        assert arrays is not None
        return team, arrays

    def _verdict(self, team: Team) -> str:
        if team not in self._verdicts:
            self._verdicts[team] = verdict = self._try(team)
            self._replayer.note(f"{team} in float32", verdict)
        return self._verdicts[team]

    def _try(self, team: Team) -> str:
        """Run the compiled program on hard inputs, in the shapes in which it runs; return "" or what came out wrong."""
        steps, elements = self._replayer.shape
        each = 1 if team.measured.stage == "param" else chunk_of(self._width)
        tried = max(1, min(TRIED, elements // each // (2 * len(team.members))))
        trial = _TeamTrial(team, steps, tried)
        window, tail = trial.spread(elements, each)
        try:
            placed, place = self._replayer.placement.put(window), self._replayer.placement.put_one
            arguments = (team, trial.scalars, placed, place(tail))
            if team.measured.stage == "param":
                read = {name: placed[name] for name in team.tensors}
                marked = _marked_program(team, self._replayer.device)
                given = (np.uint32(0), trial.scalars, read, arguments[3], placed["param"])
                return trial.judge_marked(np.asarray(marked(*given))[:, : trial.columns])
            packed, distances = (
                np.asarray(x)[:, : trial.columns] for x in self._started(*arguments)
            )
        except Exception as error:
            # Whatever the device raises: it is replayed without teams.
            return f"it does not run ({str(error).splitlines()[0][:200]})"
        return trial.judge_tally(packed, distances, each)


def _share(members: Sequence[tuple[Program, Scalars]]) -> tuple[tuple[int, ...], ...]:
    """Number the scalars of all members: the same number for those of one name that are alike."""
    numbers: dict[tuple[str, bytes], int] = {}
    return tuple(
        tuple(
            numbers.setdefault((name, scalars[name].tobytes()), len(numbers))
            for name in program.scalars
        )
        for program, scalars in members
    )


def _placed(team: Team, members: Sequence[tuple[Program, Scalars]]) -> tuple[Any, ...] | None:
    """Return the scalars of all at a team's places; None where two that share a place are not alike."""
    found: dict[int, NDArray[Any]] = {}
    for (program, scalars), places in zip(members, team.places, strict=True):
        for name, k in zip(program.scalars, places, strict=True):
            if found.setdefault(k, scalars[name]).tobytes() != scalars[name].tobytes():
                return None
    return tuple(found[k] for k in sorted(found))


def _replayed(
    team: Team, zero: Any, arrays: Sequence[Any], x: Sequence[Mapping[str, Any]], tail: Any,
    recorded: Any, device: Device,
) -> tuple[Any, list[Any], Any]:  # fmt: skip
    """Replay one step; return where something is not to be trusted, each member's float32 patterns, and the recorded ones.

    Of exact members only the recorded result is looked at: theirs is the same, or they are not exact.
    """
    wide = widen_patterns(recorded, team.measured.recorded)
    looks = Float32Operations(zero)
    looks.watch(looks.decode(wide, FLOAT32))
    strays, found = looks.strays, []
    for m, program in enumerate(team.members):
        ops = Float32Operations(zero, wide=approximates(device), number=m)
        scalars = team.scalars_of(m, arrays)
        value = program.step.replay_recorded(program.stage, ops, scalars, {**x[m], "tail": tail})
        for each in (*x[m].values(), *([] if m else [value])):
            ops.watch(each)
        strays = strays | ops.strays
        found.append(ops.patterns32(value))
    return strays, found, wide


def _values(team: Team, zero: Any, window: Recorded, steps: int) -> tuple[dict[str, Any], ...]:
    """Decode what each member reads."""
    ops, found = operations_of("float32", zero), []
    for program in team.members:
        values = program.values(ops, window, steps, None)
        del values["tail"]
        found.append(values)
    return tuple(found)


def _narrow(bits: Any, result: Format, fmt: Format) -> Any:
    """Return patterns of `fmt` from float32 ones of numbers of `result`."""
    if result is BFLOAT16 and fmt is BFLOAT16:
        return (bits >> 16).astype(jnp.uint16)
    return narrow_patterns(bits, fmt)


@functools.lru_cache(maxsize=64)
def _tally_program(team: Team, chunk: int, device: Device) -> Callable:
    """Count and measure chunk by chunk: uint32 (steps, elements / chunk) each.

    The first result holds counts, a byte each: of the measured program, of the exact ones, and of strays; the second the
    largest distance.
    """
    fmt = team.measured.recorded

    def combine(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return a[0] + b[0], jnp.maximum(a[1], b[1])

    def one_step(
        zero: Any, arrays: Any, x: Any, tail: Any, recorded: Any
    ) -> tuple[jax.Array, jax.Array]:
        strays, found, wide = _replayed(team, zero, arrays, x, tail, recorded, device)
        packed = jnp.where(strays, np.uint32(1 << 8 * _STRAY), np.uint32(0))
        for m, bits in enumerate(found):
            packed |= jnp.where(bits != wide, np.uint32(1 << 8 * m), np.uint32(0))
        return packed, distance(_narrow(found[0], team.measured.result, fmt), recorded, fmt)

    def whole(
        zero: Any, arrays: Any, window: Any, tail: Any, target: Any
    ) -> tuple[jax.Array, jax.Array]:
        steps, parts = target.shape[0] - 1, []
        for k in range(0, chunk, _LANES):
            cut = functools.partial(_columns, chunk=chunk, within=slice(k, k + _LANES))
            x = _values(team, zero, {name: cut(a) for name, a in window.items()}, steps)
            over = jax.vmap(one_step, in_axes=(None, 0, 0, None, 0))
            parts.append(over(zero, arrays, x, cut(tail), cut(target)[1:]))
        # A reduction over one element: a program of several results, without which each would be computed by itself.
        lanewise = tuple(x[..., None] for x in functools.reduce(combine, parts))
        packed, distances = lax.reduce(lanewise, (np.uint32(0),) * 2, combine, (3,))
        return _halved(packed, jnp.add), _halved(distances, jnp.maximum)

    return compile_exactly(whole, device)


def _columns(array: Any, chunk: int, within: slice) -> Any:
    return array.reshape(*array.shape[:-1], -1, chunk)[..., within]


def _halved(lanes: Any, combine: Callable) -> Any:
    """Combine lanes, a power of two of them: of integers the order does not matter."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = combine(lanes[..., :half], lanes[..., half:])
    return lanes[..., 0]


@functools.lru_cache(maxsize=64)
def _marked_program(team: Team, device: Device) -> Callable:
    """Replay: patterns of the measured result, NaN where something is not as was taken for granted."""
    fmt = team.measured.result

    def one_step(zero: Any, arrays: Any, x: Any, tail: Any, recorded: Any) -> jax.Array:
        strays, found, wide = _replayed(team, zero, arrays, x, tail, recorded, device)
        for bits in found[1:]:
            strays = strays | (bits != wide)
        patterns = _narrow(found[0], fmt, fmt)
        return jnp.where(strays, fmt.pattern_dtype.type(fmt.infinity + 1), patterns)

    def whole(zero: Any, arrays: Any, window: Any, tail: Any, target: Any) -> jax.Array:
        x = _values(team, zero, window, target.shape[0] - 1)
        over = jax.vmap(one_step, in_axes=(None, 0, 0, None, 0))
        return over(zero, arrays, x, tail, target[1:])

    return compile_exactly(whole, device)


class _TeamTrial:
    """Hard inputs for a team, and what must come out.

    Each member's own (see `replay.Trial`), and then such under which that member agrees with the recording.
    """

    def __init__(self, team: Team, steps: int, tried: int):
        self._team = team
        trials = [Trial(program, "float32", (steps, tried), tried) for program in team.members]
        members = [
            (program, trial.scalars) for program, trial in zip(team.members, trials, strict=True)
        ]
        found: dict[int, NDArray[Any]] = {}
        for (program, scalars), places in zip(members, team.places, strict=True):
            for name, k in zip(program.scalars, places, strict=True):
                found.setdefault(k, scalars[name])
        self.scalars = tuple(found[k] for k in sorted(found))
        for m, trial in enumerate(trials):
            trial.scalars = team.scalars_of(m, self.scalars)
        parts = [(trial.window, trial.tail) for trial in trials]
        parts += [trial.agreeing() for trial in trials]
        full = {name: rows for window, _ in parts for name, rows in window.items()}
        names = {*team.tensors, team.measured.stage}
        self.window = {
            name: np.concatenate([window.get(name, full[name]) for window, _ in parts], axis=1)
            for name in names
        }
        self.tail = np.concatenate([tail for _, tail in parts])
        self.columns = self.tail.size
        self._expect(steps)

    def _expect(self, steps: int) -> None:
        """Replay in NumPy: where each member differs, and the measured one's results."""
        team, recorded = self._team, self.window[self._team.measured.stage][1:]
        wide = floats.decode(recorded, team.measured.recorded).view(np.uint32)
        self._differs, values = [], []
        for m, program in enumerate(team.members):
            ops, scalars = (
                numpy_operations(flushes=program.step.flushes),
                team.scalars_of(m, self.scalars),
            )
            value = program.replay(ops, scalars, self.window, steps, self.tail)
            values.append(np.ascontiguousarray(value, np.float32))
            self._differs.append(values[m].view(np.uint32) != wide)
        fmt = team.measured.recorded
        self._results = floats.encode(values[0], team.measured.result)
        self._distances = floats.ulp_distance(floats.encode(values[0], fmt), recorded, fmt)

    def spread(self, elements: int, each: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        """Return a window of so many elements, of which the first hold every column `each` times, and its tail."""
        count = self.columns * each
        window = {}
        for name, rows in self.window.items():
            window[name] = np.zeros((rows.shape[0], elements), rows.dtype)
            window[name][:, :count] = np.repeat(rows, each, axis=1)
        tail = np.zeros(elements, np.uint8)
        tail[:count] = np.repeat(self.tail, each)
        return window, tail

    def judge_marked(self, patterns: NDArray[Any]) -> str:
        """Return "" or what is wrong with the marked results of every column."""
        fmt, apart = self._team.measured.result, np.zeros(patterns.shape, bool)
        for differs in self._differs[1:]:
            apart |= differs
        marked = floats.is_nan(patterns, fmt)
        strays = marked & ~apart
        wrong = (~marked & (patterns != self._results)) | (apart & ~marked)
        return self._verdict(wrong, strays[~apart], patterns)

    def judge_tally(self, packed: NDArray[Any], distances: NDArray[Any], each: int) -> str:
        """Return "" or what is wrong with the counts and distances of every column, repeated so many times."""
        strays = packed >> 8 * _STRAY != 0
        wrong = distances != self._distances
        for m, differs in enumerate(self._differs):
            wrong |= packed >> 8 * m & 0xFF != np.where(differs, each, 0)
        return self._verdict(wrong & ~strays, strays, packed)

    def _verdict(
        self, wrong: NDArray[np.bool_], strays: NDArray[np.bool_], got: NDArray[Any]
    ) -> str:
        if strays.size and strays.mean() > 0.5:
            return "it takes ordinary numbers for subnormal ones"
        if not wrong.any():
            return ""
        t, k = np.argwhere(wrong)[0]
        inputs = ", ".join(
            f"{i.name}={self.window[i.tensor][t + i.offset, k]:#x}"
            for i in self._team.measured.inputs
        )
        return f"{inputs} gave {got[t, k]:#x}, expected {self._results[t, k]:#x}"
