"""A recorded training run, and the groups of tokens to count it by."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit.byte_files import Closing
from jaxaudit.floats import FORMATS, Format
from jaxaudit.gaps import Gaps, find
from jaxaudit.hyperparameters import Hyperparameters, StepCount, double_of_float32
from jaxaudit.safetensors_file import FileError, SafetensorsFile, aligned, prefetched, short
from jaxaudit.sources.hdf5 import Hdf5Source
from jaxaudit.sources.opening import RateOf, kind_of, open_source
from jaxaudit.sources.source import TENSOR_KEYS, Opened, Source

_SCALAR_KEYS = {
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "epsilon": "adam_epsilon",
}

#: Other spellings that the JSON of the metadata `hyperparameters` may use.
_SPELLINGS = {
    "lr": "learning_rate",
    "eps": "epsilon",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "epsilon",
}


@dataclasses.dataclass(frozen=True)
class Window:
    """A few steps of a recording (and a range of rows), as bit patterns.

    The arrays belong to the reader, which fills them anew when it no longer has to hold them. They always have the full
    window length, so that no program is compiled twice; entries beyond `steps` are zero.

    Attributes:
        first: the first step, counted from 1.
        steps: how many steps are valid.
        rows: range of rows.
        overlap: how many of them, at the start, belong to the rows before: they are read once more, so that every window
            has as many.
        tensors: `grad` of shape (length, rows, width): entry k belongs to step first + k. All others of
            shape (length + 1, rows, width): entry k is the state before step first + k.
    """

    first: int
    steps: int
    rows: tuple[int, int]
    tensors: Mapping[str, NDArray[Any]]
    overlap: int = 0

    @property
    def range(self) -> tuple[int, int]:
        """First step, and the step after the last."""
        return self.first, self.first + self.steps

    @property
    def own(self) -> tuple[int, int]:
        """Range of rows without those that belong to the rows before."""
        return self.rows[0] + self.overlap, self.rows[1]


class Recording(Closing):
    """A recorded run, opened without loading; a context manager.

    Args:
        source: a safetensors file, or where else the tensors come from (`open_recording`).

    Attributes:
        path: the file or folder.
        steps: T, the number of recorded steps.
        row_shape: shape of one row of the parameter; () for a vector.
        tokens: entries of the parameter's first axis, called rows or tokens.
        width: elements of one row.
        formats: recorded format of each big tensor that is there, by name (`param`, `grad`, `exp_avg`,
            `exp_avg_sq`, `max_exp_avg_sq`, `compensation`).
        hyperparameters: what the optimizer was given; None where the file says nothing of it.
        metadata: the file's own claims, as strings.
        losses: loss of each step, float64 of shape (T,), or None.
        first_step: count of the first recorded step in the bias corrections.
        timesteps: number of each recorded state in the training run, int64 (T+1,). It is 0..T unless the run was
            recorded late, or the parameter was left out of some steps (metadata `skipped_steps`): those are no
            steps of its optimizer and are not in the recording. Of a recording with gaps, that of the state before
            the first recorded step, and of the states after each.
        gaps: which steps were recorded, where the recorder left some out (`every=`), each with the state before it;
            None where there are no gaps. Steps are counted as recorded, 1..T; `number_of` says which of the run's
            they are.
        runs: for a series of checkpoints with gaps, the first and last number of each run of consecutive steps,
            of which this recording is one (`open_recording(path, run=k)`); else empty.

    Raises:
        FileError: what the file lacks or contradicts, with the key and the shape.
    """

    def __init__(self, source: str | os.PathLike[str] | Opened):
        found = source if isinstance(source, Opened) else Opened(SafetensorsFile(source))
        self._source, self.runs = found.source, found.runs
        try:
            self._open(found)
        except BaseException:
            self._source.close()
            raise

    def _open(self, found: Opened) -> None:
        self.path, self.metadata = self._source.path, dict(self._source.metadata)
        shape = self._shape()
        self._entries = shape[0]
        self.first_step = self.number("first_step") or 1
        self.gaps: Gaps | None = find(self.path, self.metadata, shape[0], self.first_step)
        self._kept = self.gaps.states if self.gaps else self._kept_entries()
        self.timesteps = np.arange(shape[0]) if found.timesteps is None else found.timesteps
        if self.gaps:
            self.timesteps = self.gaps.timesteps
        elif self._kept is not None:
            self.timesteps = self.timesteps[self._kept]
        self.steps, self.tokens, self.row_shape = self.timesteps.size - 1, shape[1], shape[2:]
        self.width = math.prod(self.row_shape)
        self.formats = self._formats(shape)
        self._check_num_steps()
        self._check_skipped()
        self.losses = self._losses()
        self.hyperparameters = self._hyperparameters()

    def close(self) -> None:
        """Close the files."""
        self._source.close()

    @property
    def storage(self) -> Format:
        """Format of the parameter."""
        return self.formats["param"]

    @property
    def longest_run(self) -> int:
        """Most recorded steps that follow on one another."""
        if self.gaps is None:
            return self.steps
        return int(np.diff([1, *self.gaps.resumed, self.steps + 1]).max())

    def number_of(self, step: int) -> int:
        """Return the number in the run of a recorded step, 1..T; it is the same where there are no gaps."""
        return step if self.gaps is None else int(self.gaps.numbers[step - 1])

    @property
    def step_elements(self) -> int:
        """Elements of the parameter."""
        return self.tokens * self.width

    @property
    def bytes(self) -> int:
        """Bytes of the big tensors."""
        return sum(self._source.tensors[TENSOR_KEYS[name]].bytes for name in self.formats)

    def fingerprint(self) -> str:
        """Return a cheap digest of the source; of a safetensors file, its length, its header and the MiB that follows."""
        return self._source.fingerprint()

    def coverage(self) -> dict[str, str]:
        """Say in words what an audit can give: for each stage and each group of the audit's file.

        Each sentence begins with "yes" or "no".
        """
        has = {*self.formats}
        moments, fresh = {"exp_avg", "exp_avg_sq"} <= has, self.first_step == 1
        given = self.hyperparameters is not None
        why: dict[str, str] = {}
        for stage in ("exp_avg", "exp_avg_sq"):
            why[stage] = self._lack({stage, "grad"})
        if not given:
            why["param"] = "no hyperparameters"
        elif not moments and not (fresh and "grad" in has):
            why["param"] = self._lack({"exp_avg", "exp_avg_sq"})
        replayed = self._lack({"grad"}) or ("" if given else "no hyperparameters")
        if not replayed and not moments and not fresh:
            replayed = (
                self._lack({"exp_avg", "exp_avg_sq"}) + ", and the run does not start at step 1"
            )
        for group in ("free_run", "updates", "moments", "counterfactual"):
            why[group] = replayed
        found = {name: f"no: {reason}" if reason else "yes" for name, reason in why.items()}
        if found.get("param", "yes") == "yes" and "grad" not in has:
            found["param"] = (
                "yes, under arithmetics that read stored moments; not under fused ones (no `grad_W`)"
            )
        names = (
            "exp_avg",
            "exp_avg_sq",
            "param",
            "free_run",
            "updates",
            "moments",
            "counterfactual",
        )
        found = {name: found.get(name, "yes") for name in names}
        found |= {"lattice": "yes", "tokens": "yes"}
        return found if self.gaps is None else self._covered_between_gaps(found, self.gaps)

    def _covered_between_gaps(self, found: Mapping[str, str], gaps: Gaps) -> dict[str, str]:
        """Take from what a recording's tensors allow what the missing steps do not."""
        said = f"yes, at the recorded steps ({gaps.text()})"
        without = {name: said if why == "yes" else why for name, why in found.items()}
        for name in ("free_run", "counterfactual"):  # they run on from step to step
            if found[name] == "yes":
                without[name] = f"no: {gaps.text()}, and nothing is run across a gap"
        return without

    def _lack(self, needed: set[str]) -> str:
        """Name the tensors of those needed that are not recorded, by their keys; nothing if none."""
        missing = [f"`{TENSOR_KEYS[n]}`" for n in TENSOR_KEYS if n in needed - {*self.formats}]
        return f"no {' and no '.join(missing)}" if missing else ""

    def flag(self, name: str) -> bool | None:
        """Read a yes-or-no claim of the metadata; None where there is none."""
        text = self.metadata.get(name, "").strip().lower()
        return {"true": True, "1": True, "false": False, "0": False}.get(text)

    def number(self, name: str) -> int | None:
        """Read a positive integer claim of the metadata; None where there is none."""
        text = self.metadata.get(name, "").strip()
        return int(text) if text.isdecimal() and len(text) < 10 and int(text) > 0 else None

    def token_numbers(self) -> tuple[NDArray[np.int64], int]:
        """Return each recorded row's number within the whole parameter, and how many that one has.

        A recording of some rows only names them in its metadata (`rows`, `parameter_shape`); without
        that it counts as whole.
        """
        rows = _json_counts(self.metadata.get("rows"))
        shape = _json_counts(self.metadata.get("parameter_shape"))
        if (
            not rows
            or not shape
            or len(rows) != self.tokens
            or tuple(shape[1:]) != self.row_shape
            or max(rows) >= shape[0]
        ):
            return np.arange(self.tokens), self.tokens
        return np.array(rows), shape[0]

    def parameter_elements(self) -> tuple[NDArray[np.int64], int]:
        """Return each recorded element's flat position within the whole parameter, and that one's size.

        See `token_numbers`.
        """
        rows, tokens = self.token_numbers()
        within = np.arange(self.width)
        return (rows[:, None] * self.width + within).reshape(-1), tokens * self.width

    def patterns(
        self, name: str, states: tuple[int, int], rows: tuple[int, int]
    ) -> NDArray[np.unsignedinteger]:
        """Read a range of states of a range of rows of one tensor, into memory of its own.

        Args:
            name: which tensor.
            states: range of entries of the first axis: 0 is the initial state, t belongs to step t.
            rows: range of rows.

        Returns:
            Bit patterns of shape (states, rows, width).
        """
        shape = (states[1] - states[0], rows[1] - rows[0], self.width)
        out = aligned(shape, self.formats[name].pattern_dtype)
        wanted = states if self._kept is None else self._kept[slice(*states)]
        self._read_entries(name, wanted, rows, out)
        return out

    def windows(
        self,
        steps: tuple[int, int],
        length: int,
        rows: int,
        names: tuple[str, ...],
        held: int = 1,
        ranges: Iterable[tuple[tuple[int, int], int]] | None = None,
    ) -> Iterator[Window]:
        """Read steps[0]..steps[1]-1 (1-based) window by window, one window ahead.

        Args:
            steps: range of steps.
            length: steps of one window.
            rows: rows of one window; row ranges follow one another within each range of steps.
            names: which tensors.
            held: how many windows stay as they are: the latest ones.
            ranges: ranges of so many rows, each with its overlap (see `Window`); by default all rows, one range after the
                other.
        """
        starts = range(0, self.tokens, rows)
        ranges = list(ranges or (((row, min(row + rows, self.tokens)), 0) for row in starts))
        rings = [self._buffers(length, rows, names) for _ in range(held + 1)]
        jobs = []
        for first, count in self._cuts(steps, length):
            for part, overlap in ranges:
                ring = rings[len(jobs) % len(rings)]
                jobs.append(
                    lambda f=first, c=count, s=part, r=ring, o=overlap: self._read(f, c, s, r, o)
                )
        with prefetched(jobs) as ready:
            yield from ready

    def _cuts(self, steps: tuple[int, int], length: int) -> Iterator[tuple[int, int]]:
        """Cut a range of steps into windows: the first step of each, and how many. None reaches across a gap."""
        resumed = [] if self.gaps is None else self.gaps.resumed.tolist()
        inner = [step for step in resumed if steps[0] < step < steps[1]]
        for start, stop in itertools.pairwise([steps[0], *inner, steps[1]]):
            for first in range(start, stop, length):
                yield first, min(length, stop - first)

    def at(
        self, timestep: int, rows: tuple[int, int], names: tuple[str, ...] | None = None
    ) -> Window:
        """Read one timestep of a range of rows, into memory of its own; as `windows` does."""
        names = tuple(self.formats) if names is None else names
        buffers = self._buffers(1, rows[1] - rows[0], names)
        return self._read(timestep, 1, rows, buffers)

    def group_tensors(self) -> Source | None:
        """Return the open source if it holds token groups of its own."""
        found = any(_holds_groups(name) for name in self._source.tensors)
        return self._source if found else None

    def _buffers(
        self, length: int, rows: int, names: tuple[str, ...]
    ) -> dict[str, NDArray[np.unsignedinteger]]:
        return {
            name: aligned(
                (length + (name != "grad"), min(rows, self.tokens), self.width),
                self.formats[name].pattern_dtype,
            )
            for name in names
        }

    def _read(
        self,
        first: int,
        count: int,
        rows: tuple[int, int],
        ring: Mapping[str, NDArray[Any]],
        overlap: int = 0,
    ) -> Window:
        tensors = {}
        for name, buffer in ring.items():
            start = first if name == "grad" else first - 1
            entries = self._entries_between(start, first + count, first)
            part = buffer[:, : rows[1] - rows[0]]
            if part.shape != buffer.shape:  # the last rows: a window of its own size
                part = aligned(part.shape, part.dtype)
            self._read_entries(name, entries, rows, part[: first + count - start])
            part[first + count - start :] = 0
            tensors[name] = part
        return Window(first, count, rows, tensors, overlap)

    def _entries_between(
        self, start: int, stop: int, first: int
    ) -> tuple[int, int] | NDArray[np.int64]:
        """Return the source's entries of some states, one of which may be that before step `first`."""
        if self._kept is None:
            return start, stop
        wanted = self._kept[start:stop]
        if self.gaps is not None and start < first:
            wanted = np.append(self.gaps.before[first - 1], wanted[1:])
        return wanted

    def _read_entries(
        self,
        name: str,
        wanted: tuple[int, int] | NDArray[np.int64],
        rows: tuple[int, int],
        out: NDArray[Any],
    ) -> None:
        """Read entries of the source: a range, or those of which it holds more than are steps of the optimizer."""
        key = TENSOR_KEYS[name]
        if isinstance(wanted, tuple):
            self._source.read_rows(key, wanted, rows, out)
            return
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        for part in np.split(np.arange(wanted.size), cuts):
            first, last = int(wanted[part[0]]), int(wanted[part[-1]])
            self._source.read_rows(key, (first, last + 1), rows, out[part[0] : part[-1] + 1])

    def _kept_entries(self) -> NDArray[np.int64] | None:
        """Return the entries that are states after a step of the optimizer; None for all.

        A step without a gradient changes nothing and is not counted, so the states around it are consecutive.
        """
        text = self.metadata.get("skipped_steps")
        skipped = _json_counts(text)
        if text is None or skipped == []:
            return None
        if skipped is None or min(skipped) < 1 or max(skipped) >= self._entries:
            raise FileError(
                f"{self.path}: the metadata `skipped_steps` is {short(text)}; needed a JSON list of timesteps from "
                f"1 to {self._entries - 1}."
            )
        kept = np.setdiff1d(np.arange(self._entries), skipped)
        if kept.size < 2:
            raise FileError(
                f"{self.path}: every timestep is in `skipped_steps`; the parameter never had a gradient, and there "
                "is nothing to audit."
            )
        return kept

    def _check_skipped(self) -> None:
        """Raise unless skipped steps at the end left the weights as they were; those within are seen by the replay."""
        if self.gaps or self._kept is None or self._kept[-1] == self._entries - 1:
            return
        rows = max(1, (1 << 22) // self.width)
        for row in range(0, self.tokens, rows):
            span = (row, min(row + rows, self.tokens))
            states = []
            for entry in (int(self._kept[-1]), self._entries - 1):
                shape = (1, span[1] - span[0], self.width)
                states.append(aligned(shape, self.storage.pattern_dtype))
                self._source.read_rows("W", (entry, entry + 1), span, states[-1])
            if not np.array_equal(*states):
                raise FileError(
                    f"{self.path}: `W` changes after timestep {self._kept[-1]}, though `skipped_steps` names every "
                    "later one. Record the run again."
                )

    def _shape(self) -> tuple[int, ...]:
        tensor = self._source.tensors.get("W")
        if tensor is None:
            found = short(", ".join(self._source.tensors)) or "no tensor at all"
            raise FileError(
                f"{self.path}: no `W` (found: {found}). A recording holds the parameter as `W` of shape "
                "(T+1, token, ...)."
            )
        if len(tensor.shape) < 2 or 0 in tensor.shape[1:]:
            raise FileError(
                f"{self.path}: `W` has shape {list(tensor.shape)}, needed (T+1, token, ...) without empty axes."
            )
        if tensor.shape[0] < 2:
            raise FileError(
                f"{self.path}: `W` has shape {list(tensor.shape)}, which holds no step (T = "
                f"{tensor.shape[0] - 1}). A recording needs the initial state and at least one step."
            )
        return tensor.shape

    def _formats(self, shape: tuple[int, ...]) -> dict[str, Format]:
        formats = {}
        for name, key in TENSOR_KEYS.items():
            tensor = self._source.tensors.get(key)
            if tensor is None:
                continue
            if tensor.dtype not in FORMATS:
                raise FileError(
                    f"{self.path}: `{key}` has dtype {tensor.dtype}; supported are {', '.join(FORMATS)}."
                )
            if tensor.shape != shape:
                raise FileError(
                    f"{self.path}: `{key}` has shape {list(tensor.shape)}, but `W` has {list(shape)}; both "
                    "must be the same."
                )
            formats[name] = FORMATS[tensor.dtype]
        return formats

    def _check_num_steps(self) -> None:
        if "num_steps" not in self._source.tensors:
            return
        stated = self._scalars("num_steps", 1)
        if stated[0] != self._entries - 1:
            raise FileError(
                f"{self.path}: `num_steps` says {stated[0]:g}, but `W` holds {self._entries - 1} steps. "
                "The recording is incomplete or was cut; correct `num_steps`."
            )

    def _losses(self) -> NDArray[np.float64] | None:
        if "losses" not in self._source.tensors:
            return None
        return self._of_steps(self._scalars("losses", self._entries))

    def _of_steps(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values of the optimizer's steps, (T,), from one for each entry of the source."""
        return (values if self._kept is None else values[self._kept])[1:]

    def _scalars(self, key: str, *lengths: int) -> NDArray[np.float64]:
        """Read a small tensor as a vector of one of the given lengths (a 0-d one has length 1)."""
        tensor = self._source.tensors[key]
        if math.prod(tensor.shape) not in lengths or len(tensor.shape) > 1:
            needed = " or ".join(f"({length},)" for length in lengths)
            raise FileError(
                f"{self.path}: `{key}` has shape {list(tensor.shape)}, needed {needed}."
            )
        if tensor.dtype in ("BF16", "F16", "BOOL"):
            raise FileError(
                f"{self.path}: `{key}` has dtype {tensor.dtype}, needed F32, F64 or an integer."
            )
        return self._source.read_floats(key).reshape(-1)

    def _hyperparameters(self) -> Hyperparameters | None:
        stated = self._stated_hyperparameters()
        values: dict[str, NDArray[np.float64]] = {}
        origin: dict[str, str] = {}
        for name, key in _SCALAR_KEYS.items():
            if name in stated:
                values[name] = _as_doubles(self.path, name, self._without_blanks(stated[name]))
                origin[name] = "metadata `hyperparameters`"
            elif key in self._source.tensors:
                values[name], origin[name] = self._stored_scalar(name, key)
        if not values and not {"grad", "exp_avg", "exp_avg_sq"} & set(self.formats):
            return None
        missing = [_SCALAR_KEYS[name] for name in _SCALAR_KEYS if name not in values]
        if missing:
            raise FileError(
                f"{self.path}: missing hyperparameters: {', '.join(missing)}. Store them as scalars or in the "
                "metadata `hyperparameters`."
            )
        self._check_hyperparameters(values)
        return Hyperparameters(
            learning_rate=self._per_step(values.pop("learning_rate")),
            count=StepCount(
                first=self.first_step,
                numbers=tuple(self.gaps.numbers.tolist()) if self.gaps else (),
            ),
            exact_rate="float32" not in origin["learning_rate"],
            origin=origin,
            **{name: float(value[0]) for name, value in values.items()},
        )

    def _stated_hyperparameters(self) -> dict[str, Any]:
        text = self.metadata.get("hyperparameters")
        if text is None:
            return {}
        try:
            stated = json.loads(text)
        except (ValueError, RecursionError):
            stated = None
        if not isinstance(stated, dict):
            raise FileError(
                f"{self.path}: the metadata `hyperparameters` is not a JSON object. Correct or remove it."
            )
        stated = {_SPELLINGS.get(str(name), str(name)): value for name, value in stated.items()}
        betas = stated.pop("betas", None)
        if isinstance(betas, list) and len(betas) == 2:
            stated = {"beta1": betas[0], "beta2": betas[1]} | stated
        return stated

    def _without_blanks(self, stated: Any) -> Any:
        """Put any number for that of an entry which no recorded step led to; it is never used."""
        if self.gaps is None or not isinstance(stated, list) or len(stated) != self._entries:
            return stated
        some = stated[int(self.gaps.after[0])]
        steps = {*self.gaps.after.tolist()}
        return [
            value if k in steps or value is not None else some for k, value in enumerate(stated)
        ]

    def _stored_scalar(self, name: str, key: str) -> tuple[NDArray[np.float64], str]:
        lengths = (1, self._entries) if name == "learning_rate" else (1,)
        doubles = self._scalars(key, *lengths)
        if (
            self.gaps and doubles.size == self._entries
        ):  # NaN where no recorded step led to the entry
            doubles = np.where(np.isin(np.arange(doubles.size), self.gaps.after), doubles, doubles[self.gaps.after[0]])  # fmt: skip
        if self._source.tensors[key].dtype != "F32":
            return doubles, f"`{key}`"
        found = [double_of_float32(np.float32(value)) for value in doubles]
        recovered = sum(short for _, short in found)
        how = "the shortest decimal" if recovered == len(found) else "float32 as stored"
        if 0 < recovered < len(found):
            how = f"the shortest decimal for {recovered} of {len(found)} values, else float32 as stored"
        return np.array([value for value, _ in found]), f"`{key}` (float32; {how})"

    def _check_hyperparameters(self, values: Mapping[str, NDArray[np.float64]]) -> None:
        limits = {"beta1": "0 <= beta1 < 1", "beta2": "0 <= beta2 < 1"}
        for name, value in values.items():
            used = value[1:] if value.size > 1 else value
            good = np.isfinite(used) & (used >= 0) & ((used < 1) | (name not in limits))
            if not good.all():
                raise FileError(
                    f"{self.path}: {name} is {used[~good][0]:g}; needed "
                    f"{limits.get(name, f'a finite {name} >= 0')}. Correct the recording."
                )

    def _per_step(self, rates: NDArray[np.float64]) -> NDArray[np.float64]:
        if rates.size == 1:
            return np.full(self.steps, rates[0])
        if rates.size == self._entries:
            return self._of_steps(rates)
        raise FileError(
            f"{self.path}: learning_rate has {rates.size} values, needed 1 or {self._entries} (one per row "
            "of `W`)."
        )


@dataclasses.dataclass(frozen=True)
class TokenGroups:
    """Named sets of tokens to count over; they may overlap. `all` is always the first.

    Attributes:
        tokens: how many tokens there are.
        members: sorted token indices of each group, by name.
    """

    tokens: int
    members: Mapping[str, NDArray[np.int64]]

    @property
    def names(self) -> list[str]:
        """Names in the dataset's order."""
        return list(self.members)


def open_recording(
    path: str | os.PathLike[str],
    parameter: str | None = None,
    *,
    run: int | None = None,
    rate_of: RateOf | None = None,
    state_index: int | None = None,
) -> Recording:
    """Open a recording without loading it, and check its shapes, dtypes and consistency.

    What the path holds is decided by its content: a safetensors file; an index of several (or the folder with it);
    an HDF5 file; the folder of a whole-model recording, finished or not; a folder with a series of checkpoints.

    Args:
        path: a file or a folder.
        parameter: which parameter of a model or of a series of checkpoints; which group of an HDF5 file. Needed if
            there are several.
        run: of a series of checkpoints with gaps, which run of consecutive steps (`Recording.runs`), from 0; by
            default the longest.
        rate_of: of a series of checkpoints, whether a checkpoint's learning rate is the one of the step that led
            to it ("this") or of the step after it ("next", as where the scheduler steps before the checkpoint is
            written). Needed if the rate changes and the checkpoints' scheduler does not tell.
        state_index: of a series of checkpoints, the parameter's number in the optimizer's state; needed if it
            cannot be told from the names or shapes.

    Raises:
        FileError: what is missing, unreadable or inconsistent.
    """
    return Recording(
        open_source(path, parameter, run=run, rate_of=rate_of, state_index=state_index)
    )


def open_token_groups(path: str | os.PathLike[str]) -> TokenGroups:
    """Read token groups: `NAME_mask` (booleans or bytes) and `token_group` (integer labels).

    `dead_mask` gives the groups `dead` and `live`; labels are named by the metadata `group_names`
    (a JSON list, or an object from label to name), else `group_0`, `group_1`, ...

    Raises:
        FileError: the file is unreadable, or holds no usable group.
    """
    path = Path(path)
    with Hdf5Source(path) if kind_of(path) == "hdf5" else SafetensorsFile(path) as file:
        return read_token_groups(file)


def token_groups_of(recording: Recording) -> TokenGroups:
    """Return the groups that the recording itself holds, else only `all`."""
    file = recording.group_tensors()
    if file is None:
        return TokenGroups(recording.tokens, {"all": np.arange(recording.tokens)})
    return read_token_groups(file)


def read_token_groups(file: Source) -> TokenGroups:
    """Read token groups from an open source (see `open_token_groups`)."""
    groups: list[tuple[str, NDArray[np.int64]]] = []
    sizes: set[int] = set()
    for name in filter(_holds_groups, file.tensors):
        if name == "token_group":
            size, labelled = _labelled_groups(file)
            groups += labelled
        else:
            mask = _vector(file, name, ("BOOL", "U8")).astype(bool)
            size = mask.size
            groups.append((name.removesuffix("_mask"), np.flatnonzero(mask)))
            if name == "dead_mask":
                groups.append(("live", np.flatnonzero(~mask)))
        sizes.add(size)
    if len(sizes) != 1 or 0 in sizes:
        found = (
            f"lengths {short(sorted(sizes))}"
            if sizes
            else f"found: {short(', '.join(file.tensors))}"
        )
        raise FileError(
            f"{file.path}: no usable token group ({found}); needed `dead_mask`, another `NAME_mask` or "
            "`token_group`, all over the same tokens."
        )
    tokens = sizes.pop()
    members = {"all": np.arange(tokens)}
    for name, indices in groups:
        _check_group(file.path, name, indices, members)
        members[name] = indices
    return TokenGroups(tokens, members)


def sample_paths() -> tuple[Path, Path]:
    """Return the sample recording that ships with the package, and its token groups."""
    folder = Path(str(resources.files("jaxaudit") / "data"))
    return folder / "sample.safetensors", folder / "sample-token-groups.safetensors"


def _holds_groups(name: str) -> bool:
    return name == "token_group" or name.endswith("_mask")


def _check_group(
    path: Path, name: str, indices: NDArray[np.int64], others: Mapping[str, NDArray[np.int64]]
) -> None:
    if not name or not name.isprintable():
        raise FileError(
            f"{path}: {short(repr(name))} cannot name a token group. Give it another name."
        )
    if not indices.size:
        raise FileError(
            f"{path}: the token group '{short(name)}' has no token. Correct the mask or leave it out."
        )
    if name in others and not np.array_equal(others[name], indices):
        raise FileError(
            f"{path}: two token groups with different tokens are called '{short(name)}'"
            f"{', which stands for every token' if name == 'all' else ''}. Rename one of them."
        )


def _labelled_groups(file: Source) -> tuple[int, list[tuple[str, NDArray[np.int64]]]]:
    """Return how many tokens `token_group` labels, and each label's name and tokens."""
    integers = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
    labels = _vector(file, "token_group", integers)
    present = np.unique(labels)
    if present.size > 10_000:
        raise FileError(
            f"{file.path}: `token_group` has {present.size} labels; at most 10000 make sense as groups."
        )
    try:
        names = json.loads(file.metadata.get("group_names", "{}"))
    except (ValueError, RecursionError):
        raise FileError(f"{file.path}: the metadata `group_names` is not valid JSON.") from None
    if isinstance(names, list):
        names = {str(label): name for label, name in enumerate(names)}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FileError(f"{file.path}: the metadata `group_names` must give a string per label.")
    named = [(names.get(str(k), f"group_{k}"), np.flatnonzero(labels == k)) for k in present]
    return labels.size, named


def _vector(file: Source, name: str, dtypes: tuple[str, ...]) -> NDArray[Any]:
    tensor = file.tensors[name]
    if tensor.dtype not in dtypes or len(tensor.shape) != 1:
        raise FileError(
            f"{file.path}: `{short(name)}` is {tensor.dtype} of shape {list(tensor.shape)}; needed one axis over "
            f"tokens, of {' or '.join(dtypes)}."
        )
    return file.read(name)


def _as_doubles(path: Path, name: str, stated: Any) -> NDArray[np.float64]:
    values = stated if isinstance(stated, list) else [stated]
    good = values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not good or (len(values) > 1 and name != "learning_rate"):
        raise FileError(
            f"{path}: the metadata `hyperparameters` gives no usable number for {name}."
        )
    try:
        return np.array([float(value) for value in values], np.float64)
    except OverflowError:
        raise FileError(f"{path}: {name} in the metadata `hyperparameters` is too large.") from None


def _json_counts(text: str | None) -> list[int] | None:
    try:
        counts = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    good = isinstance(counts, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in counts)
    return counts if good else None
