"""Compare two recordings: where they part, and how far they are apart at every timestep."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.divergence.alignment import Alignment, Block, Pair, align, held, value_format
from jaxaudit.divergence.distances import (
    ULP_BIN_ENDS,
    ULP_BINS,
    Formats,
    Tokens,
    coarser,
    compare_tokens,
    differing,
    widened,
)
from jaxaudit.divergence.variables import DIFFERENCE_FIELDS, NEVER, RUNS, VARIABLES
from jaxaudit.floats import FLOAT32
from jaxaudit.provenance import origin
from jaxaudit.recording import Recording, TokenGroups, token_groups_of
from jaxaudit.results import NOT_AUDITED, label
from jaxaudit.safetensors_file import FileError

#: Called after each window with the bytes that are done, and all of them.
Progress = Callable[[int, int], None]

#: Entries of the largest table of ulp distances; above it there is none.
_MOST_ENTRIES = 1 << 25

#: Elements of the weights at the start that are kept; of larger parameters they are read again each time.
_KEPT_ELEMENTS = 1 << 24

_THREADS = min(4, os.cpu_count() or 1)


def compare(
    a: Recording,
    b: Recording,
    groups: TokenGroups | None = None,
    *,
    steps: tuple[int | None, int | None] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Compare two recordings of one parameter, element by element and timestep by timestep.

    Both are read once, side by side, in windows: memory does not grow with their length. Tensors stored in one format
    are compared bit for bit; of different formats their exact values are compared, and the distance in ulp is that
    after rounding to the coarser one. Timesteps or tokens that only one holds are left out.

    Args:
        a: one run.
        b: the other.
        groups: sets of tokens to count by: over the rows of `a`, over those of `b`, or over the whole parameter; by
            default those that `a` holds, else only `all`.
        steps: range of timesteps, its end not included; by default all common ones.
        window_steps: timesteps that are read at a time. The result does not depend on it.
        progress: called after each window.

    Returns:
        The dataset of `divergence.variables.VARIABLES`. `ulp_histogram` is left out where it would be huge.

    Raises:
        FileError: a recording cannot be read; or both have different shapes, or nothing in common; or the groups do
            not fit them.
        ValueError: the range of timesteps is empty, or not within the common ones.
    """
    alignment = align(a, b, steps)
    members = _members(alignment, groups or token_groups_of(a))
    tables = _Tables(alignment, members)
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        tables.add_start(pool)
        for pair in alignment.pairs(window_steps):
            tables.add(pair, pool)
            done += sum(x.nbytes for both in pair.tensors.values() for x in both)
            if progress:
                progress(min(done, alignment.bytes), alignment.bytes)
    return _label(alignment, tables)


def _members(alignment: Alignment, groups: TokenGroups) -> dict[str, NDArray[np.int64]]:
    """Return each group's members among the common tokens; there may be none."""
    a, b = alignment.recordings
    for whole, places in (
        (a.tokens, alignment.rows[0]),
        (b.tokens, alignment.rows[1]),
        (alignment.parameter_tokens, alignment.tokens),
    ):
        if groups.tokens == whole:
            return {
                name: np.flatnonzero(np.isin(places, members)).astype(np.int64)
                for name, members in groups.members.items()
            }
    sizes = sorted({a.tokens, b.tokens, alignment.parameter_tokens})
    raise FileError(
        f"the token groups are over {groups.tokens} tokens, but the recordings hold "
        f"{' or '.join(map(str, sizes))}. Use the groups that belong to one of them."
    )


