"""What a comparison comes to: plain numbers for programs, and a few lines that need no manual."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit.divergence.variables import NEVER, RUNS
from jaxaudit.ledger.verdict import number, percent
from jaxaudit.results import NOT_AUDITED
from jaxaudit.safetensors_file import printable, short

#: Tensors in prose.
NAMES = {
    "grad": "gradient",
    "exp_avg": "first moment (exp_avg)",
    "exp_avg_sq": "second moment (exp_avg_sq)",
    "max_exp_avg_sq": "largest second moment (max_exp_avg_sq)",
    "compensation": "Kahan buffer",
    "param": "weight",
}

_MOST = 8  # things that are listed in one sentence

#: Lines of parameters in the text of two models.
LINES = 40

_NAME = 48  # characters of a parameter's name


def identical(dataset: xr.Dataset) -> bool:
    """Tell whether everything that both hold is the same to the bit, at the start and at every timestep compared."""
    if "differing_entry_count" in dataset:
        both = dataset.held.all("run")
        return not dataset.differing_entry_count.where(both, 0).any()
    stored = dataset.storage_format
    same_formats = bool((stored.sel(run="a") == stored.sel(run="b")).all())
    return same_formats and not _ever_differs(dataset)


def summarize(dataset: xr.Dataset) -> dict[str, Any]:
    """Return the summary of a comparison as values that JSON can hold."""
    found = _summary_of_results if "held" in dataset else _summary_of_runs
    return found(dataset) | {"identical": identical(dataset), "sentences": sentences(dataset)}


def sentences(dataset: xr.Dataset) -> list[str]:
    """Say what differs, in one plain sentence each."""
    told = _of_results(dataset) if "held" in dataset else _of_runs(dataset)
    return [printable(text) for text in told]


def describe(dataset: xr.Dataset) -> str:
    """Say in plain text what was compared and what differs."""
    lines = [
        f"a           {printable(dataset.attrs['source_a'])}",
        f"b           {printable(dataset.attrs['source_b'])}",
    ]
    if "held" not in dataset:
        lines += [*_compared_lines(dataset), "", *_tensor_table(dataset)]
    return "\n".join([*lines, "", *sentences(dataset)])


def parting(dataset: xr.Dataset) -> tuple[int, str] | None:
    """Return the first timestep at which two runs differ, and the first tensor of that step that does.

    The order within a step is that of its computation: gradient, moments, weight. None where nothing differs.
    """
    found = [
        (int(_first(dataset, name)["timestep"]), k) for k, name in enumerate(_tensors(dataset))
    ]
    found = [each for each in found if each[0] != NEVER]
    return (min(found)[0], _tensors(dataset)[min(found)[1]]) if found else None


# Two runs.


def _summary_of_runs(dataset: xr.Dataset) -> dict[str, Any]:
    first = parting(dataset)
    return {
        "kind": dataset.attrs["kind"],
        "source_a": dataset.attrs["source_a"],
        "source_b": dataset.attrs["source_b"],
        "timesteps": [int(dataset.timestep[0]), int(dataset.timestep[-1])],
        "timesteps_a": dataset.attrs["timesteps_a"],
        "timesteps_b": dataset.attrs["timesteps_b"],
        "token_count": dataset.sizes["token"],
        "element_count": _by_group(dataset, dataset.element_count),
        "only_in_a": _listed(dataset.attrs["only_in_a"]),
        "only_in_b": _listed(dataset.attrs["only_in_b"]),
        "differing_claims": json.loads(dataset.attrs["differing_claims"]),
        "first_timestep": first[0] if first else None,
        "first_tensor": first[1] if first else None,
        "tensors": {name: _tensor(dataset.sel(tensor=name)) for name in _tensors(dataset)},
        "displacement_cosine_at_the_end": _by_group(
            dataset, dataset.displacement_cosine.isel(timestep=-1)
        ),
    }


def _tensor(one: xr.Dataset) -> dict[str, Any]:
    first, end = _first(one), one.isel(timestep=-1)
    return {
        "storage_format": [str(name) for name in one.storage_format.values],
        "ulp_format": str(one.ulp_format.values),
        "differing_count": int(one.differing_count.sel(token_group="all").sum()),
        "rounded_differing_count": int(one.rounded_differing_count.sel(token_group="all").sum()),
        "differing_count_at_start": max(
            int(one.differing_count_at_start.sel(token_group="all")), 0
        ),
        "first_difference": None if first["timestep"] == NEVER else first,
        "max_ulp_distance": int(one.max_ulp_distance.max()),
        "at_the_end": {
            name: _by_group(end, end[name])
            for name in (
                "differing_count",
                "rounded_differing_count",
                "differing_token_count",
                "max_ulp_distance",
                "distance",
                "max_distance",
            )
        },
    }


def _of_runs(dataset: xr.Dataset) -> list[str]:
    told = [*_held_differently(dataset)]
    if not _ever_differs(dataset):
        return [_nothing_differs(dataset), *told, *_claims(dataset)]
    return [
        *_parting_sentences(dataset),
        *_rounded_sentences(dataset),
        *_end_sentences(dataset),
        *told,
        *_claims(dataset),
    ]


def _nothing_differs(dataset: xr.Dataset) -> str:
    steps, names = dataset.sizes["timestep"], ", ".join(_tensors(dataset))
    stored = dataset.storage_format
    how = "Bit-identical" if identical(dataset) else "Equal in value, though stored differently"
    others = "" if (stored.sel(run="a") == stored.sel(run="b")).all() else " Formats differ."
    return (
        f"{how}: every element of {names}, {_size(dataset):,} per timestep, in all {steps:,} timesteps and at the "
        f"start.{others}"
    )


def _parting_sentences(dataset: xr.Dataset) -> list[str]:
    found = parting(dataset)
    if found is None:
        return []
    timestep, tensor = found
    first = _first(dataset, tensor)
    formats = [str(f) for f in dataset.storage_format.sel(tensor=tensor).values]
    bits = " against ".join(
        f"{first[f'bits_{run}']:#0{_digits(fmt)}x}" for run, fmt in zip(RUNS, formats, strict=True)
    )
    at = f"token {first['token']:,}, position {first['position']:,}, {bits}"
    if timestep < int(dataset.timestep[0]):
        return [_start_sentence(dataset, timestep, f"{tensor}: {at}")]
    lines = [f"They part at timestep {timestep:,}: the {NAMES[tensor]} differs first ({at})."]
    if tensor == "grad":
        lines.append(
            "All that is compared of the state before it is identical: the passes through the model, or the data, "
            "part them, not the optimizer."
        )
    elif "grad" in _tensors(dataset):
        lines.append(
            "The gradients up to there are identical, and so is all that is compared of the state before: the "
            "optimizer's arithmetic or its hyperparameters part them."
        )
    else:
        lines.append("Both together hold no gradients that could tell whether these part first.")
    return lines


def _start_sentence(dataset: xr.Dataset, start: int, at: str) -> str:
    """Tell what differs before the first timestep, and whether rounding makes it the same."""
    names = [n for n in _tensors(dataset) if int(_first(dataset, n)["timestep"]) == start]
    rounded = dataset.rounded_differing_count_at_start.sel(tensor=names, token_group="all")
    verb = "differs" if len(names) == 1 else "differ"
    alike = "; rounded to the coarser format they are alike" if not rounded.any() else ""
    return f"Before timestep {start + 1:,} they are apart already: {', '.join(names)} {verb} ({at}){alike}."


def _rounded_sentences(dataset: xr.Dataset) -> list[str]:
    """Where formats differ, tell what is left after rounding to the coarser one."""
    lines = []
    for name in _tensors(dataset):
        one = dataset.sel(tensor=name, token_group="all")
        stored = [str(fmt) for fmt in one.storage_format.values]
        if stored[0] == stored[1]:
            continue
        counts, size = one.rounded_differing_count.values, _size(dataset)
        what = f"{name} is {stored[0]} in a and {stored[1]} in b"
        if not counts.any():
            lines.append(
                f"{what}: rounded to {one.ulp_format.values}, both are the same in every timestep."
            )
            continue
        first = int(one.timestep.values[np.argmax(counts > 0)])
        lines.append(
            f"{what}: rounded to {one.ulp_format.values}, both differ from timestep {first:,} on, at the last one in "
            f"{percent(int(counts[-1]), size)} of the elements."
        )
    return lines


def _end_sentences(dataset: xr.Dataset) -> list[str]:
    """Tell how far the weights are apart in the end."""
    end = dataset.sel(tensor="param").isel(timestep=-1)
    whole = end.sel(token_group="all")
    count, last = int(whole.differing_count), int(end.timestep)
    if not count:
        return [f"The weights are the same at the last timestep, {last:,}."]
    shares = [
        f"{short(name)} {percent(int(one.differing_count), int(one.element_count))}"
        for name in map(str, dataset.token_group.values)
        if name != "all" and int((one := end.sel(token_group=name)).element_count)
    ]
    far = f"by up to {int(whole.max_ulp_distance):,} ulp of {end.ulp_format.values}{_middle(whole)}"
    by_group = f" ({', '.join(shares[:_MOST])})" if shares else ""
    lines = [
        f"At timestep {last:,}, {percent(count, _size(dataset))} of the weights differ{by_group}, {far}; "
        f"{int(whole.differing_token_count):,} of {dataset.sizes['token']:,} tokens hold one."
    ]
    moved, distance = float(whole.displacement_norm.sel(run="a")), float(whole.distance)
    if math.isfinite(distance) and moved > 0:
        lines.append(
            f"Their L2 distance is then {number(distance)}, where a has moved by {number(moved)} and b by "
            f"{number(float(whole.displacement_norm.sel(run='b')))} since the start; the cosine of the two "
            f"displacements is {_cosine(float(whole.displacement_cosine))}."
        )
    never = [n for n in _tensors(dataset) if not dataset.differing_count.sel(tensor=n).any()]
    if never:
        lines.append(f"Never different: {', '.join(never)}.")
    return lines


def _middle(one: xr.Dataset) -> str:
    """Tell which distance half of the elements at any distance do not exceed."""
    if "ulp_histogram" not in one or not (counts := one.ulp_histogram.values[1:]).any():
        return ""
    median = int(np.argmax(2 * counts.cumsum() >= counts.sum())) + 1
    most = min(int(one.ulp_bin[median]), int(one.max_ulp_distance))
    return f", half of them by at most {most:,}"


def _held_differently(dataset: xr.Dataset) -> list[str]:
    """Tell what only one of both holds."""
    attributes, lines = dataset.attrs, []
    for run in RUNS:
        names = _listed(attributes[f"only_in_{run}"])
        if names:
            verb = "is" if len(names) == 1 else "are"
            lines.append(f"Only {run} holds {', '.join(names)}, which {verb} not compared.")
    first, last = int(dataset.timestep[0]), int(dataset.timestep[-1])
    held = [attributes[f"timesteps_{run}"] for run in RUNS]
    if held[0] != held[1]:
        count = dataset.sizes["timestep"]
        some = f" ({count:,} of them)" if count < last + 1 - first else ""
        lines.append(
            f"a holds the timesteps {held[0]}, b {held[1]} (ends not included); {first}:{last + 1}{some} are compared."
        )
    if run := attributes["rows_assumed_of"]:
        lines.append(
            f"{run} does not say which rows of the parameter it holds; they are taken for those of the other."
        )
    counts = [int(attributes[f"tokens_{run}"]) for run in RUNS]
    common = dataset.sizes["token"]
    if counts != [common, common]:
        lines.append(
            f"a holds {counts[0]:,} tokens, b {counts[1]:,}; the {common:,} common ones are compared."
        )
    return lines


def _claims(dataset: xr.Dataset) -> list[str]:
    return claim_sentences(json.loads(dataset.attrs["differing_claims"]))


def claim_sentences(found: Mapping[str, Sequence[Any]]) -> list[str]:
    """Say what two runs say differently of themselves."""
    shown = [
        f"{short(name)} {_said(a)} in a, {_said(b)} in b"
        for name, (a, b) in [*found.items()][:_MOST]
    ]
    more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return [f"They say of themselves: {'; '.join(shown)}{more}."] if shown else []


# What comparisons of models have in common.


def named(name: str) -> str:
    """Show a parameter's name."""
    text = printable(name)
    return text if len(text) <= _NAME else text[: _NAME - 3] + "..."


