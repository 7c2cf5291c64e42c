"""How far tokens move on the lattice of their format's numbers, and what becomes of each of them.

An element's displacement in a step is measured twice: in ulp of the weight that the step starts from, and in steps on
the ordered line of the format's numbers (`floats.ordered`). The two differ in size where a binade edge or zero is
crossed. An element that stays at its point of the line, be that infinity or NaN, has not moved in either measure; one
that becomes infinite has moved infinitely many ulp, one that becomes NaN, or was, an undefined number of them (NaN),
which counts as more than any bound.

Displacements are exact in float64, but for a weight that goes to another more than 2^45 times as small or as large
(2^29 in float32), whose displacement is rounded once. Sums over a token are taken in a fixed order. Whether
L2 > sqrt(D) is decided on the sum of squares, exactly so for up to 16,128 elements a token (many more in float16 and
float32): only the square of a weight that moves by about 2^p ulp at once, p being the significand's stored bits, can
need more than float64 has, and that square alone is more than D.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import lax
from numpy.typing import NDArray

from jaxaudit.comparison import fold, larger, sum_groups
from jaxaudit.devices import Device
from jaxaudit.floats import FLOAT32, Format
from jaxaudit.ledger.clusters import Clusters
from jaxaudit.ledger.lives import Lives, line_distances, squared_norms
from jaxaudit.ledger.subject import Seen, Subject
from jaxaudit.ledger.variables import LATTICE, MEASURES, NORMS, REGIMES, TOKENS
from jaxaudit.operations import (
    Operations,
    compile_exactly,
    kept,
    operations_of,
    widen_patterns,
)
from jaxaudit.recording import Window
from jaxaudit.results import label
from jaxaudit.strips import Countable

#: Numbers of a table of every token and step up to which it is kept unless told otherwise.
_TABLE = 1 << 20

#: Elements, times steps, that are reduced at once.
_PART = 1 << 20

#: What `_rows_program` returns for each row and step, and how its lanes are combined.
_COMBINES: dict[str, Callable] = {
    "ulp_l1": jnp.add,
    "ulp_squares": jnp.add,
    "ulp_linf": larger,
    "ulp_signed": jnp.add,
    "line_l1": jnp.add,
    "line_squares": jnp.add,
    "line_linf": larger,
    "line_signed": jnp.add,
    "crossings": jnp.add,
    "change_squares": jnp.add,
}

_EXPONENT, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)

Rows = dict[str, NDArray[Any]]


class Lattice(Countable):
    """Observes the recorded weights: displacements, regimes and lives of tokens.

    Args:
        subject: what is followed.
        per_token: keep the displacements of every token in every step; None: where these are few.
    """

    MERGED = {
        "_found": "sum",
        "_found.displacement_max": "max",
        "_found.displacement": "rows",
        "_ends": "rows",
    }
    MADE_OF = ("_lives",)

    def __init__(self, subject: Subject, *, per_token: bool | None = None):
        self._subject, recording = subject, subject.bench.recording
        self._fmt, self._width, tokens = recording.storage, recording.width, recording.tokens
        self._members = list(subject.groups.members.values())
        steps, groups = subject.counts
        table = steps * tokens <= _TABLE if per_token is None else per_token
        shapes = {"timestep": steps, "token_group": groups, "measure": 2, "norm": 3, "regime": 4}
        self._found = {
            name: np.zeros([shapes[dim] for dim in field.dims], field.dtype)
            for name, field in LATTICE.items()
            if name != "displacement"
        }
        if table:
            self._found["displacement"] = np.zeros((2, 3, steps, tokens))
        self._lives = Lives(tokens, subject.steps)
        self._ends = {name: np.zeros(tokens, TOKENS[name].dtype) for name in _ENDS}
        self._first_weights: NDArray[np.unsignedinteger] | None = None

    def forget(self) -> None:
        """Forget a strip's first weights, and which of its tokens moved last."""
        super().forget()
        self._first_weights = None

    def take(self, seen: Seen) -> None:
        """Take the next window."""
        patterns, key = seen.arrays["param"], (self._fmt, self._width, self._subject.bench.device)
        plain = not np.asarray(_special_program(*key)(patterns)).any()
        steps = _steps_of_part(patterns)
        program = _rows_program(*key, plain, steps)
        parts = [program(patterns, k) for k in range(0, len(patterns) - 1, steps)]
        seen.later(lambda: self._finish(seen, parts))

    def lattice(self) -> xr.Dataset:
        """Return the group `lattice`."""
        sizes = np.array([tokens.size for tokens in self._members], np.float64)
        with np.errstate(invalid="ignore"):  # no mean of an empty group
            means = self._found["displacement_mean"] / sizes
        found = self._found | {
            "displacement_mean": means,
            "settled_regime_count": self._lives.settled(self._members),
        }
        coordinates = self._subject.coordinates() | {
            "measure": list(MEASURES),
            "norm": list(NORMS),
            "regime": list(REGIMES),
        }
        attributes = {}
        if "displacement" in self._found:
            coordinates["token"] = np.arange(self._subject.groups.tokens)
        else:
            attributes["displacement_left_out"] = (
                "no table of every token's displacement in every step: it would hold "
                f"{self._subject.counts[0]} timesteps x {self._subject.groups.tokens} tokens, and by default at "
                f"most {_TABLE} are kept"
            )
        return label(found, coordinates, attributes, LATTICE)

    def tokens(self, clusters: Clusters) -> xr.Dataset:
        """Return the group `tokens`.

        Args:
            clusters: of the same weights.
        """
        lives, groups = self._lives, self._subject.groups
        inside = np.zeros((groups.tokens, len(self._members)), np.int8)
        for k, tokens in enumerate(self._members):
            inside[tokens, k] = 1
        counted = ("distinct_row_count", "cluster_count", "clustered_token_count")
        found = {
            "in_group": inside,
            "last_early": lives.last_early,
            "last_midlife": lives.last_midlife,
            "freeze_onset": lives.freeze_onset(),
            "thaw_count": lives.thaw_count,
            "weight_path": lives.weight_path,
            "lattice_path": lives.lattice_path,
            **self._ends,
            "cluster": clusters.numbered(),
            **dict(zip(counted, clusters.counts, strict=True)),
        }
        coordinates = self._subject.coordinates() | {"token": np.arange(groups.tokens)}
        return label({name: found[name] for name in TOKENS}, coordinates, {}, TOKENS)

    def _finish(self, seen: Seen, parts: list[dict[str, jax.Array]]) -> None:
        """Take what the device made of a window."""
        window = seen.window
        self._meet_ends(window)
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        rows = {name: x[: window.steps, :, 0] for name, x in found.items()}
        lengths = _lengths(rows, self._fmt)
        regimes = _regimes(rows, self._fmt, self._width)
        self._measure(seen, rows, lengths, regimes)
        self._live(window, rows, regimes)

    def _measure(
        self, seen: Seen, rows: Rows, lengths: NDArray[np.float64], regimes: NDArray[np.bool_]
    ) -> None:
        """Count by token group, and keep the table."""
        found, shape, place = self._found, lengths.shape[:3], self._subject.place(seen.window)
        flat = lengths.reshape(-1, lengths.shape[-1])
        counted = np.stack([*regimes, rows["crossings"]])
        for k, tokens in enumerate(seen.members):
            # One copy of the group's rows, side by side, serves the sum (that of `sum_groups`) and the largest.
            mine = flat.take(tokens, axis=1)
            with np.errstate(invalid="ignore", over="ignore"):  # infinities
                found["displacement_mean"][:, :, place, k] += mine.sum(axis=1).reshape(shape)
            largest = found["displacement_max"][:, :, place, k]
            np.maximum(largest, mine.max(axis=1, initial=0).reshape(shape), out=largest)
            counts = counted.take(tokens, axis=2).sum(axis=2)
            found["regime_count"][:, place, k] += counts[:-1]
            found["edge_crossing_count"][place, k] += counts[-1]
        for k, measure in enumerate(MEASURES):
            signed = sum_groups(rows[f"{measure}_signed"], seen.members)
            signed = signed * _unit(self._fmt, measure)
            with np.errstate(invalid="ignore"):
                found["signed_displacement"][k, place] += signed
        if "displacement" in found:
            found["displacement"][:, :, place, slice(*seen.window.rows)] = lengths

    def _live(self, window: Window, rows: Rows, regimes: NDArray[np.bool_]) -> None:
        own = slice(window.overlap, None)
        early, midlife, _, frozen = regimes[..., own]
        with np.errstate(invalid="ignore"):
            change = np.sqrt(rows["change_squares"][:, own])
        for k in range(window.steps):
            self._lives.live(
                window.first + k,
                slice(*window.own),
                early=early[k],
                midlife=early[k] | midlife[k],
                moved=~frozen[k],
                change=change[k],
                line=rows["line_l1"][k, own],
            )

    def _meet_ends(self, window: Window) -> None:
        """Compare the weights before the first step and after the last, of the window's rows."""
        rows, weights = slice(*window.rows), window.tensors["param"]
        if window.first == self._subject.steps[0]:
            self._first_weights = weights[0].copy()
            self._ends["norm_at_start"][rows] = np.sqrt(squared_norms(weights[0], self._fmt))
        if window.range[1] == self._subject.steps[1]:
            last, first = weights[window.steps], self._first_weights
            assert first is not None
            self._ends["norm_at_end"][rows] = np.sqrt(squared_norms(last, self._fmt))
            moved = squared_norms(last, self._fmt, first)
            self._ends["weight_displacement"][rows] = np.sqrt(moved)
            self._ends["lattice_displacement"][rows] = line_distances(last, first, self._fmt)


