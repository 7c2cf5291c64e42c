"""Compare two results: two NetCDF files that a command of this package wrote, variable by variable."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.divergence.variables import AUDIT_VARIABLES, NEVER, RUNS
from jaxaudit.provenance import origin
from jaxaudit.results import NOT_AUDITED, label
from jaxaudit.safetensors_file import FileError, short

#: The datasets of a file by the name of their group; that of the root is "".
Tree = Mapping[str, xr.Dataset]

#: Attributes that no two calls share, or that are told of in their own words.
_TOLD_ELSEWHERE = {
    "title",
    "created_at",
    "command",
    "verdict",
    "hyperparameters",
    "identified_arithmetic",
    "recording_metadata",
    "self_test",
    "arithmetics",
}


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Tree]:
    """Open a result without loading it.

    Raises:
        FileError: it is no NetCDF file, or cannot be read.
    """
    try:
        tree = xr.open_datatree(Path(path).absolute(), engine="netcdf4")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(
            f"{path}: cannot be read as NetCDF ({short(reason)}). Give a result of this package."
        ) from error
    with tree:
        yield {node.path.strip("/"): node.to_dataset() for node in tree.subtree}


def compare_results(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> xr.Dataset:
    """Compare two results, such as the audits of two runs, or two audits of one run.

    Variables are compared bit for bit (all NaNs are alike) where both have the same labels: timesteps, token groups or
    arithmetics that only one holds are left out.

    Args:
        a: a NetCDF file.
        b: another.

    Returns:
        The dataset of `divergence.variables.AUDIT_VARIABLES`; those that neither file has anything for are left out.

    Raises:
        FileError: a file cannot be read, or both have no variable in common.
    """
    with opened(a) as one, opened(b) as other:
        return compare_trees((one, other), (Path(a), Path(b)))


def compare_trees(trees: tuple[Tree, Tree], paths: tuple[Path, Path]) -> xr.Dataset:
    """Compare the groups of two results; see `compare_results`."""
    a, b = paths
    names = _variables(trees)
    if not any(all(held) for held in names.values()):
        raise FileError(f"{a} and {b} have no variable in common. Give two results of one kind.")
    try:
        arrays, coordinates = _table(trees, names)
        for part in (_identified, _mismatches, _updates):
            more, labels = part(trees)
            arrays |= more
            coordinates |= labels
        attributes = _attributes(paths, trees)
    except (OSError, RuntimeError) as error:  # netCDF: a damaged part is found when it is read
        raise FileError(f"{a} or {b} is damaged ({short(error)}). Make it again.") from error
    return label(arrays, coordinates, attributes, AUDIT_VARIABLES)


def _variables(trees: tuple[Tree, Tree]) -> dict[str, tuple[bool, bool]]:
    """Name every variable of either file, as `group/variable`, and tell which file holds it."""
    held = [
        [f"{group}/{name}".lstrip("/") for group, ds in tree.items() for name in ds.data_vars]
        for tree in trees
    ]
    return {name: (name in held[0], name in held[1]) for name in dict.fromkeys(held[0] + held[1])}


def _array(tree: Tree, name: str) -> xr.DataArray:
    group, _, variable = name.rpartition("/")
    return tree[group][variable]


def _table(
    trees: tuple[Tree, Tree], names: Mapping[str, tuple[bool, bool]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare every variable."""
    rows = []
    for name, held in names.items():
        rows.append(_compared(*(_array(t, name) for t in trees)) if all(held) else (0, 0, math.nan, NEVER))  # fmt: skip
    entries, differing, largest, first = zip(*rows, strict=True)
    arrays = {
        "held": np.array([*names.values()]),
        "entry_count": entries,
        "differing_entry_count": differing,
        "max_difference": largest,
        "first_differing_timestep": first,
    }
    return arrays, {"variable": [*names], "run": list(RUNS)}


def _compared(a: xr.DataArray, b: xr.DataArray) -> tuple[int, int, float, int]:
    """Count entries and those that differ; find the largest difference and the first timestep that has one."""
    if a.dims != b.dims:
        return 0, NOT_AUDITED, math.nan, NEVER
    a, b = xr.align(a, b, join="inner", copy=False)
    one, other = a.values, b.values
    unlike = _unlike(one, other)
    if not unlike.any():
        return unlike.size, 0, 0.0, NEVER
    first = NEVER
    if "timestep" in a.dims and "timestep" in a.coords:
        others = tuple(k for k, dim in enumerate(a.dims) if dim != "timestep")
        first = int(a.timestep.values[np.argmax(unlike.any(axis=others))])
    largest = math.nan
    if one.dtype.kind in "iufb" and other.dtype.kind in "iufb":
        with np.errstate(all="ignore"):
            gap = np.abs(one[unlike].astype(np.float64) - other[unlike].astype(np.float64))
        largest = float(gap.max())
    return unlike.size, int(np.count_nonzero(unlike)), largest, first