def share(value: float) -> str:
    """Write a ratio as a percentage, which may be above 100; "-" for none."""
    if not math.isfinite(value):
        return "-"
    return percent(value, 1.0) if value <= 1 else f"{number(100 * value)} %"


def only_sentences(overview: xr.Dataset) -> list[str]:
    """Name the parameters that only one of two models holds."""
    lines = []
    for run in RUNS:
        names = json.loads(overview.attrs[f"only_in_{run}"])
        if names:
            shown = ", ".join(named(name) for name in names[:_MOST])
            more = f" and {len(names) - _MOST:,} more" if len(names) > _MOST else ""
            verb = "is" if len(names) == 1 else "are"
            lines.append(f"Only {run} holds {shown}{more}, which {verb} not compared.")
    return lines


def page(
    overview: xr.Dataset, rows: Sequence[Sequence[str]], left_out: int, sentences: Sequence[str]
) -> str:
    """Put the text of two models together: what was compared, a table with its head, and sentences."""
    lines = [
        f"a           {printable(overview.attrs['source_a'])}",
        f"b           {printable(overview.attrs['source_b'])}",
        f"Parameters  {overview.sizes['parameter']:,} that both hold",
        "",
        *map(printable, _aligned(rows)),
    ]
    lines += [f"and {left_out:,} more"] if left_out else []
    return "\n".join([*lines, "", *map(printable, sentences)])


