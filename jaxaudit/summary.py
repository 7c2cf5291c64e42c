"""An audit's dataset in a few lines that need no manual, and the same as plain numbers."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit.safetensors_file import printable

#: The band within which the first analyses of such runs called a timestep accounted for.
RATIO_BAND = (0.99, 1.01)

_UNKNOWN = "the arithmetic may be one that is not in the catalogue (docs/limits.md)"


def summarize(dataset: xr.Dataset, free_run: xr.Dataset | None = None) -> dict[str, Any]:
    """Return the summary of an audit, and of a free run, as values that JSON can hold.

    A timestep at which neither replay nor recording moves agrees, in every count here.
    """
    found = _summarize_audit(dataset)
    return found if free_run is None else found | {"free_run": _summarize_free_run(free_run)}


def _summarize_free_run(free_run: xr.Dataset) -> dict[str, Any]:
    """Tell for each arithmetic when it first parts from the recording, and how far it is at the end."""
    end = free_run.isel(timestep=-1)
    return {
        str(name): {
            "first_divergence": _by_group(free_run, free_run.first_divergence.sel(arithmetic=name)),
            "mismatch_count_at_the_end": _by_group(end, end.mismatch_count.sel(arithmetic=name)),
            "max_ulp_distance_at_the_end": _by_group(
                end, end.max_ulp_distance.sel(arithmetic=name)
            ),
        }
        for name in free_run.arithmetic.values
    }


def _summarize_audit(dataset: xr.Dataset) -> dict[str, Any]:
    attributes = dataset.attrs
    return {
        "source": attributes["source"],
        "timesteps": [int(dataset.timestep[0]), int(dataset.timestep[-1])],
        "timestep_count": dataset.sizes["timestep"],
        "element_count": _by_group(dataset, dataset.element_count),
        "storage_format": attributes["storage_format"],
        "state_precision": attributes["state_precision"],
        "hyperparameters": json.loads(attributes["hyperparameters"]),
        "backend": attributes["backend"],
        "device": attributes["device"],
        "identified_arithmetic": [
            name for name in attributes["identified_arithmetic"].split(",") if name
        ],
        "nonfinite_count": {
            str(name): int(dataset.nonfinite_count.sel(tensor=name, token_group="all").sum())
            for name in dataset.tensor.values
        },
        "arithmetics": {
            str(name): _summarize_arithmetic(dataset.sel(arithmetic=name))
            | _used(dataset, str(name))
            for name in dataset.arithmetic.values
        },
    }


def replays_exactly(dataset: xr.Dataset, arithmetic: str) -> bool:
    """Tell whether weights and every other audited stage came out bit for bit under an arithmetic."""
    one = dataset.sel(arithmetic=arithmetic, token_group="all")
    audited = one.audited == 1
    wrong = int(one.mismatch_count.where(audited, 0).sum())
    return bool(audited.sel(stage="param")) and wrong == 0


def describe(dataset: xr.Dataset, free_run: xr.Dataset | None = None) -> str:
    """Say in plain text what was read, what the state's precision is, and what agrees."""
    found = summarize(dataset, free_run)
    lines = [
        _recording_line(dataset, found),
        f"Optimizer   {_hyperparameter_line(found['hyperparameters'])}",
        f"State       {found['state_precision']}",
        f"Backend     {found['backend']} ({found['device']}), jax {dataset.attrs['jax_version']}, "
        f"self-test {_self_test_line(dataset)}",
        "",
        *_stage_table(dataset, found),
        "",
        *_timestep_table(found),
        "",
        *_used_lines(found),
        *_first_mismatch_lines(found),
        *_free_run_lines(found),
        *_nonfinite_lines(found),
        _verdict(found),
    ]
    return "\n".join(lines)