def _steps_of_part(patterns: jax.Array) -> int:
    """Cut a window's (length + 1, elements) into so many steps each, whose sums stay in memory that malloc keeps."""
    length, most = patterns.shape[0] - 1, max(1, _PART // patterns.shape[1])
    return max(k for k in range(1, min(length, most) + 1) if length % k == 0)


#: What the first and the last weights tell.
_ENDS = ("weight_displacement", "lattice_displacement", "norm_at_start", "norm_at_end")


def _unit(fmt: Format, measure: str) -> float:
    """Return what the numbers of `_rows_program` are multiples of."""
    return 2.0 ** (fmt.significand_bits - 1) if measure == "ulp" else 1.0


def _lengths(rows: Rows, fmt: Format) -> NDArray[np.float64]:
    """Return L1, L2 and Linf of each token in each step, in both measures; (2, 3, steps, tokens)."""
    unit = _unit(fmt, "ulp")
    with np.errstate(invalid="ignore"):
        ulp = [rows["ulp_l1"], np.sqrt(rows["ulp_squares"]), rows["ulp_linf"].view(np.float64)]
        line = [rows["line_l1"], np.sqrt(rows["line_squares"]), rows["line_linf"]]
        return np.stack([np.stack(ulp) * unit, np.stack(line).astype(np.float64)])


def _regimes(rows: Rows, fmt: Format, width: int) -> NDArray[np.bool_]:
    """Tell each token's regime in each step, as `REGIMES`; (4, steps, tokens)."""
    unit = _unit(fmt, "ulp")
    with np.errstate(invalid="ignore"):  # what is not a number is beyond every bound
        early = ~(rows["ulp_squares"] * unit**2 <= width)
        beyond = ~(rows["ulp_linf"].view(np.float64) * unit <= 1)
    frozen = rows["line_l1"] == 0
    return np.stack([early, beyond & ~early, ~(early | beyond | frozen), frozen])


def _line(patterns: Any, fmt: Format, plain: bool) -> Any:
    """Place patterns on the ordered line, as `floats.ordered`; signed integers of their width."""
    signed = lax.bitcast_convert_type(patterns, jnp.int16 if fmt.width == 16 else jnp.int32)
    magnitude, flips = signed & (fmt.sign_bit - 1), signed >> (fmt.width - 1)
    if not plain:
        nan = magnitude > fmt.infinity
        magnitude = jnp.where(nan, jnp.asarray(fmt.infinity + 1, signed.dtype), magnitude)
        flips = jnp.where(nan, jnp.asarray(0, signed.dtype), flips)
    return (magnitude ^ flips) - flips


def _line_steps(before: Any, after: Any, fmt: Format, width: int, plain: bool) -> tuple[Any, Any]:
    """Return signed distances on the ordered line: integers in which a row's sum fits, and float64."""
    a, b = _line(before, fmt, plain), _line(after, fmt, plain)
    if fmt is FLOAT32:
        return b.astype(jnp.int64) - a.astype(jnp.int64), b.astype(jnp.float64) - a.astype(jnp.float64)  # fmt: skip
    steps = b.astype(jnp.int32) - a.astype(jnp.int32)
    fits = width * (2 * fmt.infinity + 1) < 1 << 31
    return (steps if fits else steps.astype(jnp.int64)), steps.astype(jnp.float64)


def _value(wide: Any, plain: bool) -> Any:
    """Widen float32 patterns to float64.

    A subnormal number, which XLA:CPU would take for zero, is read as if it had a hidden bit, 2^-126, which is then
    taken away; so is zero.
    """
    if plain:
        return lax.bitcast_convert_type(wide, jnp.float32).astype(jnp.float64)
    hidden = jnp.where((wide & _EXPONENT) == 0, np.uint32(1 << 23), np.uint32(0))
    sign = wide & np.uint32(FLOAT32.sign_bit)
    value, excess = (
        lax.bitcast_convert_type(bits | hidden, jnp.float32).astype(jnp.float64)
        for bits in (wide, sign)
    )
    return value - excess


def _per_ulp(wide: Any, fmt: Format, plain: bool) -> Any:
    """Return 2^(1 - p) over the ulp of float32 patterns, p being the stored bits of the format's significand.

    In binade 2^e the ulp is 2^(e - p), which makes this 2^(1 - e): exponents add up to 255. It is a normal float32
    number throughout; for infinity and NaN it is that of the last binade.
    """
    lowest = 128 - fmt.bias  # exponent field, in float32, of the smallest normal number
    reflected = jnp.minimum(_EXPONENT - (wide & _EXPONENT), np.uint32((255 - lowest) << 23))
    if not plain:
        reflected = jnp.maximum(reflected, np.uint32(1 << 23))
    return lax.bitcast_convert_type(reflected, jnp.float32).astype(jnp.float64)


def _square(value: Any) -> Any:
    """Square what was decoded, rounded: a selection, which may choose NaN, cannot be fused with the sum that follows.

    (A zero known at run time only, as it stands elsewhere, would keep the compiler from using vectors here.)
    """
    square = value * value
    return jnp.where(jnp.isnan(square), np.nan, square)


@functools.lru_cache(maxsize=64)
def _rows_program(
    fmt: Format, width: int, device: Device, plain: bool, steps: int | None = None
) -> Callable:
    """Make what reduces (length + 1, rows * width) patterns, from a step on, to numbers of each row and step.

    Each is of shape (steps, rows, 1), combined as `_COMBINES` says.

    Distances in ulp are in units of `_unit`, the largest as the bits of a float64 number: NaN is the largest of all.

    Args:
        fmt: of the patterns.
        width: elements of a row.
        device: where they are.
        plain: no pattern is infinite, NaN or, as float32, subnormal.
        steps: how many; None for all.
    """

    def one_step(ops: Operations, before: Any, after: Any) -> dict[str, jax.Array]:
        wide = widen_patterns(before, fmt)
        change = _value(widen_patterns(after, fmt), plain) - _value(wide, plain)
        steps, line = _line_steps(before, after, fmt, width, plain)
        if not plain:
            change = jnp.where(steps == 0, np.float64(0), change)
        ulp = change * _per_ulp(wide, fmt, plain)
        crosses = jnp.abs(ulp) != jnp.abs(line) * (1 / _unit(fmt, "ulp"))
        # Of 16-bit formats these squares are exact; that an integer is not NaN the compiler knows.
        squares = line * line if fmt.width == 16 else ops.wide_multiply(line, line)
        values = {
            "ulp_l1": jnp.abs(ulp),
            "ulp_squares": _square(ulp),
            "ulp_linf": lax.bitcast_convert_type(jnp.abs(ulp), jnp.int64),
            "ulp_signed": ulp,
            "line_l1": jnp.abs(steps),
            "line_squares": squares,
            "line_linf": jnp.abs(steps),
            "line_signed": steps,
            "crossings": crosses.astype(jnp.int32),
            "change_squares": _square(change),
        }
        return {name: fold(x.reshape(-1, width), _COMBINES[name]) for name, x in values.items()}

    def folded(name: str, lanes: Any) -> jax.Array:
        while lanes.shape[-1] > 1:
            lanes = jax.vmap(functools.partial(fold, combine=_COMBINES[name]))(kept(lanes))
        return lanes

    def whole(zero: Any, w: Any, start: Any) -> dict[str, jax.Array]:
        ops, count = operations_of("float64", zero), steps or w.shape[0] - 1
        if (
            count < w.shape[0] - 1
        ):  # fused with what follows, it would keep the compiler from using vectors
            w = kept(lax.dynamic_slice_in_dim(w, start, count + 1))
        lanes = jax.vmap(functools.partial(one_step, ops))(w[:-1], w[1:])
        return {name: folded(name, each) for name, each in lanes.items()}

    program = compile_exactly(whole, device)
    return lambda patterns, start=0: program(np.uint32(0), patterns, np.int32(start))


@functools.lru_cache(maxsize=64)
def _special_program(fmt: Format, width: int, device: Device) -> Callable:
    """Make what marks rows with patterns that are infinite, NaN or, as float32, subnormal."""

    def one_state(patterns: Any) -> jax.Array:
        wide = widen_patterns(patterns, fmt) & _MAGNITUDE
        subnormal = wide - np.uint32(1) < np.uint32((1 << 23) - 1)  # zero wraps around
        special = subnormal | (wide >= _EXPONENT)
        return fold(special.astype(jnp.uint8).reshape(-1, width), jnp.maximum)

    return compile_exactly(jax.vmap(one_state), device)