def _compared_lines(dataset: xr.Dataset) -> list[str]:
    groups = ", ".join(
        f"{short(str(name))} {int(n):,}"
        for name, n in zip(dataset.token_group.values, dataset.element_count.values, strict=True)
    )
    first, last = int(dataset.timestep[0]), int(dataset.timestep[-1])
    return [
        f"Compared    timesteps {first:,} to {last:,}, {dataset.sizes['token']:,} tokens",
        f"Elements    {groups} per timestep",
    ]


def _tensor_table(dataset: xr.Dataset) -> list[str]:
    total = _size(dataset) * dataset.sizes["timestep"]
    rows = [["tensor", "formats", f"differ, of {total:,}", "from timestep", "largest distance", "L2 at the end"]]  # fmt: skip
    for name in _tensors(dataset):
        one = dataset.sel(tensor=name, token_group="all")
        stored = [str(fmt) for fmt in one.storage_format.values]
        first = int(_first(dataset, name)["timestep"])
        rows.append(
            [
                name,
                stored[0] if stored[0] == stored[1] else " | ".join(stored),
                f"{int(one.differing_count.sum()):,}",
                "never" if first == NEVER else f"{first:,}",
                f"{int(one.max_ulp_distance.max()):,} ulp of {one.ulp_format.values}",
                number(float(one.distance[-1])),
            ]
        )
    return _aligned(rows)


