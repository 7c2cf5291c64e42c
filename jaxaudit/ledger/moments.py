"""The ratchet of the second moment: moments that should fall and do not, and what that does to the step size.

A moment decays by a factor near 1. In a format of few bits the product often rounds back to what it was: the moment
rises with every large gradient and never comes down again. What it should be is the arithmetic's own formula in
float64, from the recorded state and gradient (`subject.ExactRule`); what it would be with more bits is a second
moment kept in float32 over the recorded gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import lax
from numpy.typing import NDArray

from jaxaudit import scalars
from jaxaudit.comparison import fold, larger
from jaxaudit.devices import Device
from jaxaudit.floats import FLOAT16, FLOAT32, Format, decode
from jaxaudit.free_running import FreeRun
from jaxaudit.ledger.counting import (
    QUANTILES,
    SIZES,
    GroupCounter,
    quantiles,
    size_code,
    steps_at_once,
)
from jaxaudit.ledger.subject import ExactRule, Seen, Subject
from jaxaudit.ledger.variables import MOMENTS
from jaxaudit.operations import ExactOperations, compile_exactly, kept, widen_patterns
from jaxaudit.recording import TokenGroups, Window
from jaxaudit.results import NOT_AUDITED, label
from jaxaudit.steps import Scalars, Stage, Step
from jaxaudit.strips import Countable, Histograms
from jaxaudit.workbench import Candidate

#: What is told of each element and counted, from the lowest bit of its code.
FACTS = (
    "exp_avg_sq_stuck",
    "exp_avg_stuck",
    "exp_avg_sq_fall",
    "exp_avg_fall",
    "exp_avg_sq_underflow",
    "exp_avg_underflow",
    "epsilon_dominates",
    "exp_avg_low_bits_zero",
    "exp_avg_sq_low_bits_zero",
)

#: Tokens that are followed at most, and how far down each group's list of members they stand.
TRACED, _QUARTERS = 12, (1, 2, 3)

_MOMENTS: tuple[Stage, ...] = ("exp_avg_sq", "exp_avg")

#: What the denominator is made of: an arithmetic without amsgrad has no `max_exp_avg_sq`.
_SECONDS = ("exp_avg_sq", "max_exp_avg_sq")

#: Sizes are counted in pairs, within this many bins of each; what lies elsewhere is counted by itself.
_NEAR = 64

#: Codes of an element of which the ratios mean nothing, and of one whose ratios lie elsewhere.
_UNCOUNTED, _ELSEWHERE = _NEAR * _NEAR, _NEAR * _NEAR + 1

_PAIRS = _NEAR * _NEAR + 2


class Moments(Countable):
    """Observes both moments, window by window.

    Args:
        subject: what is followed; `possible` must hold.
    """

    MERGED = {"_counts": "sum", "_longest": "max", "_lengths": "sum", "_beyond_float16": "sum"}
    MADE_OF = ("_ratios", "_traces")

    def __init__(self, subject: Subject):
        self._subject, self._rule = subject, ExactRule(subject)
        bench, width = subject.bench, subject.bench.recording.width
        self._counter = GroupCounter(subject.groups, width, bench.device)
        self._layout = _Layout.of(subject, self._rule.step)
        self._twin = _Float32Twin(subject, self._layout)
        self._counts = {fact: np.zeros(subject.counts, np.int64) for fact in FACTS}
        self._longest = {name: np.zeros(subject.counts, np.int64) for name in _MOMENTS}
        self._lengths = {name: np.zeros(subject.counts, np.int64) for name in _MOMENTS}
        self._ratios = _Ratios(subject, self._counter)
        self._traces = _Traces(subject)
        self._streaks: dict[tuple[int, int], tuple[jax.Array, ...]] = {}
        self._kinds: dict[tuple[int, int], _Kinds] = {}
        #: Windows in which a float32 moment of a float16 run is no float16 value.
        self._beyond_float16 = {name: np.zeros((), np.int64) for name in _MOMENTS}

    def forget(self) -> None:
        """Forget a strip's rows, and how long their moments have been stuck."""
        super().forget()
        self._streaks.clear()
        self._kinds.clear()
        self._counter.forget()
        self._twin.forget()

    @staticmethod
    def possible(subject: Subject) -> bool:
        """Tell whether an arithmetic was found, and the recording holds, or lets run freely, what it reads."""
        if subject.chosen is None:
            return False
        return subject.holds({"grad", *_before(ExactRule(subject).step), *_seconds(subject)})

    def take(self, seen: Seen) -> None:
        """Follow the moments through a window."""
        subject, layout = self._subject, self._layout
        device, rows = subject.bench.device, seen.window.rows
        limits = _limits(subject, self._rule, seen.window)
        own32 = self._twin.advance(seen)
        # Each is counted on the host while the device computes the next.
        near, pairs = self._ratios.code(seen, limits.added, own32)
        seen.later(lambda: self._ratios.count(seen, limits.added, own32, near, pairs))
        facts = _facts_program(layout, device)(
            np.uint32(0),
            {name: limits.scalars[name] for name in layout.scalars},
            limits.threshold,
            {name: seen.arrays[subject.source(name)[0]] for name in layout.names},
            subject.bench.tail(subject.candidate, rows),
        )
        if rows not in self._streaks:
            none = np.zeros(facts.shape[1], layout.streak)
            self._streaks[rows] = jax.device_put((none,) * len(_MOMENTS), device)
        self._streaks[rows], numbers = _rows_program(layout, device)(
            facts, self._streaks[rows], np.int64(seen.window.steps)
        )
        seen.later(lambda: self._count(seen, *map(np.asarray, numbers)))
        seen.later(lambda: self._traces.take(seen, own32["exp_avg_sq"]))
        self._notice_float16(seen)

    def dataset(self) -> xr.Dataset:
        """Return the variables of `variables.MOMENTS`; attributes name the precision of the moments."""
        found: dict[str, NDArray[Any]] = {
            f"{fact}_count": counts for fact, counts in self._counts.items()
        }
        formats = self._subject.bench.recording.formats
        for name in _MOMENTS:
            stuck = found[f"{name}_stuck_count"]
            mean = self._lengths[name] / np.where(stuck > 0, stuck, 1)
            found[f"{name}_stuck_steps_max"] = self._longest[name]
            found[f"{name}_stuck_steps_mean"] = np.where(stuck > 0, mean, np.nan)
            if formats.get(name) is not FLOAT32:
                found[f"{name}_low_bits_zero_count"] = np.full_like(stuck, NOT_AUDITED)
        coordinates = self._subject.coordinates()
        coordinates |= {"quantile": np.array(QUANTILES), "traced_token": self._traces.tokens}
        attributes = {f"{name}_precision": self._precision(name) for name in _MOMENTS}
        found |= self._ratios.arrays() | self._traces.arrays()
        return label(found, coordinates, attributes, MOMENTS)

    def _count(
        self, seen: Seen, facts: NDArray[Any], lengths: NDArray[Any], longest: NDArray[Any]
    ) -> None:
        """Add a window's numbers by row, of `_rows_program`, to those of its timesteps."""
        place, steps = self._subject.place(seen.window), seen.window.steps
        if seen.window.rows not in self._kinds:
            self._kinds[seen.window.rows] = _Kinds(seen)
        kinds = self._kinds[seen.window.rows]
        for fact, rows in zip(FACTS, _facts(facts, self._layout), strict=True):
            self._counts[fact][place] += kinds.combine(rows[:steps], np.add)
        for name, length, most in zip(_MOMENTS, lengths, longest, strict=True):
            self._lengths[name][place] += kinds.combine(length[:steps], np.add)
            found = kinds.combine(most[:steps], np.maximum)
            self._longest[name][place] = np.maximum(self._longest[name][place], found)

    def _notice_float16(self, seen: Seen) -> None:
        """Look whether float32 moments of a float16 run are all float16 values."""
        formats = self._subject.bench.recording.formats
        if formats["param"] is not FLOAT16:
            return
        for name in _MOMENTS:
            if formats.get(name) is FLOAT32 and not self._beyond_float16[name]:
                new = np.asarray(seen.arrays[name])[1 : seen.window.steps + 1]
                self._beyond_float16[name] += not _float16_valued(new).all()

    def _precision(self, name: Stage) -> str:
        """Say what the recorded bits of a moment are."""
        recording = self._subject.bench.recording
        stored = recording.formats.get(name)
        if stored is None:
            return "not recorded"
        if stored is not FLOAT32:
            return f"{stored.name} as stored"
        if recording.storage is FLOAT16 and not self._beyond_float16[name]:
            return "float16-valued (stored as float32)"
        of_all = self._counts[f"{name}_low_bits_zero"][:, self._subject.groups.names.index("all")]
        if (of_all == recording.step_elements).all():
            return "bfloat16-valued (stored as float32)"
        return "float32"


