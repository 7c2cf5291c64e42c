"""The overview of a model: one row for each parameter, from the datasets of its audit."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit import results
from jaxaudit.ledger import verdict
from jaxaudit.models import variables
from jaxaudit.results import NOT_AUDITED
from jaxaudit.steps import STAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a parameter before its audit.

    Attributes:
        name: in the model.
        group_path: group of its audit in the file; "" where it is not audited.
        optimizer_group: from 0.
        shape: of the whole parameter.
        storage_format: of the recorded weights.
        tokens: recorded rows.
        elements: recorded elements per timestep.
        timesteps: number in the training run of each recorded state of its own, (T+1,).
        skipped: timesteps that did not step it.
        numbers: number of each recorded step among its own, (T,), as its datasets have it; None for 1..T.
    """

    name: str
    group_path: str
    optimizer_group: int
    shape: tuple[int, ...]
    storage_format: str
    tokens: int
    elements: int
    timesteps: NDArray[np.int64]
    skipped: int
    numbers: NDArray[np.int64] | None = None

    def in_the_run(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the timesteps of the training run that some of its own steps were."""
        places = steps if self.numbers is None else np.searchsorted(self.numbers, steps) + 1
        return self.timesteps[places]


class Overview:
    """Collects rows.

    Args:
        timesteps: the recorded timesteps of the training run, ascending.
    """

    def __init__(self, timesteps: NDArray[np.int64]):
        self._timesteps, self._count = timesteps, timesteps.size
        self._rows: list[dict[str, Any]] = []

    def take(self, facts: Facts, tree: Mapping[str, xr.Dataset], identified_by: str) -> None:
        """Add a parameter, in the model's order; without datasets where it was not audited."""
        row = self._empty(facts)
        if tree:
            row |= self._audited(facts, tree) | {"identified_by": identified_by}
        self._rows.append(row)

    def dataset(self, attributes: Mapping[str, Any]) -> xr.Dataset:
        """Return the dataset of `variables.OVERVIEW`."""
        columns: dict[str, Any] = {
            name: [row[name] for row in self._rows] for name in self._rows[0]
        }
        columns["rank_by_mismatches"] = _ranks(
            [-1.0 if not any(row["audited"]) else _mismatches(row) for row in self._rows]
        )
        columns["rank_by_lost_share"] = _ranks(
            [-1.0 if math.isnan(share) else share for share in columns["lost_share"]]
        )
        coordinates = {
            "parameter": columns.pop("parameter"),
            "stage": list(STAGES),
            "run_timestep": self._timesteps,
        }
        arrays = {name: np.asarray(columns[name]) for name in variables.OVERVIEW}
        return results.label(arrays, coordinates, attributes, variables.OVERVIEW)

    def _empty(self, facts: Facts) -> dict[str, Any]:
        absent = np.full(self._count, NOT_AUDITED, np.int64)
        return {
            "parameter": facts.name,
            "group_path": facts.group_path,
            "optimizer_group": facts.optimizer_group,
            "shape": "x".join(map(str, facts.shape)),
            "storage_format": facts.storage_format,
            "element_count": facts.elements,
            "token_count": facts.tokens,
            "timestep_count": 0,
            "skipped_count": facts.skipped,
            "arithmetic": "",
            "identified_arithmetic": "",
            "identified_by": "",
            "replays_exactly": 0,
            "mismatch_total": np.full(len(STAGES), NOT_AUDITED, np.int64),
            "audited": np.zeros(len(STAGES), np.int8),
            "first_mismatch_timestep": NOT_AUDITED,
            "nonfinite_total": NOT_AUDITED,
            "wanted_total": NOT_AUDITED,
            "lost_total": NOT_AUDITED,
            "lost_share": math.nan,
            "exp_avg_sq_fall_total": NOT_AUDITED,
            "exp_avg_sq_stuck_total": NOT_AUDITED,
            "exp_avg_sq_stuck_share": math.nan,
            "frozen_token_count": NOT_AUDITED,
            "ledger_exact": NOT_AUDITED,
            "mismatch_count": absent,
            "wanted_count": absent,
            "lost_count": absent,
            "norm_observed": np.full(self._count, math.nan),
        }

    def _audited(self, facts: Facts, tree: Mapping[str, xr.Dataset]) -> dict[str, Any]:
        root = tree[""].sel(token_group="all")
        # Its own steps have other numbers than the run's where some left it out.
        places = np.searchsorted(self._timesteps, facts.in_the_run(root.timestep.values))
        row: dict[str, Any] = {
            "timestep_count": root.sizes["timestep"],
            "identified_arithmetic": root.attrs["identified_arithmetic"],
            "replays_exactly": int(bool(root.attrs["identified_arithmetic"])),
            "nonfinite_total": int(root.nonfinite_count.sum()),
            "norm_observed": self._placed(places, root.norm_observed.values, math.nan),
        }
        name = counted_by(tree[""])
        if name:
            row |= self._replayed(facts, places, root.sel(arithmetic=name)) | {"arithmetic": name}
        row |= _shares(tree)
        for variable in ("wanted_count", "lost_count"):
            if "updates" in tree:
                counts = tree["updates"][variable].sel(token_group="all").values
                row[variable] = self._placed(places, counts, NOT_AUDITED)
        if "tokens" in tree:
            row["frozen_token_count"] = int((verdict.onsets_of(tree["tokens"], "all") >= 0).sum())
        if "updates" in tree:
            row["ledger_exact"] = root.attrs["ledger_arithmetic_replays_exactly"]
        return row

    def _replayed(self, facts: Facts, places: NDArray[np.int64], one: xr.Dataset) -> dict[str, Any]:
        audited = one.audited.values == 1
        counts = np.maximum(one.mismatch_count.transpose("stage", "timestep").values, 0)
        first = one.first_mismatch.sel(mismatch_field="timestep").values
        first = first[first > 0]
        found: dict[str, Any] = {
            "audited": audited.astype(np.int8),
            "mismatch_total": np.where(audited, counts.sum(axis=1), NOT_AUDITED),
        }
        if audited.any():
            found["first_mismatch_timestep"] = (
                int(facts.in_the_run(first).min()) if first.size else 0
            )
            found["mismatch_count"] = self._placed(places, counts.sum(axis=0), NOT_AUDITED)
        return found

    def _placed(self, places: NDArray[np.int64], values: NDArray[Any], absent: Any) -> NDArray[Any]:
        """Put the values of a parameter's steps to the timesteps of the run."""
        found = np.full(self._count, absent, values.dtype)
        found[places] = values
        return found


def counted_by(root: xr.Dataset) -> str:
    """Name the arithmetic that a parameter is counted by; "" where it was replayed under none."""
    fitting = root.attrs["identified_arithmetic"].split(",")[0]
    if fitting or not root.sizes["arithmetic"]:
        return fitting
    counts = root.mismatch_count.sel(token_group="all").where(root.audited == 1, 0)
    nearest = int(counts.sum(("stage", "timestep")).argmin("arithmetic"))
    return str(root.arithmetic.values[nearest])


def worst_first(overview: xr.Dataset) -> NDArray[np.int64]:
    """Return the numbers of the parameters: by mismatches, then by the share of lost updates."""
    totals = np.maximum(overview.mismatch_total.values, 0).sum(axis=1)
    return np.lexsort((overview.rank_by_lost_share.values, -totals))


def _mismatches(row: Mapping[str, Any]) -> float:
    return float(np.maximum(row["mismatch_total"], 0).sum())


def _ranks(badness: Sequence[float]) -> NDArray[np.int64]:
    order = np.argsort(-np.array(badness), kind="stable")
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(1, order.size + 1)
    return ranks


def _shares(tree: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Sum up what was wanted and lost, and what should have fallen and was stuck."""
    row: dict[str, Any] = {}
    for group, whole, part, names in (
        ("updates", "wanted_count", "lost_count", ("wanted_total", "lost_total", "lost_share")),
        (
            "moments",
            "exp_avg_sq_fall_count",
            "exp_avg_sq_stuck_count",
            ("exp_avg_sq_fall_total", "exp_avg_sq_stuck_total", "exp_avg_sq_stuck_share"),
        ),
    ):
        all_of, lost = (verdict.total(tree.get(group), name, "all") for name in (whole, part))
        if all_of is None or lost is None:
            continue
        row |= dict(zip(names, (all_of, lost, lost / all_of if all_of else math.nan), strict=True))
    return row
