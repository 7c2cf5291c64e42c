"""The audit: replay every recorded step, compare, label."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr

from jaxaudit import history, results, stochastic
from jaxaudit.accounting import Accountant, Divergence, Tables
from jaxaudit.comparison import members_within
from jaxaudit.devices import Backend, find_devices
from jaxaudit.floats import FLOAT32
from jaxaudit.identification import Known, check_names, choose
from jaxaudit.ledger import verdict
from jaxaudit.ledger.ledger import Ledger
from jaxaudit.ledger.subject import LedgerOptions, Subject
from jaxaudit.provenance import provenance
from jaxaudit.recording import TENSOR_KEYS, Recording, TokenGroups, Window, token_groups_of
from jaxaudit.safetensors_file import FileError
from jaxaudit.steps import STAGES
from jaxaudit.workbench import Candidate, Workbench, check_steps

#: Told at the start and after each window: bytes of the recording done, bytes in all, and the last timestep done.
Progress = Callable[[int, int, int], None]

_USUAL = LedgerOptions()


def audit(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
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
        devices: how many of its devices; by default one CPU, or all there are of another kind. The result does
            not depend on it.
        steps: range of steps, 1-based, the end not included; by default all.
        window_steps: steps per window; the result does not depend on it.
        progress: called after each window.

    Returns:
        The dataset of `results.VARIABLES`.

    Raises:
        FileError: the recording cannot be read, or does not fit the groups.
        ValueError: an unknown arithmetic, or steps outside the recording.
        BackendError: the backend is absent, or has fewer devices.
        SelfTestError: the device cannot compute what the audit needs.
    """
    request = _Request(
        recording, groups, arithmetics, backend, devices, steps, window_steps, progress
    )
    return _audit(request)[""]


