"""Which arithmetic a recording was made with: candidates are tried on a few windows."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import xarray as xr

from jaxaudit import results
from jaxaudit.arithmetics import CATALOGUE, STAGES, Arithmetic, Options, Stage
from jaxaudit.devices import Backend, find_device
from jaxaudit.floats import FLOAT32
from jaxaudit.recording import Recording, Window
from jaxaudit.safetensors_file import FileError
from jaxaudit.workbench import Candidate, Workbench, check_steps

#: Replayed beside the identified arithmetic: what the first analyses of such runs assumed.
USUAL_ASSUMPTION = "float32-then-bfloat16"


def identify(
    recording: Recording,
    *,
    backend: Backend = "auto",
    steps: tuple[int, int] | None = None,
) -> xr.Dataset:
    """Rank the arithmetics by how few bits they get wrong in an early, a middle and a late window.

    Arithmetics whose weights the recording's format cannot hold are left out.
    Options that the recording's metadata leave open (kind of weight decay, threads) are tried, and those
    that fit best are kept.

    Args:
        recording: the run.
        backend: where JAX runs.
        steps: range of steps, 1-based, the end not included; by default all.

    Returns:
        Dataset over `arithmetic`, best first: `mismatch_count` (arithmetic, stage), -1 where a stage cannot
        be audited; `compared_count`, elements per stage; `options` (JSON); `fits`, 1 where nothing differs.

    Raises:
        FileError: the recording lacks the moments.
    """
    steps = check_steps(recording, steps)
    device = find_device(backend)
    with jax.enable_x64(True), jax.default_device(device):
        bench = Workbench(recording, device, steps, None)
        if bench.free_running or not bench.stages():
            raise FileError(
                f"{recording.path}: identification needs the moments, momentum_W and variance_W; without "
                "them, audit the recording under every arithmetic instead."
            )
        ranked = _rank(bench)
    counts = np.array([[count[stage] for stage in STAGES] for _, count, _ in ranked])
    names = [candidate.arithmetic.name for candidate, _, _ in ranked]
    return xr.Dataset(
        {
            "mismatch_count": (("arithmetic", "stage"), counts.astype(np.int64)),
            "compared_count": ((), np.int64(ranked[0][2])),
            "options": (
                "arithmetic",
                [json.dumps(dataclasses.asdict(c.options)) for c, _, _ in ranked],
            ),
            "fits": ("arithmetic", (counts <= 0).all(axis=1).astype(np.int8)),
        },
        {"arithmetic": names, "stage": list(STAGES)},
    )


def choose(bench: Workbench, wanted: str | Sequence[str]) -> list[Candidate]:
    """Turn what was asked for into arithmetics with options."""
    chosen: list[Candidate] = []
    for name in _listed(wanted):
        if name == "auto":
            chosen += _identified(bench)
        elif name == "all":
            chosen += [_with_options(bench, arithmetic) for arithmetic in CATALOGUE.values()]
        else:
            chosen.append(_with_options(bench, CATALOGUE[name]))
    return [
        c for k, c in enumerate(chosen) if c.arithmetic not in [d.arithmetic for d in chosen[:k]]
    ]


def _identified(bench: Workbench) -> list[Candidate]:
    """Return the arithmetics that fit the probes, else the nearest one, and the usual assumption."""
    if not bench.stages():
        return [Candidate(CATALOGUE[USUAL_ASSUMPTION], Options())]
    if bench.free_running:  # no window can be tried without those before it
        first = _possible_options(bench.recording)[0]
        return [Candidate(arithmetic, first) for arithmetic in _conceivable(bench.recording)]
    ranked = _rank(bench)
    fitting = [c for c, counts, _ in ranked if not _total(counts)]
    usual = [c for c, _, _ in ranked if c.arithmetic.name == USUAL_ASSUMPTION]
    return (fitting or [ranked[0][0]]) + usual


def check_names(wanted: str | Sequence[str]) -> None:
    """Raise unless everything named is an arithmetic, "auto" or "all".

    Raises:
        ValueError: with the names that there are.
    """
    names = _listed(wanted)
    unknown = [name for name in names if name not in {*CATALOGUE, "auto", "all"}]
    if unknown or not names:
        raise ValueError(
            f"unknown arithmetic {', '.join(map(repr, unknown)) or '(none)'}; there are "
            f"{', '.join(CATALOGUE)}, and `auto` and `all`."
        )


def _listed(wanted: str | Sequence[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted)


def _total(counts: dict[Stage, int]) -> int:
    """Add up the mismatches of the stages that were audited."""
    return sum(max(count, 0) for count in counts.values())


def _rank(bench: Workbench) -> list[tuple[Candidate, dict[Stage, int], int]]:
    """Rank every arithmetic under its best options: (candidate, mismatches by stage, compared)."""
    ranked = []
    for arithmetic in _conceivable(bench.recording):
        _, counts, compared = best = _best_options(bench, arithmetic)
        ranked.append((_total(counts) / max(compared, 1), best))
    ranked.sort(key=lambda item: item[0])
    return [best for _, best in ranked]


def _conceivable(recording: Recording) -> list[Arithmetic]:
    """List the arithmetics whose weights the recording's format can hold."""
    return [
        arithmetic
        for arithmetic in CATALOGUE.values()
        if arithmetic.param_format == "storage" or recording.storage is FLOAT32
    ]


def _with_options(bench: Workbench, arithmetic: Arithmetic) -> Candidate:
    options = _possible_options(bench.recording)
    if len(options) == 1 or not bench.stages() or bench.free_running:
        return Candidate(arithmetic, options[0])
    return _best_options(bench, arithmetic)[0]


def _best_options(
    bench: Workbench, arithmetic: Arithmetic
) -> tuple[Candidate, dict[Stage, int], int]:
    tried = [
        _probe(bench, Candidate(arithmetic, options))
        for options in _possible_options(bench.recording)
    ]
    return min(tried, key=lambda item: _total(item[1]))


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


def _probe(bench: Workbench, candidate: Candidate) -> tuple[Candidate, dict[Stage, int], int]:
    """Count a candidate's mismatches in an early, a middle and a late window."""
    counts: dict[Stage, int] = {
        stage: 0 if stage in bench.stages() else results.NOT_AUDITED for stage in STAGES
    }
    compared = 0
    for window in _probe_windows(bench):
        arrays = bench.put(window)
        for stage in bench.stages():
            flags, _ = bench.flags(candidate, stage, window, arrays)
            counts[stage] += int(np.count_nonzero(flags))
        compared += window.steps * next(iter(arrays.values())).shape[1]
    return candidate, counts, compared


def _probe_windows(bench: Workbench) -> Iterator[Window]:
    start, stop = bench.steps
    firsts = {start, (start + stop - bench.length) // 2, stop - bench.length}
    for first in sorted(firsts):
        yield from bench.windows((first, first + bench.length))