# Two results.


def _summary_of_results(dataset: xr.Dataset) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": dataset.attrs["kind"],
        "source_a": dataset.attrs["source_a"],
        "source_b": dataset.attrs["source_b"],
        "variables": {
            str(name): _variable(dataset.sel(variable=name)) for name in dataset.variable.values
        },
        "differing_labels": json.loads(dataset.attrs["differing_labels"]),
        "differing_attributes": json.loads(dataset.attrs["differing_attributes"]),
        "differing_claims": json.loads(dataset.attrs["differing_claims"]),
        "verdict_a": json.loads(dataset.attrs["verdict_a"]),
        "verdict_b": json.loads(dataset.attrs["verdict_b"]),
    }
    if "identified_arithmetic" in dataset:
        found["identified_arithmetic"] = [_listed(str(x)) for x in dataset.identified_arithmetic.values]  # fmt: skip
    if "mismatch_total" in dataset:
        found["mismatch_total"] = {
            str(name): {
                str(stage): [_or_none(n) for n in dataset.mismatch_total.sel(arithmetic=name, stage=stage).values]
                for stage in dataset.stage.values
            }
            for name in dataset.arithmetic.values
        }  # fmt: skip
    if "lost_count" in dataset:
        totals = dataset[["lost_count", "wanted_count"]].sum("timestep")
        found["lost_and_wanted"] = {
            str(name): [[int(totals[v].sel(run=run, token_group=name)) for v in ("lost_count", "wanted_count")] for run in RUNS]
            for name in dataset.token_group.values
        }  # fmt: skip
    return found


