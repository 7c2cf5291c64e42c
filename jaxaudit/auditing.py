"""The audit: replay every recorded step, compare, label."""

import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit import results
from jaxaudit.arithmetics import (
    CATALOGUE,
    STAGES,
    Arithmetic,
    Options,
    Scalars,
    Stage,
    Step,
    make_step,
    scalar_rule_elements,
    scalars_of,
)
from jaxaudit.comparison import (
    NONFINITE,
    TINY,
    UNREPRESENTABLE,
    Comparison,
    max_groups,
    members_within,
    sum_groups,
)
from jaxaudit.devices import Backend, Device, find_device
from jaxaudit.floats import FLOAT16, FLOAT32
from jaxaudit.recording import (
    TENSOR_KEYS,
    FileError,
    Recording,
    TokenGroups,
    Window,
    token_groups_of,
)
from jaxaudit.replay import Formulation, Program, Replayer

#: Elements of a window: below this its arrays of 16-bit results stay in memory that malloc keeps.
WINDOW_ELEMENTS = 1 << 22

#: Replayed beside the identified arithmetic: what the first analyses of such runs assumed.
USUAL_ASSUMPTION = "float32-then-bfloat16"

#: Told after each window: bytes of the recording done, and bytes in all.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An arithmetic with the options to replay it under."""

    arithmetic: Arithmetic
    options: Options


