"""What a comparison of two models comes to: plain numbers for programs, and a few lines that need no manual."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit.divergence import account
from jaxaudit.divergence.account import NAMES, named, only_sentences, page
from jaxaudit.divergence.overview import parting, worst_first
from jaxaudit.divergence.variables import NEVER
from jaxaudit.ledger.verdict import number, percent

_NAMED = 3  # parameters in one sentence


def identical(overview: xr.Dataset) -> bool:
    """Tell whether everything that both hold of the common parameters is the same to the bit.

    A parameter of one name that cannot be compared (another shape, no common timestep) is not the same.
    """
    return bool((overview.is_identical == 1).all())


def summarize(overview: xr.Dataset) -> dict[str, Any]:
    """Return the overview as values that JSON can hold, parameters in the order of a."""
    found = parting(overview)
    names = [str(name) for name in overview.parameter.values]
    return {
        "kind": overview.attrs["kind"],
        "source_a": overview.attrs["source_a"],
        "source_b": overview.attrs["source_b"],
        "timesteps": [int(t) for t in overview.compared_timestep.values[[0, -1]]] if overview.sizes["compared_timestep"] else None,
        "only_in_a": json.loads(overview.attrs["only_in_a"]),
        "only_in_b": json.loads(overview.attrs["only_in_b"]),
        "differing_claims": json.loads(overview.attrs["differing_claims"]),
        "first_timestep": found[0] if found else None,
        "first_tensor": found[1] if found else None,
        "first_parameters": [names[k] for k in found[2]] if found else [],
        "parameters": {name: _row(overview.isel(parameter=k)) for k, name in enumerate(names)},
        "worst_first": [names[k] for k in worst_first(overview)],
        "identical": identical(overview),
        "sentences": sentences(overview),
    }  # fmt: skip


def _row(one: xr.Dataset) -> dict[str, Any]:
    end = _end(one)
    first = {str(f): int(v) for f, v in zip(one.divergence_field.values, one.first_difference.values, strict=True)}  # fmt: skip
    return {
        "shape": str(one["shape"].values),
        "not_compared": str(one.reason.values) or None,
        "identical": bool(one.is_identical == 1) if one.is_identical >= 0 else None,
        "timestep_count": int(one.timestep_count),
        "element_count": int(one.element_count),
        "first_tensor": str(one.first_tensor.values) or None,
        "first_difference": first if first["timestep"] != NEVER else None,
        "differing_total": {
            str(name): int(count)
            for name, count, held in zip(
                one.compared_tensor.values, one.differing_total.values, one.held.values, strict=True
            )
            if held
        },
        "distance_growth": _or_none(float(one.distance_growth)),
        "at_the_end": None
        if end is None
        else {
            "differing_count": int(end.differing_count),
            "max_ulp_distance": int(end.max_ulp_distance),
            "distance": _or_none(float(end.distance)),
            "relative_distance": _or_none(float(end.relative_distance)),
        },
    }


def sentences(overview: xr.Dataset) -> list[str]:
    """Say what differs, in one plain sentence each."""
    told = [_nothing(overview)] if parting(overview) is None else _differences(overview)
    told += only_sentences(overview)
    told += _not_compared(overview)
    others = json.loads(overview.attrs["stepped_at_other_timesteps"])
    if others:
        told.append(
            f"Not stepped at the same timesteps in both: {_listed(others)}; they are laid upon each other by their own "
            "step counts."
        )
    claims = json.loads(overview.attrs["differing_claims"])
    return [*told, *account.claim_sentences(claims)]


def describe(overview: xr.Dataset) -> str:
    """Say in plain text what was compared, a line for each of the worst parameters, and what differs."""
    head = [
        "parameter, the worst first",
        "shape",
        "from timestep",
        "first in",
        "weights differ",
        "largest distance",
    ]
    rows = [[*head, "L2 at the end", "of a's way", "grown"]]
    order = worst_first(overview)
    shown = order if order.size <= account.LINES else order[: account.LINES - 1]
    rows += [_line(overview.isel(parameter=k)) for k in shown.tolist()]
    return page(overview, rows, order.size - shown.size, sentences(overview))


def _line(one: xr.Dataset) -> list[str]:
    first, end = int(one.first_difference[0]), _end(one)
    compared = not str(one.reason.values)
    line = [
        named(str(one.parameter.values)),
        str(one["shape"].values),
        "not compared" if not compared else "never" if first == NEVER else f"{first:,}",
        str(one.first_tensor.values) or "-",
    ]
    if end is None:
        count, size = int(one.differing_count_at_start), int(one.element_count)
        share = percent(count, size) if compared and size else "-"
        return [*line, share, *["-"] * 4]
    growth = float(one.distance_growth)
    return [
        *line,
        percent(int(end.differing_count), int(one.element_count)),
        f"{int(end.max_ulp_distance):,} ulp",
        number(float(end.distance)),
        account.share(float(end.relative_distance)),
        f"{number(growth)} times" if math.isfinite(growth) else "-",
    ]


def _nothing(overview: xr.Dataset) -> str:
    count = int((overview.reason.values == "").sum())
    alike = (
        "Bit-identical"
        if (overview.is_identical != 0).all()
        else "Equal in value, though stored differently"
    )
    which = "the one parameter" if count == 1 else f"all {count:,} parameters"
    return (
        f"{alike}: every element of {which} that {'is' if count == 1 else 'are'} compared, "
        f"{int(overview.element_count.sum()):,} per timestep, in all {overview.sizes['compared_timestep']:,} timesteps and at the "
        "start."
    )


def _differences(overview: xr.Dataset) -> list[str]:
    found = parting(overview)
    assert found is not None
    timestep, tensor, places = found
    one = overview.isel(parameter=places[0])
    first = dict(
        zip(
            map(str, one.divergence_field.values),
            map(int, one.first_difference.values),
            strict=True,
        )
    )
    count = int((overview.reason.values == "").sum())
    of = f"{len(places):,} of {count:,} parameters" if count > 1 else "the one parameter"
    first_of = "the first of them in the order of a is " if len(places) > 1 else ""
    at = (
        f"{first_of}{named(str(one.parameter.values))} (token {first['token']:,}, position {first['position']:,}, "
        f"{first['bits_a']:#x} against {first['bits_b']:#x})"
    )
    started = not overview.sizes["compared_timestep"] or timestep < int(
        overview.compared_timestep[0]
    )
    if started:
        firsts = overview.first_difference.sel(divergence_field="timestep").values
        apart = int((firsts == timestep).sum())
        told = [
            f"They are apart at the start already, in {apart:,} of {count:,} parameters: among others the {NAMES[tensor]} "
            f"of {named(str(one.parameter.values))} differs (token {first['token']:,}, position "
            f"{first['position']:,}, {first['bits_a']:#x} against {first['bits_b']:#x})."
        ]
    else:
        told = [
            f"They part at timestep {timestep:,}: the {NAMES[tensor]} of {of} differs first; {at}."
        ]
        told.append(_cause(tensor))
    same = int((overview.is_identical == 1).sum())
    if same:
        told.append(
            f"{same:,} of {count:,} parameters {'is' if same == 1 else 'are'} identical throughout."
        )
    return [*told, *_at_the_end(overview)]


def _cause(tensor: str) -> str:
    if tensor == "grad":
        return (
            "All that is compared of the state before it is identical: the passes through the model, or the data, part "
            "them, not the optimizer."
        )
    return (
        "The gradients that both hold are identical up to there, and so is all that is compared of the state before: the "
        "optimizer's arithmetic or its hyperparameters part them."
    )


def _at_the_end(overview: xr.Dataset) -> list[str]:
    if not overview.sizes["compared_timestep"]:
        return []
    end = overview.isel(compared_timestep=-1)
    count, size = int(end.total_differing_count), int(end.compared_element_count)
    last, distance = int(end.compared_timestep), float(end.total_distance)
    if not count:
        return [f"The weights are the same at the last timestep, {last:,}."]
    lines = [f"At timestep {last:,}, {percent(count, size)} of the weights differ."]
    moved = [float(x) for x in end.total_displacement_norm.values]
    if math.isfinite(distance) and moved[0] > 0:
        lines.append(
            f"Their L2 distance is then {number(distance)}, where a has moved by {number(moved[0])} and b by "
            f"{number(moved[1])} since the start."
        )
    order = [
        k for k in worst_first(overview).tolist() if (_last(overview.isel(parameter=k)) or 0) > 0
    ]
    if len(order) > 1:
        far = ", ".join(
            f"{named(str(overview.parameter.values[k]))} ({account.share(_last(overview.isel(parameter=k)) or 0)})"
            for k in order[:_NAMED]
        )
        lines.append(f"Farthest apart, measured by the way that a has gone: {far}.")
    return lines


def _not_compared(overview: xr.Dataset) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, why in zip(overview.parameter.values, overview.reason.values, strict=True):
        if why:
            reasons.setdefault(str(why), []).append(str(name))
    return [f"Not compared: {_listed(names)} ({why})." for why, names in reasons.items()]


def _end(one: xr.Dataset) -> xr.Dataset | None:
    """Return the last timestep at which a parameter is compared."""
    there = np.flatnonzero(one.differing_count.values >= 0)
    return one.isel(compared_timestep=int(there[-1])) if there.size else None


def _last(one: xr.Dataset) -> float | None:
    end = _end(one)
    return None if end is None else float(end.relative_distance)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(named(name) for name in names[:_NAMED]) + more


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
