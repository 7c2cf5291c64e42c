"""The variables of a model's overview: names, dimensions, units and meanings."""

from jaxaudit.results import NOT_AUDITED, Field
from jaxaudit.sources.model_folder import file_name

_EACH = ("parameter",)
_PER_STAGE = ("parameter", "stage")
_PER_STEP = ("parameter", "run_timestep")

_ABSENT = f"{NOT_AUDITED} where it was not audited"
_COUNTED = "under the arithmetic of the variable `arithmetic`"
_NO_STEP = (
    f"{NOT_AUDITED} at timesteps that did not step the parameter, and where it was not audited"
)


def _count(long_name: str, comment: str = _ABSENT) -> Field:
    return Field(_EACH, "int64", "1", long_name, comment)


def _text(long_name: str, comment: str = "") -> Field:
    return Field(_EACH, "str", "1", long_name, comment)


def _share(long_name: str, comment: str) -> Field:
    return Field(_EACH, "float64", "1", long_name, comment)


#: Group of the file that holds those of the parameters.
PARAMETERS = "parameters"


def group_path(name: str) -> str:
    """Return the group of a parameter's audit: its name is encoded as that of its file.

    NetCDF wants a letter, a digit or an underscore first: a leading "-" is encoded too, and "_" put before a "%".
    """
    text = file_name(name)
    text = "%2D" + text[1:] if text.startswith("-") else text
    return f"{PARAMETERS}/{'_' * text.startswith('%')}{text}"


#: The root of a model's file. Sums are over the audited timesteps and all rows.
OVERVIEW = {
    "group_path": _text("group of the parameter's audit in this file", "empty: it has none"),
    "optimizer_group": _count("group of the optimizer, from 0", ""),
    "shape": _text("shape of the whole parameter"),
    "storage_format": _text("format in which the weights are stored"),
    "element_count": _count("recorded elements per timestep", ""),
    "token_count": _count("recorded rows of the first axis", ""),
    "timestep_count": _count("audited steps of the parameter", ""),
    "skipped_count": _count("timesteps of the whole recording that did not step the parameter", ""),
    "arithmetic": _text(
        "arithmetic that is counted by",
        "the first that replays exactly, else the one with the fewest mismatches",
    ),
    "identified_arithmetic": _text(
        "arithmetics under which every audited stage came out without a mismatch",
        "separated by commas, best first; empty: none",
    ),
    "identified_by": _text(
        "what the arithmetic was found by",
        "group: it was identified on another parameter of the same optimizer group, tried first, and replays this one; "
        "parameter: on this one alone; request: it was asked for by name",
    ),
    "replays_exactly": Field(_EACH, "int8", "1", "1 where an arithmetic replays it bit for bit"),
    "mismatch_total": Field(
        _PER_STAGE,
        "int64",
        "1",
        "elements whose replayed bits differ, summed over timesteps",
        f"{_COUNTED}; {NOT_AUDITED} where the stage was not audited",
    ),
    "audited": Field(
        _PER_STAGE, "int8", "1", "1 where the recording holds what the stage needs", _COUNTED
    ),
    "first_mismatch_timestep": _count(
        "first timestep of the run with a mismatch", f"{_COUNTED}; 0 where there is none; {_ABSENT}"
    ),
    "nonfinite_total": _count("recorded values that are infinite or NaN"),
    "wanted_total": _count("updates that were not zero before rounding; see updates.wanted_count"),
    "lost_total": _count("of these, updates that left their weight as it was"),
    "lost_share": _share("share of the updates that were lost", "NaN where none was wanted"),
    "exp_avg_sq_fall_total": _count(
        "times that an element's second moment should have fallen; see moments.exp_avg_sq_fall_count"
    ),
    "exp_avg_sq_stuck_total": _count("of these, times that the stored one did not"),
    "exp_avg_sq_stuck_share": _share(
        "share of the times that the second moment was stuck",
        "NaN where it never should have fallen",
    ),
    "frozen_token_count": _count("rows that do not move after the last step but one, or never did"),
    "ledger_exact": Field(
        _EACH,
        "int8",
        "1",
        "1 where the arithmetic that the updates are counted under replays exactly",
        _ABSENT,
    ),
    "rank_by_mismatches": _count(
        "rank by mismatches, 1 for the most",
        "by the sum of mismatch_total over stages; equals in the model's order, what was not audited last",
    ),
    "rank_by_lost_share": _count(
        "rank by the share of lost updates, 1 for the largest",
        "equals in the model's order, what has no share last",
    ),
    "mismatch_count": Field(
        _PER_STEP,
        "int64",
        "1",
        "elements whose replayed bits differ, summed over the audited stages",
        f"{_COUNTED}; {_NO_STEP}",
    ),
    "wanted_count": Field(
        _PER_STEP, "int64", "1", "updates that were not zero before rounding", _NO_STEP
    ),
    "lost_count": Field(
        _PER_STEP, "int64", "1", "of these, updates that left their weight as it was", _NO_STEP
    ),
    "norm_observed": Field(
        _PER_STEP,
        "float64",
        "1",
        "L2 norm of the recorded weight change",
        "NaN at timesteps that did not step the parameter",
    ),
}
