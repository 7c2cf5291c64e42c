"""Two models side by side: one row for each parameter that both hold, from the comparisons of their recordings."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.divergence import account
from jaxaudit.divergence.alignment import ORDER
from jaxaudit.divergence.variables import DIFFERENCE_FIELDS, MODEL_VARIABLES, NEVER, RUNS
from jaxaudit.results import NOT_AUDITED, label

#: Variables of the weights that a row takes from a parameter's comparison, and what stands for no timestep.
_COURSES = {
    "differing_count": NOT_AUDITED,
    "max_ulp_distance": NOT_AUDITED,
    "distance": math.nan,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a parameter before it is compared.

    Attributes:
        name: in the model.
        group_path: group of its comparison in the file; "" where it has none.
        shape: of the whole parameter.
        reason: why it is not compared; "" where it is.
        elements: of the weights that were never stepped, which are compared once; 0 for all others.
        differing: how many of them differ, and the first one's token, position and bits.
    """

    name: str
    group_path: str = ""
    shape: tuple[int, ...] = ()
    reason: str = ""
    elements: int = 0
    differing: tuple[int, int, int, int, int] = (0, NEVER, NEVER, NEVER, NEVER)


class Overview:
    """Collects rows, in the order of the first model."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def take(self, facts: Facts, dataset: xr.Dataset | None) -> None:
        """Add a parameter; without a dataset where it was not compared, or never stepped."""
        row = _empty(facts)
        if dataset is not None:
            row |= _compared(dataset)
        elif not facts.reason:
            row |= _never_stepped(facts)
        self._rows.append(row)

    def dataset(self, attributes: Mapping[str, Any]) -> xr.Dataset:
        """Return the dataset of `variables.MODEL_VARIABLES`."""
        rows = self._rows
        timesteps = np.unique(np.concatenate([row["timesteps"] for row in rows]))
        arrays: dict[str, Any] = {
            name: [row[name] for row in rows]
            for name, field in MODEL_VARIABLES.items()
            if field.dims in (("parameter",), ("parameter", "compared_tensor"), ("parameter", "divergence_field"))
            and name in rows[0]
        }  # fmt: skip
        for name, absent in _COURSES.items():
            arrays[name] = np.stack([_placed(row, name, timesteps, absent) for row in rows])
        moves = [
            np.stack([_placed(row, f"moved_{run}", timesteps, math.nan) for row in rows])
            for run in RUNS
        ]
        arrays["displacement_norm"] = np.stack(moves)
        with np.errstate(all="ignore"):
            arrays["relative_distance"] = arrays["distance"] / moves[0]
        arrays |= _totals(arrays)
        arrays["rank_by_distance"] = _ranks(_badness(arrays))
        firsts = np.array([row["first_difference"][0] for row in rows])
        orders = np.array([ORDER.index(row["first_tensor"] or "param") for row in rows])
        never = (firsts == NEVER).astype(np.int64)
        arrays["rank_by_first_difference"] = _ranked(np.lexsort((orders, firsts, never)))
        coordinates = {
            "parameter": [row["parameter"] for row in rows],
            "compared_timestep": timesteps,
            "compared_tensor": list(ORDER),
            "run": list(RUNS),
            "divergence_field": list(DIFFERENCE_FIELDS),
        }
        return label(arrays, coordinates, attributes, MODEL_VARIABLES)


def worst_first(overview: xr.Dataset) -> NDArray[np.int64]:
    """Return the numbers of the parameters in the order of `rank_by_distance`."""
    return np.argsort(overview.rank_by_distance.values, kind="stable")


def parting(overview: xr.Dataset) -> tuple[int, str, list[int]] | None:
    """Return the first timestep at which the models differ, the first tensor of that step that does, and where.

    The gradients of a step are there before its moments, and these before its weights, in all parameters. None where
    nothing differs.
    """
    first = overview.first_difference.sel(divergence_field="timestep").values
    found = [
        (int(t), ORDER.index(str(name)), k)
        for k, (t, name) in enumerate(zip(first, overview.first_tensor.values, strict=True))
        if t != NEVER
    ]
    if not found:
        return None
    timestep, order, _ = min(found)
    return timestep, ORDER[order], [k for t, o, k in found if (t, o) == (timestep, order)]


def _empty(facts: Facts) -> dict[str, Any]:
    tensors = len(ORDER)
    return {
        "parameter": facts.name,
        "group_path": facts.group_path,
        "shape": "x".join(map(str, facts.shape)),
        "reason": facts.reason,
        "is_identical": NOT_AUDITED,
        "element_count": 0,
        "token_count": 0,
        "timestep_count": 0,
        "first_tensor": "",
        "first_difference": np.full(len(DIFFERENCE_FIELDS), NEVER),
        "first_differing_timestep": np.full(tensors, NEVER),
        "held": np.zeros(tensors, np.int8),
        "differing_total": np.full(tensors, NOT_AUDITED),
        "differing_count_at_start": NOT_AUDITED,
        "distance_growth": math.nan,
        "timesteps": np.zeros(0, np.int64),
    }


def _compared(dataset: xr.Dataset) -> dict[str, Any]:
    whole = dataset.sel(token_group="all")
    weights, timesteps = whole.sel(tensor="param"), dataset.timestep.values
    row: dict[str, Any] = {
        "is_identical": int(account.identical(dataset)),
        "element_count": int(whole.element_count),
        "token_count": dataset.sizes["token"],
        "timestep_count": timesteps.size,
        "differing_count_at_start": int(weights.differing_count_at_start),
        "timesteps": timesteps,
    }
    held = [str(name) for name in dataset.tensor.values]
    firsts, totals = np.full(len(ORDER), NEVER), np.full(len(ORDER), NOT_AUDITED)
    for name in held:
        k = ORDER.index(name)
        at = {"tensor": name, "divergence_field": "timestep"}
        firsts[k] = int(dataset.first_difference.sel(at))
        totals[k] = int(whole.differing_count.sel(tensor=name).sum())
    row |= {"first_differing_timestep": firsts, "differing_total": totals}
    row["held"] = np.array([name in held for name in ORDER], np.int8)
    found = account.parting(dataset)
    if found:
        row["first_tensor"] = found[1]
        row["first_difference"] = dataset.first_difference.sel(tensor=found[1]).values
    for name in _COURSES:
        row[name] = weights[name].values
    for run in RUNS:
        row[f"moved_{run}"] = whole.displacement_norm.sel(run=run).values
    known = weights.distance.values
    known = known[np.isfinite(known) & (known > 0)]
    if known.size:
        row["distance_growth"] = float(known[-1] / known[0])
    return row


def _never_stepped(facts: Facts) -> dict[str, Any]:
    count, *first = facts.differing
    weights = ORDER.index("param")
    row: dict[str, Any] = {
        "is_identical": int(not count),
        "element_count": facts.elements,
        "differing_count_at_start": count,
        "held": np.array([name == "param" for name in ORDER], np.int8),
        "differing_total": np.array([0 if k == weights else NOT_AUDITED for k in range(len(ORDER))]),
    }  # fmt: skip
    if count:
        row["first_tensor"] = "param"
        row["first_difference"] = np.array([0, *first])
        row["first_differing_timestep"] = np.array([0 if k == weights else NEVER for k in range(len(ORDER))])  # fmt: skip
    return row


def _placed(
    row: Mapping[str, Any], name: str, timesteps: NDArray[np.int64], absent: float
) -> NDArray[Any]:
    """Put the values of a parameter's timesteps to those of all."""
    found = np.full(timesteps.size, absent, np.float64 if math.isnan(absent) else np.int64)
    if row["timesteps"].size:
        found[np.searchsorted(timesteps, row["timesteps"])] = row[name]
    return found


