"""The audit: replay every recorded step, compare, label."""

import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
import xarray as xr

from jaxaudit import results
from jaxaudit.accounting import Accountant, Tables
from jaxaudit.devices import Backend, find_device
from jaxaudit.floats import FLOAT32
from jaxaudit.identification import check_names, choose
from jaxaudit.recording import TENSOR_KEYS, Recording, TokenGroups, token_groups_of
from jaxaudit.safetensors_file import FileError
from jaxaudit.steps import STAGES
from jaxaudit.workbench import Candidate, Workbench, check_steps

#: Told after each window: bytes of the recording done, and bytes in all.
Progress = Callable[[int, int], None]


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
        bench = Workbench(recording, device, steps, window_steps)
        candidates = choose(bench, arithmetics)
        tables = Tables(recording, groups, [c.arithmetic.name for c in candidates], steps)
        accountant = Accountant(bench, tables, candidates)
        if steps[0] > 1 and any(bench.hidden(candidate) for candidate in candidates):
            for window in bench.windows((1, steps[0])):
                accountant.run_up(window)
        done, total = 0, bench.bytes(steps)
        for window in bench.windows(steps):
            accountant.account(window)
            done += sum(array.nbytes for array in window.tensors.values())
            if progress:
                progress(min(done, total), total)
    return _label(bench, tables, candidates)


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
                    "formula": c.arithmetic.text,
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
        share = f"{elements - beyond:,} of {elements:,} values fit {recording.storage.name}"
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