def _summarize_arithmetic(one: xr.Dataset) -> dict[str, Any]:
    audited = {str(stage): bool(one.audited.sel(stage=stage)) for stage in one.stage.values}
    counts, distances = one.mismatch_count, one.max_ulp_distance
    summary: dict[str, Any] = {
        "mismatch_count": {
            stage: int(counts.sel(stage=stage, token_group="all").sum()) if known else None
            for stage, known in audited.items()
        },
        "max_ulp_distance": {
            stage: int(distances.sel(stage=stage, token_group="all").max()) if known else None
            for stage, known in audited.items()
        },
        "first_mismatch": {
            stage: _first_mismatch(one.first_mismatch.sel(stage=stage)) for stage in audited
        },
    }
    if audited["param"]:
        exact = (counts.sel(stage="param") == 0).sum("timestep")
        still = one.norm_observed == 0
        ratio_agrees = ((one.ratio >= RATIO_BAND[0]) & (one.ratio <= RATIO_BAND[1])) | (
            still & (one.norm_predicted == 0)
        )
        cosine_agrees = (one.cosine_similarity > 0.99) | (still & (one.norm_predicted == 0))
        summary |= {
            "exact_timesteps": _by_group(one, exact),
            "timesteps_with_ratio_within_1_percent": _by_group(one, ratio_agrees.sum("timestep")),
            "timesteps_with_cosine_above_0.99": _by_group(one, cosine_agrees.sum("timestep")),
        }
    return summary


def _by_group(dataset: xr.Dataset, values: xr.DataArray) -> dict[str, int]:
    return {str(name): int(values.sel(token_group=name)) for name in dataset.token_group.values}


def _used(dataset: xr.Dataset, name: str) -> dict[str, Any]:
    """Tell under which variant, options and other than stored hyperparameters an arithmetic was replayed."""
    stated = json.loads(dataset.attrs["arithmetics"])[name]
    return {key: stated[key] for key in ("variant", "options", "hyperparameters")}


def _first_mismatch(fields: xr.DataArray) -> dict[str, int] | None:
    found = {
        str(name): int(fields.sel(mismatch_field=name)) for name in fields.mismatch_field.values
    }
    return found if found["timestep"] > 0 else None


def _recording_line(dataset: xr.Dataset, found: dict[str, Any]) -> str:
    groups = ", ".join(f"{name} {count:,}" for name, count in found["element_count"].items())
    first, last = found["timesteps"]
    return (
        f"Recording   {printable(found['source'])}: timesteps {first} to {last}{_optimizer_steps(dataset)}, "
        f"{found['storage_format']}\n"
        f"Elements    {groups} per timestep"
    )


def _optimizer_steps(dataset: xr.Dataset) -> str:
    """Say which steps of the optimizer the timesteps are, where the recording began in the middle of a run."""
    before = int(json.loads(dataset.attrs["recording_metadata"]).get("first_step", 1)) - 1
    first, last = (int(dataset.timestep[k]) for k in (0, -1))
    if before < 1 or last - first + 1 != dataset.sizes["timestep"]:
        return ""
    return f" (steps {before + first:,} to {before + last:,} of the optimizer)"


def _hyperparameter_line(given: dict[str, Any]) -> str:
    if not given:
        return "no hyperparameters recorded"
    rate = given["learning_rate"]["value"]
    shown = f"{min(rate):g} to {max(rate):g}" if isinstance(rate, list) else repr(rate)
    return (
        f"learning rate {shown}, betas {given['beta1']['value']!r} and {given['beta2']['value']!r}, "
        f"eps {given['epsilon']['value']!r}, weight decay {given['weight_decay']['value']!r}\n"
        f"            from {_origins(given)}"
    )


def _origins(given: dict[str, Any]) -> str:
    """Name where the numbers come from; what is said of several alike is said once."""
    named: dict[str, list[str]] = {}
    for origin in sorted({str(entry["origin"]) for entry in given.values()}):
        key, _, said = origin.partition(" (")
        named.setdefault(said, []).append(key)
    return "; ".join(f"{', '.join(keys)}{said and ' ('}{said}" for said, keys in named.items())


def _self_test_line(dataset: xr.Dataset) -> str:
    verdicts = json.loads(dataset.attrs["self_test"])
    failed = [name for name, verdict in verdicts.items() if verdict != "passed"]
    if not failed:
        return f"passed ({len(verdicts)} programs)"
    inexact = verdicts.get("operations in float32", "").removeprefix("inexact: ")
    return f"passed in float64 emulation; float32 is inexact here ({inexact})"