class _Tables:
    """All arrays of a comparison, filled window by window.

    Args:
        alignment: what is compared.
        members: of each token group, among the common tokens.
    """

    def __init__(self, alignment: Alignment, members: Mapping[str, NDArray[np.int64]]):
        self.alignment, self.members = alignment, members
        self.formats = _formats(alignment)
        self.blocks = alignment.blocks()
        self.inside = np.zeros((len(alignment.tokens), len(members)), np.int8)
        for k, tokens in enumerate(members.values()):
            self.inside[tokens, k] = 1
        self._kinds, kind = np.unique(self.inside, axis=0, return_inverse=True)
        self._kind = kind.reshape(-1).astype(np.int64)
        tensors, groups = len(alignment.tensors), len(members)
        each = (tensors, len(alignment.timesteps), groups)
        self.counts = np.zeros((3, *each), np.int64)
        self.sums = np.zeros((5, *each))
        self.peaks = np.zeros((2, *each))
        self.moves = np.zeros((3, *each[1:]))
        kept = math.prod(each) * ULP_BINS <= _MOST_ENTRIES
        self.histogram = np.zeros((*each, ULP_BINS), np.int64) if kept else None
        self.start_counts = np.zeros((2, tensors, groups), np.int64)
        self.start_squares = np.zeros((tensors, groups))
        self.first = np.full((tensors, len(alignment.tokens)), NEVER)
        self.first_difference = np.full((tensors, len(DIFFERENCE_FIELDS)), NEVER)
        self._starts: dict[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def add_start(self, pool: ThreadPoolExecutor) -> None:
        """Compare the state before the first timestep."""
        steps = [int(steps[0]) for steps in self.alignment.steps]
        names = tuple(name for name in self.alignment.tensors if name != "grad")
        for block in self.blocks:
            pair = self.alignment.read_before(block, steps, names)
            for name, _, found in self._compared(pair, pool, displaced=False):
                k = self.alignment.tensors.index(name)
                self._note_first(k, pair, 0, found)
                for g, members in enumerate(self._within(block)):
                    self.start_counts[:, k, g] += found.counts[:, members].sum(axis=1)
                    self.start_squares[k, g] += found.sums[2, members].sum()
        if "grad" in self.alignment.tensors:
            k = self.alignment.tensors.index("grad")
            self.start_counts[:, k], self.start_squares[k] = NOT_AUDITED, math.nan

    def add(self, pair: Pair, pool: ThreadPoolExecutor) -> None:
        """Compare a window."""
        groups = self._within(pair.block)
        for name, step, found in self._compared(pair, pool, displaced=True):
            k = self.alignment.tensors.index(name)
            at = pair.places[0] + step
            self._note_first(k, pair, step, found)
            for g, members in enumerate(groups):
                self._add_group((k, at, g), found, members)
            if self.histogram is not None:
                self.histogram[k, at] += self._kinds.T.astype(np.int64) @ found.histogram

    def _add_group(
        self, at: tuple[int, int, int], found: Tokens, members: NDArray[np.int64] | slice
    ) -> None:
        """Add up a group's tokens; NumPy's sum is pairwise, and here that of one block at one timestep."""
        counts, sums = found.counts[:, members], found.sums[:, members]
        k, t, g = at
        self.counts[:2, k, t, g] += counts.sum(axis=1)
        self.counts[2, k, t, g] += np.count_nonzero(counts[0])
        with np.errstate(all="ignore"):
            totals = np.ascontiguousarray(sums).sum(axis=1)
            self.sums[:, k, t, g] += totals[:5]
            if len(totals) > 5:
                self.moves[:, t, g] += totals[5:]
            peaks = found.peaks[:, members].max(axis=1, initial=0)
            self.peaks[:, k, t, g] = np.maximum(self.peaks[:, k, t, g], peaks)

    def _compared(
        self, pair: Pair, pool: ThreadPoolExecutor, *, displaced: bool
    ) -> Iterator[tuple[str, int, Tokens]]:
        """Compare each tensor and timestep of a window, several at a time, in the order of `tensors`."""
        kinds = self._kind[slice(*pair.block.tokens)]
        start = self._start(pair.block) if displaced else None
        jobs = [
            (name, step, pool.submit(
                compare_tokens, a[step], b[step], self.formats[name], kinds, len(self._kinds),
                start if name == "param" else None,
            ))
            for name, (a, b) in pair.tensors.items()
            for step in range(len(a))
        ]  # fmt: skip
        for name, step, job in jobs:
            yield name, step, job.result()

    def _start(self, block: Block) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the weights of both at the common start, of a block's tokens."""
        if block.tokens in self._starts:
            return self._starts[block.tokens]
        steps = self.alignment.start_steps
        patterns = self.alignment.read_before(block, steps, ("param",)).tensors["param"]
        formats = self.alignment.formats("param")
        one, other = (widened(x[0], fmt) for x, fmt in zip(patterns, formats, strict=True))
        if len(self.alignment.tokens) * self.alignment.width <= _KEPT_ELEMENTS:
            self._starts[block.tokens] = one, other
        return one, other

    def _within(self, block: Block) -> list[NDArray[np.int64] | slice]:
        """Return each group's members in a block, counted from its start."""
        found: list[NDArray[np.int64] | slice] = []
        for members in self.members.values():
            begin, end = np.searchsorted(members, block.tokens)
            whole = end - begin == block.tokens[1] - block.tokens[0]
            found.append(slice(None) if whole else members[begin:end] - block.tokens[0])
        return found

    def _note_first(self, k: int, pair: Pair, step: int, found: Tokens) -> None:
        """Keep when each token differs for the first time, and the first element that does.

        Windows come in the order of timesteps, and within a timestep in that of tokens.
        """
        unlike = found.counts[0] > 0
        if not unlike.any():
            return
        first = self.first[k, slice(*pair.block.tokens)]
        place = pair.places[0] + step
        timesteps = self.alignment.timesteps
        timestep = int(timesteps[place]) if place >= 0 else int(timesteps[0]) - 1
        first[unlike & (first == NEVER)] = timestep
        if self.first_difference[k, 0] == NEVER:
            token = int(np.argmax(unlike))
            name = self.alignment.tensors[k]
            a, b = (x[step, token] for x in pair.tensors[name])
            position = int(np.argmax(differing(a, b, self.formats[name])))
            number = self.alignment.tokens[pair.block.tokens[0] + token]
            self.first_difference[k] = (timestep, number, position, a[position], b[position])


def _formats(alignment: Alignment) -> dict[str, Formats]:
    """Find the format in which each tensor's distance is told; what was only widened counts as what it was."""
    count = len(alignment.timesteps)
    probes = sorted({0, count // 2, count - 1})
    block = alignment.blocks()[0]
    narrow = coarser(*(recording.storage for recording in alignment.recordings))
    found = {}
    for name in alignment.tensors:
        stored = alignment.formats(name)
        held = [set(), set()]
        for t in probes if FLOAT32 in stored and narrow is not FLOAT32 else ():
            patterns = alignment.read(block, (t, t + 1), (name,)).tensors[name]
            for seen, x, fmt in zip(held, patterns, stored, strict=True):
                seen.add(value_format(x, fmt, narrow))
        real = [narrow if seen == {narrow} else fmt for seen, fmt in zip(held, stored, strict=True)]
        found[name] = Formats(*stored, coarser(*real))
    return found


def _label(alignment: Alignment, tables: _Tables) -> xr.Dataset:
    """Put names to what was counted."""
    timesteps = alignment.timesteps
    with np.errstate(all="ignore"):
        roots, moves = np.sqrt(tables.sums), np.sqrt(tables.moves[:2])
        # One root of the product: exactly 1 where both displacements are the same.
        cosine = tables.moves[2] / np.sqrt(tables.moves[0] * tables.moves[1])
    arrays: dict[str, Any] = {
        "element_count": [len(m) * alignment.width for m in tables.members.values()],
        "differing_count": tables.counts[0],
        "rounded_differing_count": tables.counts[1],
        "differing_token_count": tables.counts[2],
        "max_ulp_distance": tables.peaks[1],
        "ulp_distance_sum": tables.sums[3],
        "ulp_distance_norm": roots[4],
        "norm": np.moveaxis(roots[:2], 0, 1),
        "distance": roots[2],
        "max_distance": tables.peaks[0],
        "displacement_norm": moves,
        "displacement_cosine": np.clip(cosine, -1, 1),
        "differing_count_at_start": tables.start_counts[0],
        "rounded_differing_count_at_start": tables.start_counts[1],
        "distance_at_start": np.sqrt(tables.start_squares),
        "first_difference": tables.first_difference,
        "first_divergence": tables.first,
        "in_group": tables.inside,
        "storage_format": [[f.name for f in alignment.formats(n)] for n in alignment.tensors],
        "ulp_format": [tables.formats[name].ulp.name for name in alignment.tensors],
        "loss": [
            _series(r, "loss", s)
            for r, s in zip(alignment.recordings, alignment.steps, strict=True)
        ],
        "learning_rate": [
            _series(r, "rate", s)
            for r, s in zip(alignment.recordings, alignment.steps, strict=True)
        ],
    }
    coordinates = {
        "timestep": timesteps,
        "token_group": list(tables.members),
        "tensor": list(alignment.tensors),
        "run": list(RUNS),
        "token": alignment.tokens,
        "divergence_field": list(DIFFERENCE_FIELDS),
    }
    if tables.histogram is not None:
        arrays["ulp_histogram"] = tables.histogram
        coordinates["ulp_bin"] = ULP_BIN_ENDS
    return label(arrays, coordinates, _attributes(alignment), VARIABLES)


def _series(recording: Recording, what: str, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the losses or learning rates of a recording at some of its steps; NaN where it has none."""
    given = recording.hyperparameters
    whole = recording.losses if what == "loss" else given.learning_rate if given else None
    if whole is None:
        return np.full(len(steps), math.nan)
    return np.asarray(whole, np.float64)[steps - 1]


def _attributes(alignment: Alignment) -> dict[str, Any]:
    a, b = alignment.recordings
    return {
        "title": f"jaxaudit: {a.path.name} (a) against {b.path.name} (b)",
        "kind": "comparison of two recordings",
        "source_a": str(a.path),
        "source_b": str(b.path),
        "source_sha256_head_a": a.fingerprint(),
        "source_sha256_head_b": b.fingerprint(),
        "timesteps_a": held(a),
        "timesteps_b": held(b),
        "tokens_a": a.tokens,
        "tokens_b": b.tokens,
        "only_in_a": ",".join(alignment.only_in(0)),
        "only_in_b": ",".join(alignment.only_in(1)),
        "rows_assumed_of": "" if alignment.assumed is None else RUNS[alignment.assumed],
        "common_start": alignment.start,
        "differing_claims": json.dumps(differing_claims(a, b)),
        **origin(),
    }


#: Claims of the metadata that are told of elsewhere, or that no two runs share.
_TOLD_ELSEWHERE = {"hyperparameters", "rows", "created_at", "first_step", "parameter_shape"}


def differing_claims(a: Recording, b: Recording) -> dict[str, list[Any]]:
    """Return what both recordings say differently of themselves: hyperparameters and metadata, by name.

    The learning rate is among them where it differs at a common timestep; None stands for nothing said.
    """
    claims = [_hyperparameters(r) | {k: v for k, v in r.metadata.items() if k not in _TOLD_ELSEWHERE} for r in (a, b)]  # fmt: skip
    names = dict.fromkeys([*claims[0], *claims[1]])
    found = {name: [one.get(name) for one in claims] for name in names}
    return {name: both for name, both in found.items() if both[0] != both[1]}


def _hyperparameters(recording: Recording) -> dict[str, Any]:
    given = recording.hyperparameters
    if given is None:
        return {}
    rates = np.unique(given.learning_rate)
    rate = float(rates[0]) if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    named = ("beta1", "beta2", "epsilon", "weight_decay")
    return {"learning_rate": rate} | {name: fields[name] for name in named}
