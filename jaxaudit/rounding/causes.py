"""Why results differ from what was asked for, shown by computing them again in NumPy under hypotheses.

A hypothesis is a `Trait` of an implementation: it contracts products, it takes subnormal numbers for zero, it
rounds Python numbers first. The expression that was run is computed anew under sets of traits, the smallest
first, until one gives the bits that were found on every sample; another set is sought that gives the bits that
were wanted. What the two sets do not share is the cause, less everything without which the bits that were found
still turn into those that were wanted.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Format, Patterns
from jaxaudit.operations import FlushingNumpyOperations, NumpyOperations, Value
from jaxaudit.rounding.checks import Check, Platform
from jaxaudit.rounding.modes import COMPILED, JAXAUDIT, PYTORCH, REDUCED, observed_format

Trait = Literal[
    "flushed",  # float32 arithmetic takes subnormal operands and results for zero
    "contracted",  # a product and a sum round once, wherever they meet; of two products, the first
    "kernel contracted",  # only products within a kernel of PyTorch's: those that a sum has on its right
    "reciprocal",  # x / c is x * (1 / c), with c rounded before
    "reciprocal in double",  # the same, with 1 / c rounded once
    "regrouped",  # (c * a) * b is c * (a * b), (c * a) / b is c * (a / b)
    "dropped",  # results between operations are not rounded to the format
    "last dropped",  # the last result is not rounded either
    "rounded stepwise",  # every operation rounds to the format, else every kernel of PyTorch's does
    "numbers rounded",  # Python numbers that multiply or divide are rounded to the format
    "addends rounded",  # Python numbers that are added are
    "twice rounded",  # float64 goes to 16 bits through float32
    "MKL root",  # float32 roots are those of MKL on AMD processors
    "uncontracted",  # what the formula contracts rounds the product as well, to float32
    "product rounded",  # or to the format
]
Traits = frozenset[Trait]

#: Simulations of one search for a set of traits, at most.
_SEARCHED = 32

#: Distances, in float32 ulp, up to which a division or root counts as approximate.
_DISTANCES = (1, 2)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Elements of one operation.

    Attributes:
        operands: patterns, one array for each operand.
        wanted: patterns of the reference, in the format of the result.
        found: patterns of the mode, in `modes.observed_format`.
    """

    operands: tuple[Patterns, ...]
    wanted: Patterns
    found: Patterns


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why results differ.

    Attributes:
        cause: one sentence; empty where nothing differs.
        remedy: what to write instead, in one sentence; empty where nothing differs.
    """

    cause: str
    remedy: str


def explain(
    check: Check, mode: str, reference: str, platform: Platform, samples: Samples
) -> Explanation:
    """Find the smallest set of causes for what differs; say how many samples it explains if not all.

    Args:
        check: the operation.
        mode: what computed `found`, of `modes.MODES`.
        reference: what computed `wanted`: "ieee" or "pytorch".
        platform: where both ran.
        samples: elements, most of which differ.
    """
    context = _Context(check, mode, reference, platform)
    trial = _Trial(context, samples)
    differing = ~trial.same(trial.found, trial.wanted)
    if not differing.any():
        return Explanation("", "")
    with np.errstate(all="ignore"):
        found = trial.search(trial.hypotheses.of_found(), trial.found)
        wanted = trial.search(trial.hypotheses.of_wanted(), trial.wanted)
        changes = _needed(trial, found, wanted)
        explained = trial.agrees(found ^ changes, trial.wanted)
        distance = None
        if not trial.agrees(found, trial.found).all():
            distance = _approximation(trial, found)
            explained &= trial.agrees(found, trial.found) | (distance is not None)
    clauses = list(_clauses(context, found, changes, distance))
    return _sentences(clauses, int((explained & differing).sum()), int(differing.sum()))


@dataclasses.dataclass(frozen=True)
class _Context:
    """What is explained; see `explain`."""

    check: Check
    mode: str
    reference: str
    platform: Platform

    @property
    def observed(self) -> Format:
        return observed_format(self.check, self.mode)

    @property
    def follows_formula(self) -> bool:
        """Tell whether what ran is the formula, not what one writes in JAX."""
        return self.mode == PYTORCH or self.mode.startswith(JAXAUDIT)


# The expression of a check, as a graph of operations.


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """An operation on arrays; Python numbers take the format of the array that they meet.

    Attributes:
        operation: its name in `Operations`, or "operand", "number", "cast", "rsqrt", "absolute".
        fmt: of the result.
        of: what it is applied to.
        value: of a number; index of an operand.
    """

    operation: str
    fmt: Format
    of: tuple["_Node", ...] = ()
    value: Any = None

    def __add__(self, other: Any) -> "_Node":
        return self._with("add", self, other)

    def __radd__(self, other: Any) -> "_Node":
        return self._with("add", other, self)

    def __sub__(self, other: Any) -> "_Node":
        return self._with("subtract", self, other)

    def __rsub__(self, other: Any) -> "_Node":
        return self._with("subtract", other, self)

    def __mul__(self, other: Any) -> "_Node":
        return self._with("multiply", self, other)

    def __rmul__(self, other: Any) -> "_Node":
        return self._with("multiply", other, self)

    def __truediv__(self, other: Any) -> "_Node":
        return self._with("divide", self, other)

    def __rtruediv__(self, other: Any) -> "_Node":
        return self._with("divide", other, self)

    def __pow__(self, exponent: int) -> "_Node":
        if exponent != 2:
            raise NotImplementedError(f"x**{exponent}; only squares are simulated.")
        return self._with("multiply", self, self)

    def __neg__(self) -> "_Node":
        return _Node("negate", self.fmt, (self,))

    def _with(self, operation: str, *operands: Any) -> "_Node":
        nodes = (
            x if isinstance(x, _Node) else _Node("number", self.fmt, value=x) for x in operands
        )
        return _Node(operation, self.fmt, tuple(nodes))

    @property
    def is_number(self) -> bool:
        return self.operation == "number"

    @property
    def is_sum(self) -> bool:
        return self.operation in ("add", "subtract")


class _GraphNotation:
    """Writes down operations instead of carrying them out; see `checks.Notation`."""

    def cast(self, x: _Node, fmt: Format) -> _Node:
        return _Node("cast", fmt, (x,))

    def sqrt(self, x: _Node) -> _Node:
        return _Node("sqrt", x.fmt, (x,))

    def rsqrt(self, x: _Node) -> _Node:
        return _Node("rsqrt", x.fmt, (x,))

    def reciprocal(self, x: _Node) -> _Node:
        return 1 / x

    def square(self, x: _Node) -> _Node:
        return x**2

    def negate(self, x: _Node) -> _Node:
        return -x

    def absolute(self, x: _Node) -> _Node:
        return _Node("absolute", x.fmt, (x,))


class _Graph:
    """What a check writes in JAX.

    Attributes:
        root: the last operation.
        nodes: all of them.
        addends: numbers that are added.
        absorbed: operations whose results a kernel of PyTorch's does not round to the format: products,
            quotients and differences that a sum has on its right, as in m + c * (g - m).
    """

    def __init__(self, check: Check):
        operands = [_Node("operand", fmt, value=k) for k, fmt in enumerate(check.formats)]
        self.root: _Node = check.natural(_GraphNotation(), *operands)
        self.nodes = list(dict.fromkeys(_below(self.root)))
        self._used = [node for user in self.nodes for node in user.of]
        sums = [node for node in self.nodes if node.is_sum]
        self.addends = {x for node in sums for x in node.of if x.is_number}
        self.absorbed = {x for s in sums if s.operation == "add" for x in _absorbed(s.of[1])}

    def used_once(self, node: _Node) -> bool:
        return sum(user is node for user in self._used) == 1

    @property
    def rounded_between(self) -> list[_Node]:
        """Operations before the last one whose results are rounded to less than float32, or by a cast."""
        inner = [n for n in self.nodes if n.of and n is not self.root]
        return [n for n in inner if n.fmt.width == 16 or n.operation == "cast"]

    @property
    def multipliers(self) -> list[_Node]:
        """Numbers that multiply or divide."""
        return [n for n in self.nodes if n.is_number and n not in self.addends]

    @property
    def quotients_by_numbers(self) -> list[_Node]:
        return [n for n in self.nodes if n.operation == "divide" and n.of[1].is_number]

    @property
    def regroupable(self) -> list[_Node]:
        return [n for n in self.nodes if _scaled(n) is not None]

    def products_of_sums(self, *, left: bool) -> list[_Node]:
        """List the operands of sums that are products, or may be, on one side."""
        products = {n for n in self.nodes if n.operation == "multiply"}
        products |= {*self.quotients_by_numbers, *self.regroupable}
        return [s.of[not left] for s in self.nodes if s.is_sum and s.of[not left] in products]


def _below(node: _Node) -> Iterator[_Node]:
    yield node
    for one in node.of:
        yield from _below(one)


def _absorbed(node: _Node) -> Iterator[_Node]:
    if node.operation in ("multiply", "divide", "subtract"):
        yield node
        for one in node.of:
            yield from _absorbed(one)


def _scaled(node: _Node) -> _Node | None:
    """Return the product of a number and an array that a product or quotient begins with."""
    if node.operation not in ("multiply", "divide"):
        return None
    first = node.of[0]
    return first if first.operation == "multiply" and first.of[0].is_number else None


class _Simulation:
    """Computes a graph in NumPy under a set of traits.

    Args:
        graph: of the expression.
        operands: values.
        traits: of the implementation.
        moved: by how many float32 ulp quotients and roots come out too large.
    """

    def __init__(
        self,
        graph: _Graph,
        operands: Sequence[Value],
        traits: Traits,
        moved: tuple[int, int] = (0, 0),
    ):
        self._graph, self._operands, self._traits, self._moved = graph, operands, traits, moved
        self._flushes = "flushed" in traits
        self._ops = FlushingNumpyOperations() if self._flushes else NumpyOperations()
        self._known: dict[_Node, Value] = {}

    def result(self) -> Value:
        return self._value(self._graph.root)

    def _value(self, node: _Node) -> Value:
        if node not in self._known:
            value = self._computed(node)
            self._known[node] = self._rounded(value, node.fmt) if self._rounds(node) else value
        return self._known[node]

    def _rounds(self, node: _Node) -> bool:
        """Tell whether the result of an operation is rounded to its format."""
        if node is self._graph.root:
            return "last dropped" not in self._traits
        if "dropped" in self._traits and node.operation != "operand":
            return False
        stepwise = "rounded stepwise" in self._traits or node.operation == "cast"
        return not node.is_number and (stepwise or node not in self._graph.absorbed)

    def _rounded(self, value: Value, fmt: Format) -> Value:
        if fmt is FLOAT64:
            return value
        if value.dtype == np.float32:
            return floats.round_to(value, fmt)
        value = _flushed_to_single(value) if self._flushes else value
        if "twice rounded" in self._traits:
            return floats.round_to(NumpyOperations().narrow(value), fmt)
        return NumpyOperations().narrow(value, fmt)

    def _computed(self, node: _Node) -> Value:
        match node.operation:
            case "operand":
                return self._operands[node.value]
            case "number":
                return self._number(node)
            case "cast":
                return self._cast(node)
            case "add" | "subtract":
                return self._sum(node)
            case "multiply" | "divide" if (factors := self._factors(node)) is not None:
                return self._ops.multiply(*factors)
            case "divide":
                return self._quotient(*(self._value(x) for x in node.of))
            case _:
                return self._of_one(node.operation, self._value(node.of[0]), node.fmt)

    def _of_one(self, operation: str, x: Value, fmt: Format) -> Value:
        if operation == "absolute":
            return np.abs(x)
        if operation == "negate":
            return -x
        if "MKL root" in self._traits and fmt is FLOAT32:
            root = self._ops.mkl_amd_sqrt(x)
        else:
            root = _moved(self._ops.sqrt(x), self._moved[1])
        return root if operation == "sqrt" else self._quotient(np.float32(1), root)

    def _quotient(self, a: Value, b: Value) -> Value:
        return _moved(self._ops.divide(a, b), self._moved[0])

    def _number(self, node: _Node) -> Value:
        addend = node in self._graph.addends
        rounds = ("addends rounded" if addend else "numbers rounded") in self._traits
        return _rounded_number(node.value, node.fmt if rounds else FLOAT32)

    def _cast(self, node: _Node) -> Value:
        value = self._value(node.of[0])
        if node.fmt is not FLOAT64 or value.dtype == np.float64:
            return value
        return self._ops.float64(self.flushed(value))

    def flushed(self, value: Value) -> Value:
        """Take subnormal numbers for zero, if that is a trait."""
        if not self._flushes:
            return value
        smallest = np.finfo(value.dtype).tiny
        return np.where(np.abs(value) < smallest, np.copysign(value.dtype.type(0), value), value)

    def _sum(self, node: _Node) -> Value:
        """Add or subtract; contract with a product that nothing else uses and that is not rounded."""
        first, second = node.of
        negative = node.operation == "subtract"
        for product in self._contraction_order(node):
            factors = self._contractible(product)
            if factors is None:
                continue
            a, b = factors
            if product is first:
                other = self._value(second)
                return self._ops.fma(a, b, -other if negative else other)
            return self._ops.fma(-a if negative else a, b, self._value(first))
        return getattr(self._ops, node.operation)(self._value(first), self._value(second))

    def _contraction_order(self, node: _Node) -> tuple[_Node, ...]:
        if "kernel contracted" in self._traits:
            return tuple(x for x in node.of[1:] if x in self._graph.absorbed)
        return node.of if "contracted" in self._traits else ()

    def _contractible(self, node: _Node) -> tuple[Value, Value] | None:
        free = node.fmt is FLOAT32 or not self._rounds(node)
        return self._factors(node) if free and self._graph.used_once(node) else None

    def _factors(self, node: _Node) -> tuple[Value, Value] | None:
        """Return what a product multiplies; quotients are products under some traits."""
        if node.operation == "divide" and node.of[1].is_number:
            if self._traits & {"reciprocal", "reciprocal in double"}:
                return self._value(node.of[0]), self._reciprocal(node.of[1])
        scaled = _scaled(node)
        if "regrouped" in self._traits and scaled is not None:
            c, a = (self._value(x) for x in scaled.of)
            apply = self._ops.multiply if node.operation == "multiply" else self._quotient
            return c, apply(a, self._value(node.of[1]))
        if node.operation == "multiply":
            return self._value(node.of[0]), self._value(node.of[1])
        return None

    def _reciprocal(self, number: _Node) -> Value:
        if "reciprocal in double" in self._traits:
            return np.float32(1 / number.value)
        # XLA computes in float16 where that is asked for, but in float32 for bfloat16.
        inverse = self._ops.divide(np.float32(1), self._value(number))
        return (
            floats.round_to(np.atleast_1d(inverse), FLOAT16)[0]
            if number.fmt is FLOAT16
            else inverse
        )


def _rounded_number(value: float, fmt: Format) -> Any:
    if fmt is FLOAT64:
        return np.float64(value)
    with np.errstate(over="ignore", under="ignore"):
        return floats.decode(
            np.array([value]).astype(fmt.value_dtype).view(fmt.pattern_dtype), fmt
        )[0]


def _flushed_to_single(value: Value) -> Value:
    """Zero the float64 values that are below 2^-126 when rounded to 24 bits, as x86 does."""
    return np.where(np.abs(value) < 2.0**-126 - 2.0**-151, np.copysign(0.0, value), value)


def _moved(value: Value, steps: int) -> Value:
    """Move float32 values by some ulp away from zero; zeros, infinities and NaNs stay."""
    if not steps:
        return value
    bits = np.asarray(value).view(np.int32)
    return np.where(np.isfinite(value) & (value != 0), (bits + steps).view(np.float32), value)


class _FormulaOperations(NumpyOperations):
    """The host's float32 arithmetic with the traits of a build of PyTorch."""

    def __init__(self, traits: Traits, fmt: Format):
        self._traits, self._fmt = traits, fmt
        flushes = "flushed" in traits
        self._ops = FlushingNumpyOperations() if flushes else NumpyOperations()

    def add(self, a: Value, b: Value) -> Value:
        return self._ops.add(a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self._ops.subtract(a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._ops.multiply(a, b)

    def divide(self, a: Value, b: Value) -> Value:
        return self._ops.divide(a, b)

    def sqrt(self, a: Value) -> Value:
        # Roots of 16-bit numbers are not MKL's.
        mkl = "MKL root" in self._traits and self._fmt is FLOAT32
        return self._ops.mkl_amd_sqrt(a) if mkl else self._ops.sqrt(a)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        if "product rounded" in self._traits:
            return self._ops.add(self.round_to(self._ops.multiply(a, b), self._fmt), c)
        if "uncontracted" in self._traits:
            return self._ops.add(self._ops.multiply(a, b), c)
        return self._ops.fma(a, b, c)

    def narrow(self, a: Value, fmt: Format = FLOAT32) -> Value:
        a = _flushed_to_single(a) if "flushed" in self._traits else a
        if "twice rounded" in self._traits:
            return self.round_to(super().narrow(a), fmt)
        return super().narrow(a, fmt)


# Which traits may matter, for what one writes in JAX and for a formula.


class _Hypotheses(Protocol):
    """What may have run.

    `of_found` and `of_wanted` yield sets of traits in the order in which they are tried; `simulate` returns
    patterns in the format that is observed.
    """

    def of_found(self) -> Iterable[Traits]: ...
    def of_wanted(self) -> Iterable[Traits]: ...
    def simulate(self, traits: Traits, moved: tuple[int, int] = (0, 0)) -> Patterns: ...


def _subsets(traits: Sequence[Trait]) -> Iterator[Traits]:
    for count in range(len(traits) + 1):
        for chosen in itertools.combinations(traits, count):
            yield frozenset(chosen)


class _NaturalHypotheses:
    """What one writes in JAX.

    In every one of JAX's modes each operation rounds to the format, and Python numbers do first; the
    compiler may do what it does besides. What is wanted is sought from the traits of PyTorch's kernels.
    """

    def __init__(self, context: _Context, operands: Sequence[Value]):
        self._context, self._operands = context, operands
        self._graph = _Graph(context.check)
        self._narrow = context.check.result.width == 16

    def of_found(self) -> Iterator[Traits]:
        return (self._meaning() | compiled for compiled in _subsets(self._compiler_traits()))

    def of_wanted(self) -> Iterator[Traits]:
        return (self._kernel_traits() ^ change for change in _subsets(self._reference_traits()))

    def simulate(self, traits: Traits, moved: tuple[int, int] = (0, 0)) -> Patterns:
        simulation = _Simulation(self._graph, self._operands, traits, moved)
        with np.errstate(all="ignore"):
            value = simulation.result()
            if self._context.mode == REDUCED and value.dtype == self._context.observed.value_dtype:
                value = simulation.flushed(value)
        return _observed(self._context, value)

    def _meaning(self) -> Traits:
        """Return the traits that JAX's notation has by itself."""
        graph = self._graph
        having: dict[Trait, Any] = {
            "rounded stepwise": graph.absorbed,
            "numbers rounded": graph.multipliers,
            "addends rounded": graph.addends,
        }
        return frozenset(trait for trait, nodes in having.items() if self._narrow and nodes)

    def _compiler_traits(self) -> list[Trait]:
        graph, mode = self._graph, self._context.mode
        found: list[Trait] = ["flushed"]
        if mode in COMPILED and self._contracts:
            found.append("contracted")
        if graph.quotients_by_numbers:
            found.append("reciprocal")
        if mode == REDUCED and self._narrow:
            found.append("last dropped")
        if mode in COMPILED and graph.rounded_between:
            found.append("dropped")
        if self._narrows_double:
            found.append("twice rounded")
        return found

    @property
    def _contracts(self) -> bool:
        return any(self._graph.products_of_sums(left=left) for left in (True, False))

    @property
    def _narrows_double(self) -> bool:
        return any(
            n.operation == "cast" and n.fmt.width == 16 and n.of[0].fmt is FLOAT64
            for n in self._graph.nodes
        )

    def _kernel_traits(self) -> Traits:
        """Guess the traits of PyTorch's kernels on the platform, or of the formula that follows them."""
        graph, context = self._graph, self._context
        found: set[Trait] = set(self._meaning() - {"rounded stepwise", "numbers rounded"})
        if context.platform == "cuda":
            found.discard("addends rounded")
            if graph.regroupable:
                found.add("regrouped")
        if self._contracts:
            # Without products on the left both are the same, and this name is the compiler's.
            left = graph.products_of_sums(left=True)
            found.add("kernel contracted" if left else "contracted")
        return frozenset(found)

    def _reference_traits(self) -> list[Trait]:
        """List the traits in which the guess may be wrong."""
        graph, context = self._graph, self._context
        found = sorted(self._meaning())
        if context.reference == PYTORCH:
            found += self._pytorch_traits()
        found += sorted(self._kernel_traits() & {"contracted", "kernel contracted", "regrouped"})
        if graph.quotients_by_numbers and context.platform == "cuda":
            found.append("reciprocal in double")
        return found

    def _pytorch_traits(self) -> list[Trait]:
        """List what PyTorch's kernels do besides the formula."""
        found: list[Trait] = []
        if any(n.operation == "sqrt" and n.fmt is FLOAT32 for n in self._graph.nodes):
            found.append("MKL root")
        if self._narrows_double:
            found.append("twice rounded")
        return [*found, "flushed"]


class _FormulaHypotheses:
    """The formula: what PyTorch computes, and jaxaudit."""

    def __init__(self, context: _Context, operands: Sequence[Value]):
        self._context, self._operands = context, operands

    _TRAITS: tuple[Trait, ...] = (
        "MKL root", "twice rounded", "uncontracted", "product rounded", "flushed",
    )  # fmt: skip

    def of_found(self) -> Iterator[Traits]:
        return _subsets(self._TRAITS)

    def of_wanted(self) -> Iterator[Traits]:
        yield frozenset()
        if self._context.reference == PYTORCH:
            yield from _subsets(self._TRAITS)

    def simulate(self, traits: Traits, moved: tuple[int, int] = (0, 0)) -> Patterns:
        check = self._context.check
        ops = _FormulaOperations(traits, check.result)
        with np.errstate(all="ignore"):
            return _observed(self._context, check.formula(ops, check.scalars, *self._operands))


def _observed(context: _Context, value: Value) -> Patterns:
    """Return the patterns of a result as the mode shows it; a sum forgets the sign of zero."""
    fmt = context.observed
    if context.mode != REDUCED:
        if fmt is FLOAT64:
            return np.asarray(value, np.float64).view(np.uint64)
        return floats.encode(np.asarray(value, np.float32), fmt)
    patterns = np.ascontiguousarray(value, fmt.value_dtype).view(fmt.pattern_dtype)
    return np.where(patterns == fmt.sign_bit, fmt.pattern_dtype.type(0), patterns)


# The search.


class _Trial:
    """Holds samples against simulations.

    Attributes:
        hypotheses: what may have run.
        found: patterns of the samples.
        wanted: the same, in the format that is observed.
    """

    def __init__(self, context: _Context, samples: Samples):
        formats = context.check.formats
        pairs = zip(samples.operands, formats, strict=True)
        operands = [floats.decode(p, fmt) for p, fmt in pairs]
        kind = _FormulaHypotheses if context.follows_formula else _NaturalHypotheses
        self._format = context.observed
        self.hypotheses: _Hypotheses = kind(context, operands)
        self.found, self.wanted = samples.found, samples.wanted
        if context.mode == REDUCED:
            wanted = floats.decode(samples.wanted, context.check.result)
            self.wanted = _observed(context, wanted)
            self.found = _observed(context, floats.decode(samples.found, context.observed))
        self.simulate = functools.cache(self.hypotheses.simulate)

    def same(self, a: Patterns, b: Patterns) -> NDArray[np.bool_]:
        """Tell which patterns are the same; all NaNs are alike."""
        return ~floats.differ(a, b, self._format)

    def agrees(self, traits: Traits, target: Patterns) -> NDArray[np.bool_]:
        return self.same(self.simulate(traits), target)

    def search(self, candidates: Iterable[Traits], target: Patterns) -> Traits:
        """Return the first set of traits that gives the target everywhere, or else the one that does most."""
        best, most = frozenset[Trait](), -1
        for traits in itertools.islice(dict.fromkeys(candidates), _SEARCHED):
            count = int(self.agrees(traits, target).sum())
            if count > most:
                best, most = traits, count
            if count == target.size:
                break
        return best

    def within(self, traits: Traits, most: tuple[int, int]) -> bool:
        """Tell whether all found lies between results whose quotients and roots are moved by some ulp."""
        divisions, roots = (range(-n, n + 1) for n in most)
        places = [
            floats.ordered(self.simulate(traits, (d, r)), self._format)
            for d, r in itertools.product(divisions, roots)
        ]
        found = floats.ordered(self.found, self._format)
        return bool(((np.min(places, 0) <= found) & (found <= np.max(places, 0))).all())


def _approximation(trial: _Trial, found: Traits) -> tuple[int, str] | None:
    """Return by how many ulp divisions or roots must be wrong to give what was found; None for more."""
    for distance in _DISTANCES:
        if trial.within(found, (distance, distance)):
            if trial.within(found, (distance, 0)):
                return distance, "divides"
            if trial.within(found, (0, distance)):
                return distance, "takes square roots"
            return distance, "divides and takes square roots"
    return None


#: The order in which changes are left out: first those that are least often seen in the bits.
_ORDER: tuple[Trait, ...] = (
    "regrouped", "reciprocal in double", "contracted", "kernel contracted", "twice rounded", "addends rounded",
    "numbers rounded", "dropped", "rounded stepwise", "last dropped", "reciprocal", "product rounded",
    "uncontracted", "MKL root", "flushed",
)  # fmt: skip


def _needed(trial: _Trial, found: Traits, wanted: Traits) -> Traits:
    """Return the changes from one set of traits to the other, less those that no sample asks for."""
    changes = found ^ wanted
    most = trial.agrees(wanted, trial.wanted).sum()
    for trait in sorted(changes, key=_ORDER.index):
        fewer = changes - {trait}
        if trial.agrees(found ^ fewer, trial.wanted).sum() >= most:
            changes = fewer
    return changes


# The sentences.

_Clause = tuple[str, str]


def _sentences(clauses: Sequence[_Clause], explained: int, differing: int) -> Explanation:
    """Compose clauses to sentences; add what they leave open."""
    causes = dict.fromkeys(cause for cause, _ in clauses)
    remedies = dict.fromkeys(remedy for _, remedy in clauses)
    if not explained:
        return Explanation(
            f"Not explained: no known cause gives one of the {differing:,} differing samples.",
            "None is known: use jaxaudit.operations instead.",
        )
    cause = "; ".join(causes) + "."
    if explained < differing:
        rest = (
            f"explains {explained:,} of {differing:,} differing samples; the rest is not explained"
        )
        cause = f"{cause[:-1]} (this {rest})."
    return Explanation(cause, "; ".join(remedies) + ".")


def _clauses(
    context: _Context, found: Traits, changes: Traits, distance: tuple[int, str] | None
) -> Iterator[_Clause]:
    if distance is not None:
        ulp, what = distance
        yield (
            f"XLA {what} approximately on this device: up to {ulp} float32 ulp from the nearest number",
            "Compute in float64 and round once, as jaxaudit.operations.Float64Operations does",
        )
    if "contracted" in found and "kernel contracted" in changes:
        yield _OTHER_PRODUCTS
        changes -= {"contracted", "kernel contracted"}
    if "dropped" in found & changes:
        changes -= {"rounded stepwise"}  # JAX would round so if the compiler let it
    for trait in reversed(_ORDER):
        if trait in changes:
            clause = (_FOUND if trait in found else _WANTED)[trait]
            yield clause(context, changes)


def _of_flushing(context: _Context, changes: Traits) -> _Clause:
    if context.mode == PYTORCH:
        return _PYTORCH_FLUSHES
    if context.follows_formula:
        return (
            "jaxaudit's float32 formulation takes subnormal numbers for zero",
            "Let float64 compute the elements that it marks, as jaxaudit does",
        )
    name = "XLA:CPU" if context.platform == "cpu" else "XLA"
    return (f"{name} takes subnormal numbers for zero", _IN_FLOAT64)


def _of_reciprocal(context: _Context, changes: Traits) -> _Clause:
    option = "Compile with compiler_options={'xla_disable_hlo_passes': 'algsimp'}, or pass"
    written = option if context.mode in COMPILED else "Pass"
    return (
        "XLA divides by a Python number by multiplying with its reciprocal",
        f"{written} the divisor as an argument, an array of the operand's shape",
    )


def _of_dropping(context: _Context, changes: Traits) -> _Clause:
    graph = _Graph(context.check)
    fmt = min((n.fmt for n in graph.nodes if not n.is_number), key=lambda fmt: fmt.width)
    where = "before the sum" if context.mode == REDUCED else "between operations"
    cause = f"XLA drops the rounding to {fmt.name} {where}"
    if all(one is not fmt for one in context.check.formats):  # a cast
        return cause, f"Round with {_reduced(fmt)}, which no pass removes"
    return cause, _widened(context, changes)


def _widened(context: _Context, changes: Traits) -> str:
    """Say how to write in float32 what PyTorch's kernels compute."""
    graph, fmt = _Graph(context.check), context.check.result
    parts = ["widen the operands to float32", *_numbers_taken(graph, fmt, changes)]
    ends = " where a kernel of PyTorch's ends" if graph.absorbed else ""
    parts.append(f"round with {_rounding(fmt)}{ends}")
    if context.mode == "eager" and graph.absorbed:
        parts.append("compile it with jax.jit, which contracts products as PyTorch does")
    text = ", ".join(parts[:-1]) + f", and {parts[-1]}"
    return text[0].upper() + text[1:]


def _numbers_taken(graph: _Graph, fmt: Format, changes: Traits) -> Iterator[str]:
    """Say which Python numbers are rounded to the format first: those that PyTorch rounds too."""
    groups: list[tuple[Trait, Any, str]] = [
        ("numbers rounded", graph.multipliers, "multiply and divide by"),
        ("addends rounded", graph.addends, "add"),
    ]
    for trait, numbers, verb in groups:
        if numbers:
            kept = "np.float32(c)" if trait in changes else f"np.float32(jnp.{fmt.name}(c))"
            yield f"{verb} {kept}"


def _reduced(fmt: Format) -> str:
    bits = f"exponent_bits={fmt.exponent_bits}, mantissa_bits={fmt.significand_bits}"
    return f"lax.reduce_precision(x, {bits})"


def _rounding(fmt: Format) -> str:
    # To float16, reduce_precision takes subnormal results for zero.
    return _reduced(fmt) if fmt is BFLOAT16 else f"x.astype(jnp.{fmt.name})"


def _of_steps(context: _Context, changes: Traits) -> _Clause:
    fmt = context.check.result
    return (
        f"JAX rounds to {fmt.name} after every operation, PyTorch's kernels compute in float32 and round once each",
        _widened(context, changes),
    )


def _of_numbers(context: _Context, changes: Traits) -> _Clause:
    fmt = context.check.result
    return (
        f"JAX rounds the Python number to {fmt.name} before it uses it, PyTorch keeps it in float32",
        _widened(context, changes),
    )


def _kept_number(context: _Context, changes: Traits) -> _Clause:
    fmt = context.check.result
    return (
        f"PyTorch rounds the Python number to {fmt.name} before it uses it",
        f"Round the number to {fmt.name} first, as jaxaudit.floats.round_scalar does",
    )


def _of_mkl(context: _Context, changes: Traits) -> _Clause:
    in_float64 = context.mode == PYTORCH and context.check.family != "Adam steps"
    return (
        "PyTorch takes float32 square roots with Intel's MKL, which does not round them correctly on AMD processors",
        "Take the root in float64, x.double().sqrt().float()"
        if in_float64
        else "To get PyTorch's bits, take the root with jaxaudit.operations.Float64Operations.mkl_amd_sqrt",
    )


def _of_two_roundings(context: _Context, changes: Traits) -> _Clause:
    name = "PyTorch" if context.follows_formula else "XLA"
    fmt = context.check.result.name
    return (
        f"{name} rounds float64 to float32 first and that to {fmt}",
        "Round once, as jaxaudit.operations.Float64Operations.narrow does",
    )


def _unfused(context: _Context, changes: Traits) -> _Clause:
    if context.mode.startswith(JAXAUDIT) and context.reference != PYTORCH:
        return (
            "jaxaudit's formulation rounds products before it adds them",
            "This is a fault of jaxaudit on this device: report it with the counter-example",
        )
    return (
        "This build of PyTorch rounds products before it adds them",
        "Run PyTorch on a processor with AVX2 and FMA, without ATEN_CPU_CAPABILITY=default",
    )


def _always(cause: str, remedy: str) -> Callable[[_Context, Traits], _Clause]:
    return lambda context, changes: (cause, remedy)


_IN_FLOAT64 = (
    "Compute in float64 or in integers where subnormal numbers occur, "
    "as jaxaudit.operations.Float64Operations does"
)

_PYTORCH_FLUSHES: _Clause = (
    "PyTorch takes subnormal numbers for zero",
    "Call torch.set_flush_denormal(False)",
)

_GUARD = (
    "Pass the product's bits through an exclusive or with a zero that is known at run time only, "
    "as jaxaudit.operations.Float32Operations.multiply does"
)

_OTHER_PRODUCTS: _Clause = (
    "XLA's compiler (LLVM) contracts a product on the left of a sum, PyTorch's kernels only those on the right",
    f"{_GUARD}, for products on the left",
)

_CONTRACTED = _always(
    "XLA's compiler (LLVM) contracts the product and the sum to a fused multiply-add", _GUARD
)

_FUSED = _always(
    "PyTorch's kernel contracts the product and the sum to a fused multiply-add, JAX rounds both here",
    "Compute the fused multiply-add with jaxaudit.operations.Float64Operations.fma",
)

#: Sentences about traits that what was found has, and what was wanted has not.
_FOUND: dict[Trait, Callable[[_Context, Traits], _Clause]] = {
    "flushed": _of_flushing,
    "contracted": _CONTRACTED,
    "kernel contracted": _CONTRACTED,
    "reciprocal": _of_reciprocal,
    "dropped": _of_dropping,
    "last dropped": _of_dropping,
    "rounded stepwise": _of_steps,
    "numbers rounded": _of_numbers,
    "addends rounded": _of_numbers,
    "twice rounded": _of_two_roundings,
    "MKL root": _of_mkl,
    "uncontracted": _unfused,
    "product rounded": _unfused,
}

#: Sentences about traits that what was wanted has, and what was found has not.
_WANTED: dict[Trait, Callable[[_Context, Traits], _Clause]] = {
    "flushed": _always(*_PYTORCH_FLUSHES),
    "contracted": _FUSED,
    "kernel contracted": _FUSED,
    "reciprocal in double": _always(
        "PyTorch's CUDA kernel multiplies by the reciprocal of a Python number",
        "Multiply by np.float32(1 / c)",
    ),
    "regrouped": _always(
        "PyTorch's CUDA kernel multiplies by the Python number last",
        "Write c * (a * b) and c * (a / b)",
    ),
    "rounded stepwise": _always(
        "PyTorch's kernel rounds every operation here", "Round with lax.reduce_precision after each"
    ),
    "numbers rounded": _kept_number,
    "addends rounded": _kept_number,
    "twice rounded": _always(
        "PyTorch rounds float64 to float32 first and that to bfloat16",
        "Cast twice, x.astype(jnp.float32).astype(jnp.bfloat16)",
    ),
    "MKL root": _of_mkl,
    "uncontracted": _unfused,
    "product rounded": _unfused,
}
