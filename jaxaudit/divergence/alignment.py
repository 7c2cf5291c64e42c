"""Two recordings laid upon each other: their common timesteps, tokens and tensors, and how to read them."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format, Patterns, encode
from jaxaudit.recording import Recording
from jaxaudit.safetensors_file import FileError, prefetched

#: Tensors in the order in which a step computes them: the first of a step that differs is a cause.
ORDER = ("grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation", "param")

#: Elements of a tensor that are read at a time. Sums depend on it: they are made block of tokens by block.
BLOCK_ELEMENTS = 1 << 21


class Block(NamedTuple):
    """Common tokens that are read together.

    Attributes:
        tokens: range of the common tokens.
        spans: rows to read of each recording.
        rows: which of the rows read belong to the tokens; None where all do, in order.
    """

    tokens: tuple[int, int]
    spans: tuple[tuple[int, int], tuple[int, int]]
    rows: tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]


class Pair(NamedTuple):
    """The same part of both recordings.

    Attributes:
        block: which tokens.
        places: range of the common timesteps, as places among them.
        tensors: for each tensor the patterns of both, of shape (timesteps, tokens, width).
    """

    block: Block
    places: tuple[int, int]
    tensors: Mapping[str, tuple[Patterns, Patterns]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """What two recordings have in common.

    Timesteps are those of the optimizer: a recording whose metadata say that it begins at `first_step` is laid
    beside the same timesteps of the other. Where one of both has gaps, the timesteps that both recorded are compared.

    Attributes:
        recordings: both.
        start: the common timestep whose state displacements are counted from; 0 is the initial state.
        start_steps: step of either recording, as it counts them, that begins in that state.
        timesteps: those that are compared, ascending.
        steps: which step each is in either recording, as it counts them.
        tokens: numbers of the common tokens within the whole parameter, ascending.
        parameter_tokens: how many tokens the whole parameter has.
        rows: each common token's row in either recording.
        tensors: names of the common tensors, in `ORDER`.
        assumed: which recording (0 or 1) does not say which rows it holds, and is taken to hold those of the other;
            None for neither.
    """

    recordings: tuple[Recording, Recording]
    start: int
    start_steps: tuple[int, int]
    timesteps: NDArray[np.int64]
    steps: tuple[NDArray[np.int64], NDArray[np.int64]]
    tokens: NDArray[np.int64]
    parameter_tokens: int
    rows: tuple[NDArray[np.int64], NDArray[np.int64]]
    tensors: tuple[str, ...]
    assumed: int | None

    @property
    def width(self) -> int:
        """Elements of a token."""
        return self.recordings[0].width

    @property
    def bytes(self) -> int:
        """Bytes that are compared, of both recordings."""
        count = len(self.timesteps) * len(self.tokens) * self.width
        return count * sum(r.formats[name].bytes for r in self.recordings for name in self.tensors)

    def only_in(self, which: int) -> list[str]:
        """Name the tensors that only one of both holds."""
        return [n for n in ORDER if n in self.recordings[which].formats and n not in self.tensors]

    def formats(self, name: str) -> tuple[Format, Format]:
        """Return the format of a tensor in either recording."""
        one, other = (recording.formats[name] for recording in self.recordings)
        return one, other

    def blocks(self) -> list[Block]:
        """Cut the tokens into blocks of which neither recording has more than a few million elements to read."""
        most, cuts = max(1, BLOCK_ELEMENTS // self.width), [0]
        while cuts[-1] < len(self.tokens):
            begin = cuts[-1]
            ends = [begin + _within(rows[begin : begin + most], most) for rows in self.rows]
            cuts.append(min(ends))
        return [self._block(begin, end) for begin, end in itertools.pairwise(cuts)]

    def _block(self, begin: int, end: int) -> Block:
        spans, picked = [], []
        for rows in self.rows:
            part = rows[begin:end]
            low, high = int(part.min()), int(part.max()) + 1
            whole = np.array_equal(part, np.arange(low, high))
            spans.append((low, high))
            picked.append(None if whole else part - low)
        return Block((begin, end), (spans[0], spans[1]), (picked[0], picked[1]))

    def pairs(self, length: int | None = None) -> Iterator[Pair]:
        """Read all of the timesteps, one window of timesteps and block of tokens after the other.

        Args:
            length: timesteps of a window, where one block holds all tokens; otherwise it is 1.
        """
        blocks = self.blocks()
        elements = max(b - a for block in blocks for a, b in block.spans) * self.width
        usual = max(1, BLOCK_ELEMENTS // elements)
        length = (length or usual) if len(blocks) == 1 else 1
        jobs = [
            functools.partial(self.read, block, (first, min(first + length, stop)))
            for start, stop in self._stretches()
            for first in range(start, stop, length)
            for block in blocks
        ]
        with prefetched(jobs) as ready:
            yield from ready

    def _stretches(self) -> list[tuple[int, int]]:
        """Cut the places where a recording holds steps in between."""
        jumps = np.any([np.diff(steps) != 1 for steps in self.steps], axis=0)
        cuts = [0, *(np.flatnonzero(jumps) + 1).tolist(), len(self.timesteps)]
        return list(itertools.pairwise(cuts))

    def read(
        self, block: Block, places: tuple[int, int], names: tuple[str, ...] | None = None
    ) -> Pair:
        """Read the states after a range of timesteps of a block, which follow on one another in both recordings."""
        spans = [(int(s[places[0]]), int(s[places[1] - 1]) + 1) for s in self.steps]
        read = [recording.patterns for recording in self.recordings]
        tensors = {
            name: self._of_block(
                block,
                [
                    r(name, *x)
                    for r, x in zip(read, zip(spans, block.spans, strict=True), strict=True)
                ],
            )
            for name in names or self.tensors
        }
        return Pair(block, places, tensors)

    def read_before(self, block: Block, steps: Sequence[int], names: tuple[str, ...]) -> Pair:
        """Read the states before a step of either recording, as they count them."""
        windows = [
            recording.at(int(step), span, names)
            for recording, step, span in zip(self.recordings, steps, block.spans, strict=True)
        ]
        tensors = {
            name: self._of_block(block, [window.tensors[name][:1] for window in windows])
            for name in names
        }
        return Pair(block, (-1, 0), tensors)

    def _of_block(self, block: Block, found: Sequence[Patterns]) -> tuple[Patterns, Patterns]:
        """Choose the rows of a block from those read."""
        one, other = (
            whole if rows is None else np.ascontiguousarray(whole[:, rows])
            for whole, rows in zip(found, block.rows, strict=True)
        )
        return one, other


def _within(rows: NDArray[np.int64], most: int) -> int:
    """Count the first rows that lie within a span of at most so many."""
    spread = np.maximum.accumulate(rows) - np.minimum.accumulate(rows)
    return len(rows) if spread.max() < most else int(np.argmax(spread >= most))


def align(
    a: Recording, b: Recording, steps: tuple[int | None, int | None] | None = None
) -> Alignment:
    """Find what two recordings have in common.

    Args:
        a: one.
        b: the other.
        steps: range of timesteps, its end not included; by default all common ones.

    Raises:
        FileError: their shapes differ, or they have no timestep or no token in common.
        ValueError: the range is empty, or not within the common timesteps.
    """
    if a.row_shape != b.row_shape:
        raise FileError(_other_shapes(a, b))
    (tokens_a, whole_a), (tokens_b, whole_b) = a.token_numbers(), b.token_numbers()
    assumed = None
    if whole_a != whole_b and a.tokens == b.tokens and a.tokens in (whole_a, whole_b):
        assumed = 0 if a.tokens == whole_a else 1
        tokens_a = tokens_b = tokens_b if assumed == 0 else tokens_a
        whole_a = whole_b = max(whole_a, whole_b)
    if whole_a != whole_b:
        raise FileError(_other_shapes(a, b))
    tokens, rows_a, rows_b = np.intersect1d(tokens_a, tokens_b, return_indices=True)
    if not len(tokens):
        raise FileError(
            f"{a.path} and {b.path} hold different tokens of the parameter (metadata `rows`), and none in common. "
            "Record some of the same rows."
        )
    common, steps_a, steps_b = _common_timesteps(a, b)
    chosen = _chosen(steps, common)
    return Alignment(
        recordings=(a, b),
        start=int(common[0]) - 1,
        start_steps=(int(steps_a[0]), int(steps_b[0])),
        timesteps=common[chosen],
        steps=(steps_a[chosen], steps_b[chosen]),
        tokens=tokens,
        parameter_tokens=whole_a,
        rows=(rows_a, rows_b),
        tensors=tuple(name for name in ORDER if name in a.formats and name in b.formats),
        assumed=assumed,
    )


def _other_shapes(a: Recording, b: Recording) -> str:
    shapes = [[r.token_numbers()[1], *r.row_shape] for r in (a, b)]
    return (
        f"{a.path} holds a parameter of shape {shapes[0]}, {b.path} one of {shapes[1]}; both must be the same. "
        "Give two recordings of one parameter."
    )


def timesteps_of(recording: Recording) -> NDArray[np.int64]:
    """Return the optimizer's count of each step of a recording."""
    numbers = np.arange(1, recording.steps + 1)
    if recording.gaps is not None:
        numbers = recording.gaps.numbers
    return numbers + (recording.first_step - 1)


