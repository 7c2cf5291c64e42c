"""A model's overview in words: what replays, what was lost where; and the same as plain numbers."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.ledger.verdict import Sentence, percent, short
from jaxaudit.models.overview import worst_first
from jaxaudit.results import NOT_AUDITED
from jaxaudit.safetensors_file import printable
from jaxaudit.summary import as_table

#: Lines of parameters in the text, and parameters named in a sentence.
LINES, _NAMED = 40, 3

_NAME = 48  # characters of a parameter's name


def sentences(overview: xr.Dataset) -> list[Sentence]:
    """Say in two to five sentences which arithmetics replay the model and where updates were lost.

    A sentence is there only where the recording supports it.
    """
    said = (_replayed, _different, _lost, _stuck, _left_out)
    return [found for say in said if (found := say(overview)) is not None]


def summarize(overview: xr.Dataset) -> dict[str, Any]:
    """Return the overview as values that JSON can hold, parameters in the model's order."""
    told = [str(name) for name, field in overview.data_vars.items() if field.dims == ("parameter",)]
    rows: dict[str, Any] = {}
    for k, name in enumerate(overview.parameter.values.tolist()):
        one = overview.isel(parameter=k)
        row = {variable: _plain(variable, one[variable].values.item()) for variable in told}
        row["identified_arithmetic"] = [x for x in row["identified_arithmetic"].split(",") if x]
        row["mismatch_total"] = {
            str(stage): int(count) if audited else None
            for stage, count, audited in zip(
                overview.stage.values, one.mismatch_total.values, one.audited.values, strict=True
            )
        }
        rows[name] = row
    return {
        "source": overview.attrs["source"],
        "source_finished": bool(overview.attrs["source_finished"]),
        "timesteps": [int(overview.run_timestep[0]), int(overview.run_timestep[-1])],
        "recorded_timestep_count": overview.sizes["run_timestep"],
        "backend": overview.attrs["backend"],
        "device": overview.attrs["device"],
        "parameters": rows,
        "worst_first": [str(overview.parameter.values[k]) for k in worst_first(overview)],
        "verdict": json.loads(overview.attrs["verdict"]),
    }


def describe(overview: xr.Dataset) -> str:
    """Say in plain text what was read, a line for each of the worst parameters, and the verdict."""
    first, last = int(overview.run_timestep[0]), int(overview.run_timestep[-1])
    count, of = overview.sizes["parameter"], overview.attrs["parameter_count_of_recording"]
    which = f"{count:,}" if count == of else f"{count:,} of {of:,}"
    unfinished = "" if overview.attrs["source_finished"] else ", not finished"
    groups = len(np.unique(overview.optimizer_group.values))
    lines = [
        f"Model       {printable(overview.attrs['source'])}: timesteps {first:,} to {last:,}{unfinished}",
        f"Parameters  {which} in {groups} optimizer group{'s' * (groups != 1)}, "
        f"{int(overview.element_count.sum()):,} elements per timestep",
        f"Backend     {overview.attrs['backend']} ({overview.attrs['device']}), jax {overview.attrs['jax_version']}",
        "",
        *_parameter_table(overview),
        *_own_line(overview),
        "",
        *(each["sentence"] for each in json.loads(overview.attrs["verdict"])),
    ]
    return "\n".join(lines)


def _parameter_table(overview: xr.Dataset) -> list[str]:
    order = worst_first(overview)
    # One line more would say less than the parameter itself.
    shown = order if order.size <= LINES else order[: LINES - 1]
    head = ["parameter, the worst first", "group", "shape", "replayed as", *_stages(overview)]
    rows = [[*head, "lost updates", "exp_avg_sq stuck"], *(_line(overview, k) for k in shown)]
    lines = as_table(rows)
    return lines if order.size <= LINES else [*lines, rest(overview, order[shown.size :])]


def _own_line(overview: xr.Dataset) -> list[str]:
    """Name the parameters that the arithmetic of their optimizer group does not replay."""
    by, group = overview.identified_by.values, overview.optimizer_group.values
    shared = {*group[by == "group"].tolist()}
    own = [
        str(name)
        for name, how, where in zip(overview.parameter.values, by, group, strict=True)
        if how == "parameter" and int(where) in shared
    ]
    if not own:
        return []
    return [
        f"Identified on {'its' if len(own) == 1 else 'their'} own, not with the group: {in_words(own)}"
    ]


