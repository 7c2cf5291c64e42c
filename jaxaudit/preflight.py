"""What of an Adam step cannot act in a format: found out before a run, from its numbers alone.

    found = preflight(learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1)
    print(found.describe())

Nothing here rounds by a rule of its own: the catalogue's formulas are replayed on the host, without bias
correction, and what comes out is compared with what went in. Where a formula reads one tensor of a 16-bit format,
it is replayed for every positive finite value of the format; thresholds of numbers are found by bisection, over
all doubles or over all bit patterns, of comparisons that rounding to nearest cannot make go up and down. Negative
values behave as positive ones: rounding to nearest, ties to even, is symmetric.

float32 has 2^31 such values. Within a binade the spacing is constant, while what a decay takes away grows with the
value; whether the nearest value is another one then depends on the place in the binade, monotonically, and, in a
tie, on the significand being odd or even. The power of two is a case of its own, as the spacing below it is half as
wide. The first and the last two values of each kind therefore decide what holds for some and for all (`_edges`), and
a bisection in each binade counts (`_count_in_binades`). Where this does not do, `Threshold.meaning` says what was
looked at.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.arithmetics import CATALOGUE, Options, make_step
from jaxaudit.floats import FLOAT32, FORMATS, Format
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.operations import NumpyOperations, numpy_operations
from jaxaudit.scalars import scalars_of
from jaxaudit.steps import Kernel, Scalars, Step, Tensors

#: How much of a part of the step acts: on every normal value, on some, on none; or the part is switched off by its
#: number. Subnormal values are counted apart.
Acts = Literal["always", "for some values", "never", "off"]

#: Formats by the names that PyTorch gives them.
DTYPES: dict[str, Format] = {fmt.name: fmt for fmt in FORMATS.values()}

#: Arithmetics that keep weights and moments in one format and round them to nearest. Others have nothing to look
#: at here: Kahan's buffer keeps what a weight loses, stochastic rounding loses nothing on average, and a float32
#: master is a float32 run.
ARITHMETICS = (
    "torch-cpu-loop",
    "torch-cpu-foreach",
    "torch-cpu-fused",
    "torch-cuda-loop",
    "torch-cuda-foreach",
    "torch-cuda-fused",
    "optax",
    "torchao",
    "anyprecision",
)

Values = NDArray[np.float32]
Mask = NDArray[np.bool_]

_WIDTH = 100

_ZERO = np.zeros(1, np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """A number at which something begins or ceases to act.

    Attributes:
        name: for programs.
        meaning: for people.
        value: the very number, never rounded for display; None where there is none.
        unit: what it counts in; "1" for pure numbers.
        bits: its pattern in the format, where it is a value of the format.
    """

    name: str
    meaning: str
    value: float | None
    unit: str = "1"
    bits: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What becomes of one part of the step.

    Attributes:
        name: of the part, for programs.
        title: of the part, for people.
        acts: how much of it acts.
        reason: why, in a sentence or two.
        thresholds: where it begins or ceases to act, and what would make it act.
        counts: values of the format, and how many of them the part leaves as they are; empty where
            nothing is counted.
        elsewhere: the same counts, with the verdict, under every other arithmetic.
    """

    name: str
    title: str
    acts: Acts
    reason: str
    thresholds: tuple[Threshold, ...] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def threshold(self, name: str) -> Threshold:
        """Return a threshold by its name."""
        return next(each for each in self.thresholds if each.name == name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binade:
    """The smallest updates, as float32 numbers, that change weights of one binade.

    Attributes:
        smallest: smallest weight of it; the first binade of a format is that of its subnormal numbers.
        largest: largest weight of it.
        toward_some: smallest update toward zero that changes a weight of it.
        toward_every: smallest update toward zero that changes every weight of it.
        away_some: as `toward_some`, away from zero.
        away_every: as `toward_every`, away from zero.
        acts: how many of its weights an update of the size of the learning rate changes, whichever way it points.
    """

    smallest: float
    largest: float
    toward_some: float | None
    toward_every: float | None
    away_some: float | None
    away_every: float | None
    acts: Acts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked about.

    Attributes:
        learning_rate: as the optimizer is given it, like all numbers here.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: as the optimizer is given it.
        dtype: format of weights, gradients and moments.
        weight_scale: standard deviation of the weights; None where it is not known.
        arithmetic: name in the catalogue, one of `ARITHMETICS`.
        decoupled: weight decay acts on the weight (AdamW) instead of on the gradient (L2).

    Raises:
        ValueError: something is out of range, or unknown.
    """

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    dtype: str = "bfloat16"
    weight_scale: float | None = None
    arithmetic: str = "torch-cpu-loop"
    decoupled: bool = True

    def __post_init__(self):
        for name in ("learning_rate", "epsilon", "weight_decay"):
            _require(
                self, name, lambda x: 0 <= x < 2**128, "a number of at least 0 and less than 2^128"
            )
        for name in ("beta1", "beta2"):
            _require(self, name, lambda x: 0 <= x < 1, "a number of at least 0 and less than 1")
        if self.weight_scale is not None:
            needed = "a number greater than 0 and less than 2^128"
            _require(self, "weight_scale", lambda x: 0 < x < 2**128, needed)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"the format {self.dtype!r} is unknown: name one of {', '.join(DTYPES)}"
            )
        if self.arithmetic not in ARITHMETICS:
            which = "is not looked at here" if self.arithmetic in CATALOGUE else "is unknown"
            raise ValueError(
                f"the arithmetic {self.arithmetic!r} {which}: name one of {', '.join(ARITHMETICS)}"
            )
        if not self.decoupled and "l2" not in CATALOGUE[self.arithmetic].decays:
            raise ValueError(
                f"{self.arithmetic} has no L2 weight decay: ask about decoupled decay, or name another arithmetic"
            )

    @property
    def fmt(self) -> Format:
        """Return the format of weights and moments."""
        return DTYPES[self.dtype]


def _require(settings: Settings, name: str, holds: Callable[[float], bool], needed: str) -> None:
    value = getattr(settings, name)
    if not (math.isfinite(value) and holds(value)):
        plain = name.replace("_", " ")
        raise ValueError(f"the {plain} is {value}, but {needed} is needed: give another {plain}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preflight:
    """Everything that was found.

    Attributes:
        settings: what was asked about.
        findings: one for each part of the step, in its order.
        binades: the smallest visible updates, by magnitude of the weight, ascending.
    """

    settings: Settings
    findings: tuple[Finding, ...]
    binades: tuple[Binade, ...]

    def finding(self, name: str) -> Finding:
        """Return a finding by its name."""
        return next(each for each in self.findings if each.name == name)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as values that JSON can hold; numbers are the doubles themselves."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "findings": [dataclasses.asdict(each) for each in self.findings],
            "smallest_visible_updates": [dataclasses.asdict(each) for each in self.binades],
        }

    def describe(self) -> str:
        """Say it in plain text of at most 100 columns."""
        return _describe(self)


def preflight(
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    dtype: str = "bfloat16",
    weight_scale: float | None = None,
    arithmetic: str = "torch-cpu-loop",
    decoupled: bool = True,
) -> Preflight:
    """Tell which parts of a step cannot act in a format, why, and from which number on they do.

    Args:
        learning_rate: see `Settings`, also for all others.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: as the optimizer is given it.
        dtype: "bfloat16", "float16" or "float32".
        weight_scale: standard deviation of normally distributed weights.
        arithmetic: one of `ARITHMETICS`.
        decoupled: AdamW's weight decay instead of Adam's.

    Raises:
        ValueError: something is out of range, or unknown.
    """
    settings = Settings(
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        dtype=dtype,
        weight_scale=weight_scale,
        arithmetic=arithmetic,
        decoupled=decoupled,
    )
    bench = _Bench(settings, arithmetic)
    visible = _Visible.of(bench)
    findings = (
        _decoupled_decay(bench) if decoupled else _coupled_decay(bench),
        _exp_avg(bench),
        _exp_avg_sq(bench),
        _epsilon(bench),
        _small_gradients(bench),
        _visible_update(bench, visible),
        _betas(bench),
        _step_counter(bench),
    )
    return Preflight(settings=settings, findings=findings, binades=visible.binades())


# The formulas of the catalogue, one tensor at a time.


class _Bench:
    """Replays parts of a step.

    Args:
        settings: what is asked about.
        arithmetic: name of the one to replay, which may be another than that of the settings.
    """

    def __init__(self, settings: Settings, arithmetic: str):
        self.settings, self.fmt = settings, settings.fmt
        self.arithmetic = CATALOGUE[arithmetic]
        self.patterns = _edges(self.fmt) if self.fmt is FLOAT32 else _positive(self.fmt)
        self.values = floats.decode(self.patterns, self.fmt)
        self.normal = self.patterns >= 1 << self.fmt.significand_bits

    def filled(self, **changes: float) -> tuple[Step, NumpyOperations, Scalars]:
        """Return the step without bias correction and without weight decay, but for what is changed."""
        asked = self.settings
        given = Hyperparameters(
            learning_rate=np.array([changes.get("learning_rate", asked.learning_rate)]),
            beta1=changes.get("beta1", asked.beta1),
            beta2=changes.get("beta2", asked.beta2),
            epsilon=changes.get("epsilon", asked.epsilon),
            weight_decay=changes.get("weight_decay", 0.0),
            count=StepCount(corrects=False),
        )
        step = make_step(self.arithmetic, self.fmt, given, Options(decoupled=asked.decoupled))
        found = scalars_of(step, self.arithmetic.rule, given, [1])
        return step, numpy_operations(flushes=step.flushes), found

    def factor(self, name: str) -> float | None:
        """Return the scalar that a decay multiplies by, as the arithmetic rounds it; None for none, or none finite."""
        found = self.filled(weight_decay=self.settings.weight_decay)[2]
        value = float(found[name][0]) if name in found else math.nan
        return value if math.isfinite(value) else None

    def replay(self, name: str, tensors: Tensors, **changes: float) -> Values:
        """Replay a tensor of the state; tensors that are not given are 0."""
        step, ops, found = self.filled(**changes)
        zero = np.zeros(1, np.float32)
        read = ("param", "grad", "exp_avg", "exp_avg_sq", "new_exp_avg", "new_exp_avg_sq", "tail")
        return step.replay(name, ops, found, dict.fromkeys(read, zero) | dict(tensors))

    def exp_avg(self, old: Values, grad: Values = _ZERO, **changes: float) -> Values:
        """Return the first moment after a gradient."""
        return self.replay("exp_avg", {"exp_avg": old, "grad": grad}, **changes)

    def exp_avg_sq(self, old: Values, grad: Values = _ZERO, **changes: float) -> Values:
        """Return the second moment after a gradient."""
        return self.replay("exp_avg_sq", {"exp_avg_sq": old, "grad": grad}, **changes)

    def weight(self, old: Values, update: Values = _ZERO, **changes: float) -> Values:
        """Return the weight after m/d = `update`; the learning rate and weight decay are applied to it.

        Betas of 1 keep both moments as they are, where the update reads them unrounded; a second moment of 1
        and an epsilon of 0 make the denominator 1. All of this is exact.
        """
        one = np.ones(1, np.float32)
        tensors = {"param": old, "exp_avg": update, "new_exp_avg": update}
        tensors |= {"exp_avg_sq": one, "new_exp_avg_sq": one}
        fixed = {"beta1": 1.0, "beta2": 1.0, "epsilon": 0.0}
        return self.replay("param", tensors, **fixed, **changes)

    def gradient(self, grad: Values, param: Values, *, scalar_loop: bool) -> Values:
        """Return the gradient after L2 decay, as the moments see it."""
        step, ops, found = self.filled(weight_decay=self.settings.weight_decay)
        tail = np.full(1, scalar_loop, np.float32)
        return step.gradient(Kernel(step, ops, found, {"grad": grad, "param": param, "tail": tail}))

    def denominator(self, root: Values) -> Values:
        """Return the rounded sum of a root, corrected for its bias, and epsilon (`formulas.denominator`)."""
        step, ops, found = self.filled()
        kernel = Kernel(step, ops, found, {})
        return kernel.rounded(
            ops.add(root, found["epsilon"]), "the denominator", step.exp_avg_sq_format
        )


# Values of a format, and bisection.


def _positive(fmt: Format) -> floats.Patterns:
    """Return the pattern of every positive finite value, ascending."""
    return np.arange(1, fmt.infinity).astype(fmt.pattern_dtype)


def _edges(fmt: Format) -> floats.Patterns:
    """Return, of each binade, the power of two, and the first and last two patterns beside it."""
    starts = np.arange(0, fmt.infinity, 1 << fmt.significand_bits)
    around = np.array([0, 1, 2, -2, -1])
    found = np.unique(starts[:, None] + around % (1 << fmt.significand_bits))
    return found[found > 0].astype(fmt.pattern_dtype)


def _boundary(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Return the neighbouring doubles between which a comparison changes.

    Args:
        holds: what is the same on all of one side, and otherwise on all of the other.
        low: a double of one side, at least 0.
        high: a larger one, taken to be of the other side.
    """
    lower, upper = (int(np.float64(x).view(np.int64)) for x in (low, high))
    first = holds(low)
    while upper - lower > 1:
        middle = (lower + upper) // 2
        if holds(float(np.int64(middle).view(np.float64))) == first:
            lower = middle
        else:
            upper = middle
    below, above = (float(np.int64(x).view(np.float64)) for x in (lower, upper))
    return below, above


def _narrowing(
    acts: Callable[[float, Values], Mask], values: Values, *, every: bool
) -> Callable[[float], bool]:
    """Tell of a number whether it acts on every value, or on some, while a bisection closes in on it.

    Values that cannot matter between the numbers left are dropped: where some value did not act, those that
    did will act on its other side as well; where some did, those that did not never will.
    """
    kept = values

    def holds(number: float) -> bool:
        nonlocal kept
        mask = acts(number, kept)
        found = bool(mask.all() if every else mask.any())
        if found != every:
            kept = kept[mask != every]
        return found

    return holds


def _largest(
    acts: Callable[[float, Values], Mask], values: Values, *, every: bool, below: float
) -> float | None:
    """Return the largest double under a limit that acts, larger ones acting less; None where not even 0 does."""
    holds = _narrowing(acts, values, every=every)
    if not holds(0.0):
        return None
    return _boundary(holds, 0.0, below)[0]


def _smallest(
    acts: Callable[[float, Values], Mask], values: Values, *, every: bool, limit: float = 2.0**100
) -> float | None:
    """Return the smallest double that acts, larger ones acting more; None where not even a limit does."""
    holds = _narrowing(acts, values, every=every)
    if holds(0.0):
        return 0.0
    if not _narrowing(acts, values, every=every)(limit):
        return None
    return _boundary(holds, 0.0, limit)[1]


def _first_patterns(
    acts: Callable[[NDArray[np.int64]], Mask], count: int, end: int
) -> NDArray[np.int64]:
    """Return the smallest patterns that act, larger ones acting more, one for each of several bisections.

    Args:
        acts: tells for an array of patterns of shape (count,) which act.
        count: how many bisections.
        end: what is returned where no pattern below it acts.
    """
    low, high = np.zeros(count, np.int64), np.full(count, end, np.int64)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        hit = acts(np.maximum(middle, 1))
        low, high = np.where(hit, low, middle), np.where(hit, middle, high)
    return high


@dataclasses.dataclass(frozen=True)
class _Extent:
    """How many positive values of a format stay as they are.

    Attributes:
        normal: normal values that do.
        subnormal: subnormal values that do.
        largest: pattern of the largest value that does; 0 for none.
        changed: pattern of the smallest value that does not; infinity for none.
    """

    normal: int
    subnormal: int
    largest: int
    changed: int

    def counts(self, fmt: Format) -> dict[str, int]:
        """Return the counts with what they are counts of."""
        first_normal = 1 << fmt.significand_bits
        return {
            "normal": fmt.infinity - first_normal,
            "normal_unchanged": self.normal,
            "subnormal": first_normal - 1,
            "subnormal_unchanged": self.subnormal,
        }

    def acts(self, fmt: Format) -> Acts:
        """Return the verdict, which is about the normal values."""
        if self.normal == fmt.infinity - (1 << fmt.significand_bits):
            return "never"
        return "always" if self.normal == 0 else "for some values"


def _extent(bench: _Bench, after: Callable[[Values], Values]) -> _Extent:
    """Count the values that a part of the step leaves as they are."""
    fmt = bench.fmt
    if fmt is FLOAT32:
        return _count_in_binades(after)
    same = after(bench.values) == bench.values
    patterns = bench.patterns.astype(np.int64)
    return _Extent(
        int(np.sum(same & bench.normal)),
        int(np.sum(same & ~bench.normal)),
        int(patterns[same].max(initial=0)),
        int(patterns[~same].min(initial=fmt.infinity)),
    )


def _count_in_binades(after: Callable[[Values], Values]) -> _Extent:
    """Count float32 values that a decay leaves as they are.

    The odd ones of a binade that stay are the first ones of it, and so are the even ones beside the power of two
    (see above): where they end is found by bisection, in all binades at once.
    """

    def same(patterns: NDArray[np.int64]) -> Mask:
        values = floats.decode(patterns.astype(np.uint32), FLOAT32)
        return after(values) == values

    starts = np.arange(0, FLOAT32.infinity, 1 << 23)
    first = np.concatenate([starts + 1, starts + 2])
    size = np.repeat([1 << 22, (1 << 22) - 1], starts.size)
    low, high = np.zeros(first.size, np.int64), size.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        hit, open_ = same(first + 2 * np.minimum(middle, size - 1)), low < high
        low, high = np.where(open_ & hit, middle + 1, low), np.where(open_ & ~hit, middle, high)
    powers = same(starts[1:])
    last = np.where(low > 0, first + 2 * (low - 1), 0)
    next_ = np.where(low < size, first + 2 * low, FLOAT32.infinity)
    subnormal = first < 1 << 23
    return _Extent(
        int(np.sum(low[~subnormal]) + np.sum(powers)),
        int(np.sum(low[subnormal])),
        int(max(last.max(), starts[1:][powers].max(initial=0))),
        int(min(next_.min(), starts[1:][~powers].min(initial=FLOAT32.infinity))),
    )


def _value(pattern: int, fmt: Format) -> float:
    return float(floats.decode(np.array([pattern], fmt.pattern_dtype), fmt)[0])


def _bits(pattern: int, fmt: Format) -> str:
    return f"0x{pattern:0{fmt.width // 4}x}"


def _number(
    name: str, meaning: str, value: float | None, unit: str = "1", fmt: Format | None = None
) -> Threshold:
    """Return a threshold, which is none where it is not finite; with a format, the pattern of the value in it."""
    bits, value = None, value if value is not None and math.isfinite(value) else None
    if fmt is not None and value is not None:
        bits = _bits(int(floats.encode(np.array([value], np.float32), fmt)[0]), fmt)
    return Threshold(name=name, meaning=meaning, value=value, unit=unit, bits=bits)


def _pattern(name: str, meaning: str, pattern: int, fmt: Format, unit: str) -> Threshold:
    """Return a threshold that is a value of the format; none where the pattern is zero's or infinity's."""
    if pattern in (0, fmt.infinity):
        return Threshold(name=name, meaning=meaning, value=None, unit=unit)
    bits = _bits(pattern, fmt)
    return Threshold(name=name, meaning=meaning, value=_value(pattern, fmt), unit=unit, bits=bits)


# Findings.


def _others(
    bench: _Bench, outcome: Callable[[_Bench], _Extent], factor: str
) -> dict[str, dict[str, Any]]:
    """Return what becomes of a decay under every other arithmetic, and the factor it multiplies by, if it does."""
    found = {}
    for name in ARITHMETICS:
        if CATALOGUE[name] is not bench.arithmetic:
            other = _Bench(bench.settings, name)
            extent = outcome(other)
            found[name] = {"acts": extent.acts(bench.fmt), "factor": other.factor(factor)}
            found[name] |= extent.counts(bench.fmt)
    return found


def _users(bench: _Bench, factor: str, rounded: float, exact: float) -> str:
    """Name the arithmetics that multiply by a factor rounded to the format, where that is another float32 number."""
    names = [name for name in ARITHMETICS if _Bench(bench.settings, name).factor(factor) == rounded]
    if not names or rounded == float(np.float32(exact)):
        return ""
    return f" {' and '.join(names)} {'multiplies' if len(names) == 1 else 'multiply'} by that."


def _decayed(bench: _Bench) -> _Extent:
    return _extent(
        bench, lambda values: bench.weight(values, weight_decay=bench.settings.weight_decay)
    )


def _decoupled_decay(bench: _Bench) -> Finding:
    """AdamW's weight decay: which weights it changes."""
    asked, fmt = bench.settings, bench.fmt
    rate, decay = asked.learning_rate, asked.weight_decay
    extent = _decayed(bench)
    counts, acts = extent.counts(fmt), extent.acts(fmt)
    if rate * decay == 0:
        acts, reason = "off", "The learning rate times weight decay is 0."
    else:
        reason = {
            "never": f"A weight less lr*weight_decay of itself rounds back to itself for {_share(counts)} of "
            f"{fmt.name}: decay does nothing, however long the run.",
            "for some values": f"A weight less lr*weight_decay of itself rounds back to itself for {_share(counts)} "
            f"of {fmt.name}: these weights do not decay.",
            "always": "A weight less lr*weight_decay of itself is another number for every normal weight.",
        }[acts]
    factor = 1 - rate * decay
    rounded = float(floats.round_scalar(factor, fmt))
    if rounded == 1 and rate * decay != 0:
        reason += f" The factor itself, {factor!r}, is 1 in {fmt.name}."
        reason += _users(bench, "decay", rounded, factor)
    return Finding(
        name="weight_decay",
        title="decoupled weight decay",
        acts=acts,
        reason=reason,
        thresholds=(
            _number("factor", "1 - lr*weight_decay, in double", factor),
            _number("factor_in_format", f"the same, rounded to {fmt.name}", rounded, fmt=fmt),
            *_decay_thresholds(bench),
        ),
        counts=counts,
        elsewhere=_others(bench, _decayed, "decay"),
    )


def _decay_thresholds(bench: _Bench) -> list[Threshold]:
    """Find the smallest products lr*weight_decay, and decays at this learning rate, that change weights."""

    def by_decay(decay: float, values: Values) -> Mask:
        return bench.weight(values, weight_decay=decay) != values

    def by_product(product: float, values: Values) -> Mask:
        return bench.weight(values, learning_rate=1.0, weight_decay=product) != values

    rate, found = bench.settings.learning_rate, []
    # A step's decay depends on the product alone where its factor is computed in double.
    if "decay" in bench.filled(weight_decay=1.0)[2]:
        for name, values, every, which in _some_and_every(bench):
            value = _smallest(by_product, values, every=every, limit=1.0)
            text = f"smallest lr*weight_decay that changes {which}"
            found.append(_number(f"product_{name}", text, value))
    for name, values, every, which in _some_and_every(bench) if rate else ():
        # 1/rate takes off the whole weight; beyond float32's range there is no decay.
        value = _smallest(by_decay, values, every=every, limit=min(1 / rate, 2.0**127))
        text = f"smallest weight decay that, at this learning rate, changes {which}"
        found.append(_number(f"weight_decay_{name}", text, value))
    return found


def _some_and_every(bench: _Bench) -> tuple[tuple[str, Values, bool, str], ...]:
    return (
        ("some", bench.values, False, "some weight"),
        ("every", bench.values[bench.normal], True, "every normal weight"),
    )


def _share(counts: Mapping[str, int]) -> str:
    return (
        f"{counts['normal_unchanged']:,} of {counts['normal']:,} normal and "
        f"{counts['subnormal_unchanged']:,} of {counts['subnormal']:,} subnormal values"
    )


def _coupled_decay(bench: _Bench) -> Finding:
    """Adam's weight decay: how small against the gradient a weight may be and still change it.

    For every normal gradient the smallest weight that does is found by bisection, of its own sign and of the
    other, in the vectorised loop and in the scalar one.
    """
    fmt, decay = bench.fmt, bench.settings.weight_decay
    normal = bench.patterns[bench.normal]
    grads = floats.decode(normal, fmt)
    least, all_of_them = math.inf, 0.0
    for sign in (1, -1) if decay else ():
        for scalar_loop in (False, True):

            def acts(patterns: NDArray[np.int64], sign=sign, scalar_loop=scalar_loop) -> Mask:
                weights = floats.decode(patterns.astype(fmt.pattern_dtype), fmt)
                signed = np.copysign(weights, np.float32(sign))
                return bench.gradient(grads, signed, scalar_loop=scalar_loop) != grads

            found = _first_patterns(acts, grads.size, fmt.infinity)
            ratios = _ratios(found, grads.astype(np.float64), fmt)
            # Where a subnormal weight suffices, the smallest normal one is the first to count.
            first = np.maximum(found, 1 << fmt.significand_bits)
            least = min(least, float(_ratios(first, grads.astype(np.float64), fmt).min()))
            known = np.isfinite(ratios) & (found >= 1 << fmt.significand_bits)
            all_of_them = max(all_of_them, float(ratios[known].max(initial=0)))
    acts_: Acts = "off" if not decay else "never" if math.isinf(least) else "for some values"
    reason = {
        "off": "Weight decay is 0.",
        "never": "grad + weight_decay*param rounds back to grad for every pair of normal values.",
        "for some values": f"grad + weight_decay*param rounds back to grad where |param| is less than {least:.4g} "
        f"times |grad|, and is another number where it is at least {all_of_them:.4g} times (normal values); in between, the "
        "significands decide.",
    }[acts_]
    ratio = None if math.isinf(least) else least
    some = _number("ratio_some", "smallest |param|/|grad| at which decay changes a gradient", ratio)
    every = _number(
        "ratio_every",
        "smallest |param|/|grad| from which it changes every gradient",
        None if ratio is None else all_of_them,
    )
    return Finding(
        name="weight_decay",
        title="L2 weight decay",
        acts=acts_,
        reason=reason,
        thresholds=(some, every),
    )


def _ratios(found: NDArray[np.int64], others: NDArray[np.float64], fmt: Format) -> NDArray[Any]:
    """Divide the values of patterns by other values; infinite where there is no pattern."""
    known = np.minimum(found, fmt.infinity - 1).astype(fmt.pattern_dtype)
    values = floats.decode(known, fmt).astype(np.float64)
    return np.where(found < fmt.infinity, values / others, np.inf)


def _first_moment(bench: _Bench) -> _Extent:
    return _extent(bench, bench.exp_avg)


def _second_moment(bench: _Bench) -> _Extent:
    return _extent(bench, bench.exp_avg_sq)


def _exp_avg(bench: _Bench) -> Finding:
    """The first moment's decay."""
    fmt, extent = bench.fmt, _first_moment(bench)
    counts, acts = extent.counts(fmt), extent.acts(fmt)
    reason = {
        "never": f"Without a gradient exp_avg rounds back to itself for {_share(counts)} of {fmt.name}: it never "
        "forgets.",
        "for some values": f"Without a gradient exp_avg rounds back to itself for {_share(counts)} of {fmt.name}.",
        "always": "Without a gradient every normal exp_avg falls.",
    }[acts]

    def falls(beta1: float, values: Values) -> Mask:
        return bench.exp_avg(values, beta1=beta1) < values

    return Finding(
        name="exp_avg_decay",
        title="decay of exp_avg",
        acts=acts,
        reason=reason + _rest(extent, fmt),
        thresholds=(*_beta_thresholds(bench, "beta1", falls), *_resting(extent, fmt)),
        counts=counts,
        elsewhere=_others(bench, _first_moment, "beta1"),
    )


def _exp_avg_sq(bench: _Bench) -> Finding:
    """The second moment's decay, and how large a gradient must be to raise it."""
    fmt, extent = bench.fmt, _second_moment(bench)
    counts, acts = extent.counts(fmt), extent.acts(fmt)
    some, every, how_many = _rising(bench)
    reason = {
        "never": f"Without a gradient exp_avg_sq rounds back to itself for {_share(counts)} of {fmt.name}: it can "
        "rise but never fall, and gradients that were once large keep all later updates small.",
        "for some values": f"Without a gradient exp_avg_sq rounds back to itself for {_share(counts)} of {fmt.name}: "
        "there it can rise but not fall.",
        "always": "Without a gradient every normal exp_avg_sq falls.",
    }[acts]
    reason += _rest(extent, fmt)
    if acts != "always" and math.isfinite(some):
        reason += (
            f" It rises only where |grad| is at least {some:.4g} (for some values) to {every:.4g} (for every value) "
            "times its root."
        )

    def falls(beta2: float, values: Values) -> Mask:
        return bench.exp_avg_sq(values, beta2=beta2) < values

    over = f" (over {how_many:,} values)"
    return Finding(
        name="exp_avg_sq_decay",
        title="decay of exp_avg_sq",
        acts=acts,
        reason=reason,
        thresholds=(
            *_beta_thresholds(bench, "beta2", falls),
            *_resting(extent, fmt),
            _number(
                "rise_some",
                "smallest |grad|/sqrt(exp_avg_sq) that raises some value" + over,
                some if math.isfinite(some) else None,
            ),
            _number(
                "rise_every",
                "smallest |grad|/sqrt(exp_avg_sq) from which every value rises" + over,
                every if math.isfinite(some) else None,
            ),
        ),
        counts=counts,
        elsewhere=_others(bench, _second_moment, "beta2"),
    )


def _rest(extent: _Extent, fmt: Format) -> str:
    """Say where a moment comes to rest that falls from above.

    Rounding is monotone: what is larger than a value that stays cannot fall below it.
    """
    if extent.largest == 0 or extent.normal:
        return ""
    bits = _bits(extent.largest, fmt)
    return f" Falling from above it comes to rest at {_value(extent.largest, fmt):.4g} ({bits})."


def _resting(extent: _Extent, fmt: Format) -> tuple[Threshold, Threshold]:
    return (
        _pattern(
            "largest_unchanged", "largest value that cannot fall", extent.largest, fmt, "value"
        ),
        _pattern("smallest_falling", "smallest value that falls", extent.changed, fmt, "value"),
    )


def _beta_thresholds(
    bench: _Bench, name: str, falls: Callable[[float, Values], Mask]
) -> tuple[Threshold, ...]:
    """Find the largest betas, below 1, with which a moment still falls where no gradient comes."""
    return tuple(
        _number(
            f"{name}_{which}",
            f"largest {name} with which {text.replace('weight', 'value')} falls",
            _largest(falls, values, every=every, below=1.0),
        )
        for which, values, every, text in _some_and_every(bench)
    )


def _rising(bench: _Bench) -> tuple[float, float, int]:
    """Return the smallest |grad|/sqrt(exp_avg_sq) that raises some and every normal value, and of how many.

    Gradients whose square overflows are left out, and second moments that no other gradient raises.
    """
    fmt = bench.fmt
    patterns = bench.patterns[bench.normal].astype(np.int64)
    if fmt is FLOAT32:  # two binades, as a root halves the exponent, at every 2^12th significand
        one = FLOAT32.bias << 23
        patterns = np.unique(np.concatenate([patterns, np.arange(one, one + (1 << 24), 1 << 12)]))
    old = floats.decode(patterns.astype(fmt.pattern_dtype), fmt)

    def rises(grads: NDArray[np.int64]) -> Mask:
        return bench.exp_avg_sq(old, floats.decode(grads.astype(fmt.pattern_dtype), fmt)) > old

    end = (fmt.bias + (fmt.bias + 1) // 2) << fmt.significand_bits
    found = _first_patterns(rises, old.size, end)
    ratios = _ratios(found, np.sqrt(old.astype(np.float64)), fmt)[found < end]
    if ratios.size == 0:
        return math.inf, math.inf, 0
    return float(ratios.min()), float(ratios.max()), ratios.size


def _epsilon(bench: _Bench) -> Finding:
    """What is left of epsilon in the format, and up to which root it counts."""
    asked, fmt = bench.settings, bench.fmt
    step, _, found = bench.filled()
    kept = float(found["epsilon"][0])
    # Where operators do not round, the root is a float32 number.
    lattice = fmt if step.rounds_operators else FLOAT32
    patterns = (_edges if lattice is FLOAT32 else _positive)(lattice).astype(np.int64)
    roots = floats.decode(patterns.astype(lattice.pattern_dtype), lattice)
    lost = bench.denominator(roots) == roots
    alone = float(bench.denominator(_ZERO)[0])
    first_lost = int(patterns[lost].min(initial=lattice.infinity))
    last_kept = int(patterns[~lost].max(initial=0))
    acts: Acts = "always" if not lost.any() else "never" if lost.all() else "for some values"
    reason = f"It is {kept!r} where it is added."
    if acts == "for some values":
        reason += (
            f" Roots above {_value(last_kept, lattice):.9g} stay as they are when it is added; "
            "there it has no influence."
        )
    if alone == 0:
        reason = _without_epsilon(bench, kept)
    if asked.epsilon == 0:
        acts = "off"

    def survives(epsilon: float, values: Values) -> Mask:
        changed = dataclasses.replace(asked, epsilon=epsilon)
        return _Bench(changed, bench.arithmetic.name).denominator(values) > 0

    text = "smallest epsilon with which no denominator is 0"
    return Finding(
        name="epsilon",
        title="epsilon",
        acts=acts,
        reason=reason,
        thresholds=(
            _number("epsilon_in_format", "epsilon where it is added", kept, fmt=lattice),
            _number("epsilon_smallest", text, _smallest(survives, _ZERO, every=False)),
            _pattern(
                "first_lost", "smallest root that it does not change", first_lost, lattice, "root"
            ),
            _pattern("last_kept", "largest root that it changes", last_kept, lattice, "root"),
        ),
    )


def _without_epsilon(bench: _Bench, kept: float) -> str:
    """Say what happens to weights whose second moment is 0 when epsilon is no help."""
    state = {"param": np.ones(1, np.float32)}
    untouched = float(bench.replay("param", state)[0])
    state |= dict.fromkeys(("exp_avg", "new_exp_avg"), bench.values[:1])
    touched = float(bench.replay("param", state)[0])
    becomes = {True: "NaN", False: "unchanged"}[math.isnan(untouched)]
    return (
        f"It is {kept!r} where it is added, and the denominator is 0 where exp_avg_sq is 0: a weight whose exp_avg is 0 "
        f"as well becomes {becomes}, and one whose exp_avg is {_value(1, bench.fmt):.4g} becomes {touched}."
    )


def _small_gradients(bench: _Bench) -> Finding:
    """Gradients whose square leaves nothing in the second moment."""
    fmt, asked = bench.fmt, bench.settings

    def decoded(patterns: NDArray[np.int64]) -> Values:
        return floats.decode(patterns.astype(fmt.pattern_dtype), fmt)

    def second(patterns: NDArray[np.int64]) -> Mask:
        return bench.exp_avg_sq(_ZERO, decoded(patterns)) != 0

    def first(patterns: NDArray[np.int64]) -> Mask:
        return bench.exp_avg(_ZERO, decoded(patterns)) != 0

    squared, plain = (int(_first_patterns(f, 1, fmt.infinity)[0]) for f in (second, first))
    below, alone = _value(squared - 1, fmt), float(bench.denominator(_ZERO)[0])
    size = f"lr*grad/{alone:.4g}, up to {asked.learning_rate * below / alone:.4g}" if alone else ""
    reason = (
        f"(1 - beta2) * grad^2 rounds to 0 where |grad| is {below:.4g} or less: exp_avg_sq stays 0, and the first "
        f"update is {size or 'a division by 0'}."
    )
    acts: Acts = "for some values" if squared > 1 else "always"
    return Finding(
        name="small_gradients",
        title="small gradients",
        acts=acts,
        reason=reason if squared > 1 else "Every gradient leaves its square in exp_avg_sq.",
        thresholds=(
            _pattern(
                "exp_avg_sq", "smallest |grad| that exp_avg_sq sees", squared, fmt, "gradient"
            ),
            _pattern("exp_avg", "smallest |grad| that exp_avg sees", plain, fmt, "gradient"),
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Visible:
    """The smallest updates that change weights, and what one of the size of the learning rate changes.

    All are of the shape of the bench's values; updates are float32 patterns, infinity's where there is none.
    """

    bench: _Bench
    toward: NDArray[np.int64]
    away: NDArray[np.int64]
    toward_moves: Mask
    away_moves: Mask

    @classmethod
    def of(cls, bench: _Bench) -> "_Visible":
        """Replay the addition of an update to every weight, by bisection over the float32 updates."""
        values, one = bench.values, np.ones(1, np.float32)

        def toward(patterns: NDArray[np.int64]) -> Mask:
            update = floats.decode(patterns.astype(np.uint32), FLOAT32)
            return bench.weight(values, update, learning_rate=1.0) != values

        def away(patterns: NDArray[np.int64]) -> Mask:
            update = floats.decode(patterns.astype(np.uint32), FLOAT32)
            return bench.weight(values, -update, learning_rate=1.0) != values

        least, least_away = (
            _first_patterns(f, values.size, FLOAT32.infinity) for f in (toward, away)
        )
        moves, moves_away = (bench.weight(values, sign * one) != values for sign in (1, -1))
        return cls(bench, least, least_away, moves, moves_away)

    def binades(self) -> tuple[Binade, ...]:
        """Gather them by binade."""
        fmt = self.bench.fmt
        of_each = self.bench.patterns >> fmt.significand_bits
        starts = np.flatnonzero(np.diff(of_each, prepend=-1))
        bounds = zip(starts, [*starts[1:], of_each.size], strict=True)
        return tuple(self._binade(slice(*each)) for each in bounds)

    def _binade(self, part: slice) -> Binade:
        moves = (self.toward_moves & self.away_moves)[part]
        any_moves = (self.toward_moves | self.away_moves)[part].any()
        values = self.bench.values[part]
        return Binade(
            smallest=float(values[0]),
            largest=float(values[-1]),
            toward_some=_update(self.toward[part].min()),
            toward_every=_update(self.toward[part].max()),
            away_some=_update(self.away[part].min()),
            away_every=_update(self.away[part].max()),
            acts="always" if moves.all() else "for some values" if any_moves else "never",
        )


def _update(pattern: int) -> float | None:
    return None if pattern == FLOAT32.infinity else _value(int(pattern), FLOAT32)


def _visible_update(bench: _Bench, visible: _Visible) -> Finding:
    """Weights that an update of the size of the learning rate, |m/d| = 1, changes."""
    fmt, rate = bench.fmt, bench.settings.learning_rate
    patterns = bench.patterns.astype(np.int64)
    whichever = visible.toward_moves & visible.away_moves
    either = visible.toward_moves | visible.away_moves
    # Between the edges of a binade nothing else happens than at them: the pattern before is the last one.
    every = int(patterns[~whichever].min(initial=fmt.infinity)) - 1
    some = int(patterns[either].max(initial=0))
    acts: Acts = "off" if rate == 0 else "for some values" if either.any() else "never"
    if either.any() and every == fmt.infinity - 1:
        acts = "always"
    reason = {
        "off": "The learning rate is 0.",
        "never": f"An update of this size, |m/d| being 1, changes no weight of {fmt.name}.",
        "always": f"An update of this size, |m/d| being 1, changes every weight of {fmt.name}.",
        "for some values": f"An update of this size, |m/d| being 1, changes every weight up to "
        f"{_value(every, fmt):.9g} in magnitude, and none beyond {_value(some, fmt):.9g}.",
    }[acts]
    scaled, sentence = _scaled(bench, visible)
    return Finding(
        name="visible_update",
        title=f"update as large as the learning rate, {rate!r}",
        acts=acts,
        reason=reason + sentence,
        thresholds=(
            _pattern(
                "weight_every", "largest weight up to which it changes all", every, fmt, "weight"
            ),
            _pattern("weight_some", "largest weight that it changes", some, fmt, "weight"),
            *_rates_at_one(bench),
            *scaled,
        ),
    )


def _rates_at_one(bench: _Bench) -> tuple[Threshold, ...]:
    """Find the smallest learning rates that change a weight of 1, where normalisation layers begin."""
    one, found = np.ones(1, np.float32), []
    for name, sign in (("toward", 1), ("away", -1)):

        def acts(rate: float, values: Values, update: Values = sign * one) -> Mask:
            return bench.weight(values, update, learning_rate=rate) != values

        way = {"toward": "toward zero", "away": "away from zero"}[name]
        text = f"smallest learning rate that changes a weight of 1, {way}"
        found.append(_number(f"rate_at_one_{name}", text, _smallest(acts, one, every=True)))
    return tuple(found)


def _scaled(bench: _Bench, visible: _Visible) -> tuple[tuple[Threshold, ...], str]:
    """Weigh the weights as normally distributed ones, rounded to the format, are distributed."""
    scale = bench.settings.weight_scale
    if scale is None:
        return (), ""
    mass, one = _masses(bench, scale), np.ones(1, np.float32)
    neither = float(mass[~(visible.toward_moves | visible.away_moves)].sum())
    not_both = float(mass[~(visible.toward_moves & visible.away_moves)].sum())

    def half_move(rate: float) -> bool:
        moves = bench.weight(bench.values, one, learning_rate=rate) != bench.values
        moves &= bench.weight(bench.values, -one, learning_rate=rate) != bench.values
        return 1 - mass[~moves].sum() >= 0.5

    half = _boundary(half_move, 0.0, 2.0**100)[1] if half_move(2.0**100) else None
    text = f" Of weights drawn from a normal distribution of scale {scale!r}, {_percent(neither)} stay as they are"
    if _percent(neither) != _percent(not_both):
        text += f" whichever way it points, {_percent(not_both)} at least one way"
    return (
        _number("share_neither", "share of weights that it changes neither way", neither),
        _number("share_not_both", "share of weights that it does not change both ways", not_both),
        _number(
            "rate_for_half", "smallest learning rate that changes half of them both ways", half
        ),
    ), text + "."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _masses(bench: _Bench, scale: float) -> NDArray[np.float64]:
    """Return the probability of each value, and of its negative, among normally distributed ones of a scale.

    Each value stands for what rounds to it: from the midpoint below to the one above. In float32 only the values at
    the edges of a binade are at hand: the first odd one stands for half of the binade, and the first even one beside
    the power of two for the other half, which is off by less than 2^-21 of the binade's probability.
    """
    if bench.fmt is FLOAT32:
        starts = np.arange(0, FLOAT32.infinity, 1 << 23)
        bounds = np.concatenate([floats.decode(starts.astype(np.uint32), FLOAT32), [2.0**128]])
        first = np.diff(_below(bounds, scale))
        mass = np.zeros(bench.values.size)
        place = np.searchsorted(bench.patterns, starts + 1)
        mass[place] = mass[place + 1] = first / 2
        return mass
    values = bench.values.astype(np.float64)
    infinite = 2.0 ** (bench.fmt.bias + 1)
    ends = np.concatenate([[0.0], values, [infinite]])
    return np.diff(_below((ends[1:] + ends[:-1]) / 2, scale))


def _below(bounds: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Return the probabilities that normally distributed values of a scale are less in magnitude."""
    return np.array([math.erf(each / scale / math.sqrt(2)) for each in bounds.tolist()])


def _betas(bench: _Bench) -> Finding:
    """The decays rounded to the format, as implementations do that turn scalars into tensors."""
    fmt, asked = bench.fmt, bench.settings
    rounded = {
        name: float(floats.round_scalar(getattr(asked, name), fmt)) for name in ("beta1", "beta2")
    }
    ones = [name for name, value in rounded.items() if value == 1]
    reason = ", ".join(f"{name} becomes {value!r}" for name, value in rounded.items()) + "."
    if ones:
        reason += f" A decay by {' and '.join(ones)} is then none."
    reason += _users(bench, "beta2", rounded["beta2"], asked.beta2)
    changed = any(value != getattr(asked, name) for name, value in rounded.items())
    return Finding(
        name="betas",
        title=f"betas, if rounded to {fmt.name}",
        acts="never" if ones else "always",
        reason=reason if changed else "Both are exact.",
        thresholds=tuple(
            _number(f"{name}_in_format", f"{name} rounded to {fmt.name}", value, fmt=fmt)
            for name, value in rounded.items()
        ),
    )


def _step_counter(bench: _Bench) -> Finding:
    """The count at which a counter kept in the format sticks, and the bias corrections that stay."""
    fmt, asked = bench.fmt, bench.settings
    counts = bench.values[bench.values >= 1]
    after = floats.round_to(counts + np.float32(1), fmt)
    limit = float(counts[after == counts][0])
    corrections = [1 - beta**limit for beta in (asked.beta1, asked.beta2)]
    root = math.sqrt(corrections[1])
    factor = root / corrections[0]
    return Finding(
        name="step_counter",
        title=f"step counter, if kept in {fmt.name}",
        acts="for some values",
        reason=f"{limit:,.0f} + 1 rounds back to {limit:,.0f}. Bias corrections then stay at {corrections[0]:.4g} and "
        f"{root:.4g}, and every later update is {factor:.4g} times as large as if it went on. PyTorch counts in float32; "
        "other optimizers, and checkpoints cast to another format, may not.",
        thresholds=(
            _number("limit", "largest count", limit, "steps", fmt),
            _number("bias_correction1", "1 - beta1^t at it", corrections[0]),
            _number("bias_correction2_sqrt", "sqrt(1 - beta2^t) at it", root),
        ),
    )


# Text.


def _describe(found: Preflight) -> str:
    asked = found.settings
    decay = f"{asked.weight_decay!r} ({'decoupled' if asked.decoupled else 'L2'})"
    lines = [
        f"Pre-flight   weights, gradients and moments in {asked.dtype}, under {asked.arithmetic}",
        f"Numbers      learning rate {asked.learning_rate!r}, betas {asked.beta1!r} and {asked.beta2!r},",
        f"             eps {asked.epsilon!r}, weight decay {decay}",
    ]
    title = max(len(each.title) for each in found.findings)
    lines += ["", f"{'part of the step':<{title}}  acts"]
    lines += [f"{each.title:<{title}}  {each.acts}" for each in found.findings]
    for each in found.findings:
        lines += ["", *_paragraph(each)]
    lines += ["", *_table(found)]
    return "\n".join(lines)


def _paragraph(finding: Finding) -> list[str]:
    """Return a finding's reason, its thresholds, and what is otherwise elsewhere."""
    text = f"{finding.title[0].upper()}{finding.title[1:]}: {finding.acts}. {finding.reason}"
    lines = textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
    for each in finding.thresholds:
        value = "none" if each.value is None else repr(each.value)
        bits = f" ({each.bits})" if each.bits else ""
        lines += textwrap.wrap(
            f"  {value + bits:<34}  {each.meaning}",
            _WIDTH,
            subsequent_indent=" " * 38,
            break_on_hyphens=False,
        )
    differs = [
        f"{name}{_factor(other)}: {other['acts']}, {other['normal_unchanged']:,} of {other['normal']:,} normal values "
        "stay"
        for name, other in finding.elsewhere.items()
        if other["normal_unchanged"] != finding.counts["normal_unchanged"]
    ]
    if differs:
        joined = f"  Otherwise under {'; '.join(differs)}."
        lines += textwrap.wrap(joined, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _factor(other: Mapping[str, Any]) -> str:
    return "" if other["factor"] is None else f" (factor {other['factor']!r})"


def _table(found: Preflight) -> list[str]:
    """Return the smallest visible updates of the binades around those where the learning rate ceases to act."""
    head = (
        "weights from",
        "toward zero: some",
        "every",
        "away: some",
        "every",
        "changed by it",
    )
    rows: list[tuple[str, ...]] = [head]
    for each in found.binades:
        if _is_of_interest(each, found):
            updates = (each.toward_some, each.toward_every, each.away_some, each.away_every)
            rows.append((f"{each.smallest:.6g}", *(_short(x) for x in updates), each.acts))
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    text = (
        "Smallest update that changes some weight, and every weight, of a binade; and whether one as large as "
        "the learning rate changes them, whichever way it points. (JSON: all binades, numbers in full.)"
    )
    return [
        *textwrap.wrap(text, _WIDTH),
        *(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ),
    ]


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _is_of_interest(binade: Binade, found: Preflight) -> bool:
    """Keep binades near the limit of the learning rate, that of 1, and those of weights of the scale given."""
    limit = found.finding("visible_update").threshold("weight_every").value
    scale = found.settings.weight_scale
    near = limit is not None and limit / 16 < binade.largest and binade.smallest <= 16 * limit
    return near or any(
        each is not None and binade.smallest <= each <= binade.largest for each in (scale, 1.0)
    )