def audit(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Replay every recorded step and compare it, bit for bit, with the recording.

    Args:
        recording: the run.
        groups: sets of tokens to count by; by default those in the recording, else only `all`.
        arithmetics: "auto" (identify, then replay the identified one and `float32-then-bfloat16`), "all",
            or names of the catalogue.
        backend: where JAX runs.
        steps: range of steps, 1-based, the end not included; by default all.
        window_steps: steps per window; the result does not depend on it.
        progress: called after each window.

    Returns:
        The dataset of `results.VARIABLES`.

    Raises:
        FileError: the recording cannot be read, or does not fit the groups.
        ValueError: an unknown arithmetic, or steps outside the recording.
        BackendError: the backend is absent.
        SelfTestError: the device cannot compute what the audit needs.
    """
    groups = groups or token_groups_of(recording)
    check_names(arithmetics)
    _check_groups(recording, groups)
    steps = check_steps(recording, steps)
    device = find_device(backend)
    with jax.enable_x64(True), jax.default_device(device):
        bench = _Bench(recording, device, steps, window_steps)
        candidates = _choose(bench, arithmetics)
        tables = _Tables(recording, groups, [c.arithmetic.name for c in candidates], steps)
        accountant = _Accountant(bench, tables, candidates)
        done, total = 0, bench.bytes(steps)
        for window in bench.windows(steps):
            accountant.account(window)
            done += sum(array.nbytes for array in window.tensors.values())
            if progress:
                progress(min(done, total), total)
    return _label(bench, tables, candidates)


def identify(
    recording: Recording,
    *,
    backend: Backend = "auto",
    steps: tuple[int, int] | None = None,
) -> xr.Dataset:
    """Rank the arithmetics by how few bits they get wrong in an early, a middle and a late window.

    Options that the recording's metadata leave open (kind of weight decay, threads) are tried, and those
    that fit best are kept.

    Args:
        recording: the run.
        backend: where JAX runs.
        steps: range of steps, 1-based, the end not included; by default all.

    Returns:
        Dataset over `arithmetic`, best first: `mismatch_count` (arithmetic, stage), -1 where a stage cannot
        be audited; `compared_count`, elements per stage; `options` (JSON); `fits`, 1 where nothing differs.
    """
    steps = check_steps(recording, steps)
    device = find_device(backend)
    with jax.enable_x64(True), jax.default_device(device):
        bench = _Bench(recording, device, steps, None)
        ranked = _rank(bench)
    counts = np.array([[count[stage] for stage in STAGES] for _, count, _ in ranked])
    names = [candidate.arithmetic.name for candidate, _, _ in ranked]
    return xr.Dataset(
        {
            "mismatch_count": (("arithmetic", "stage"), counts.astype(np.int64)),
            "compared_count": ((), np.int64(ranked[0][2])),
            "options": ("arithmetic", [_json(dataclasses.asdict(c.options)) for c, _, _ in ranked]),
            "fits": ("arithmetic", (counts <= 0).all(axis=1).astype(np.int8)),
        },
        {"arithmetic": names, "stage": list(STAGES)},
    )


def check_steps(recording: Recording, steps: tuple[int, int] | None) -> tuple[int, int]:
    """Return a range of steps, checked against the recording.

    Raises:
        ValueError: the range is empty or outside.
    """
    start, stop = steps or (1, recording.steps + 1)
    if not 1 <= start < stop <= recording.steps + 1:
        raise ValueError(
            f"steps {start}:{stop} are outside the recording, which holds 1:{recording.steps + 1} (the end "
            "not included)."
        )
    return start, stop


class _Bench:
    """A recording, a device, and everything that turns one's windows into the other's numbers."""

    def __init__(
        self,
        recording: Recording,
        device: Device,
        steps: tuple[int, int],
        window_steps: int | None,
    ):
        self.recording, self.device, self.steps = recording, device, steps
        self.rows = max(1, min(recording.tokens, 4 * WINDOW_ELEMENTS // recording.width))
        elements = self.rows * recording.width
        self.length = min(window_steps or max(1, WINDOW_ELEMENTS // elements), steps[1] - steps[0])
        if self.rows < recording.tokens:
            self.length = 1
        second = "max_exp_avg_sq" if recording.flag("amsgrad") else "exp_avg_sq"
        self.replayer = Replayer(device, recording.formats, (self.length, elements), second)
        self.comparison = Comparison(device, recording.width)
        self.second_moment = second
        self._rules: dict[tuple[int, int, int], NDArray[np.uint8]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that are read."""
        wanted = {"param", "grad", "exp_avg", "exp_avg_sq"} | {self.second_moment}
        return tuple(name for name in self.recording.formats if name in wanted)

    def stages(self) -> tuple[Stage, ...]:
        """Stages that the recording holds everything for."""
        needs: dict[Stage, set[str]] = {
            "exp_avg": {"grad", "exp_avg"},
            "exp_avg_sq": {"grad", "exp_avg_sq"},
            "param": {"exp_avg", self.second_moment},
        }
        present = set(self.recording.formats)
        return tuple(stage for stage in STAGES if needs[stage] <= present)

    def windows(self, steps: tuple[int, int]) -> Iterator[Window]:
        """Read windows of the bench's shape."""
        return self.recording.windows(steps, self.length, self.rows, self.names)

    def bytes(self, steps: tuple[int, int]) -> int:
        """Bytes that `windows` hands out in all, short last windows counted whole."""
        count = -(-(steps[1] - steps[0]) // self.length)
        each = self.recording.step_elements
        sizes = {name: self.recording.formats[name].bytes for name in self.names}
        return count * sum(
            each * size * (self.length + (name != "grad")) for name, size in sizes.items()
        )

    def put(self, window: Window) -> dict[str, jax.Array]:
        """Hand a window to the device, flat: without a copy where the device is the CPU."""
        flat = {name: array.reshape(array.shape[0], -1) for name, array in window.tensors.items()}
        return {name: jax.device_put(array, self.device) for name, array in flat.items()}

    def scalars(self, step: Step, window: Window) -> Scalars:
        """Compute the scalars of a window's steps; beyond the last step they are repeated."""
        given = self.recording.hyperparameters
        assert given is not None  # there are no stages without hyperparameters
        index = [min(window.first + k, self.steps[1] - 1) for k in range(self.length)]
        rates = given.learning_rate[np.array(index) - 1]
        given = dataclasses.replace(given, learning_rate=rates)
        return scalars_of(step, given, [t + self.recording.first_step - 1 for t in index])

    def rule(self, step: Step, options: Options, rows: tuple[int, int]) -> NDArray[np.uint8]:
        """Mark the elements that follow PyTorch's scalar loop, where that matters."""
        width = self.recording.width
        if step.decay != "l2":
            return np.zeros((rows[1] - rows[0]) * width, np.uint8)
        key = (options.threads, *rows)
        if key not in self._rules:
            elements, size = self.recording.parameter_elements()
            elements = elements[rows[0] * width : rows[1] * width]
            self._rules[key] = scalar_rule_elements(elements, size, options.threads)
        return self._rules[key]

    def step(self, candidate: Candidate) -> Step:
        """Fill in a candidate's step."""
        given = self.recording.hyperparameters
        assert given is not None
        return make_step(candidate.arithmetic, self.recording.storage, given, candidate.options)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What came of one stage of one window."""

    program: Program
    formulation: Formulation
    flags: NDArray[np.uint8] | None  # None where nothing differs
    replayed: jax.Array | None


class _Tables:
    """The numbers of an audit, filled in window by window."""

    def __init__(
        self,
        recording: Recording,
        groups: TokenGroups,
        arithmetics: list[str],
        steps: tuple[int, int],
    ):
        self.groups, self.arithmetics, self.steps = groups, arithmetics, steps
        self.tensors = [name for name in TENSOR_KEYS if name in recording.formats]
        count = (len(arithmetics), steps[1] - steps[0], len(groups.members))
        staged = (count[0], len(STAGES), *count[1:])
        self.mismatches = np.full(staged, results.NOT_AUDITED, np.int64)
        self.distances = np.full(staged, results.NOT_AUDITED, np.int64)
        self.audited = np.zeros(staged[:2], np.int8)
        self.first = np.full((*staged[:2], len(results.MISMATCH_FIELDS)), results.NOT_AUDITED)
        self.observed = np.zeros(count[1:])
        self.predicted, self.difference, self.product = (np.full(count, math.nan) for _ in range(3))
        self.nonfinite = np.zeros((len(self.tensors), *count[1:]), np.int64)
        self.unrepresentable = np.zeros_like(self.nonfinite)

    def mark_audited(self, stages: Sequence[Stage]) -> None:
        """Start the counts of these stages at zero."""
        for stage in stages:
            k = STAGES.index(stage)
            self.audited[:, k] = 1
            self.mismatches[:, k] = self.distances[:, k] = 0
            if stage == "param":
                self.predicted[:] = self.difference[:] = self.product[:] = 0

    def place(self, window: Window) -> slice:
        """Return the window's place on the timestep axis."""
        return slice(window.first - self.steps[0], window.first - self.steps[0] + window.steps)


class _Accountant:
    """Takes windows, one after the other, into the tables."""

    def __init__(self, bench: _Bench, tables: _Tables, candidates: Sequence[Candidate]):
        self._bench, self._tables = bench, tables
        self._candidates = candidates
        self._stages = bench.stages()
        tables.mark_audited(self._stages)

    def account(self, window: Window) -> None:
        """Replay and compare one window under every arithmetic."""
        arrays = self._bench.put(window)
        members = members_within(self._tables.groups, window.rows)
        param = self._bench.comparison.inspect(
            arrays["param"], self._bench.recording.storage, self._bench.recording.storage
        )
        observed = self._observe(window, arrays, members, bool(param & TINY))
        clean: set[str] = set()
        for a, candidate in enumerate(self._candidates):
            for stage in self._stages:
                outcome = self._replay(candidate, stage, window, arrays)
                self._enter(a, stage, outcome, window, arrays, members)
                clean |= self._proved(outcome)
                if stage == "param":
                    tiny = bool(param & TINY) or outcome.formulation == "float64"
                    self._enter_norms(a, outcome, window, arrays, members, observed, tiny)
        self._look_at_values(window, arrays, members, param, clean)

    def _replay(
        self, candidate: Candidate, stage: Stage, window: Window, arrays: Mapping[str, jax.Array]
    ) -> _Outcome:
        bench = self._bench
        step = bench.step(candidate)
        program = bench.replayer.program(step, stage)
        scalars = bench.scalars(step, window)
        rule = bench.rule(step, candidate.options, window.rows)
        flags, formulation = bench.replayer.flags(program, scalars, arrays, rule)
        if not flags[: window.steps].any():
            return _Outcome(program, formulation, None, None)
        replayed = bench.replayer.results(program, scalars, arrays, rule, formulation)
        return _Outcome(program, formulation, flags[: window.steps], replayed)

    def _enter(
        self,
        a: int,
        stage: Stage,
        outcome: _Outcome,
        window: Window,
        arrays: Mapping[str, jax.Array],
        members: list[NDArray[np.int64]],
    ) -> None:
        if outcome.flags is None:
            return
        tables, place, s = self._tables, self._tables.place(window), STAGES.index(stage)
        counts, distances = self._bench.comparison.mismatches(
            outcome.replayed, outcome.program.result, arrays[stage], outcome.program.recorded
        )
        tables.mismatches[a, s, place] += sum_groups(counts[: window.steps], members)
        tables.distances[a, s, place] = np.maximum(
            tables.distances[a, s, place], max_groups(distances[: window.steps], members)
        )
        if tables.first[a, s, 0] == results.NOT_AUDITED:
            tables.first[a, s] = self._locate(outcome, window, window.tensors[stage])

    def _locate(self, outcome: _Outcome, window: Window, recorded: NDArray[Any]) -> list[int]:
        """Describe the first differing element as `results.MISMATCH_FIELDS`."""
        assert outcome.flags is not None and outcome.replayed is not None
        width = self._bench.recording.width
        t, k = divmod(int(np.argmax(outcome.flags.reshape(-1) != 0)), outcome.flags.shape[1])
        return [
            window.first + t,
            window.rows[0] + k // width,
            k % width,
            int(recorded[t + 1].reshape(-1)[k]),
            int(np.asarray(outcome.replayed[t])[k]),
        ]

    def _observe(
        self,
        window: Window,
        arrays: Mapping[str, jax.Array],
        members: list[NDArray[np.int64]],
        tiny: bool,
    ) -> NDArray[np.float64]:
        formulation: Formulation = "float64" if tiny else "float32"
        rows = self._bench.comparison.squared_norms(
            arrays["param"], self._bench.recording.storage, formulation
        )
        sums = sum_groups(rows[: window.steps], members)
        self._tables.observed[self._tables.place(window)] += sums
        return sums

    def _enter_norms(
        self,
        a: int,
        outcome: _Outcome,
        window: Window,
        arrays: Mapping[str, jax.Array],
        members: list[NDArray[np.int64]],
        observed: NDArray[np.float64],
        tiny: bool,
    ) -> None:
        tables, place = self._tables, self._tables.place(window)
        if outcome.flags is None:  # the replayed change is the recorded one, to the bit
            tables.predicted[a, place] += observed
            tables.product[a, place] += observed
            return
        program = outcome.program
        rows = self._bench.comparison.inner_products(
            outcome.replayed,
            program.result,
            arrays["param"],
            program.recorded,
            "float64" if tiny else "float32",
        )
        targets = (tables.predicted, tables.difference, tables.product)
        for table, values in zip(targets, rows, strict=True):
            table[a, place] += sum_groups(values[: window.steps], members)

    def _proved(self, outcome: _Outcome) -> set[str]:
        """Name the tensors that a stage without strays or mismatches proves finite and representable.

        A float16 result may be infinite although every operand was ordinary.
        """
        program, storage = outcome.program, self._bench.recording.storage
        ordinary = outcome.flags is None and outcome.formulation == "float32"
        if not ordinary or storage is FLOAT16:
            return set()
        rounded = program.result is storage
        return {i.tensor for i in program.inputs if i.tensor == "grad"} | (
            {program.stage} if rounded else set()
        )

    def _look_at_values(
        self,
        window: Window,
        arrays: Mapping[str, jax.Array],
        members: list[NDArray[np.int64]],
        param: int,
        clean: set[str],
    ) -> None:
        """Count infinities, NaNs and values beyond the storage format, where there may be any."""
        recording, comparison = self._bench.recording, self._bench.comparison
        tables, place = self._tables, self._tables.place(window)
        for name, array in arrays.items():
            if name in clean and name != "param":
                continue
            fmt, at = recording.formats[name], tables.tensors.index(name)
            found = param if name == "param" else comparison.inspect(array, fmt, recording.storage)
            for bit, table in (
                (NONFINITE, tables.nonfinite),
                (UNREPRESENTABLE, tables.unrepresentable),
            ):
                if found & bit:
                    rows = comparison.tally(array, fmt, recording.storage, bit)
                    rows = rows if name == "grad" else rows[1:]
                    table[at, place] += sum_groups(rows[: window.steps], members)


def _choose(bench: _Bench, wanted: str | Sequence[str]) -> list[Candidate]:
    """Turn what was asked for into arithmetics with options."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: list[Candidate] = []
    for name in names:
        if name == "auto":
            chosen += _identified(bench)
        elif name == "all":
            chosen += [_with_options(bench, arithmetic) for arithmetic in CATALOGUE.values()]
        else:
            chosen.append(_with_options(bench, CATALOGUE[name]))
    return [
        c for k, c in enumerate(chosen) if c.arithmetic not in [d.arithmetic for d in chosen[:k]]
    ]


def _identified(bench: _Bench) -> list[Candidate]:
    """Return the arithmetics that fit the probes, else the nearest one, and the usual assumption."""
    if not bench.stages():
        return [Candidate(CATALOGUE[USUAL_ASSUMPTION], Options())]
    ranked = _rank(bench)
    fitting = [c for c, counts, _ in ranked if all(n <= 0 for n in counts.values())]
    usual = [c for c, _, _ in ranked if c.arithmetic.name == USUAL_ASSUMPTION]
    return (fitting or [ranked[0][0]]) + usual


def check_names(wanted: str | Sequence[str]) -> None:
    """Raise unless everything named is an arithmetic, "auto" or "all".

    Raises:
        ValueError: with the names that there are.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in {*CATALOGUE, "auto", "all"}]
    if unknown or not names:
        raise ValueError(
            f"unknown arithmetic {', '.join(map(repr, unknown)) or '(none)'}; there are "
            f"{', '.join(CATALOGUE)}, and `auto` and `all`."
        )


def _rank(bench: _Bench) -> list[tuple[Candidate, dict[Stage, int], int]]:
    """Rank every arithmetic under its best options: (candidate, mismatches by stage, compared)."""
    ranked = []
    for arithmetic in CATALOGUE.values():
        _, counts, compared = best = _best_options(bench, arithmetic)
        ranked.append((sum(max(n, 0) for n in counts.values()) / max(compared, 1), best))
    ranked.sort(key=lambda item: item[0])
    return [best for _, best in ranked]


def _with_options(bench: _Bench, arithmetic: Arithmetic) -> Candidate:
    options = _possible_options(bench.recording)
    if len(options) == 1 or not bench.stages():
        return Candidate(arithmetic, options[0])
    return _best_options(bench, arithmetic)[0]


def _best_options(bench: _Bench, arithmetic: Arithmetic) -> tuple[Candidate, dict[Stage, int], int]:
    tried = [
        _probe(bench, Candidate(arithmetic, options))
        for options in _possible_options(bench.recording)
    ]
    return min(tried, key=lambda item: sum(max(n, 0) for n in item[1].values()))


def _possible_options(recording: Recording) -> list[Options]:
    """List the options that the metadata leave open, the likeliest first."""
    given, claimed = recording.hyperparameters, recording.metadata.get("optimizer", "").lower()
    fixed = Options(
        decoupled=claimed != "adam",
        amsgrad=bool(recording.flag("amsgrad")),
        maximize=bool(recording.flag("maximize")),
        threads=recording.number("num_threads") or 1,
    )
    if given is None or given.weight_decay == 0 or claimed == "adamw":
        return [fixed]
    coupled = dataclasses.replace(fixed, decoupled=False)
    stated = recording.number("num_threads")
    counts = [stated] if stated else [1, 2, 4, 8, 16, 32, 64]
    if recording.storage is FLOAT32:
        counts = counts[:1]
    every = [dataclasses.replace(coupled, threads=count) for count in counts]
    return every if claimed == "adam" else [fixed, *every]


def _probe(bench: _Bench, candidate: Candidate) -> tuple[Candidate, dict[Stage, int], int]:
    """Count a candidate's mismatches in an early, a middle and a late window."""
    counts: dict[Stage, int] = {
        stage: 0 if stage in bench.stages() else results.NOT_AUDITED for stage in STAGES
    }
    compared = 0
    for window in _probe_windows(bench):
        arrays = bench.put(window)
        step = bench.step(candidate)
        for stage in bench.stages():
            program = bench.replayer.program(step, stage)
            rule = bench.rule(step, candidate.options, window.rows)
            scalars = bench.scalars(step, window)
            flags, _ = bench.replayer.flags(program, scalars, arrays, rule)
            counts[stage] += int(np.count_nonzero(flags[: window.steps]))
        compared += window.steps * next(iter(arrays.values())).shape[1]
    return candidate, counts, compared


def _probe_windows(bench: _Bench) -> Iterator[Window]:
    start, stop = bench.steps
    firsts = {start, (start + stop - bench.length) // 2, stop - bench.length}
    for first in sorted(firsts):
        yield from bench.windows((first, first + bench.length))


def _check_groups(recording: Recording, groups: TokenGroups) -> None:
    if groups.tokens != recording.tokens:
        raise FileError(
            f"{recording.path}: the token groups are over {groups.tokens} tokens, but the recording has "
            f"{recording.tokens}. Give the groups that belong to this recording."
        )


def _label(bench: _Bench, tables: _Tables, candidates: Sequence[Candidate]) -> xr.Dataset:
    recording, groups = bench.recording, tables.groups
    observed = np.sqrt(tables.observed)
    with np.errstate(invalid="ignore", divide="ignore"):
        predicted = np.sqrt(tables.predicted)
        cosine = tables.product / (predicted * observed)
        ratio = predicted / observed
    steps = slice(tables.steps[0] - 1, tables.steps[1] - 1)
    given = recording.hyperparameters
    rates = given.learning_rate[steps] if given else np.full(observed.shape[0], math.nan)
    arrays = {
        "element_count": [m.size * recording.width for m in groups.members.values()],
        "mismatch_count": tables.mismatches,
        "max_ulp_distance": tables.distances,
        "audited": tables.audited,
        "first_mismatch": tables.first,
        "norm_observed": observed,
        "norm_predicted": predicted,
        "norm_difference": np.sqrt(tables.difference),
        "cosine_similarity": cosine,
        "ratio": ratio,
        "nonfinite_count": tables.nonfinite,
        "unrepresentable_count": tables.unrepresentable,
        "learning_rate": rates,
    }
    if recording.losses is not None:
        arrays["loss"] = recording.losses[steps]
    coordinates = {
        "timestep": np.arange(*tables.steps, dtype=np.int64),
        "token_group": groups.names,
        "arithmetic": tables.arithmetics,
        "stage": list(STAGES),
        "tensor": [TENSOR_KEYS[name] for name in tables.tensors],
        "mismatch_field": list(results.MISMATCH_FIELDS),
    }
    dataset = results.label(arrays, coordinates, {})
    dataset.attrs = _provenance(bench, dataset, candidates)
    return dataset


def _provenance(
    bench: _Bench, dataset: xr.Dataset, candidates: Sequence[Candidate]
) -> dict[str, Any]:
    recording, given = bench.recording, bench.recording.hyperparameters
    return {
        "title": f"jaxaudit of {recording.path.name}",
        "identified_arithmetic": ",".join(fitting_arithmetics(dataset)),
        "hyperparameters": _json(given.as_json() if given else {}),
        "arithmetics": _json(
            {
                c.arithmetic.name: {
                    "formula": c.arithmetic.formula,
                    "source": c.arithmetic.source,
                    "options": dataclasses.asdict(c.options),
                }
                for c in candidates
            }
        ),
        "recording_metadata": _json(recording.metadata),
        "source": str(recording.path),
        "source_bytes": int(recording.bytes),
        "source_sha256_head": recording.fingerprint(),
        "storage_format": recording.storage.name,
        "state_precision": _state_precision(recording, dataset),
        "backend": bench.device.platform,
        "device": bench.device.device_kind,
        "self_test": _json(bench.replayer.self_tests()),
        "jax_version": jax.__version__,
        "jaxlib_version": metadata.version("jaxlib"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jaxaudit_version": version(),
        "creation_library": "jaxaudit",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "schema_version": results.SCHEMA_VERSION,
        "Conventions": "CF-1.11",
    }


def fitting_arithmetics(dataset: xr.Dataset) -> list[str]:
    """Name the arithmetics under which every audited stage came out without a mismatch, best first."""
    audited = dataset.audited == 1
    wrong = dataset.mismatch_count.where(audited, 0).sum(("stage", "timestep", "token_group"))
    fits = (wrong == 0) & audited.any("stage")
    return [str(name) for name in dataset.arithmetic.values[fits.values]]


def _state_precision(recording: Recording, dataset: xr.Dataset) -> str:
    """Say in words what the bits of the moments show."""
    sentences = []
    elements = int(dataset.element_count.sel(token_group="all")) * dataset.sizes["timestep"]
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in recording.formats:
            sentences.append(f"{name}: not recorded")
            continue
        stored = recording.formats[name]
        if stored is not FLOAT32 or recording.storage is FLOAT32:
            sentences.append(f"{name}: {stored.name} as stored")
            continue
        key = TENSOR_KEYS[name]
        beyond = int(dataset.unrepresentable_count.sel(tensor=key, token_group="all").sum())
        share = f"{elements - beyond} of {elements} values fit {recording.storage.name}"
        verdict = recording.storage.name if beyond == 0 else "float32"
        sentences.append(f"{name}: {verdict} (stored as float32; {share})")
    return "; ".join(sentences)


def version() -> str:
    """Return the installed package's version."""
    try:
        return metadata.version("jaxaudit")
    except metadata.PackageNotFoundError:
        return "unknown"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