def _stages(overview: xr.Dataset) -> list[str]:
    return [f"{stage} differs" for stage in overview.stage.values]


def _line(overview: xr.Dataset, k: int) -> list[str]:
    one = overview.isel(parameter=k)
    counts = zip(one.mismatch_total.values, one.audited.values, strict=True)
    name = str(one.arithmetic.values)
    shares = (one.lost_share, one.exp_avg_sq_stuck_share)
    return [
        short(str(one.parameter.values), _NAME),
        str(int(one.optimizer_group)),
        str(one["shape"].values),
        name if name or not int(one.timestep_count) == 0 else "no step",
        *(f"{int(count):,}" if audited else "not audited" for count, audited in counts),
        *("-" if math.isnan(float(s)) else _share(float(s)) for s in shares),
    ]


def rest(overview: xr.Dataset, numbers: NDArray[np.int64]) -> str:
    """Sum up in a line the parameters that have none of their own."""
    others = overview.isel(parameter=numbers)
    wrong = int(np.maximum(others.mismatch_total.values, 0).sum())
    exact = int(others.replays_exactly.sum())
    wanted, lost = sums(others, "wanted_total", "lost_total")
    tail = f", {percent(lost, wanted)} of the updates lost" if wanted else ""
    return (
        f"and {numbers.size:,} more: {exact:,} replay exactly, {_counted(wrong, 'mismatch', 'mismatches')} "
        f"in all{tail}"
    )


# The sentences.


def _replayed(overview: xr.Dataset) -> Sentence | None:
    audited = overview.isel(parameter=np.flatnonzero(overview.timestep_count.values))
    exact = audited.isel(parameter=np.flatnonzero(audited.replays_exactly.values))
    count, of = exact.sizes["parameter"], audited.sizes["parameter"]
    variables = ("replays_exactly", "identified_arithmetic")
    if not of:
        return None
    if not count:
        which = "The parameter" if of == 1 else f"None of the {of:,} parameters"
        verb = "does not replay" if of == 1 else "replays"
        return Sentence(
            f"{which} {verb} bit for bit under an arithmetic that was tried.", variables
        )
    elements = int((exact.element_count * exact.timestep_count).sum())
    if count == of:
        which = "The one parameter replays" if of == 1 else f"All {of:,} parameters replay"
    else:
        which = f"{count:,} of {of:,} parameters replay{'s' * (count == 1)}"
    stages = _stage_clause(exact)
    return Sentence(
        f"{which} bit for bit under {_arithmetics(exact)} ({_counted(elements, 'update', 'updates')}"
        f"{stages}).",
        variables,
    )


def _stage_clause(exact: xr.Dataset) -> str:
    lacking = [
        f"{stage} in {int((one == 0).sum()):,}"
        for stage, one in zip(exact.stage.values, exact.audited.values.T, strict=True)
        if not one.all()
    ]
    return f"; not audited: {', '.join(lacking)}" if lacking else ""


def _arithmetics(exact: xr.Dataset) -> str:
    """Name the arithmetics that all have in common, else how many replay under which first."""
    found = [str(names).split(",") for names in exact.identified_arithmetic.values]
    common = [name for name in found[0] if all(name in names for names in found)]
    if common:
        tail = ", which they do not tell apart" if len(common) > 1 else ""
        return ", ".join(common) + tail
    counts = Counter(names[0] for names in found)
    return ", ".join(f"{name} ({count:,})" for name, count in counts.most_common())


def _different(overview: xr.Dataset) -> Sentence | None:
    totals = np.maximum(overview.mismatch_total.values, 0).sum(axis=1)
    wrong = [int(k) for k in worst_first(overview) if totals[k]]
    if not wrong:
        return None
    first = overview.first_mismatch_timestep.values
    named = [
        f"{_name(overview, k)} ({_counted(int(totals[k]), 'mismatch', 'mismatches')} under "
        f"{overview.arithmetic.values[k]}, the first at timestep {int(first[k]):,})"
        for k in wrong[:_NAMED]
    ]
    start = "One parameter does" if len(wrong) == 1 else f"{len(wrong):,} parameters do"
    which = "" if len(wrong) <= _NAMED else "with most mismatches "
    return Sentence(
        f"{start} not replay bit for bit{': ' if not which else ', ' + which + 'in '}{', '.join(named)}.",
        ("mismatch_total", "arithmetic", "first_mismatch_timestep"),
    )