def _stage_table(dataset: xr.Dataset, found: dict[str, Any]) -> list[str]:
    total = found["element_count"]["all"] * found["timestep_count"]
    rows = [["elements that differ, of " + f"{total:,}", *map(str, dataset.stage.values)]]
    for name, one in found["arithmetics"].items():
        counts = one["mismatch_count"].values()
        rows.append([name, *("not audited" if n is None else f"{n:,}" for n in counts)])
    return as_table(rows)


def _timestep_table(found: dict[str, Any]) -> list[str]:
    low, high = RATIO_BAND
    groups = list(found["element_count"])
    total = found["timestep_count"]
    rows = [[f"timesteps, of {total:,}", *groups]]
    titles = {
        "exact_timesteps": "weights agree exactly",
        "timesteps_with_ratio_within_1_percent": f"ratio in [{low}, {high}]",
        "timesteps_with_cosine_above_0.99": "cosine above 0.99",
    }
    for name, one in found["arithmetics"].items():
        # Where all weights agree exactly in all timesteps, the other rows say nothing more.
        exact = one.get("exact_timesteps", {}).get("all") == total
        for key, title in titles.items():
            if key in one and (key == "exact_timesteps" or not exact):
                rows.append([f"{name}: {title}", *(f"{one[key][g]:,}" for g in groups)])
    return (
        as_table(rows) if len(rows) > 1 else ["weights: not audited (the recording has no moments)"]
    )


def _used_lines(found: dict[str, Any]) -> list[str]:
    """Say what was replayed otherwise than the recording states."""
    lines = []
    for name, one in found["arithmetics"].items():
        changed = [_changed(key, value) for key, value in one["hyperparameters"].items()]
        if one["variant"] or changed:
            lines.append(
                f"{name} is replayed with {', '.join([one['variant']] * bool(one['variant']) + changed)}."
            )
    return lines


def _changed(key: str, value: Any) -> str:
    """Say what was used instead of what is stored; a step count is said in words already."""
    if key == "step_count":
        return f"{'' if str(value).startswith('no ') else 'step count '}{value}"
    return f"{key} {value} instead of the stored one"


def _first_mismatch_lines(found: dict[str, Any]) -> list[str]:
    """Say where the weights first differ, or the moments where all weights agree."""
    lines = []
    for name, one in found["arithmetics"].items():
        stages = one["first_mismatch"]
        stage = next((s for s in ("param", "exp_avg", "exp_avg_sq") if stages[s]), "param")
        at, what = stages[stage], "weight" if stage == "param" else stage
        if at:
            lines.append(
                f"First {what} that differs under {name}: timestep {at['timestep']}, token {at['token']}, "
                f"position {at['position']}, recorded {at['recorded_bits']:#x}, replayed {at['replayed_bits']:#x}"
            )
    return lines


def _free_run_lines(found: dict[str, Any]) -> list[str]:
    runs, total = found.get("free_run", {}), found["element_count"]["all"]
    lines = []
    never = [name for name, one in runs.items() if one["first_divergence"]["all"] == 0]
    if never:
        verb = "never parts" if len(never) == 1 else "never part"
        lines.append(f"Run freely over the gradients alone, {', '.join(never)} {verb} from it.")
    for name, one in runs.items():
        first, count = one["first_divergence"]["all"], one["mismatch_count_at_the_end"]["all"]
        if first > 0:
            far = one["max_ulp_distance_at_the_end"]["all"]
            differ = f"{count:,} of {total:,} weights differ, by up to {far:,} ulp"
            lines.append(
                f"Run freely over the gradients alone, {name} parts from it at timestep {first:,}; in the end "
                f"{differ if count else 'all weights agree again'}."
            )
    return lines


def _nonfinite_lines(found: dict[str, Any]) -> list[str]:
    counts = {name: count for name, count in found["nonfinite_count"].items() if count}
    if not counts:
        return []
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [f"Infinite or NaN elements in the recording: {shown}"]