def _totals(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Add up the parameters that are compared at each timestep."""
    there = arrays["differing_count"] >= 0
    sizes = np.array(arrays["element_count"])[:, None]
    with np.errstate(over="ignore"):
        squares = np.square(np.where(there, arrays["distance"], 0))
        moves = np.square(np.where(there, arrays["displacement_norm"], 0))
    return {
        "compared_element_count": (sizes * there).sum(axis=0),
        "total_differing_count": np.maximum(arrays["differing_count"], 0).sum(axis=0),
        "total_distance": np.sqrt(squares.sum(axis=0)),
        "total_displacement_norm": np.sqrt(moves.sum(axis=1)),
    }


def _badness(arrays: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return how far each parameter is apart in the end: relative to a's way, then by elements ever differing."""
    found = []
    for k, relative in enumerate(arrays["relative_distance"]):
        known = relative[arrays["differing_count"][k] >= 0]
        last = float(known[-1]) if known.size else 0.0
        total = float(np.maximum(arrays["differing_total"][k], 0).sum())
        total += max(int(arrays["differing_count_at_start"][k]), 0)
        found.append((math.inf if math.isnan(last) and total else max(last, 0.0), total))
    return found


def _ranks(badness: Sequence[tuple[float, float]]) -> NDArray[np.int64]:
    first, second = np.array(badness).reshape(-1, 2).T
    return _ranked(np.lexsort((-second, -np.nan_to_num(first, nan=0.0, posinf=np.inf))))


def _ranked(order: NDArray[np.int64]) -> NDArray[np.int64]:
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(1, order.size + 1)
    return ranks


def as_names(names: Sequence[str]) -> str:
    """Write names as an attribute: JSON, since a parameter's name may hold anything."""
    return json.dumps(list(names))
