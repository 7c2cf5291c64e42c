"""What a replayed window is compared by: counts, ulp distances and norms, per row and then per token group.

Nothing here depends on how many steps a window has or how many cores there are. XLA's own reductions would:
they split by thread and by shape, and lose the roundings before them. Rows are therefore summed by element-wise
additions of their slices in a fixed order, in float64, and groups by NumPy's pairwise sum along one axis.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxaudit import stochastic
from jaxaudit.devices import Device, on_host
from jaxaudit.floats import BFLOAT16, FLOAT32, Format, differ
from jaxaudit.operations import (
    Formulation,
    Operations,
    any_bits,
    combined,
    compile_exactly,
    narrow_patterns,
    operations_of,
    widen_patterns,
)

#: Bits of `inspect`: non-zero and too small for float32 sums, infinite or NaN, not a storage-format value.
TINY, NONFINITE, UNREPRESENTABLE = np.uint8(1), np.uint8(2), np.uint8(4)

#: Columns whose slices are combined in one expression.
BLOCK = 256


class Comparison:
    """Reduces windows of (steps, rows * width) patterns to numbers per row.

    Args:
        device: where the programs run.
        width: elements of one row.
    """

    def __init__(self, device: Device, width: int):
        self._device = device
        self._width = width

    def inspect(self, patterns: Any, fmt: Format, storage: Format) -> int:
        """Tell which of TINY, NONFINITE and UNREPRESENTABLE occur among patterns of `fmt`."""
        return combined(self.start_inspection(patterns, fmt, storage))

    def start_inspection(self, patterns: Any, fmt: Format, storage: Format) -> jax.Array:
        """Start what `inspect` does; `operations.combined` ends it."""
        return _inspect_program(fmt, storage, self._device)(patterns)

    def tally(
        self, patterns: Any, fmt: Format, storage: Format, bit: np.uint8
    ) -> NDArray[np.int64]:
        """Count the elements of each row to which a bit of `inspect` belongs."""
        program = _tally_program(fmt, storage, int(bit), self._width, self._device)
        return self._finish(program(patterns), jnp.add).astype(np.int64)

    def mismatches(
        self, replayed: Any, replayed_format: Format, recorded: Any, recorded_format: Format
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count differing elements of each row, and find the largest ulp distance.

        Args:
            replayed: patterns, (steps, elements).
            replayed_format: their format.
            recorded: patterns, (steps + 1, elements); row k + 1 belongs to `replayed[k]`.
            recorded_format: their format, in whose ulp the distance is.

        Returns:
            Two arrays of shape (steps, rows).
        """
        program = _mismatch_program(replayed_format, recorded_format, self._width, self._device)
        counts, distances = program(replayed, recorded)
        return np.asarray(counts).astype(np.int64), np.asarray(distances).astype(np.int64)

    def squared_norms(
        self, recorded: Any, fmt: Format, formulation: Formulation
    ) -> NDArray[np.float64]:
        """Sum the squares of each row's recorded change, (steps, rows), from (steps + 1, elements)."""
        return self.finished(self.start_squared_norms(recorded, fmt, formulation))

    def start_squared_norms(
        self, recorded: Any, fmt: Format, formulation: Formulation
    ) -> jax.Array:
        """Start what `squared_norms` does; `finished` ends it."""
        program = _observed_program(fmt, self._width, formulation, self._device)
        return self._folded(program(np.uint32(0), recorded), jnp.add)

    def finished(self, rows: jax.Array) -> NDArray[Any]:
        """Return the last lane of rows on the host."""
        return np.asarray(rows)[..., 0]

    def inner_products(
        self,
        replayed: Any,
        replayed_format: Format,
        recorded: Any,
        recorded_format: Format,
        formulation: Formulation,
    ) -> tuple[NDArray[np.float64], ...]:
        """Compare each row's replayed change with its recorded one.

        Returns:
            Sums of squares of the replayed change, of squares of the difference of both, and of their
            products; each of shape (steps, rows).
        """
        program = _products_program(
            replayed_format, recorded_format, self._width, formulation, self._device
        )
        return tuple(np.asarray(sums) for sums in program(np.uint32(0), replayed, recorded))

    def start_changes(
        self, replayed: Any, replayed_format: Format, recorded: Any, recorded_format: Format
    ) -> tuple[jax.Array, ...]:
        """Start what `mismatches`, `inner_products` and `squared_norms` do, in float32.

        A replayed value that is NaN makes its row's second sum of squares NaN.

        Returns:
            Counts, distances, the three sums of `inner_products`, and that of `squared_norms`, each (steps, rows).
        """
        formats, key = (replayed_format, recorded_format), (self._width, self._device)
        counted = _mismatch_program(*formats, *key)(replayed, recorded)
        products = _products_program(*formats, self._width, "float32", self._device, observed=True)
        return (*counted, *products(np.uint32(0), replayed, recorded))

    def roundings(self, replayed: Any, recorded: Any) -> tuple[NDArray[np.float64], ...]:
        """Count what stochastic rounding to bfloat16 did, by row and bin of the fraction.

        Args:
            replayed: float32 patterns before rounding, (steps, elements).
            recorded: bfloat16 patterns, (steps + 1, elements); row k + 1 belongs to `replayed[k]`.

        Returns:
            What was rounded away from zero, its expectation, and the variance of that; each of shape
            (steps, rows, BINS). Weights that are neither neighbour do not count.
        """
        found = _roundings_program(self._width, self._device)(replayed, recorded)
        away, fractions, products = (
            np.stack([self._finish(each, jnp.add) for each in bins], axis=-1) for bins in found
        )
        return away.astype(np.float64), fractions / 2.0**16, products / 2.0**32

    def _finish(self, lanes: jax.Array, combine: Callable) -> NDArray[Any]:
        return self.finished(self._folded(lanes, combine))

    def _folded(self, lanes: jax.Array, combine: Callable) -> jax.Array:
        while lanes.shape[-1] > 1:
            lanes = _fold_program(combine, self._device)(lanes)
        return lanes


