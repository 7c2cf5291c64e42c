"""Labels: the numbers of an audit as datasets, with where they come from."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit import results, stochastic
from jaxaudit.accounting import Divergence, Tables
from jaxaudit.floats import FLOAT32
from jaxaudit.provenance import provenance
from jaxaudit.recording import TENSOR_KEYS, Recording
from jaxaudit.steps import STAGES
from jaxaudit.workbench import Candidate, Workbench


@dataclasses.dataclass(frozen=True)
class Notes:
    """What is known of an audit beside its numbers; of several parts of it, put together.

    Attributes:
        self_tests: every self-test that was made: "passed", or what came out wrong.
        settled: for each candidate by its number and each timestep, the nudge of scalars that are not known exactly.
        ambiguous: timesteps for which strips of rows settled different ones, by candidate.
    """

    self_tests: dict[str, str] = dataclasses.field(default_factory=dict)
    settled: dict[int, dict[int, tuple[float, ...]]] = dataclasses.field(default_factory=dict)
    ambiguous: dict[int, set[int]] = dataclasses.field(default_factory=dict)

    def take(self, other: "Notes") -> None:
        """Add what is known of another part."""
        self.self_tests.update(other.self_tests)
        for candidate, found in other.settled.items():
            mine = self.settled.setdefault(candidate, {})
            for timestep, nudge in found.items():
                if mine.setdefault(timestep, nudge) != nudge:
                    self.ambiguous.setdefault(candidate, set()).add(timestep)

    def as_json(self) -> str:
        """Return what `of_json` reads."""
        return json.dumps({"self_tests": self.self_tests, "settled": self.settled})

    @staticmethod
    def of_json(text: str) -> "Notes":
        """Read what `as_json` returned.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        found = json.loads(text)
        settled = {
            int(k): {int(t): tuple(map(float, nudge)) for t, nudge in each.items()}
            for k, each in found["settled"].items()
        }
        return Notes({str(k): str(v) for k, v in found["self_tests"].items()}, settled)


def label_free_run(dataset: xr.Dataset, divergence: Divergence) -> xr.Dataset:
    """Return the group `free_run` beside the audit's dataset."""
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


def label_audit(
    bench: Workbench, tables: Tables, candidates: Mapping[int, Candidate], notes: Notes
) -> xr.Dataset:
    """Return the audit's dataset.

    Args:
        bench: of the recording.
        tables: of these candidates.
        candidates: by the number under which the notes have them.
        notes: what else is known.
    """
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
    if any(c.arithmetic.stochastic for c in candidates.values()):
        arrays |= _roundings(tables, [c.arithmetic.stochastic for c in candidates.values()])
    if recording.losses is not None:
        arrays["loss"] = recording.losses[steps]
    coordinates = {
        "timestep": np.arange(*tables.steps, dtype=np.int64),
        "token_group": groups.names,
        "arithmetic": [c.arithmetic.name for c in candidates.values()],
        "stage": list(STAGES),
        "tensor": [TENSOR_KEYS[name] for name in tables.tensors],
        "mismatch_field": list(results.MISMATCH_FIELDS),
    }
    if "rounding_p_value" in arrays:
        edges = np.arange(stochastic.BINS) / stochastic.BINS
        coordinates["fraction_bin"] = edges + 0.5 / stochastic.BINS
    dataset = results.label(arrays, coordinates, {})
    dataset.attrs = _provenance(bench, dataset, candidates, notes)
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
    bench: Workbench, dataset: xr.Dataset, candidates: Mapping[int, Candidate], notes: Notes
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
                    "uncertain_scalars_settled": len(notes.settled.get(k, {})),
                    "uncertain_scalars_ambiguous": len(notes.ambiguous.get(k, ())),
                }
                for k, c in candidates.items()
            }
        ),
        "recording_metadata": _json(recording.metadata),
        "source": str(recording.path),
        "source_bytes": int(recording.bytes),
        "source_sha256_head": recording.fingerprint(),
        "storage_format": recording.storage.name,
        "state_precision": _state_precision(recording, dataset),
        "self_test": _json(notes.self_tests),
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