class _Kinds:
    """Rows of a window that are in the same groups: integers of each kind are combined once.

    Args:
        seen: a window of these rows.
    """

    def __init__(self, seen: Seen):
        begin, end = seen.window.rows
        member = np.zeros((end - begin, len(seen.members)), bool)
        for g, rows in enumerate(seen.members):
            member[rows, g] = True
        kinds, kind = np.unique(member, axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        self._order = np.argsort(kind, kind="stable")
        self._starts = np.searchsorted(kind[self._order], np.arange(len(kinds)))
        self._groups = [np.flatnonzero(each) for each in kinds.T]

    def combine(self, rows: NDArray[np.integer], combine: np.ufunc) -> NDArray[np.int64]:
        """Add up numbers by row, (steps, rows), or take the largest, 0 for none: (steps, groups)."""
        each = combine.reduceat(rows[:, self._order], self._starts, axis=1, dtype=np.int64)
        return np.stack(
            [combine.reduce(each[:, g], axis=1, initial=0) for g in self._groups], axis=-1
        )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What the programs of the moments depend on.

    Attributes:
        step: of the exact rule.
        before: tensors that it reads, with their formats.
        after: both moments, and what the denominator is made of, with their formats.
        scalars: names of those that it reads.
        low_bits: moments of which the low bits are looked at.
        width: elements of a row.
        streak: integer dtype that holds the number of steps.
        length: integer dtype that holds the sum of a row's steps.
    """

    step: Step
    before: tuple[tuple[str, Format], ...]
    after: tuple[tuple[str, Format], ...]
    scalars: tuple[str, ...]
    low_bits: tuple[str, ...]
    width: int
    streak: str
    length: str

    @staticmethod
    def of(subject: Subject, step: Step) -> "_Layout":
        """Look it up."""
        recording = subject.bench.recording
        steps = subject.steps[1] - subject.steps[0]
        return _Layout(
            step,
            tuple((name, subject.source(name)[1]) for name in _before(step)),
            tuple((name, subject.source(name)[1]) for name in ("exp_avg", *_seconds(subject))),
            tuple(sorted({s for name in _MOMENTS for s in step.reads_scalars(name)})),
            tuple(name for name in _MOMENTS if recording.formats.get(name) is FLOAT32),
            recording.width,
            "uint16" if steps < 1 << 16 else "uint32",
            "uint32" if recording.width * steps < 1 << 32 else "uint64",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are read."""
        return tuple({**dict(self.before), **dict(self.after)})


def _before(step: Step) -> tuple[str, ...]:
    """Name the tensors that the formulas of both moments read."""
    found = {name for moment in _MOMENTS for name in step.reads(moment)}
    return tuple(sorted({"grad", *_MOMENTS, *found}))


def _seconds(subject: Subject) -> tuple[str, ...]:
    """Name the second moment, and what the denominator is made of where that is not the same."""
    return _SECONDS if subject.candidate.options.amsgrad else _SECONDS[:1]


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Numbers of a window's steps, each of shape (length,).

    Attributes:
        scalars: of the exact rule.
        added: eps * c, where c = sqrt(1 - beta2^t) is what the root is divided by; float64.
        threshold: the first float32 pattern whose corrected root is not smaller than eps, uint32.
    """

    scalars: Scalars
    added: NDArray[np.float64]
    threshold: NDArray[np.uint32]


def _limits(subject: Subject, rule: ExactRule, window: Window) -> _Limits:
    found, given = rule.scalars(window), subject.candidate.given
    timesteps = range(window.first, window.first + subject.bench.length)
    corrections = np.ones(len(timesteps))
    if _corrects(rule.step):
        beta2 = given.beta2 if given.corrected_beta2 is None else given.corrected_beta2
        powers = (0.0 if math.isinf(n) else beta2**n for n in map(given.count.at, timesteps))
        corrections = np.array([math.sqrt(1 - power) for power in powers])
    threshold = _threshold(corrections, given.epsilon)
    return _Limits(found, given.epsilon * corrections, threshold)


def _corrects(step: Step) -> bool:
    """Tell whether the update corrects the root for its bias.

    optimi's betas are without bias, and optax keeps the largest corrected second moment for amsgrad.
    """
    read = step.reads_scalars("param")
    return any("bias_correction2" in name or name == "capturable_divisor" for name in read)


def _threshold(corrections: NDArray[np.float64], epsilon: float) -> NDArray[np.uint32]:
    """Find the first of the patterns 0 to infinity for which sqrt(v) / c < eps does not hold, by bisection."""
    low = np.zeros(corrections.shape, np.int64)
    high = np.full(corrections.shape, FLOAT32.infinity, np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        values = decode(middle.astype(np.uint32), FLOAT32).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # a correction is 0 where beta2 is 1
            smaller = np.sqrt(values) / corrections < epsilon
        low, high = np.where(smaller, middle + 1, low), np.where(smaller, high, middle)
    return low.astype(np.uint32)


class _Float32Twin:
    """The second moment of the recorded gradients under the arithmetic's own formula, but kept in float32.

    It starts from the state before the first step of the range: the recorded one, or, where that was not recorded,
    what was run freely, which is zero at the start of a recording.
    """

    def __init__(self, subject: Subject, layout: _Layout):
        self._subject = subject
        self._candidate = with_float32_moments(subject.candidate)
        self._hidden = _seconds(subject)
        step = subject.bench.step(self._candidate)
        read = {x.removeprefix("new_") for name in self._hidden for x in step.reads(name)}
        names = (*self._hidden, *sorted({"grad", *read} - {*self._hidden}))
        self._sources = {name: subject.source(name) for name in names}
        self._first: FreeRun | None = None
        self._runs: dict[tuple[int, int], FreeRun] = {}

    def forget(self) -> None:
        """Forget a strip's run."""
        self._runs.clear()

    def advance(self, seen: Seen) -> dict[str, jax.Array]:
        """Return float32 patterns after each step, (length, elements)."""
        bench, rows, candidate = self._subject.bench, seen.window.rows, self._candidate
        if rows not in self._runs:
            self._first = self._first or self._tried()
            self._runs[rows] = self._first.afresh()
        arrays = {name: seen.arrays[key] for name, (key, _) in self._sources.items()}
        numbers, tail = bench.scalars(candidate, seen.window), bench.tail(candidate, rows)
        return self._runs[rows].after(numbers, arrays, tail, seen.window.steps)

    def _tried(self) -> FreeRun:
        """Return a run that has passed its self-test."""
        bench, arithmetic = self._subject.bench, self._candidate.arithmetic
        return FreeRun(
            bench.replayer_together,
            bench.step(self._candidate),
            arithmetic.rule,
            f"{arithmetic.label} with a second moment in float32",
            self._hidden,
            {name: fmt for name, (_, fmt) in self._sources.items()},
        )


def with_float32_moments(candidate: Candidate) -> Candidate:
    """Return a candidate that keeps its moments in float32.

    optax rounds after every operator, and its scalars too (beta2 = 0.999 is 1 in bfloat16), to the format of the
    weights: its formulas are evaluated in float32 throughout. All others round a moment where they store it.
    """
    arithmetic = dataclasses.replace(candidate.arithmetic, moments="float32")
    if candidate.arithmetic.rule is scalars.optax:
        arithmetic = dataclasses.replace(arithmetic, operators="float32", rule=_optax32)
    return Candidate(arithmetic, candidate.options, candidate.given)


def _optax32(moment: scalars.Moment) -> dict[str, float]:
    """Compute optax's scalars for float32 arrays."""
    return scalars.optax(
        dataclasses.replace(moment, storage=FLOAT32, first=FLOAT32, second=FLOAT32)
    )


class _Ratios(Countable):
    """Counts how much too large the stored second moment is, and what that does to the step size.

    Both ratios of an element go into one code, which holds for the usual ones; the few others are computed
    once more in NumPy, and counted by themselves.
    """

    MADE_OF = ("_roots", "_steps")

    def __init__(self, subject: Subject, counter: GroupCounter):
        self._subject, self._counter = subject, counter
        self._seconds = tuple((name, *subject.source(name)) for name in _seconds(subject))
        self._roots, self._steps = (Histograms(*subject.counts, SIZES) for _ in range(2))
        #: First bins of those that codes tell apart: where most ratios of the window before were.
        self._near = np.full(2, (SIZES - _NEAR) // 2, np.int32)
        groups = subject.counts[1]
        self._length = min(subject.bench.length, steps_at_once(groups, _PAIRS))
        self._histograms = np.zeros((2, self._length, groups, SIZES), np.int64)

    def code(
        self, seen: Seen, added: NDArray[np.float64], own32: Mapping[str, jax.Array]
    ) -> tuple[NDArray[np.int32], jax.Array]:
        """Compute the codes of a window's pairs of ratios, (length, elements); tell the first bins, too."""
        formats, near = tuple(fmt for _, _, fmt in self._seconds), self._near
        return near, _pairs_program(formats, self._subject.bench.device)(
            np.uint32(0),
            tuple(seen.arrays[key] for _, key, _ in self._seconds),
            tuple(own32[name] for name, _, _ in self._seconds),
            added,
            near,
            self._counter.offsets(seen.window, _PAIRS),
        )

    def count(
        self,
        seen: Seen,
        added: NDArray[np.float64],
        own32: Mapping[str, jax.Array],
        near: NDArray[np.int32],
        codes: jax.Array,
    ) -> None:
        """Count a window, whose codes were computed with these first bins."""
        found = np.asarray(codes)[: seen.window.steps]
        for first in range(0, len(found), self._length):
            self._count_steps(seen, first, added, own32, near, found[first : first + self._length])
        self._near = self._middle()

    def _count_steps(
        self,
        seen: Seen,
        first: int,
        added: NDArray[np.float64],
        own32: Mapping[str, jax.Array],
        near: NDArray[np.int32],
        codes: NDArray[np.int32],
    ) -> None:
        """Count some steps from the window's `first` on."""
        steps = len(codes)
        self._histograms[:] = 0
        pairs = self._counter.count(codes, steps, _PAIRS)
        inside = pairs[..., :_UNCOUNTED].reshape(*pairs.shape[:2], _NEAR, _NEAR)
        for k, axis in enumerate((-1, -2)):
            at = slice(near[k], near[k] + _NEAR)
            self._histograms[k, :steps, :, at] += inside.sum(axis=axis)
        if pairs[..., _ELSEWHERE].any():
            self._count_elsewhere(seen, first, added, own32, codes)
        begin = self._subject.place(seen.window).start + first
        self._roots.add(begin, self._histograms[0, :steps])
        self._steps.add(begin, self._histograms[1, :steps])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the variables.

        A bin of a root is half as wide as one of the second moment: its lower edge is less than 1/64 below
        the root. That of a step size is less than 1/32 below it.
        """
        shape = (*self._subject.counts, len(QUANTILES))
        found, root, step = np.zeros(shape[:2], np.int64), np.full(shape, np.nan), np.full(shape, np.nan)  # fmt: skip
        for place, histograms in self._roots:
            found[place] = histograms.sum(axis=-1)
            root[place] = np.sqrt(quantiles(histograms))
        for place, histograms in self._steps:
            step[place] = quantiles(histograms)
        return {
            "root_ratio_count": found,
            "root_ratio_quantile": root,
            "step_size_ratio_quantile": step,
        }

    def _count_elsewhere(
        self,
        seen: Seen,
        first: int,
        added: NDArray[np.float64],
        own32: Mapping[str, jax.Array],
        codes: NDArray[Any],
    ) -> None:
        """Compute and count what `code` could not hold."""
        offsets = np.asarray(self._counter.offsets(seen.window, _PAIRS))
        kinds = np.asarray(self._counter.offsets(seen.window, SIZES + 1))
        stored = [(np.asarray(seen.arrays[key]), fmt) for _, key, fmt in self._seconds]
        other = [np.asarray(own32[name]) for name, _, _ in self._seconds]
        for i in range(len(codes)):
            where, k = np.flatnonzero(codes[i] == offsets + _ELSEWHERE), first + i
            values = [_decoded(each[k + 1, where], fmt) for each, fmt in stored]
            values32 = [_decoded(each[k, where], FLOAT32) for each in other]
            with np.errstate(all="ignore"):
                sizes = _sizes(values, values32, added[k], np.sqrt)
                meant = [np.ones(where.shape, bool), _positive(values[-1], values32[-1])]
            for found, size, counts in zip(self._histograms, sizes, meant, strict=True):
                each = np.where(counts, size_code(size), SIZES) + kinds[where]
                counted = self._counter.count(each[None], 1, SIZES + 1)
                found[i] += counted[0, :, :SIZES]

    def _middle(self) -> NDArray[np.int32]:
        """Return first bins for the next window, with the middle of the last ratios in the middle."""
        firsts = self._near.copy()
        for k, found in enumerate(self._histograms):
            below = np.cumsum(found[:, 0].sum(axis=0))
            if below[-1]:
                middle = int(np.searchsorted(below, below[-1] / 2))
                firsts[k] = min(max(middle - _NEAR // 2, 0), SIZES - _NEAR)
        return firsts


class _Traces(Countable):
    """Follows a few tokens of each group, step by step."""

    MERGED = {"_stored": "sum", "_float32": "sum"}

    def __init__(self, subject: Subject):
        self._subject = subject
        chosen = chosen_tokens(subject.groups)
        self.tokens = np.array(list(chosen), np.int64)
        self._groups = np.array(list(chosen.values()))
        shape = (subject.counts[0], len(chosen))
        self._stored, self._float32 = np.zeros(shape), np.zeros(shape)

    def take(self, seen: Seen, own32: jax.Array) -> None:
        """Note the roots of a window's tokens."""
        key, fmt = self._subject.source("exp_avg_sq")
        place, steps = self._subject.place(seen.window), seen.window.steps
        stored, float32 = np.asarray(seen.arrays[key]), np.asarray(own32)
        width, begin = self._subject.bench.recording.width, seen.window.rows[0]
        for i, token in enumerate(self.tokens.tolist()):
            if seen.window.own[0] <= token < seen.window.own[1]:
                at = slice((token - begin) * width, (token - begin + 1) * width)
                self._stored[place, i] = _root_of_mean(stored[1 : steps + 1, at], fmt)
                self._float32[place, i] = _root_of_mean(float32[:steps, at], FLOAT32)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the variables."""
        return {
            "stored_root": self._stored,
            "float32_root": self._float32,
            "traced_group": self._groups,
        }


def chosen_tokens(groups: TokenGroups) -> dict[int, str]:
    """Choose tokens to follow, a quarter, a half and three quarters down each group's list of members.

    `all` is left out where there are other groups. Returns the group that each token was chosen from.
    """
    names = groups.names[1:] or groups.names
    chosen: dict[int, str] = {}
    for name in names:
        members = groups.members[name]
        for quarter in _QUARTERS:
            chosen.setdefault(int(members[len(members) * quarter // 4]), name)
    return dict(list(chosen.items())[:TRACED])


def _root_of_mean(patterns: NDArray[Any], fmt: Format) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        return np.sqrt(np.ascontiguousarray(_decoded(patterns, fmt)).mean(axis=-1))


def _decoded(patterns: NDArray[Any], fmt: Format) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):  # a signalling NaN
        return decode(patterns, fmt).astype(np.float64)


def _float16_valued(patterns: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Tell which float32 patterns are float16 values; every NaN is one."""
    magnitude = patterns & np.uint32(0x7FFFFFFF)
    # 11 bits of significand from 2^-14 on; below that multiples of 2^-24.
    dropped = np.clip(13 + 113 - (magnitude >> 23).astype(np.int64), 13, 24)
    significand = (magnitude & np.uint32(0x007FFFFF)) | np.uint32(0x00800000)
    whole = significand & ((np.int64(1) << dropped) - 1) == 0
    small = (magnitude < np.uint32((127 + 16) << 23)) & (magnitude >= np.uint32((127 - 24) << 23))
    return (whole & small) | (magnitude == 0) | (magnitude >= np.uint32(FLOAT32.infinity))


def _positive(*values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which are positive and finite in all."""
    return np.logical_and.reduce([(value > 0) & (value < np.inf) for value in values])


def _sizes(values: Any, values32: Any, added: Any, sqrt: Callable) -> tuple[Any, Any]:
    """Divide the stored second moment by the float32 one, and the step size by that with the float32 one.

    The latter is (sqrt(v32)/c + eps) / (sqrt(v)/c + eps), evaluated as (sqrt(v32) + eps*c) / (sqrt(v) + eps*c).

    Args:
        values: second moment, and the largest so far with amsgrad; float64.
        values32: those kept in float32.
        added: eps * c.
        sqrt: of NumPy or JAX.
    """
    sizes = (sqrt(values32[-1]) + added) / (sqrt(values[-1]) + added)
    return values[0] / values32[0], sizes


def _widened(patterns: Any, fmt: Format) -> Any:
    return widen_patterns(patterns, fmt)


def _size(wide: Any) -> Any:
    return wide & np.uint32(0x7FFFFFFF)


def _line(wide: Any) -> Any:
    """Place float32 patterns on the ordered line, int32; both zeros are 0."""
    size = _size(wide).astype(jnp.int32)
    return jnp.where(wide >= np.uint32(FLOAT32.sign_bit), -size, size)


def _positive_patterns(wide: Any) -> Any:
    """Tell which float32 patterns are positive and finite."""
    return wide - np.uint32(1) < np.uint32(FLOAT32.infinity - 1)


@functools.lru_cache(maxsize=64)
def _facts_program(layout: _Layout, device: Device) -> Callable:
    """Return what makes one code of the FACTS of each element, (length, elements)."""
    before, after = dict(layout.before), dict(layout.after)

    def one_step(
        ops: ExactOperations, s: Any, threshold: Any, tail: Any, old: Any, new: Any
    ) -> jax.Array:
        x = {name: ops.decode(old[name], fmt) for name, fmt in before.items()} | {"tail": tail}
        exact = {name: layout.step.replay(name, ops, s, x) for name in _MOMENTS}
        wide = {name: _widened(new[name], fmt) for name, fmt in after.items()}
        was = {name: _widened(old[name], before[name]) for name in _MOMENTS}
        number = {name: _size(wide[name]) <= np.uint32(FLOAT32.infinity) for name in _MOMENTS}
        falls = exact["exp_avg_sq"] < x["exp_avg_sq"]
        shrinks = jnp.abs(exact["exp_avg"]) < jnp.abs(x["exp_avg"])
        kept = _line(wide["exp_avg_sq"]) >= _line(was["exp_avg_sq"])
        large = _size(wide["exp_avg"]) >= _size(was["exp_avg"])
        divisor = wide[tuple(after)[-1]]
        negative_zero = divisor == np.uint32(FLOAT32.sign_bit)
        facts = {
            "exp_avg_sq_fall": falls,
            "exp_avg_sq_stuck": falls & kept & number["exp_avg_sq"],
            "exp_avg_fall": shrinks,
            "exp_avg_stuck": shrinks & large & number["exp_avg"],
            "epsilon_dominates": (divisor < threshold) | (negative_zero & (threshold > 0)),
        }
        for name in _MOMENTS:
            facts[f"{name}_underflow"] = (_size(wide[name]) == 0) & (exact[name] != 0)
            if name in layout.low_bits:
                facts[f"{name}_low_bits_zero"] = wide[name] << 16 == 0
        bits = [facts[f].astype(jnp.int32) << k for k, f in enumerate(FACTS) if f in facts]
        return functools.reduce(lambda a, b: a | b, bits)

    def whole(zero: Any, s: Any, threshold: Any, arrays: Any, tail: Any) -> jax.Array:
        ops = ExactOperations(zero)
        old = {name: arrays[name] if name == "grad" else arrays[name][:-1] for name in before}
        new = {name: arrays[name][1:] for name in after}
        codes = jax.vmap(functools.partial(one_step, ops), (0, 0, None, 0, 0))(
            s, threshold, tail, old, new
        )
        return codes.astype(jnp.uint16)

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=64)
def _pairs_program(formats: tuple[Format, ...], device: Device) -> Callable:
    """Return what makes one code of both ratios of each element, (length, elements)."""

    def whole(
        zero: Any, stored: Any, stored32: Any, added: Any, near: Any, kinds: Any
    ) -> jax.Array:
        ops = ExactOperations(zero)
        wide = [_widened(each[1:], fmt) for each, fmt in zip(stored, formats, strict=True)]
        values, values32 = ([ops.decode(x, FLOAT32) for x in each] for each in (wide, stored32))
        sizes = _sizes(values, values32, added[:, None], jnp.sqrt)
        root, step = (size_code(size) - near[k] for k, size in enumerate(sizes))
        means = _positive_patterns(wide[0]) & _positive_patterns(stored32[0])
        inside = (root.astype(jnp.uint32) < _NEAR) & (step.astype(jnp.uint32) < _NEAR)
        if len(formats) > 1:
            inside &= _positive_patterns(wide[-1]) & _positive_patterns(stored32[-1])
        pair = jnp.where(inside, root * _NEAR + step, _ELSEWHERE)
        return jnp.where(means, pair, _UNCOUNTED) + kinds

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=64)
def _rows_program(layout: _Layout, device: Device) -> Callable:
    """Return what follows each element's steps in a row, and adds up each row's facts and steps.

    It returns the streaks after the window and, by row, the counts of the facts (see `_facts`), the sum of the
    streaks of each moment, and the longest of each: three arrays of (numbers, length, rows).
    """

    def one_step(streaks: Any, timestep: Any) -> tuple[Any, Any]:
        codes, counts = timestep
        found = []
        for bit, streak in enumerate(streaks):
            longer = streak + streak.dtype.type(1)
            found.append(jnp.where((codes >> bit) & 1 == 1, longer, streak.dtype.type(0)))
        after = tuple(jnp.where(counts, *each) for each in zip(found, streaks, strict=True))
        return after, tuple(found)

    def folded(values: Any, combine: Callable) -> jax.Array:
        return kept(jax.vmap(lambda each: fold(each.reshape(-1, layout.width), combine))(values))

    def whole(codes: Any, streaks: Any, steps: Any) -> Any:
        counts = jnp.arange(codes.shape[0]) < steps
        after, found = lax.scan(one_step, streaks, (codes, counts))
        longest = [folded(each.astype(jnp.int32), larger) for each in found]
        lengths = [folded(each.astype(layout.length), jnp.add) for each in found]
        facts = [folded(_spread(codes, k), jnp.add) for k in range(_PACKS)]
        if layout.width > _PACKED:
            facts = [_unpacked(facts, fact) for fact in range(len(FACTS))]
        return after, _combined(facts, lengths, longest)

    return compile_exactly(whole, device)


def _combined(*kinds: list[Any]) -> tuple[jax.Array, ...]:
    """Add up the lanes of lists of integers, the last one's largest, all at once: the order does not matter."""
    lanes = [each for kind in kinds for each in kind]
    sums = len(lanes) - len(kinds[-1])

    def combine(a: Any, b: Any) -> tuple[Any, ...]:
        added = [x + y for x, y in zip(a[:sums], b[:sums], strict=True)]
        return *added, *(larger(x, y) for x, y in zip(a[sums:], b[sums:], strict=True))

    zeros = tuple(each.dtype.type(0) for each in lanes)
    found = iter(lax.reduce(tuple(lanes), zeros, combine, (lanes[0].ndim - 1,)))
    return tuple(jnp.stack([next(found) for _ in kind]) for kind in kinds)


#: 32-bit integers that the facts are packed into, a byte for each: no lane adds up more than 32 elements.
_PACKS = -(-len(FACTS) // 4)


def _spread(codes: Any, pack: int) -> Any:
    """Put four bits of a code into a byte each."""
    bits = (codes >> 4 * pack).astype(jnp.uint32) & np.uint32(15)
    return (bits * np.uint32(0x00204081)) & np.uint32(0x01010101)


#: Widest row whose counts of facts are packed into bytes.
_PACKED = 255


def _facts(counts: NDArray[Any], layout: _Layout) -> NDArray[Any]:
    """Return the counts of each fact by row, integers (len(FACTS), length, rows)."""
    if layout.width > _PACKED:
        return counts
    # Bytes of a word, the lowest first on any machine.
    each = np.ascontiguousarray(counts, "<u4").view(np.uint8).reshape(*counts.shape, 4)
    return np.moveaxis(each, -1, 1).reshape(-1, *counts.shape[1:])[: len(FACTS)]


def _unpacked(packed: Any, fact: int) -> Any:
    return (packed[fact // 4] >> np.uint32(8 * (fact % 4))).astype(jnp.int32) & 0xFF