def sum_groups(rows: NDArray[Any], groups: Iterable[NDArray[np.int64]]) -> NDArray[Any]:
    """Add up (steps, rows) over each group's rows; (steps, groups), independent of the window."""
    with np.errstate(invalid="ignore", over="ignore"):  # recorded infinities and NaNs carry through
        return np.stack([_of_group(rows, g).sum(axis=1) for g in groups], axis=-1)


def max_groups(rows: NDArray[Any], groups: Iterable[NDArray[np.int64]]) -> NDArray[Any]:
    """Take the largest of (steps, rows) over each group's rows, 0 for none; (steps, groups)."""
    return np.stack([_of_group(rows, g).max(axis=1, initial=0) for g in groups], axis=-1)


def _of_group(rows: NDArray[Any], group: NDArray[np.int64]) -> NDArray[Any]:
    """Return a group's columns of (steps, rows), in C order: sums along it are pairwise."""
    count = rows.shape[1]
    if group.size == count and (group[:-1] < group[1:]).all():  # that is, all
        return np.ascontiguousarray(rows)
    return rows.take(group, axis=1)


def _change(ops: Operations, after: Any, before: Any) -> Any:
    """Return the float32 difference as float64: its square is exact there, fused or not."""
    return ops.float64(ops.subtract(after, before))


def distance(a: Any, b: Any, fmt: Format) -> Any:
    """Count the steps between patterns of `fmt` that are no NaNs on its ordered line, in uint32; see `floats.ordered`."""
    wide_a, wide_b = (x.astype(jnp.uint32) << (32 - fmt.width) for x in (a, b))
    size_a, size_b = wide_a & np.uint32(0x7FFFFFFF), wide_b & np.uint32(0x7FFFFFFF)
    across = (wide_a ^ wide_b) >> 31 != 0
    between = jnp.maximum(size_a, size_b) - jnp.minimum(size_a, size_b)
    return jnp.where(across, size_a + size_b, between) >> (32 - fmt.width)


def fold(values: Any, combine: Callable) -> Any:
    """Combine the columns of (rows, width) into a few lanes, in a fixed order; repeated, until one is left.

    Columns k, k + lanes, ... of each block of 256 are combined from left to right, and so are the rest.
    """
    rows, width = values.shape
    each = lanes_of(width)
    if not each:
        return functools.reduce(combine, [values[:, k : k + 1] for k in range(width)])
    blocks = width // BLOCK * BLOCK
    lanes = width // each * each
    folded = []
    if blocks:
        by_block = values[:, :blocks].reshape(rows, -1, BLOCK)
        slices = [by_block[..., k : k + each] for k in range(0, BLOCK, each)]
        folded.append(functools.reduce(combine, slices).reshape(rows, -1))
    if lanes > blocks:
        slices = [values[:, k : k + each] for k in range(blocks, lanes, each)]
        folded.append(functools.reduce(combine, slices))
    if width > lanes:
        folded.append(values[:, lanes:])
    return folded[0] if len(folded) == 1 else jnp.concatenate(folded, axis=-1)


