"""What each step wanted and what became of it: the ledger of lost updates, group `updates`.

The exact update of a weight is what the arithmetic's own formula gives in float64 before anything is rounded, from
the recorded state and gradient (`subject.ExactRule`). Beside it stands what was stored: the recorded weight after
the step minus the one before. Every element gets one integer code, which says what became of its update and how
large that was in half ulps of the weight; every count, histogram and quantile comes from the codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import lax
from numpy.typing import NDArray

from jaxaudit import results
from jaxaudit.comparison import fold_together, sum_groups
from jaxaudit.devices import Device
from jaxaudit.floats import FLOAT32, FLOAT64, Format
from jaxaudit.ledger import counting, variables
from jaxaudit.ledger.counting import SIZES, GroupCounter
from jaxaudit.ledger.subject import ExactRule, Seen, Subject, exact_update
from jaxaudit.operations import (
    ExactOperations,
    compile_exactly,
    kept,
    narrow_patterns,
    operations_of,
    widen_patterns,
)
from jaxaudit.replay import widened
from jaxaudit.steps import Kernel, Scalars, Step
from jaxaudit.strips import Countable, Histograms

# What became of a weight that was to change: unchanged, moved by one ulp, by more; one and more the other way.
_LOST, _ONE, _MORE, _ONE_AGAINST, _MORE_AGAINST, _CLASSES = range(6)

#: Codes of an element: first class * SIZES + bin of the size where its exact update is not zero, then these.
_IDLE, _UNWANTED, _UNDEFINED = (_CLASSES * SIZES + k for k in range(3))
_CODES = _CLASSES * SIZES + 3

#: Codes of the decay ledger: the classes, and this.
_NOT_DECAYING = _CLASSES

#: What is summed over elements, in float64: `wanted` is the exact update, `realised` the recorded change.
_SUMS = (
    "wanted_sum",
    "realised_sum",
    "wanted_absolute_sum",
    "realised_absolute_sum",
    "wanted_square",
    "realised_square",
    "inner_product",
)

#: What stands for an exact update that is none: -0.
_UNDEFINED_BITS = np.uint64(FLOAT64.sign_bit)

#: Elements that are computed at once: float64 numbers of so many stay in the cache, and in memory that malloc keeps.
_BLOCK = 1 << 20


class Updates(Countable):
    """The ledger of lost updates of one recording, filled in window by window.

    Args:
        subject: the recording, under the arithmetic that made it.
    """

    MERGED = {"_classes": "sum", "_others": "sum", "_decay_classes": "sum", "_sums": "sum"}
    MADE_OF = ("_sizes",)

    def __init__(self, subject: Subject):
        self._subject, self._rule = subject, ExactRule(subject)
        device, width = subject.bench.device, subject.bench.recording.width
        self._counter = GroupCounter(subject.groups, width, device)
        self._decays = subject.step.decay != "none" and subject.candidate.given.weight_decay != 0
        shape = subject.counts
        self._classes = np.zeros((*shape, _CLASSES), np.int64)
        self._others = np.zeros((*shape, _CODES - _IDLE), np.int64)
        self._decay_classes = np.zeros((*shape, _CLASSES), np.int64)
        self._sums = {name: np.zeros(shape) for name in _SUMS}
        self._sizes = Histograms(*shape, SIZES)

    def forget(self) -> None:
        """Forget a strip's rows."""
        self._counter.forget()

    @staticmethod
    def possible(subject: Subject) -> bool:
        """Tell whether the recording holds, or can be run for, everything that a step reads."""
        formats = subject.bench.recording.formats
        if subject.bench.recording.hyperparameters is None or "grad" not in formats:
            return False
        return subject.holds(ExactRule(subject).reads)

    def take(self, seen: Seen) -> jax.Array:
        """Take a window into account.

        Returns:
            uint8 (length, elements) on the device: 1 where the exact update of an element is not zero and its
            stored weight did not change. Rows beyond the window's steps mean nothing.
        """
        scalars, block = self._rule.scalars(seen.window), self._block(seen)
        lost = [
            self._take_block(seen, k, {name: x[k : k + block] for name, x in scalars.items()})
            for k in range(0, self._subject.bench.length, block)
        ]
        if self._decays:
            decay_codes = self._decay(seen)
            seen.later(lambda: self._count_decay(seen, decay_codes))
        return lost[0] if len(lost) == 1 else jnp.concatenate(lost)

    def _block(self, seen: Seen) -> int:
        """Return of how many steps a block is: the largest part of a window that fits."""
        length, elements = self._subject.bench.length, seen.arrays["param"].shape[1]
        parts = [k for k in range(1, length + 1) if length % k == 0 and k * elements <= _BLOCK]
        return max(parts, default=1)

    def _take_block(self, seen: Seen, start: int, scalars: Scalars) -> jax.Array:
        """Take some steps of a window into account, from its step `start` on; return what was lost."""
        bench, zero, first = self._subject.bench, np.uint32(0), np.int32(start)
        device, storage = bench.device, bench.recording.storage
        sources = self._sources(self._rule.reads)
        arrays, param = {key: seen.arrays[key] for _, key, _ in sources}, seen.arrays["param"]
        offsets = self._counter.offsets(seen.window, _CODES)
        program = _block_program(self._rule.step, sources, storage, bench.recording.width, device)
        codes, lost, sums = program(zero, first, scalars, arrays, param, offsets)
        if start < seen.window.steps:
            seen.later(lambda: self._count(seen, start, codes))
            seen.later(lambda: self._add(seen, start, sums))
        return lost

    def _sources(self, names: Iterable[str]) -> tuple["_Source", ...]:
        return tuple((name, *self._subject.source(name)) for name in names)

    def _decay(self, seen: Seen) -> jax.Array:
        """Code what weight decay alone does to each element."""
        subject, window = self._subject, seen.window
        bench, candidate, step = subject.bench, subject.candidate, subject.step
        names = ("param", "grad") if step.decay == "l2" else ("param",)
        sources = self._sources(names)
        program = _decay_program(step, sources, bench.recording.storage, bench.device)
        factors = self._rule.scalars(window)[ExactRule.DECAY]
        if step.decay == "l2":
            factors = np.full_like(factors, candidate.given.weight_decay)
        return program(
            np.uint32(0),
            widened(bench.scalars(candidate, window)),
            factors,
            {key: seen.arrays[key] for _, key, _ in sources},
            bench.tail(candidate, window.rows),
            self._counter.offsets(window, _NOT_DECAYING + 1),
        )

    def _place(self, seen: Seen, start: int, steps: int) -> slice:
        """Return the place of a block on the timestep axis, up to the window's last step."""
        place = self._subject.place(seen.window)
        return slice(place.start + start, min(place.start + start + steps, place.stop))

    def _count(self, seen: Seen, start: int, codes: jax.Array) -> None:
        place, rows = self._place(seen, start, codes.shape[0]), np.asarray(codes)
        most = counting.steps_at_once(self._classes.shape[1], _CODES)
        for k in range(0, place.stop - place.start, most):
            steps = min(most, place.stop - place.start - k)
            part = slice(place.start + k, place.start + k + steps)
            found = self._counter.count(rows[k:], steps, _CODES)
            sized = found[..., :_IDLE].reshape(*found.shape[:2], _CLASSES, SIZES)
            self._classes[part] += sized.sum(axis=-1)
            self._others[part] += found[..., _IDLE:]
            self._sizes.add(part.start, sized.sum(axis=-2))

    def _add(self, seen: Seen, start: int, sums: jax.Array) -> None:
        place = self._place(seen, start, sums.shape[1])
        for name, rows in zip(_SUMS, np.asarray(sums), strict=True):
            found = rows[: place.stop - place.start]
            self._sums[name][place] += sum_groups(found, seen.members)

    def _count_decay(self, seen: Seen, codes: jax.Array) -> None:
        found = self._counter.count(codes, seen.window.steps, _NOT_DECAYING + 1)
        self._decay_classes[self._subject.place(seen.window)] += found[..., :_CLASSES]

    def dataset(self) -> xr.Dataset:
        """Label what was counted; see `variables.UPDATES`."""
        subject, candidate = self._subject, self._subject.candidate
        arrays = _counts(self._classes, "") | _counts(self._decay_classes, "decay_")
        undefined = self._others[..., _UNDEFINED - _IDLE]
        arrays |= {
            "unwanted_count": self._others[..., _UNWANTED - _IDLE],
            "undefined_count": undefined,
            **self._totals(undefined),
            **self._margins(),
        }
        coordinates = subject.coordinates() | {
            "quantile": counting.QUANTILES,
            "margin": np.arange(counting.LOWEST, counting.HIGHEST),
        }
        attributes = {
            "title": "What each step wanted, and what became of it",
            "arithmetic": candidate.arithmetic.label,
            "formula": candidate.arithmetic.formula,
            "comment": "The exact update is this formula in float64, with no rounding of R(), of scalars or of "
            "operators, from the recorded state and gradient; with Kahan summation it includes the compensation. "
            "Undefined are also the updates of weights that are infinite or NaN before the step or after it; they "
            "enter no other count and no sum. signed_bias is the mean over all others.",
        }
        return results.label(arrays, coordinates, attributes, table=variables.UPDATES)

    def _margins(self) -> dict[str, NDArray[Any]]:
        """Return what the sizes come to."""
        shape = self._subject.counts
        binades = np.zeros((*shape, SIZES // counting.STEPS_PER_BINADE), np.int64)
        quantiles = np.full((*shape, len(counting.QUANTILES)), np.nan)
        for place, sizes in self._sizes:
            binades[place] = sizes.reshape(*sizes.shape[:2], -1, counting.STEPS_PER_BINADE).sum(-1)
            quantiles[place] = np.log2(counting.quantiles(sizes))
        return {"margin_quantile": quantiles, "margin_histogram": binades}

    def _totals(self, undefined: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return the sums, and what is made of them."""
        sums, width = self._sums, self._subject.bench.recording.width
        sizes = [members.size * width for members in self._subject.groups.members.values()]
        with np.errstate(all="ignore"):
            share = sums["inner_product"] / sums["wanted_square"]
            bias = (sums["realised_sum"] - sums["wanted_sum"]) / (np.array(sizes) - undefined)
            return {
                **{name: sums[name] for name in _SUMS if not name.endswith("_square")},
                "wanted_norm": np.sqrt(sums["wanted_square"]),
                "realised_norm": np.sqrt(sums["realised_square"]),
                "descent_quality": np.where(sums["wanted_square"] > 0, share, np.nan),
                "signed_bias": bias,
            }


def _counts(classes: NDArray[np.int64], prefix: str) -> dict[str, NDArray[np.int64]]:
    lost, one, more, one_against, more_against = np.moveaxis(classes, -1, 0)
    return {
        f"{prefix}wanted_count": classes.sum(axis=-1),
        f"{prefix}lost_count": lost,
        f"{prefix}one_ulp_count": one + one_against,
        f"{prefix}more_ulp_count": more + more_against,
        f"{prefix}against_count": one_against + more_against,
    }


def _line(patterns: Any, fmt: Format) -> Any:
    """Place patterns on the ordered line, int32: as `floats.ordered`, but for NaNs, which follow infinity."""
    magnitude = (patterns & fmt.pattern_dtype.type(fmt.sign_bit - 1)).astype(jnp.int32)
    return jnp.where(patterns >= fmt.pattern_dtype.type(fmt.sign_bit), -magnitude, magnitude)


def _class_of(before: Any, after: Any, falls: Any) -> Any:
    """Tell what became of a number that was to change.

    Args:
        before: its place on the ordered line, int32.
        after: where it went.
        falls: whether it was to become smaller.
    """
    distance = after - before  # wraps around, at the far ends, to something else than 0, 1 and -1
    size = jnp.where((distance == 1) | (distance == -1), _ONE, _MORE)
    size = jnp.where((after < before) != falls, size + (_ONE_AGAINST - _ONE), size)
    return jnp.where(after == before, _LOST, size)


def _margin_code(wanted: Any, before: Any, fmt: Format) -> Any:
    """Return the bin of |wanted| over half the gap to the weight's neighbour in its direction.

    The gap is the ulp of the weight's binade. It is half of that from a power of two towards zero, but for the
    smallest normal number, below which the spacing stays.

    Args:
        wanted: exact updates, float64.
        before: the weight's patterns.
        fmt: their format.
    """
    magnitude = (before & fmt.pattern_dtype.type(fmt.sign_bit - 1)).astype(jnp.int32)
    negative = before >= fmt.pattern_dtype.type(fmt.sign_bit)
    exponent = magnitude >> fmt.significand_bits
    edge = (magnitude & ((1 << fmt.significand_bits) - 1)) == 0
    narrow = edge & (exponent > 1) & ((wanted < 0) != negative)
    half = (
        jnp.maximum(exponent, 1) - narrow.astype(jnp.int32) - (fmt.bias + fmt.significand_bits + 1)
    )
    scale = (FLOAT64.bias - half).astype(jnp.int64) << FLOAT64.significand_bits
    return counting.size_code(jnp.abs(wanted) * lax.bitcast_convert_type(scale, jnp.float64))


def _finite(patterns: Any, fmt: Format) -> Any:
    dtype = fmt.pattern_dtype.type
    return (patterns & dtype(fmt.sign_bit - 1)) < dtype(fmt.infinity)


#: Name of a tensor, its key among a window's arrays, and its format.
_Source = tuple[str, str, Format]


def _cut(rows: Any, start: Any, steps: int) -> Any:
    """Return some rows of a window's array, by the number of the first."""
    return lax.dynamic_slice_in_dim(rows, start, steps)


def _steps_of(arrays: Mapping[str, Any], sources: Sequence[_Source]) -> dict[str, Any]:
    """Cut patterns before each step out of a window's arrays."""
    return {name: arrays[key] if name == "grad" else arrays[key][:-1] for name, key, _ in sources}


@functools.lru_cache(maxsize=64)
def _block_program(
    step: Step, sources: tuple[_Source, ...], storage: Format, width: int, device: Device
) -> Callable:
    """Take some steps of a window.

    It returns codes, int32 (steps, elements); what was lost, uint8 (steps, elements); and `_SUMS` over each row,
    float64 (len(_SUMS), steps, rows).
    """

    def whole(
        zero: Any, start: Any, scalars: Any, arrays: Any, param: Any, offsets: Any
    ) -> tuple[jax.Array, ...]:
        ops, steps = ExactOperations(zero), next(iter(scalars.values())).shape[0]
        tensors = {name: _cut(arrays[key], start, steps) for name, key, _ in sources}
        before, after = (_cut(param, k, steps) for k in (start, start + 1))
        exact = functools.partial(_exact, step, sources, storage, ops)
        wanted = kept(jax.vmap(exact)(scalars, tensors, before, after))
        coded = jax.vmap(functools.partial(_coded, storage), (0, 0, 0, None))
        codes = kept(coded(wanted, before, after, offsets))
        lost = (codes - offsets < SIZES).astype(jnp.uint8)  # the first class
        change = ops.decode(after, storage) - ops.decode(before, storage)
        realised = kept(jnp.where(_undefined(wanted), 0.0, change))
        sums = _summed(ops, wanted.reshape(-1, width), realised.reshape(-1, width))
        return codes, lost, jnp.stack(sums).reshape(len(_SUMS), steps, -1)

    return compile_exactly(whole, device)


def _exact(
    step: Step,
    sources: tuple[_Source, ...],
    storage: Format,
    ops: ExactOperations,
    s: Any,
    patterns: Mapping[str, Any],
    before: Any,
    after: Any,
) -> jax.Array:
    """Compute a timestep's exact updates, float64.

    What is undefined is -0 (see `_undefined`), and a zero is +0: undefined are infinities, NaNs, and the updates
    of recorded weights that are not finite, before the step or after it.
    """
    x = {name: ops.decode(patterns[name], fmt) for name, _, fmt in sources}
    change = exact_update(step, ops, s, x | {"tail": np.uint8(0)}).change
    finite = _finite(before, storage) & _finite(after, storage)
    # Bits: XLA takes a sum with 0, which would turn -0 into 0, for nothing.
    bits = lax.bitcast_convert_type(change, jnp.uint64)
    bits = jnp.where(bits << 1 == 0, np.uint64(0), bits)
    defined = finite & (jnp.abs(change) < np.inf)
    return lax.bitcast_convert_type(jnp.where(defined, bits, _UNDEFINED_BITS), jnp.float64)


def _undefined(wanted: Any) -> Any:
    return lax.bitcast_convert_type(wanted, jnp.uint64) == _UNDEFINED_BITS


def _coded(storage: Format, wanted: Any, before: Any, after: Any, offsets: Any) -> jax.Array:
    """Code each element of a timestep, int32."""
    old, new, idle = _line(before, storage), _line(after, storage), wanted == 0
    code = _class_of(old, new, wanted < 0) * SIZES + _margin_code(wanted, before, storage)
    code = jnp.where(idle, jnp.where(old == new, _IDLE, _UNWANTED), code)
    code = jnp.where(_undefined(wanted), _UNDEFINED, code).astype(jnp.int32)
    return code + offsets


def _summed(ops: ExactOperations, wanted: Any, realised: Any) -> tuple[jax.Array, ...]:
    """Sum up `_SUMS` over each row; each (rows,)."""
    w, r = wanted, realised
    products = (ops.multiply(w, w), ops.multiply(r, r), ops.multiply(w, r))
    return fold_together((w, r, jnp.abs(w), jnp.abs(r), *products), w.shape[1])


@functools.lru_cache(maxsize=64)
def _decay_program(
    step: Step, sources: tuple[_Source, ...], storage: Format, device: Device
) -> Callable:
    """Code what weight decay alone does: to the weight (decoupled), or to the gradient (L2).

    Elements count whose decay is not zero, while what it is added to is finite.
    """
    alone = _decayed_gradient if step.decay == "l2" else _decayed_weight

    def whole(
        zero: Any, scalars: Any, factors: Any, arrays: Any, tail: Any, offsets: Any
    ) -> jax.Array:
        own = operations_of("float64", zero, flushes=step.flushes)
        ops = ExactOperations(zero)
        formats = {name: fmt for name, _, fmt in sources}

        def one_step(s: Any, factor: Any, patterns: Any) -> jax.Array:
            x = {name: own.decode(patterns[name], fmt) for name, fmt in formats.items()}
            kernel = Kernel(step, own, s, x | {"tail": tail})
            before, after, fmt = alone(kernel, patterns["param"], formats["param"], storage)
            wanted = ops.multiply(factor, ops.decode(patterns["param"], formats["param"]))
            decays = _finite(before, fmt) & (jnp.abs(wanted) < np.inf) & (wanted != 0)
            found = _class_of(_line(before, fmt), _line(after, fmt), wanted < 0)
            return jnp.where(decays, found, _NOT_DECAYING).astype(jnp.int32) + offsets

        return jax.vmap(one_step)(scalars, factors, _steps_of(arrays, sources))

    return compile_exactly(whole, device)


def _decayed_gradient(
    k: Kernel, patterns: Any, fmt: Format, storage: Format
) -> tuple[Any, Any, Format]:
    """Return the gradient without and with L2 decay, as patterns of the format that it is rounded to."""
    kept = k.step.storage if k.step.rounds_operators else FLOAT32
    return k.ops.encode(k.plain_gradient(), kept), k.ops.encode(k.gradient(), kept), kept


def _decayed_weight(
    k: Kernel, patterns: Any, fmt: Format, storage: Format
) -> tuple[Any, Any, Format]:
    """Return the stored weight before and after a step of decoupled decay alone, as patterns.

    The arithmetic's own step is taken with moments that leave the weight alone: an update of 0 over a root of 1.
    """
    step, nothing, one = dataclasses.replace(k.step, reads_stored=True), jnp.zeros(()), jnp.ones(())
    still = dict.fromkeys(("new_exp_avg", "compensation"), nothing)
    still |= dict.fromkeys(("new_exp_avg_sq", "new_max_exp_avg_sq"), one)
    after = step.replay_recorded("param", k.ops, k.s, {**k.x, **still})
    before = narrow_patterns(widen_patterns(patterns, fmt), storage) if fmt != storage else patterns
    return before, k.ops.encode(after, storage), storage