def _unlike(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which entries differ: numbers of one dtype in their bits (all NaNs being alike), others in value."""
    if one.dtype == other.dtype and one.dtype.kind == "f":
        bits = f"u{one.dtype.itemsize}"
        same = np.ascontiguousarray(one).view(bits) == np.ascontiguousarray(other).view(bits)
        return ~(same.reshape(one.shape) | (np.isnan(one) & np.isnan(other)))
    return np.asarray(one != other)


def _identified(trees: tuple[Tree, Tree]) -> tuple[dict[str, Any], dict[str, Any]]:
    found = [tree[""].attrs.get("identified_arithmetic") for tree in trees]
    if None in found:
        return {}, {}
    return {"identified_arithmetic": [str(names) for names in found]}, {}


def _mismatches(trees: tuple[Tree, Tree]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add up the mismatches of all timesteps, for every arithmetic that either replayed."""
    if not all(_is_audit(tree) for tree in trees):
        return {}, {}
    names = list(dict.fromkeys(str(n) for tree in trees for n in tree[""].arithmetic.values))
    stages = list(dict.fromkeys(str(n) for tree in trees for n in tree[""].stage.values))
    totals = np.full((2, len(names), len(stages)), NOT_AUDITED)
    for k, tree in enumerate(trees):
        root = tree[""]
        counts = root.mismatch_count.sel(token_group="all").sum("timestep")
        for name in root.arithmetic.values:
            for stage in root.stage.values:
                if int(root.audited.sel(arithmetic=name, stage=stage)):
                    total = int(counts.sel(arithmetic=name, stage=stage))
                    totals[k, names.index(str(name)), stages.index(str(stage))] = total
    return {"mismatch_total": totals}, {"arithmetic": names, "stage": stages}


def _is_audit(tree: Tree) -> bool:
    root = tree[""]
    needed = {"mismatch_count", "audited"} <= set(root.data_vars)
    return needed and "all" in root.get("token_group", xr.DataArray([])).values


def _updates(trees: tuple[Tree, Tree]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lay the wanted and lost updates, and the norms of the weights' changes, side by side."""
    arrays, labels = {}, {}
    sources = {
        "wanted_count": ("updates", "wanted_count"),
        "lost_count": ("updates", "lost_count"),
        "norm_observed": ("", "norm_observed"),
    }
    for name, (group, variable) in sources.items():
        if not all(variable in tree.get(group, ()) for tree in trees):
            continue
        if any({*tree[group][variable].dims} != {"timestep", "token_group"} for tree in trees):
            continue  # the overview of a model has one by parameter
        both = [tree[group][variable].transpose("timestep", "token_group") for tree in trees]
        one, other = xr.align(*both, join="inner", copy=False)
        if one.size:
            arrays[name] = np.stack([one.values, other.values])
            labels = {"timestep": one.timestep.values, "token_group": one.token_group.values}
    return arrays, labels


def _attributes(paths: tuple[Path, Path], trees: tuple[Tree, Tree]) -> dict[str, Any]:
    roots = [tree[""].attrs for tree in trees]
    names = [n for n in dict.fromkeys([*roots[0], *roots[1]]) if n not in _TOLD_ELSEWHERE]
    shown = {n: [_plain(root.get(n)) for root in roots] for n in names}
    given = [_hyperparameters(root) for root in roots]
    numbers = {n: [one.get(n) for one in given] for n in dict.fromkeys([*given[0], *given[1]])}
    return {
        "title": f"jaxaudit: {paths[0].name} (a) against {paths[1].name} (b)",
        "kind": "comparison of two results",
        "source_a": str(paths[0]),
        "source_b": str(paths[1]),
        "differing_labels": json.dumps(_labels(trees)),
        "differing_attributes": json.dumps({n: x for n, x in shown.items() if x[0] != x[1]}),
        "differing_claims": json.dumps({n: x for n, x in numbers.items() if x[0] != x[1]}),
        "verdict_a": _verdict(roots[0]),
        "verdict_b": _verdict(roots[1]),
        **origin(),
    }


def _labels(trees: tuple[Tree, Tree]) -> dict[str, list[int]]:
    """Count the labels that only one file has, and the common ones, where both are not the same."""
    found = {}
    for group in trees[0].keys() & trees[1].keys():
        one, other = trees[0][group], trees[1][group]
        for name in sorted(set(map(str, one.indexes)) & set(map(str, other.indexes))):
            a, b = set(one[name].values.tolist()), set(other[name].values.tolist())
            if a != b:
                found[name] = [len(a - b), len(a & b), len(b - a)]
    return dict(sorted(found.items()))


def _hyperparameters(attributes: Mapping[str, Any]) -> dict[str, Any]:
    given = _parsed(attributes.get("hyperparameters"), {})
    return {
        str(name): entry.get("value") for name, entry in given.items() if isinstance(entry, dict)
    }


def _verdict(attributes: Mapping[str, Any]) -> str:
    told = _parsed(attributes.get("verdict"), [])
    return json.dumps([str(each.get("sentence")) for each in told if isinstance(each, dict)])


def _parsed(text: Any, otherwise: Any) -> Any:
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return otherwise
    return found if isinstance(found, type(otherwise)) else otherwise


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