def larger(a: Any, b: Any) -> Any:
    """Return the larger of two signed integers of which none is negative: `maximum` has no vector code in XLA:CPU."""
    difference = b - a
    return a + (difference & ~(difference >> (8 * difference.dtype.itemsize - 1)))


def lanes_of(width: int) -> int:
    """Tell how many columns of a row of so many are combined side by side; 0: one after the other.

    Sixteen let XLA:CPU use whole registers of AVX-512; eight of them, or of AVX2's, keep it from using any.
    """
    return 16 if width >= 32 else 8 if width > 16 else 0


def fold_together(terms: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    """Sum the rows of several (rows, width) arrays in one pass over memory, each in the same fixed order.

    As `fold` does, until one column is left. XLA reduces several arrays at once by a plain loop for
    each element of the result, without splitting it: the order is the one written.
    """
    while width > 1:
        each = lanes_of(width)
        parts, lanes = [], width // each * each if each else 0
        blocks = width // BLOCK * BLOCK
        for begin, end, shape in (
            (0, blocks, (-1, BLOCK // max(each, 1), each)),
            (blocks, lanes, (1, (lanes - blocks) // max(each, 1), each)),
        ):
            if end > begin:
                parts.append(_added([x[:, begin:end].reshape(x.shape[0], *shape) for x in terms]))
        if not lanes:
            parts.append(_added([x[:, None, :, None] for x in terms]))
        elif width > lanes:
            parts.append([x[:, lanes:] for x in terms])
        terms = tuple(
            part[0] if len(part) == 1 else jnp.concatenate(part, axis=-1)
            for part in zip(*parts, strict=True)
        )
        width = terms[0].shape[1]
    return tuple(term[:, 0] for term in terms)


def _added(terms: list[Any]) -> list[Any]:
    """Add up axis 2 of (rows, blocks, slices, lanes), from left to right; (rows, blocks * lanes)."""

    def add(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = tuple(np.float64(0) for _ in terms)
    found = lax.reduce(tuple(terms), zeros, add, (2,))
    return [each.reshape(each.shape[0], -1) for each in found]


@functools.lru_cache(maxsize=64)
def _fold_program(combine: Callable, device: Device) -> Callable:
    return compile_exactly(jax.vmap(lambda lanes: fold(lanes, combine)), device)


def _properties(patterns: Any, fmt: Format, storage: Format) -> Any:
    """Flag each element with TINY, NONFINITE and UNREPRESENTABLE."""
    wide = widen_patterns(patterns, fmt)
    magnitude = wide & np.uint32(0x7FFFFFFF)
    tiny = magnitude - np.uint32(1) < np.uint32((127 - 100) << 23) - np.uint32(1)
    flags = tiny.astype(jnp.uint8) * TINY
    flags |= (magnitude >= FLOAT32.infinity).astype(jnp.uint8) * NONFINITE
    if fmt is FLOAT32 and storage is not FLOAT32:
        kept = widen_patterns(narrow_patterns(wide, storage), storage)
        beyond = (kept != wide) & (magnitude <= FLOAT32.infinity)  # NaNs are NaNs in any format
        flags |= beyond.astype(jnp.uint8) * UNREPRESENTABLE
    return flags


@functools.lru_cache(maxsize=64)
def _inspect_program(fmt: Format, storage: Format, device: Device) -> Callable:
    def whole(patterns: Any) -> jax.Array:
        flags = _properties(patterns, fmt, storage)
        return flags if on_host(device) else any_bits(flags)

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=64)
def _tally_program(fmt: Format, storage: Format, bit: int, width: int, device: Device) -> Callable:
    def one_step(patterns: Any) -> jax.Array:
        found = (_properties(patterns, fmt, storage) & np.uint8(bit)) != 0
        return fold(found.astype(jnp.int32).reshape(-1, width), jnp.add)

    return compile_exactly(jax.vmap(one_step), device)


@functools.lru_cache(maxsize=64)
def _mismatch_program(
    replayed_format: Format, recorded_format: Format, width: int, device: Device
) -> Callable:
    """Count each row's differing elements, and find its largest distance: uint32 (steps, rows) each."""

    def line(patterns: Any) -> Any:
        """Place patterns on the ordered line (see `floats.ordered`), moved up into uint32."""
        wide = patterns.astype(jnp.uint32)
        magnitude = wide & np.uint32(recorded_format.sign_bit - 1)
        middle = np.uint32(1 << 31)
        signed = jnp.where(
            wide >= np.uint32(recorded_format.sign_bit), middle - magnitude, middle + magnitude
        )
        nan = magnitude > np.uint32(recorded_format.infinity)
        return jnp.where(nan, middle + np.uint32(recorded_format.infinity + 1), signed)

    def one_step(replayed: Any, recorded: Any) -> tuple[jax.Array, jax.Array]:
        if replayed_format is recorded_format:
            differs = differ(replayed, recorded, recorded_format)
        else:
            wide = widen_patterns(replayed, replayed_format)
            differs = differ(wide, widen_patterns(recorded, recorded_format))
            replayed = narrow_patterns(wide, recorded_format)
        a, b = line(replayed), line(recorded)
        distances = jnp.maximum(a, b) - jnp.minimum(a, b)
        counts = fold(differs.astype(jnp.uint32).reshape(-1, width), jnp.add)
        return counts, fold(distances.reshape(-1, width), jnp.maximum)

    def whole(replayed: Any, recorded: Any) -> tuple[jax.Array, jax.Array]:
        # Of integers the order does not matter: what lanes are left are combined as XLA likes best.
        lanes = jax.vmap(one_step)(replayed, recorded[1:])
        combine = lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1]))  # noqa: E731
        return lax.reduce(lanes, (np.uint32(0), np.uint32(0)), combine, (2,))

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=64)
def _roundings_program(width: int, device: Device) -> Callable:
    def one_step(replayed: Any, recorded: Any) -> tuple[tuple[jax.Array, ...], ...]:
        wide = widen_patterns(recorded, BFLOAT16)
        counted, bins = stochastic.possible(replayed, wide), stochastic.bin_of(replayed)
        low = (replayed & np.uint32(0xFFFF)).astype(jnp.float64)
        # All integers below 2^53: the sums are exact in any order.
        terms = (stochastic.away(replayed, wide).astype(jnp.float64), low, low * (65536 - low))
        return tuple(
            tuple(
                fold(jnp.where(counted & (bins == b), term, 0.0).reshape(-1, width), jnp.add)
                for b in range(stochastic.BINS)
            )
            for term in terms
        )

    return compile_exactly(lambda a, b: jax.vmap(one_step)(a, b[1:]), device)


@functools.lru_cache(maxsize=64)
def _observed_program(
    fmt: Format, width: int, formulation: Formulation, device: Device
) -> Callable:
    def whole(zero: Any, recorded: Any) -> jax.Array:
        ops = operations_of(formulation, zero)

        def one_step(before: Any, after: Any) -> jax.Array:
            change = _change(ops, ops.decode(after, fmt), ops.decode(before, fmt))
            return fold((change * change).reshape(-1, width), jnp.add)

        return jax.vmap(one_step)(recorded[:-1], recorded[1:])

    return compile_exactly(whole, device)


@functools.lru_cache(maxsize=64)
def _products_program(
    replayed_format: Format,
    recorded_format: Format,
    width: int,
    formulation: Formulation,
    device: Device,
    *,
    observed: bool = False,
) -> Callable:
    """Compute what `Comparison.inner_products` returns; with `observed` also the squares of the recorded change."""

    def whole(zero: Any, replayed: Any, recorded: Any) -> tuple[jax.Array, ...]:
        ops = operations_of(formulation, zero)

        def one_step(replayed: Any, before: Any, after: Any) -> tuple[jax.Array, ...]:
            p = ops.decode(replayed, replayed_format)
            w, o = ops.decode(before, recorded_format), ops.decode(after, recorded_format)
            predicted, actual = _change(ops, p, w), _change(ops, o, w)
            difference = _change(ops, p, o)
            terms = (predicted * predicted, difference * difference, predicted * actual)
            terms += (actual * actual,) if observed else ()
            return fold_together(tuple(term.reshape(-1, width) for term in terms), width)

        return jax.vmap(one_step)(replayed, recorded[:-1], recorded[1:])

    return compile_exactly(whole, device)