def _variable(one: xr.Dataset) -> dict[str, Any]:
    largest = float(one.max_difference)
    return {
        "held": [bool(held) for held in one.held.values],
        "entry_count": int(one.entry_count),
        "differing_entry_count": int(one.differing_entry_count),
        "max_difference": largest if math.isfinite(largest) else None,
        "first_differing_timestep": _or_none(one.first_differing_timestep),
    }


def _of_results(dataset: xr.Dataset) -> list[str]:
    return [
        *_identified_sentences(dataset),
        *_mismatch_sentences(dataset),
        *_lost_sentences(dataset),
        *_verdict_sentences(dataset),
        *_variable_sentences(dataset),
        *_label_sentences(dataset),
        *_claims(dataset),
        *_attribute_sentences(dataset),
    ]


def _identified_sentences(dataset: xr.Dataset) -> list[str]:
    if "identified_arithmetic" not in dataset:
        return []
    one, other = (", ".join(_listed(str(names))) for names in dataset.identified_arithmetic.values)
    if one == other:
        return [f"Both replay bit for bit under {one}." if one else "No arithmetic replays either bit for bit."]  # fmt: skip
    return [f"Replay bit for bit: a under {one or 'none that was tried'}, b under {other or 'none that was tried'}."]  # fmt: skip


def _mismatch_sentences(dataset: xr.Dataset) -> list[str]:
    """Lay the mismatches of each arithmetic side by side."""
    if "mismatch_total" not in dataset:
        return []
    lines = []
    for name in map(str, dataset.arithmetic.values):
        both = dataset.mismatch_total.sel(arithmetic=name)
        absent = [run for run in RUNS if (both.sel(run=run) == NOT_AUDITED).all()]
        if absent == [*RUNS]:
            continue
        shown = [_total(both.sel(stage=stage), absent) for stage in both.stage.values]
        same = bool((both.sel(run="a") == both.sel(run="b")).all())
        head = f"Mismatches under {name}{' are as many in both' if same else ''}"
        tail = f"; {absent[0]} did not replay it" if absent else ""
        lines.append(f"{head}{'' if absent else ', a | b'}: {', '.join(shown)}{tail}.")
    return lines


def _total(both: xr.DataArray, absent: Sequence[str]) -> str:
    """Write the mismatches of a stage in either run that replayed it."""
    counts = [int(both.sel(run=run)) for run in RUNS if run not in absent]
    told = ["not audited" if n == NOT_AUDITED else f"{n:,}" for n in counts]
    return f"{both.stage.values} {' | '.join(told)}"


def _lost_sentences(dataset: xr.Dataset) -> list[str]:
    if "lost_count" not in dataset:
        return []
    totals = dataset[["lost_count", "wanted_count"]].sum("timestep")
    lines = []
    for name in map(str, dataset.token_group.values):
        one = totals.sel(token_group=name)
        lost, wanted = one.lost_count.values.tolist(), one.wanted_count.values.tolist()
        shares = [
            f"{percent(n, of)} in {run} ({n:,} of {of:,})" if of else f"none wanted in {run}"
            for run, n, of in zip(RUNS, lost, wanted, strict=True)
        ]
        same = lost == lost[::-1] and wanted == wanted[::-1]
        told = f"{shares[0].replace(' in a', '')} in both" if same else ", ".join(shares)
        lines.append(f"Wanted updates of {short(name)} tokens that changed nothing: {told}.")
    return lines


