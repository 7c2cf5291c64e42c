"""Tokens whose rows are bit for bit the same: found by hashes, and confirmed by the rows themselves.

A hash says which rows can be the same; two rows count as the same only after a comparison of all their bits, so
that a collision of hashes costs time and changes nothing.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxaudit.comparison import fold
from jaxaudit.devices import Device
from jaxaudit.floats import Format
from jaxaudit.ledger.subject import Subject
from jaxaudit.operations import compile_exactly, kept
from jaxaudit.recording import Window
from jaxaudit.strips import Countable

#: Rows of a timestep, range by range: the first one's token, and their patterns of shape (rows, width).
Rows = Callable[[], Iterable[tuple[int, NDArray[np.unsignedinteger]]]]


def hash_rows(recorded: Any, fmt: Format, width: int, device: Device) -> dict[str, jax.Array]:
    """Hash each row after each step, and count the elements of it whose bits changed.

    Args:
        recorded: patterns, (length + 1, rows * width).
        fmt: their format.
        width: elements of a row.
        device: where they are.

    Returns:
        `hash0` and `hash1`, uint32, and `changed`, int32, each of shape (length, rows).
    """
    return _hash_program(fmt, width, device)(recorded)


def hashed(before: Any, after: Any, fmt: Format, width: int) -> dict[str, Any]:
    """Return what the hashes of rows are the sums of, element by element.

    Args:
        before: patterns before a step, (elements,).
        after: those after it.
        fmt: their format.
        width: elements of a row.

    Returns:
        `hash0` and `hash1`, uint32, and `changed`, int32, 1 where the bits are others: each (rows, width).
    """
    bits = after.astype(jnp.uint32).reshape(-1, width)
    if fmt.width == 32:  # else two changed signs would always cancel: 2^31 times an odd factor
        bits ^= bits >> 16
    factors = _factors(width)
    changed = (before != after).astype(jnp.int32).reshape(-1, width)
    return {"hash0": bits * factors[0], "hash1": bits * factors[1], "changed": changed}


class Clusters(Countable):
    """The sets of tokens with the same bits in every step: of all rows at once, read by themselves.

    Args:
        subject: what is followed.

    Attributes:
        first: of each token, the first one with the same bits after the last step; int64 (tokens,).
        counts: how many different rows, clusters and clustered tokens; int64 (3, timesteps, groups).
    """

    MERGED = {"first": "rows", "counts": "sum"}

    def __init__(self, subject: Subject):
        self._subject = subject
        self.first = np.arange(subject.groups.tokens)
        self.counts = np.zeros((3, *subject.counts), np.int64)

    def follow(self, progress: Callable[[Window], None]) -> None:
        """Read the weights of every step.

        Args:
            progress: is told of each window.
        """
        subject, bench = self._subject, self._subject.bench
        sets = Sets(subject.groups.tokens, subject.groups.members.values())
        key = bench.recording.storage, bench.recording.width, bench.device
        whole: dict[str, NDArray[Any]] = {}
        for window in bench.windows(subject.steps, names=("param",)):
            flat = window.tensors["param"].reshape(bench.length + 1, -1)
            for name, rows in hash_rows(jax.device_put(flat, bench.device), *key).items():
                found = np.asarray(rows)[: window.steps]
                if name not in whole or len(whole[name]) != window.steps:
                    whole[name] = np.empty((window.steps, subject.groups.tokens), found.dtype)
                whole[name][:, slice(*window.rows)] = found
            if window.rows[1] == subject.groups.tokens:
                self._count(window, whole, sets)
            progress(window)
        self.first[:] = sets.first

    def numbered(self) -> NDArray[np.int64]:
        """Number the sets in the order of their first tokens; (tokens,)."""
        return np.unique(self.first, return_inverse=True)[1].reshape(-1)

    def _count(self, window: Window, whole: Mapping[str, NDArray[Any]], sets: "Sets") -> None:
        hashes = (whole["hash0"].astype(np.uint64) << 32) | whole["hash1"]
        start, gaps = self._subject.place(window).start, self._subject.bench.recording.gaps
        resumed = gaps is not None and gaps.resumes(window.first)
        for k in range(window.steps):
            changed = bool(whole["changed"][k].any()) or (resumed and k == 0)
            rows = functools.partial(self._rows, window.first + k)
            self.counts[:, start + k] += sets.after(hashes[k], changed, rows)

    def _rows(self, timestep: int) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
        """Return all rows after a step, range by range."""
        bench = self._subject.bench
        for strip in bench.strips:
            patterns = bench.recording.patterns("param", (timestep, timestep + 1), strip.own)
            yield strip.own[0], patterns[0]


class Sets:
    """Follows the sets of tokens with the same bits.

    Args:
        tokens: how many there are.
        members: sorted tokens of each group.

    Attributes:
        first: of each token, the first one with the same bits; int64 (tokens,).
    """

    def __init__(self, tokens: int, members: Iterable[NDArray[np.int64]]):
        self._members = list(members)
        self.first = np.arange(tokens)
        self._counts: NDArray[np.int64] | None = None

    def after(self, hashes: NDArray[np.uint64], changed: bool, rows: Rows) -> NDArray[np.int64]:
        """Tell how many different rows, clusters and clustered tokens each group has after a step.

        Args:
            hashes: of each token's row.
            changed: whether a bit of any row changed since the call before.
            rows: reads the rows.

        Returns:
            Counts of shape (3, groups).
        """
        if changed or self._counts is None:
            self.first = first_alike(hashes, rows)
            self._counts = self._count()
        return self._counts

    def _count(self) -> NDArray[np.int64]:
        sizes = np.bincount(self.first, minlength=self.first.size)
        shared = sizes[self.first] > 1
        found = []
        for tokens in self._members:
            together = self.first[tokens[shared[tokens]]] if shared.any() else self.first[:0]
            sizes = np.unique(together, return_counts=True)[1]
            clusters, clustered = np.count_nonzero(sizes > 1), sizes[sizes > 1].sum()
            found.append((tokens.size - clustered + clusters, clusters, clustered))
        return np.array(found, np.int64).reshape(-1, 3).T


def first_alike(hashes: NDArray[np.uint64], rows: Rows) -> NDArray[np.int64]:
    """Return for each token the first one whose row has the same bits.

    Args:
        hashes: of each token's row; equal where the rows are.
        rows: reads the rows; not called where no two hashes are equal.
    """
    first, ordered = np.arange(hashes.size), np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not repeated.size:
        return first
    shared = repeated[np.minimum(repeated.searchsorted(hashes), repeated.size - 1)] == hashes
    tokens = np.flatnonzero(shared)
    _, index, kind = np.unique(hashes[tokens], return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    first[tokens] = tokens[index][kind]
    return _apart(first, _differing(tokens, kind, first[tokens] == tokens, rows))


def _differing(
    tokens: NDArray[np.int64], kind: NDArray[np.int64], leads: NDArray[np.bool_], rows: Rows
) -> list[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Return the tokens, with their rows, that are not like the first of their kind.

    Args:
        tokens: in order.
        kind: of each, counted from 0.
        leads: whether it is the first of its kind.
        rows: reads all rows in the order of tokens.
    """
    kept, found = np.zeros((0, 0)), []
    for begin, part in rows():
        if not kept.size:
            kept = np.empty((np.count_nonzero(leads), part.shape[1]), part.dtype)
        here = slice(*np.searchsorted(tokens, (begin, begin + len(part))))
        mine = part[tokens[here] - begin]
        kept[kind[here][leads[here]]] = mine[leads[here]]
        differs = (mine != kept[kind[here]]).any(axis=1)
        found.append((tokens[here][differs], mine[differs]))
    return found


