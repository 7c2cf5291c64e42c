"""The audit of a model on one page of HTML that needs nothing but itself; see `report`."""

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit import report
from jaxaudit.ledger.verdict import percent, short
from jaxaudit.models import account, figures
from jaxaudit.models.overview import worst_first

#: Parameters that have a row of their own on the page.
MOST = 1000

_NAME = 120  # characters of a parameter's name


def html(overview: xr.Dataset, notes: Sequence[str] = ()) -> str:
    """Write the page: verdict, figure, a table of the parameters, the worst first, and provenance.

    Args:
        overview: of a model, as `audit_model` returns it under "".
        notes: sentences that are told below the title.

    Returns:
        A whole HTML document. Every text that came from the recording is escaped; whatever is not printable is a
        question mark.
    """
    told = json.loads(overview.attrs["verdict"])
    drawn = (report.image(name, draw(overview)) for name, draw in figures.FIGURES.items())
    sections = [
        report.verdict_section((each["sentence"], each["variables"]) for each in told),
        report.section("Figures", drawn),
        report.section("Tables", [_groups(overview), *_parameters(overview)]),
        report.provenance(overview),
    ]
    return report.document(str(overview.attrs["title"]), _lead(overview, notes), sections)


def _lead(overview: xr.Dataset, notes: Sequence[str]) -> str:
    """Say in a line how many parameters replay, and in another what was read."""
    audited = overview.timestep_count.values > 0
    exact, of = int(overview.replays_exactly.values.sum()), int(audited.sum())
    count, whole = overview.sizes["parameter"], int(overview.attrs["parameter_count_of_recording"])
    which = f"{count:,} of {whole:,} parameters" if count < whole else f"{count:,} parameters"
    first, last = (int(overview.run_timestep[k]) for k in (0, -1))
    unfinished = "" if overview.attrs["source_finished"] else "; the recording was not finished"
    lines = [
        f"{exact:,} of {of:,} audited parameters replay bit for bit.",
        *notes,
    ]
    facts = (
        f"{which}, {int(overview.element_count.sum()):,} elements per timestep, timesteps {first:,} to {last:,}"
        f"{unfinished}."
    )
    return "\n".join(
        [
            *(f"<p>{report.escaped(line)}</p>" for line in lines),
            f'<p class="note">{report.escaped(facts)}</p>',
        ]
    )


def _groups(overview: xr.Dataset) -> str:
    """Sum up each group of the optimizer."""
    rows = []
    for group in np.unique(overview.optimizer_group.values):
        one = overview.isel(parameter=np.flatnonzero(overview.optimizer_group.values == group))
        mismatches = int(np.maximum(one.mismatch_total.values, 0).sum())
        names = sorted({str(name) for name in one.arithmetic.values if name})
        rows.append(
            [
                str(int(group)),
                f"{one.sizes['parameter']:,}",
                f"{int(one.element_count.sum()):,}",
                short(", ".join(names), _NAME) or "none",
                f"{int(one.replays_exactly.sum()):,}",
                f"{mismatches:,}",
                _part(*account.sums(one, "wanted_total", "lost_total")),
                _part(*account.sums(one, "exp_avg_sq_fall_total", "exp_avg_sq_stuck_total")),
            ]
        )
    header = ["optimizer group", "parameters", "elements", "replayed as", "exactly"]
    header += ["bits differ", "lost updates", "stuck second moments"]
    return report.table("Groups of the optimizer, over all audited timesteps", header, rows)


def _parameters(overview: xr.Dataset) -> Iterator[str]:
    order = worst_first(overview)
    stages = [f"{stage} differs" for stage in overview.stage.values]
    header = ["parameter", "group", "shape", "replayed as", *stages, "first mismatch at timestep"]
    header += ["lost updates", "stuck second moments", "frozen rows", "weights in", "found by"]
    caption = "Parameters, the worst first: by elements whose replayed bits differ, then by the share of lost updates"
    yield report.table(caption, header, _rows(overview, order[:MOST]))
    if order.size > MOST:
        yield f'<p class="note">{report.escaped(account.rest(overview, order[MOST:]))}</p>'


def _rows(overview: xr.Dataset, numbers: NDArray[np.int64]) -> Iterator[list[str]]:
    values = {name: array.values for name, array in overview.data_vars.items()}
    for k in numbers.tolist():
        counts = zip(values["mismatch_total"][k], values["audited"][k], strict=True)
        stepped = values["timestep_count"][k] > 0
        first, frozen = int(values["first_mismatch_timestep"][k]), int(values["frozen_token_count"][k])  # fmt: skip
        yield [
            short(str(overview.parameter.values[k]), _NAME),
            str(int(values["optimizer_group"][k])),
            str(values["shape"][k]),
            str(values["arithmetic"][k]) if stepped else "no step",
            *(f"{int(count):,}" if audited else "not audited" for count, audited in counts),
            f"{first:,}" if first > 0 else "",
            _share(float(values["lost_share"][k])),
            _share(float(values["exp_avg_sq_stuck_share"][k])),
            f"{frozen:,} of {int(values['token_count'][k]):,}" if frozen >= 0 else "",
            str(values["storage_format"][k]),
            str(values["identified_by"][k]),
        ]


def _part(whole: int, part: int) -> str:
    return f"{part:,} ({percent(part, whole)})" if whole else ""


def _share(share: float) -> str:
    return "" if math.isnan(share) else percent(share, 1.0)