def _lost(overview: xr.Dataset) -> Sentence | None:
    wanted, lost = sums(overview, "wanted_total", "lost_total")
    if not wanted:
        return None
    names = ("wanted_total", "lost_total", "lost_share")
    if not lost:
        return Sentence(
            f"None of {_counted(wanted, 'update', 'updates')} was lost to rounding.", names
        )
    start = f"{lost:,} of {_counted(wanted, 'update', 'updates')} ({percent(lost, wanted)}) left their weight as it was"
    return Sentence(start + _most(overview, "rank_by_lost_share", "lost") + ".", names)


def _stuck(overview: xr.Dataset) -> Sentence | None:
    should, stuck = sums(overview, "exp_avg_sq_fall_total", "exp_avg_sq_stuck_total")
    if not should:
        return None
    names = ("exp_avg_sq_fall_total", "exp_avg_sq_stuck_total", "exp_avg_sq_stuck_share")
    cases = _counted(should, "case", "cases")
    if not stuck:
        return Sentence(f"The second moment fell in all {cases} in which it should have.", names)
    most = _most(overview, None, "exp_avg_sq_stuck")
    return Sentence(
        f"The second moment should have fallen in {cases} and did not in {stuck:,} of them "
        f"({percent(stuck, should)}){most}.",
        names,
    )


def _most(overview: xr.Dataset, rank: str | None, which: str) -> str:
    """Name the parameters with the largest shares, where there are several and they differ."""
    shares = overview[f"{which}_share"].values
    known = np.flatnonzero(np.isfinite(shares))
    if known.size < 2 or np.unique(shares[known]).size < 2:
        return ""
    ranks = overview[rank].values[known] if rank else -shares[known]
    order = [int(k) for k in known[np.argsort(ranks, kind="stable")] if shares[k] > 0][:_NAMED]
    named = ", ".join(f"{_name(overview, k)} ({_share(float(shares[k]))})" for k in order)
    return f"; the largest share{'s are those' if len(order) > 1 else ' is that'} of {named}"


def _left_out(overview: xr.Dataset) -> Sentence | None:
    """Say which parameters were not stepped, and whether the run was cut off."""
    idle = np.flatnonzero(overview.timestep_count.values == 0)
    last, unfinished = int(overview.run_timestep[-1]), not overview.attrs["source_finished"]
    told = []
    recorded, of = overview.sizes["run_timestep"], _timesteps_within(overview)
    if recorded < of:
        told.append(
            f"{recorded:,} of the {of:,} timesteps were recorded, each with the state before it, and audited; what runs "
            "on from step to step is not told"
        )
    if unfinished:
        told.append(f"The recording was not finished; it was read up to timestep {last:,}")
    if idle.size:
        named = ", ".join(_name(overview, int(k)) for k in idle[:_NAMED])
        more = f" and {idle.size - _NAMED:,} more" if idle.size > _NAMED else ""
        verb = "was" if idle.size == 1 else "were"
        told.append(f"{named}{more} {verb} not stepped, and not audited")
    return Sentence("; ".join(told) + ".", ("timestep_count", "skipped_count")) if told else None


def _timesteps_within(overview: xr.Dataset) -> int:
    """Count the timesteps of the run from the first to the last that were audited."""
    return int(overview.run_timestep[-1]) - int(overview.run_timestep[0]) + 1


def sums(overview: xr.Dataset, whole: str, part: str) -> tuple[int, int]:
    """Sum two counts over the parameters that have both."""
    counts, parts = overview[whole].values, overview[part].values
    known = (counts >= 0) & (parts >= 0)
    return int(counts[known].sum()), int(parts[known].sum())


def _name(overview: xr.Dataset, k: int) -> str:
    return short(str(overview.parameter.values[k]), _NAME)


def _share(share: float) -> str:
    return percent(share, 1.0)


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _plain(variable: str, value: Any) -> Any:
    """Return a value that JSON can hold: None for what there is not, and for what was not counted."""
    uncounted = variable.endswith("_total") and value == NOT_AUDITED
    return None if uncounted or (isinstance(value, float) and not math.isfinite(value)) else value


def in_words(numbers: Sequence[str], most: int = _NAMED) -> str:
    """List names, shortened."""
    named = ", ".join(short(name, _NAME) for name in numbers[:most])
    return named + (f" and {len(numbers) - most:,} more" if len(numbers) > most else "")