def _verdict_sentences(dataset: xr.Dataset) -> list[str]:
    """Repeat the sentences of both verdicts that are not the same."""
    told = [json.loads(dataset.attrs[f"verdict_{run}"]) for run in RUNS]
    if not any(told):
        return []
    if told[0] == told[1]:
        return ["Both come to the same sentences."]
    return [
        f"Only {run} says: {sentence}"
        for run, mine, others in (("a", *told), ("b", *told[::-1]))
        for sentence in mine
        if sentence not in others
    ]


def _variable_sentences(dataset: xr.Dataset) -> list[str]:
    both = dataset.sel(variable=dataset.held.all("run").values)
    counts = both.differing_entry_count.values
    differ = [str(name) for name in both.variable.values[counts != 0]]
    lines = []
    if not differ:
        lines.append(f"All {len(counts)} common variables are identical.")
    else:
        shown = [_change(both.sel(variable=name), name) for name in differ[:_MOST]]
        more = f"; and {len(differ) - _MOST} more" if len(differ) > _MOST else ""
        lines.append(
            f"{len(differ)} of {len(counts)} common variables differ: {'; '.join(shown)}{more}."
        )
    for run, other in (RUNS, RUNS[::-1]):
        held = dataset.held.sel(run=run).values.astype(bool) & ~dataset.held.sel(run=other).values.astype(bool)  # fmt: skip
        names = [str(name) for name in dataset.variable.values[held]]
        if names:
            shown = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")  # fmt: skip
            lines.append(f"Only {run} holds {shown}.")
    return lines


def _change(one: xr.Dataset, name: str) -> str:
    if int(one.differing_entry_count) == NEVER:
        return f"{name} (other dimensions)"
    since, largest = int(one.first_differing_timestep), float(one.max_difference)
    told = [f"{int(one.differing_entry_count):,} of {int(one.entry_count):,}"]
    told += [f"from timestep {since:,}"] if since != NEVER else []
    told += [f"by up to {number(largest)}"] if math.isfinite(largest) else []
    return f"{name} ({', '.join(told)})"


def _label_sentences(dataset: xr.Dataset) -> list[str]:
    return [
        f"{name}: {common:,} labels are common, {a:,} only in a, {b:,} only in b."
        for name, (a, common, b) in json.loads(dataset.attrs["differing_labels"]).items()
    ]


def _attribute_sentences(dataset: xr.Dataset) -> list[str]:
    found = json.loads(dataset.attrs["differing_attributes"])
    shown = [f"{short(name)} ({_said(a)} | {_said(b)})" for name, (a, b) in found.items()]
    more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return [f"Attributes that differ: {'; '.join(shown[:_MOST])}{more}."] if shown else []


# Both.


def _tensors(dataset: xr.Dataset) -> list[str]:
    return [str(name) for name in dataset.tensor.values]


def _size(dataset: xr.Dataset) -> int:
    return int(dataset.element_count.sel(token_group="all"))


def _ever_differs(dataset: xr.Dataset) -> bool:
    return bool((dataset.first_difference.sel(divergence_field="timestep") != NEVER).any())


def _first(dataset: xr.Dataset, tensor: str | None = None) -> dict[str, int]:
    one = (
        dataset.first_difference if tensor is None else dataset.first_difference.sel(tensor=tensor)
    )
    return {str(k): int(v) for k, v in zip(one.divergence_field.values, one.values, strict=True)}


def _by_group(dataset: xr.Dataset, values: xr.DataArray) -> dict[str, int | float | None]:
    found = {}
    for name in map(str, dataset.token_group.values):
        value = values.sel(token_group=name).item()
        found[name] = value if isinstance(value, int) or math.isfinite(value) else None
    return found


def _or_none(value: Any) -> int | None:
    return int(value) if int(value) != NEVER else None


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _said(value: Any) -> str:
    return "not said" if value is None else short(value)


def _cosine(value: float) -> str:
    return f"{value:.6f}" if math.isfinite(value) else "undefined"


def _digits(fmt: str) -> int:
    return 10 if fmt == "float32" else 6


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = np.max([[len(cell) for cell in row] for row in rows], axis=0)
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip
