"""Compare two audits of models: what differs between the results of each parameter."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit.divergence import account
from jaxaudit.divergence.audits import Tree, compare_trees, opened
from jaxaudit.divergence.overview import as_names
from jaxaudit.divergence.variables import MODEL_AUDIT_VARIABLES, NEVER, RUNS
from jaxaudit.models.audits import selected
from jaxaudit.provenance import origin
from jaxaudit.results import NOT_AUDITED, label
from jaxaudit.safetensors_file import FileError
from jaxaudit.sources.model_folder import choices

#: Of the overviews, what is laid side by side for each parameter.
_SIDE_BY_SIDE = ("arithmetic", "identified_arithmetic", "mismatch_total", "wanted_total", "lost_total", "lost_share")  # fmt: skip

#: Group of the comparison's file that compares the overviews' variables.
OVERVIEW = "overview"


def is_model(tree: Tree) -> bool:
    """Tell whether a result is the audit of a model."""
    return {"group_path", "rank_by_mismatches", *_SIDE_BY_SIDE} <= {*tree[""].data_vars}


def compare_model_results(
    a: Path, b: Path, *, parameters: str | re.Pattern[str] | Sequence[str] | None = None
) -> Iterator[dict[str, xr.Dataset]]:
    """Compare two audits of models, parameter by parameter.

    Args:
        a: a NetCDF file that an audit of a model wrote.
        b: another.
        parameters: which: a regular expression that is searched in the names, or names; by default all.

    Yields:
        The dataset of each group of the file: under `overview` and `parameters/NAME` what `compare_results` makes of the
        overviews and of each parameter's audit, and last the overview of `divergence.variables.MODEL_AUDIT_VARIABLES`
        under "".

    Raises:
        FileError: a file cannot be read, is no audit of a model, or both have no parameter in common.
        ValueError: parameters that are not there.
    """
    with opened(a) as one, opened(b) as other:
        trees, paths = (one, other), (a, b)
        for path, tree in zip(paths, trees, strict=True):
            if not is_model(tree):
                raise FileError(f"{path}: not the audit of a model. Give two results of one kind.")
        rows = [{str(name): k for k, name in enumerate(t[""].parameter.values)} for t in trees]
        chosen = selected(dict.fromkeys([*rows[0], *rows[1]]), parameters)
        names = [name for name in chosen if name in rows[0] and name in rows[1]]
        if not names:
            raise FileError(
                f"{a} and {b} have no parameter in common. {choices(rows[0])} {choices(rows[1])} Give two audits of one "
                "model."
            )
        # Ranks depend on the other parameters.
        ranks = [str(name) for name in one[""].data_vars if str(name).startswith("rank_by_")]
        roots = [
            tree[""].sel(parameter=names).drop_vars(ranks, errors="ignore").load() for tree in trees
        ]
        first = compare_trees(({"": roots[0]}, {"": roots[1]}), paths)
        yield {OVERVIEW: first}
        found: list[xr.Dataset | None] = []
        for name in names:
            groups = [str(root.sel(parameter=name).group_path.values) for root in roots]
            if not all(groups):
                found.append(None)
                continue
            parts = [_below(tree, group) for tree, group in zip(trees, groups, strict=True)]
            dataset = compare_trees((parts[0], parts[1]), paths)
            found.append(dataset)
            yield {groups[0]: dataset.assign_attrs(parameter=name)}
        only = [[n for n in chosen if n in rows[k] and n not in rows[1 - k]] for k in (0, 1)]
        yield {"": _overview(paths, roots, names, found, first, only)}


def _below(tree: Tree, group: str) -> dict[str, xr.Dataset]:
    """Return the groups of one parameter, by their names within its own, loaded."""
    inside = {name: each for name, each in tree.items() if name == group or name.startswith(f"{group}/")}  # fmt: skip
    return {name.removeprefix(group).lstrip("/"): each.load() for name, each in inside.items()}


def _overview(
    paths: tuple[Path, Path],
    roots: Sequence[xr.Dataset],
    names: Sequence[str],
    found: Sequence[xr.Dataset | None],
    first: xr.Dataset,
    only: Sequence[Sequence[str]],
) -> xr.Dataset:
    rows = [_row(dataset) for dataset in found]
    arrays: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    arrays["group_path"] = [str(path) for path in roots[0].group_path.values]
    for name in _SIDE_BY_SIDE:
        arrays[name] = np.stack([root[name].values for root in roots])
    order = np.lexsort(
        (
            np.array(arrays["first_differing_timestep"]),
            -np.array(arrays["differing_variable_count"]),
        )
    )
    arrays["rank_by_differing_variables"] = np.argsort(order, kind="stable") + 1
    coordinates = {"parameter": list(names), "run": list(RUNS), "stage": roots[0].stage.values}
    attributes = {
        "title": f"jaxaudit: {paths[0].name} (a) against {paths[1].name} (b)",
        "kind": "comparison of two audits of models",
        "source_a": str(paths[0]),
        "source_b": str(paths[1]),
        "only_in_a": as_names(only[0]),
        "only_in_b": as_names(only[1]),
        "overview_identical": int(account.identical(first)),
        **{
            name: first.attrs[name]
            for name in ("differing_attributes", "differing_claims", "verdict_a", "verdict_b")
        },
        **origin(),
    }
    return label(arrays, coordinates, attributes, MODEL_AUDIT_VARIABLES)


def _row(dataset: xr.Dataset | None) -> dict[str, Any]:
    if dataset is None:
        return {
            "is_identical": NOT_AUDITED,
            "variable_count": 0,
            "differing_variable_count": 0,
            "largest_differing_variable": "",
            "first_differing_timestep": NEVER,
        }
    both = dataset.isel(variable=np.flatnonzero(dataset.held.all("run").values))
    differ = both.isel(variable=np.flatnonzero(both.differing_entry_count.values))
    first = differ.first_differing_timestep.values
    first = first[first != NEVER]
    shares = np.abs(differ.differing_entry_count.values) / np.maximum(differ.entry_count.values, 1)
    most = str(differ.variable.values[int(np.argmax(shares))]) if shares.size else ""
    return {
        "is_identical": int(account.identical(dataset)),
        "variable_count": both.sizes["variable"],
        "differing_variable_count": differ.sizes["variable"],
        "largest_differing_variable": most,
        "first_differing_timestep": int(first.min()) if first.size else NEVER,
    }


# What is said of it.


def identical(overview: xr.Dataset) -> bool:
    """Tell whether everything that both results hold of the common parameters is the same to the bit."""
    return bool(overview.attrs["overview_identical"]) and not (overview.is_identical == 0).any()


def summarize(overview: xr.Dataset) -> dict[str, Any]:
    """Return the overview as values that JSON can hold."""
    rows = {}
    for name in overview.parameter.values.tolist():
        one = overview.sel(parameter=name)
        rows[name] = {
            str(variable): _plain(one[variable].values.tolist()) for variable in one.data_vars
        }
    return {
        "kind": overview.attrs["kind"],
        "source_a": overview.attrs["source_a"],
        "source_b": overview.attrs["source_b"],
        "only_in_a": json.loads(overview.attrs["only_in_a"]),
        "only_in_b": json.loads(overview.attrs["only_in_b"]),
        "parameters": rows,
        "identical": identical(overview),
        "sentences": sentences(overview),
    }


def sentences(overview: xr.Dataset) -> list[str]:
    """Say what differs, in one plain sentence each."""
    compared = int((overview.is_identical >= 0).sum())
    same = int((overview.is_identical == 1).sum())
    told = []
    if same == compared:
        told.append(f"The audits of all {compared:,} common parameters are identical.")
    else:
        first = overview.first_differing_timestep.values
        first = first[first != NEVER]
        since = f", from timestep {int(first.min()):,} on" if first.size else ""
        told.append(
            f"The audits of {compared - same:,} of {compared:,} common parameters differ{since}."
        )
    sums = np.maximum(overview.mismatch_total.values, 0).sum(axis=(1, 2))
    exact = (overview.identified_arithmetic.values != "").sum(axis=1)
    told.append(
        f"Replay bit for bit: {exact[0]:,} parameters in a, {exact[1]:,} in b; mismatches in all: {int(sums[0]):,} in a, "
        f"{int(sums[1]):,} in b."
    )
    told += account.only_sentences(overview)
    return told


def describe(overview: xr.Dataset) -> str:
    """Say in plain text what was compared and what differs, a line for each of the worst parameters."""
    rows = [["parameter, the worst first", "variables differ", "from timestep", "most in", "mismatches a | b", "lost a | b"]]  # fmt: skip
    order = np.argsort(overview.rank_by_differing_variables.values)
    shown = order if order.size <= account.LINES else order[: account.LINES - 1]
    for k in shown.tolist():
        one = overview.isel(parameter=k)
        first = int(one.first_differing_timestep)
        totals = np.maximum(one.mismatch_total.values, 0).sum(axis=1)
        lost = [account.share(float(x)) for x in one.lost_share.values]
        rows.append(
            [
                account.named(str(one.parameter.values)),
                f"{int(one.differing_variable_count):,} of {int(one.variable_count):,}",
                f"{first:,}" if first != NEVER else "never",
                str(one.largest_differing_variable.values),
                " | ".join(f"{int(n):,}" for n in totals),
                " | ".join(lost),
            ]
        )
    return account.page(overview, rows, order.size - shown.size, sentences(overview))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