def _apart(
    first: NDArray[np.int64], odd: list[tuple[NDArray[np.int64], NDArray[Any]]]
) -> NDArray[np.int64]:
    """Correct `first` where rows have the hash of an earlier one, but other bits, by a sort of the rows themselves."""
    tokens = np.concatenate([some for some, _ in odd])
    if not tokens.size:
        return first
    rows = np.ascontiguousarray(np.concatenate([part for _, part in odd]))
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, index, kind = np.unique(whole, return_index=True, return_inverse=True)
    first = first.copy()
    first[tokens] = tokens[index][kind.reshape(-1)]
    return first


@functools.lru_cache(maxsize=8)
def _factors(width: int) -> NDArray[np.uint32]:
    """Draw the odd factors of two multilinear hashes; (2, width)."""
    drawn = np.random.default_rng(0).integers(0, 1 << 31, (2, width), np.uint32)
    return drawn * np.uint32(2) + np.uint32(1)


@functools.lru_cache(maxsize=64)
def _hash_program(fmt: Format, width: int, device: Device) -> Callable:
    def one_step(before: Any, after: Any) -> dict[str, jax.Array]:
        values = hashed(before, after, fmt, width)
        return {name: fold(each, jnp.add) for name, each in values.items()}

    def whole(recorded: Any) -> dict[str, jax.Array]:
        found = {}
        for name, lanes in jax.vmap(one_step)(recorded[:-1], recorded[1:]).items():
            while lanes.shape[-1] > 1:
                lanes = jax.vmap(lambda each: fold(each, jnp.add))(kept(lanes))
            found[name] = lanes[..., 0]
        return found

    return compile_exactly(whole, device)
