"""What an audit tells of a recording with gaps: the timesteps of the run, and nothing that the missing steps are part of."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.gaps import Gaps
from jaxaudit.results import NOT_AUDITED

#: Variables that add up what happened from one step to the next, by the group of the file. The missing steps are part
#: of them: they are not told.
HISTORY = {
    "moments": (
        "exp_avg_sq_stuck_steps_max",
        "exp_avg_sq_stuck_steps_mean",
        "exp_avg_stuck_steps_max",
        "exp_avg_stuck_steps_mean",
        "root_ratio_count",
        "root_ratio_quantile",
        "step_size_ratio_quantile",
        "float32_root",
    ),
    "tokens": ("thaw_count", "weight_path", "lattice_path"),
}

#: Variables whose values are timesteps; numbers below 1 say that there is none.
_TIMESTEPS = {"tokens": ("last_early", "last_midlife", "freeze_onset")}


def told(found: Mapping[str, xr.Dataset], gaps: Gaps) -> dict[str, xr.Dataset]:
    """Return the datasets of an audit with the timesteps of the run, and without what the gaps leave untold.

    Args:
        found: by the name of their group; their timesteps are counted from 1 as recorded.
        gaps: of the recording.
    """
    told = {name: _renumbered(name, dataset, gaps.numbers) for name, dataset in found.items()}
    for group, names in HISTORY.items():
        if group in told:
            told[group] = told[group].assign(
                {name: _untold(told[group][name]) for name in names if name in told[group]}
            )
    told[""] = told[""].assign_attrs(
        gaps=f"{gaps.text()}, each with the state before it; what runs on from step to step is not told: free_run, "
        f"counterfactual, {', '.join(f'{group}.{name}' for group, names in HISTORY.items() for name in names)}"
    )
    return told


def _renumbered(group: str, dataset: xr.Dataset, numbers: NDArray[np.int64]) -> xr.Dataset:
    if "timestep" in dataset.coords:
        given = dataset.timestep
        coordinate = given.copy(data=numbers[given.values - 1])
        dataset = dataset.assign_coords(timestep=coordinate)
    changed = {
        name: dataset[name].copy(data=_numbered(dataset[name].values, numbers))
        for name in _TIMESTEPS.get(group, ())
        if name in dataset
    }
    if "first_mismatch" in dataset:
        first = dataset.first_mismatch.copy(deep=True)
        at = dict(mismatch_field="timestep")
        first.loc[at] = _numbered(first.loc[at].values, numbers)
        changed["first_mismatch"] = first
    return dataset.assign(changed)


def _numbered(steps: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number steps as the run does; what is below 1 stays."""
    return np.where(steps > 0, numbers[np.maximum(steps, 1) - 1], steps)


def _untold(variable: xr.DataArray) -> xr.DataArray:
    nothing = np.nan if variable.dtype.kind == "f" else NOT_AUDITED
    return variable.copy(data=np.full_like(variable.values, nothing))