def held(recording: Recording) -> str:
    """Say which timesteps a recording holds, as a range without its end."""
    own = timesteps_of(recording)
    gaps = f" ({len(own):,} of them)" if recording.gaps is not None else ""
    return f"{own[0]}:{own[-1] + 1}{gaps}"


def _common_timesteps(
    a: Recording, b: Recording
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the common timesteps, and which step each is in either recording, from 1."""
    common, *places = np.intersect1d(
        timesteps_of(a), timesteps_of(b), assume_unique=True, return_indices=True
    )
    if not common.size:
        both = " and ".join(f"{held(r)} ({r.path})" for r in (a, b))
        raise FileError(f"no timestep in common: {both}. Give recordings of the same timesteps.")
    return common, places[0] + 1, places[1] + 1


def _chosen(steps: tuple[int | None, int | None] | None, common: NDArray[np.int64]) -> slice:
    """Return the places of a range of timesteps among the common ones."""
    start, stop = int(common[0]), int(common[-1]) + 1
    first, end = steps or (None, None)
    first, end = start if first is None else first, stop if end is None else end
    if not start <= first < end <= stop:
        raise ValueError(
            f"steps {first}:{end} are outside what both recordings hold, {start}:{stop} (the end not included)."
        )
    begin, past = np.searchsorted(common, (first, end)).tolist()
    if begin == past:
        raise ValueError(f"steps {first}:{end}: none of them is in both recordings.")
    return slice(begin, past)


def value_format(patterns: Patterns, fmt: Format, narrow: Format) -> Format:
    """Return `narrow` if it holds every one of these float32 values, of which one at least is not zero.

    A recorder may have widened tensors that the optimizer keeps in 16 bits; their ulp is that of the 16 bits.
    """
    if fmt is not FLOAT32 or narrow is FLOAT32 or not (patterns << 1).any():
        return fmt
    if narrow is BFLOAT16:
        return fmt if (patterns & 0xFFFF).any() else narrow
    values = patterns.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        back = encode(values, FLOAT16).view(np.float16).astype(np.float32)
    same = (back == values) | np.isnan(values)
    return narrow if same.all() else fmt