def free_run(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Leave each arithmetic to itself: from the first weights and moments and the gradients alone.

    The audit starts each step from the recorded state; here a step starts from where the one before it led. An
    arithmetic that replays the recording exactly never parts from it; of any other this shows when it does, and
    how fast the weights grow apart.

    Args:
        recording: the run; it needs gradients.
        groups: as for `audit`; so are all other arguments.
        arithmetics: which.
        backend: where JAX runs.
        devices: how many of them.
        steps: range of steps; the run starts from the recorded state before the first of them.
        window_steps: steps per window.
        progress: called after each window.

    Returns:
        The dataset of `results.FREE_RUN_VARIABLES`.

    Raises:
        FileError, ValueError, BackendError, SelfTestError: as `audit`.
    """
    request = _Request(
        recording, groups, arithmetics, backend, devices, steps, window_steps, progress
    )
    return _audit(request, run_freely=True)["free_run"]


def audit_groups(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
    ledger: LedgerOptions | None = _USUAL,
    known: Sequence[Known] = (),
) -> dict[str, xr.Dataset]:
    """Do everything that there is to do with a recording, in one reading.

    Args:
        recording: the run.
        groups: as for `audit`; so are all other arguments but the last two.
        arithmetics: which; the ledger follows the first that fits.
        backend: where JAX runs.
        devices: how many of them; the ledger uses the first.
        steps: range of steps.
        window_steps: steps per window.
        progress: called after each window.
        ledger: what is asked of the ledger; None for no ledger.
        known: arithmetics that "auto" tries before the whole catalogue (`identification.fitting`). The attribute
            `identified_by` at the root then says what the replayed ones were found by: `known` or `recording`.

    Returns:
        The dataset of each group of the file: under "" what `audit` returns, under "free_run" what `free_run`
        does, and those of the ledger (`ledger.variables`), without those that the recording lacks tensors for.

    Raises:
        FileError, ValueError, BackendError, SelfTestError: as `audit`.
    """
    request = _Request(
        recording,
        groups,
        arithmetics,
        backend,
        devices,
        steps,
        window_steps,
        progress,
        tuple(known),
    )
    return _audit(request, run_freely=True, ledger=ledger)


def audit_tree(
    recording: Recording, groups: TokenGroups | None = None, **options: Any
) -> xr.DataTree:
    """Return what `audit_groups` does as a tree, as `xr.open_datatree` shows the file; arguments are the same."""
    found = audit_groups(recording, groups, **options)
    return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in found.items()})


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `audit`."""

    recording: Recording
    groups: TokenGroups | None
    arithmetics: str | Sequence[str]
    backend: Backend
    devices: int | None
    steps: tuple[int, int] | None
    window_steps: int | None
    progress: Progress | None
    known: tuple[Known, ...] = ()


def _audit(
    request: _Request, *, run_freely: bool = False, ledger: LedgerOptions | None = None
) -> dict[str, xr.Dataset]:
    """Return the dataset of each group of the file, the root's under ""."""
    recording = request.recording
    groups = request.groups or token_groups_of(recording)
    check_names(request.arithmetics)
    _check_groups(recording, groups)
    steps = check_steps(recording, request.steps)
    devices = find_devices(request.backend, request.devices)
    with (
        jax.enable_x64(True),
        jax.default_device(devices[0]),
        contextlib.ExitStack() as unfinished,
    ):
        bench = Workbench(recording, devices, steps, request.window_steps)
        choice = choose(bench, request.arithmetics, request.known)
        candidates = choice.candidates
        tables = Tables(recording, groups, len(candidates), steps)
        divergence = Divergence(bench, tables, candidates) if run_freely else None
        accountant = Accountant(bench, tables, candidates, divergence)
        book = None
        if ledger:
            subject = Subject(bench, choice.nearest, groups, steps)
            book = unfinished.enter_context(Ledger(subject, ledger))
        _read(bench, request, accountant, book, groups)
        kept = _kept(tables, candidates)
        exact = choice.nearest is not None and _replays(tables, candidates.index(choice.nearest))
        tables.keep(kept)
        candidates = [candidates[k] for k in kept]
        if divergence:
            divergence.keep(kept)
        found = {"": _label(bench, tables, candidates)}
        if request.known:
            found[""].attrs["identified_by"] = "known" if choice.known else "recording"
        if divergence:
            found["free_run"] = _label_free_run(found[""], divergence)
        if book:
            found |= book.datasets()
        if recording.gaps:
            found = history.told(found, recording.gaps)
        if book:
            found[""] = _with_verdict(found, choice.nearest, exact=exact)
    return found


def _read(
    bench: Workbench,
    request: _Request,
    accountant: Accountant,
    book: Ledger | None,
    groups: TokenGroups,
) -> None:
    """Take every window into the audit, and into the ledger."""
    if bench.steps[0] > 1 and accountant.needs_run_up:
        for window in bench.windows((1, bench.steps[0])):
            accountant.run_up(window)
    done, total = 0, bench.bytes(bench.steps[1] - bench.steps[0], bench.recording.tokens)
    tell = request.progress or (lambda done, total, timestep: None)
    tell(done, total, bench.steps[0] - 1)
    for window, arrays in _one_ahead(bench, accountant):
        members = members_within(groups, window.rows)
        if book:
            book.take(window, arrays, members)
        accountant.account(window, arrays, members)
        if book:
            book.finish()  # what it counts on the host goes on beside the accounting
        done += bench.bytes(window.steps, window.rows[1] - window.rows[0])
        tell(done, total, window.range[1] - 1)


def _one_ahead(
    bench: Workbench, accountant: Accountant
) -> Iterator[tuple[Window, dict[str, jax.Array]]]:
    """Return each window after the next one was started, so that the device never waits for the host."""
    held = None
    for window in bench.windows(bench.steps):
        arrays = bench.put(window)
        accountant.start(window, arrays)
        if held:
            yield held
        held = window, arrays
    if held:
        yield held


def _replays(tables: Tables, a: int) -> bool:
    """Tell whether every audited stage of a candidate came out without a mismatch."""
    return bool(tables.audited[a].any() and not np.maximum(tables.mismatches[a], 0).any())


def _with_verdict(
    found: Mapping[str, xr.Dataset], subject: Candidate | None, *, exact: bool
) -> xr.Dataset:
    """Say at the root what the ledger followed, and what it found."""
    followed = "" if subject is None else subject.arithmetic.label
    root = found[""].assign_attrs(
        ledger_arithmetic=followed, ledger_arithmetic_replays_exactly=int(exact)
    )
    told = verdict.sentences({**found, "": root})
    return root.assign_attrs(verdict=_json(verdict.as_json(told)))


def _kept(tables: Tables, candidates: Sequence[Candidate]) -> list[int]:
    """Choose among the variants of each name the one with the fewest mismatches, in any audited stage."""
    wrong = np.maximum(tables.mismatches, 0)[..., 0].sum(axis=(1, 2))
    best: dict[str, int] = {}
    for k, candidate in enumerate(candidates):
        name = candidate.arithmetic.name
        if name not in best or wrong[k] < wrong[best[name]]:
            best[name] = k
    return list(best.values())


def _label_free_run(dataset: xr.Dataset, divergence: Divergence) -> xr.Dataset:
    apart = divergence.mismatches > 0
    steps = dataset.timestep.values[:, None]
    first = np.where(
        apart.any(axis=1), np.where(apart, steps, np.iinfo(np.int64).max).min(axis=1), 0
    )
    first[~np.array(divergence.runs, bool)] = results.NOT_AUDITED
    arrays = {
        "mismatch_count": divergence.mismatches,
        "max_ulp_distance": divergence.distances,
        "norm_divergence": np.sqrt(divergence.squares),
        "first_divergence": first,
    }
    names = ("timestep", "token_group", "arithmetic")
    coordinates = {name: dataset[name].values for name in names}
    title = {"title": "weights of each arithmetic left to itself against the recorded ones"}
    return results.label(arrays, coordinates, title, results.FREE_RUN_VARIABLES)


def _check_groups(recording: Recording, groups: TokenGroups) -> None:
    if groups.tokens != recording.tokens:
        raise FileError(
            f"{recording.path}: the token groups are over {groups.tokens} tokens, but the recording has "
            f"{recording.tokens}. Give the groups that belong to this recording."
        )


def _label(bench: Workbench, tables: Tables, candidates: Sequence[Candidate]) -> xr.Dataset:
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
    if any(c.arithmetic.stochastic for c in candidates):
        arrays |= _roundings(tables, [c.arithmetic.stochastic for c in candidates])
    if recording.losses is not None:
        arrays["loss"] = recording.losses[steps]
    coordinates = {
        "timestep": np.arange(*tables.steps, dtype=np.int64),
        "token_group": groups.names,
        "arithmetic": [c.arithmetic.name for c in candidates],
        "stage": list(STAGES),
        "tensor": [TENSOR_KEYS[name] for name in tables.tensors],
        "mismatch_field": list(results.MISMATCH_FIELDS),
    }
    if "rounding_p_value" in arrays:
        edges = np.arange(stochastic.BINS) / stochastic.BINS
        coordinates["fraction_bin"] = edges + 0.5 / stochastic.BINS
    dataset = results.label(arrays, coordinates, {})
    dataset.attrs = _provenance(bench, dataset, candidates)
    return dataset


def _roundings(tables: Tables, by_chance: Sequence[bool]) -> dict[str, Any]:
    """Sum up what stochastic rounding did, where an arithmetic has it."""
    found = np.where(np.array(by_chance)[:, None, None, None], tables.roundings, math.nan)
    whole = found.sum(axis=2)
    return {
        "rounded_away_count": found[0].sum(axis=-1),
        "rounded_away_expected": found[1].sum(axis=-1),
        "rounding_p_value": stochastic.p_value(*found),
        "rounded_away_count_by_fraction": whole[0],
        "rounded_away_expected_by_fraction": whole[1],
        "rounding_p_value_of_all_timesteps": stochastic.p_value(*whole),
    }


def _provenance(
    bench: Workbench, dataset: xr.Dataset, candidates: Sequence[Candidate]
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
                    "confirmed": c.arithmetic.confirmed or "not yet confirmed on hardware",
                    "variant": c.arithmetic.variant,
                    "options": dataclasses.asdict(c.options),
                    "hyperparameters": c.given.differences(given) if given else {},
                    "uncertain_scalars_settled": len(bench.nudges.get(c, {})),
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
        "self_test": _json(bench.replayer.self_tests()),
    } | provenance(bench.device, len(bench.placement.devices))


def fitting_arithmetics(dataset: xr.Dataset) -> list[str]:
    """Name the arithmetics under which every audited stage came out without a mismatch, best first."""
    audited = dataset.audited == 1
    wrong = dataset.mismatch_count.where(audited, 0).sum(("stage", "timestep", "token_group"))
    fits = (wrong == 0) & audited.any("stage")
    if "rounding_p_value_of_all_timesteps" in dataset:
        by_chance = dataset.rounding_p_value_of_all_timesteps.sel(token_group="all")
        fits &= ~(by_chance < stochastic.LEAST_P_VALUE)
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
        share = f"{elements - beyond:,} of {elements:,} values fit {recording.storage.name}"
        verdict = recording.storage.name if beyond == 0 else "float32"
        sentences.append(f"{name}: {verdict} (stored as float32; {share})")
    return "; ".join(sentences)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