def _verdict(found: dict[str, Any]) -> str:
    fitting = found["identified_arithmetic"]
    if not fitting:
        return "No arithmetic that was tried replays this recording bit for bit."
    audited = found["arithmetics"][fitting[0]]["mismatch_count"]
    missing = [stage for stage, count in audited.items() if count is None]
    what = "every audited element" if missing else "every weight and both moments"
    tail = f" ({', '.join(missing)} not audited)" if missing else ""
    told = "" if len(fitting) == 1 else " This recording does not tell them apart."
    return f"Replays bit for bit under {', '.join(fitting)}: {what} of every timestep{tail}.{told}"


def where_to_look(dataset: xr.Dataset) -> str:
    """Say which stages the nearest arithmetic of an audit gets right, and what that leaves to be checked.

    It tells something where all arithmetics were tried: else another may fit. "" where one fits.
    """
    found = _summarize_audit(dataset)
    if found["identified_arithmetic"]:
        return ""
    name, one = next(iter(found["arithmetics"].items()), ("", {}))
    counts: dict[str, int | None] = one.get("mismatch_count", {})
    if not any(counts.values()) or not found["hyperparameters"]:
        return ""
    total = found["element_count"]["all"] * found["timestep_count"]
    wrong = [stage for stage, count in counts.items() if count]
    right = [stage for stage, count in counts.items() if count == 0]
    if all((counts[stage] or 0) * 1000 < total for stage in wrong):
        few = " and ".join(f"{counts[stage]:,} of {stage}" for stage in wrong)
        return (
            f"Under {name}, all but {few} agree: look at these elements. The file may be damaged there, or something "
            f"other than the optimizer wrote to them; else {_UNKNOWN}."
        )
    apart = found["timestep_count"] - one.get("exact_timesteps", {}).get("all", 0)
    if wrong == ["param"] and len(right) == 2 and apart * 2 < found["timestep_count"]:
        return (
            f"Under {name}, the moments agree and the weights differ in {apart:,} of {found['timestep_count']:,} timesteps, "
            f"the first {one['first_mismatch']['param']['timestep']:,}: look at what other than the optimizer changed the "
            f"weights before these, and at their learning rate. Where that is as it should be, {_UNKNOWN}."
        )
    fits = f"{' and '.join(right)} agree{'s' * (len(right) == 1)} and " if right else ""
    return (
        f"Under {name}, {fits}{' and '.join(wrong)} differ{'s' * (len(wrong) == 1)}: look at "
        f"{_suspects(wrong, right, found['hyperparameters'])}. Where these are as they should be, {_UNKNOWN}."
    )


def _suspects(wrong: Sequence[str], right: Sequence[str], given: dict[str, Any]) -> str:
    """Name what decides the stages that differ, in words; what decides those that agree is beyond suspicion."""
    betas = f"the betas ({given['beta1']['value']!r} and {given['beta2']['value']!r})"
    values = {name: entry["value"] for name, entry in given.items()}
    moments = [stage for stage in wrong if stage != "param"]
    gradients = (
        "whether `grad_W` holds in row t the gradient that step t used, clipped and unscaled"
    )
    if len(moments) == 2:
        return f"{gradients}, and at {betas}"
    if moments:
        beta = "beta1" if moments == ["exp_avg"] else "beta2"
        return f"{beta} ({values[beta]!r} is stored)"
    rate = values["learning_rate"]
    shown = f"{rate!r} is stored" if not isinstance(rate, list) else "one for each step is stored"
    unsure = "" if len(right) == 2 else f"{gradients}, at {betas}, "
    return (
        f"{unsure}the learning rate ({shown}), eps ({values['epsilon']!r}), weight decay ({values['weight_decay']!r}), the step "
        "count, and whether anything else than the optimizer changed the weights"
    )


def as_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, columns below one another; the first is on the left."""
    widths = np.max([[len(cell) for cell in row] for row in rows], axis=0)
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip
