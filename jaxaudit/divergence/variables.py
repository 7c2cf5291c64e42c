"""The variables of a comparison of two runs: names, dimensions, units and meanings."""

from jaxaudit.results import NOT_AUDITED, Field

#: Both runs, as the dimension `run` names them.
RUNS = ("a", "b")

#: Fields of `first_difference`, in order.
DIFFERENCE_FIELDS = ("timestep", "token", "position", "bits_a", "bits_b")

#: In a table of timesteps: never.
NEVER = NOT_AUDITED

_PER_TENSOR = ("tensor", "timestep", "token_group")
_PER_RUN = ("run", "timestep", "token_group")
_ULP = "steps on the ordered integer line of `ulp_format`, to which a value of another format is rounded"
_VALUES = "of the exact values, in float64; an element that does not differ is at distance 0"


def _count(long_name: str, comment: str = "") -> Field:
    return Field(_PER_TENSOR, "int64", "1", long_name, comment)


def _number(long_name: str, units: str = "1", comment: str = "") -> Field:
    return Field(_PER_TENSOR, "float64", units, long_name, comment)


VARIABLES = {
    "element_count": Field(("token_group",), "int64", "1", "elements per timestep"),
    "differing_count": _count(
        "elements that differ",
        "in their bits, or, where both are stored in different formats, in the bits of their float32 values; +0 and "
        "-0 differ, all NaNs are alike",
    ),
    "rounded_differing_count": _count(
        "elements that differ after rounding to `ulp_format`", "to nearest, ties to even"
    ),
    "differing_token_count": _count("tokens of which an element differs"),
    "max_ulp_distance": Field(_PER_TENSOR, "int64", "ulp", "largest distance in ulp", _ULP),
    "ulp_distance_sum": _number("sum of the distances in ulp", "ulp", _ULP),
    "ulp_distance_norm": _number("L2 norm of the distances in ulp", "ulp", _ULP),
    "ulp_histogram": Field(
        (*_PER_TENSOR, "ulp_bin"), "int64", "1", "elements by their distance in ulp", _ULP
    ),
    "norm": Field(("tensor", *_PER_RUN), "float64", "1", "L2 norm"),
    "distance": _number("L2 distance", comment=_VALUES),
    "max_distance": _number("largest distance of an element (Linf)", comment=_VALUES),
    "displacement_norm": Field(
        _PER_RUN, "float64", "1", "L2 norm of the weights' displacement since the common start"
    ),
    "displacement_cosine": Field(
        ("timestep", "token_group"),
        "float64",
        "1",
        "cosine of the displacements of both",
        "each since its own weights at the common start; NaN where either is zero",
    ),
    "differing_count_at_start": Field(
        ("tensor", "token_group"),
        "int64",
        "1",
        "elements that differ before the first timestep",
        f"{NOT_AUDITED} for gradients, of which there are none",
    ),
    "rounded_differing_count_at_start": Field(
        ("tensor", "token_group"),
        "int64",
        "1",
        "elements that differ before the first timestep after rounding to `ulp_format`",
        f"{NOT_AUDITED} for gradients, of which there are none",
    ),
    "distance_at_start": Field(
        ("tensor", "token_group"), "float64", "1", "L2 distance before the first timestep"
    ),
    "first_difference": Field(
        ("tensor", "divergence_field"),
        "int64",
        "1",
        "first element that differs",
        "lowest timestep, then token, then position within the token's row (C order); bits are those of either "
        f"storage format; {NEVER} where nothing differs; the timestep before the first one is the state at the start",
    ),
    "first_divergence": Field(
        ("tensor", "token"),
        "int64",
        "1",
        "first timestep at which an element of the token differs",
        f"{NEVER} where none ever does; the timestep before the first one is the state at the start",
    ),
    "in_group": Field(("token", "token_group"), "int8", "1", "1 where the token is in the group"),
    "storage_format": Field(("tensor", "run"), "str", "1", "format in which the tensor is stored"),
    "ulp_format": Field(
        ("tensor",),
        "str",
        "1",
        "format in whose ulp distances are",
        "the coarser of both; tensors that were widened to float32 only to be stored count as what they were",
    ),
    "loss": Field(("run", "timestep"), "float64", "1", "training loss", "NaN where not recorded"),
    "learning_rate": Field(
        ("run", "timestep"), "float64", "1", "learning rate", "NaN where not recorded"
    ),
}

_PARAMETER = ("parameter",)
_COURSE = ("parameter", "compared_timestep")
_NOT_COMPARED = f"{NOT_AUDITED} where it is not compared"
_WEIGHTS = "of the weights"


def _of_each(long_name: str, comment: str = "", dtype: str = "int64") -> Field:
    return Field(_PARAMETER, dtype, "1", long_name, comment)


#: A comparison of two models: the root of its file. Timesteps are those of each parameter's own step count.
MODEL_VARIABLES = {
    "group_path": _of_each("group of the parameter's comparison in this file", "empty: it has none", "str"),
    "shape": _of_each("shape of the whole parameter", "in a", "str"),
    "reason": _of_each("why the parameter is not compared", "empty: it is", "str"),
    "is_identical": _of_each(
        "1 where everything that both hold of it is the same to the bit", _NOT_COMPARED, "int8"
    ),
    "element_count": _of_each("elements compared per timestep"),
    "token_count": _of_each("rows compared"),
    "timestep_count": _of_each("timesteps compared", "0 for a parameter that neither model ever stepped"),
    "first_tensor": _of_each(
        "tensor that differs first", "in the order in which a step computes them; empty: none ever does", "str"
    ),
    "first_difference": Field(
        ("parameter", "divergence_field"), "int64", "1", "first element of that tensor that differs",
        "as first_difference in the parameter's group",
    ),
    "first_differing_timestep": Field(
        ("parameter", "compared_tensor"), "int64", "1", "first timestep at which an element differs",
        f"{NEVER} where none ever does; the timestep before the first one is the state at the start",
    ),
    "held": Field(("parameter", "compared_tensor"), "int8", "1", "1 where both hold the tensor, and it is compared"),
    "differing_total": Field(
        ("parameter", "compared_tensor"), "int64", "1", "elements that differ, summed over timesteps", _NOT_COMPARED
    ),
    "differing_count_at_start": _of_each("elements of the weights that differ before the first timestep", _NOT_COMPARED),
    "differing_count": Field(_COURSE, "int64", "1", f"elements that differ, {_WEIGHTS}", _NOT_COMPARED),
    "max_ulp_distance": Field(_COURSE, "int64", "ulp", f"largest distance in ulp, {_WEIGHTS}", _NOT_COMPARED),
    "distance": Field(_COURSE, "float64", "1", f"L2 distance, {_WEIGHTS}", "NaN where they are not compared"),
    "displacement_norm": Field(
        ("run", *_COURSE), "float64", "1", "L2 norm of the weights' displacement since the common start",
        "NaN where they are not compared",
    ),
    "relative_distance": Field(
        _COURSE, "float64", "1", "L2 distance of the weights over the displacement of a",
        "NaN where they are not compared, or a has not moved",
    ),
    "distance_growth": Field(
        _PARAMETER, "float64", "1", "L2 distance of the weights at the last timestep over the first one that is not 0",
        "NaN where they are never apart",
    ),
    "compared_element_count": Field(("compared_timestep",), "int64", "1", "elements of all parameters that are compared"),
    "total_differing_count": Field(("compared_timestep",), "int64", "1", "elements of all weights that differ"),
    "total_distance": Field(("compared_timestep",), "float64", "1", "L2 distance of all weights"),
    "total_displacement_norm": Field(
        ("run", "compared_timestep"), "float64", "1", "L2 norm of the displacement of all weights since the common start"
    ),
    "rank_by_distance": _of_each(
        "rank by the relative distance at the end, 1 for the largest",
        "then by elements that ever differ; equals in the order of a",
    ),
    "rank_by_first_difference": _of_each(
        "rank by the first difference, 1 for the first",
        "by timestep, then by the order of tensors in a step, then in the order of a; what never differs last",
    ),
}  # fmt: skip

_PER_VARIABLE = ("variable",)

#: A comparison of two results.
AUDIT_VARIABLES = {
    "held": Field(("variable", "run"), "int8", "1", "1 where the file holds the variable"),
    "entry_count": Field(
        _PER_VARIABLE,
        "int64",
        "1",
        "entries compared",
        "those whose labels both files have; 0 where only one holds the variable, or in another layout",
    ),
    "differing_entry_count": Field(
        _PER_VARIABLE,
        "int64",
        "1",
        "entries that differ",
        "in their bits, all NaNs being alike; of another dtype, in value; "
        f"{NOT_AUDITED} where the dimensions are others",
    ),
    "max_difference": Field(
        _PER_VARIABLE,
        "float64",
        "1",
        "largest absolute difference",
        "in the variable's own units; NaN where it holds names, or a NaN stands against a number",
    ),
    "first_differing_timestep": Field(
        _PER_VARIABLE,
        "int64",
        "1",
        "first timestep with an entry that differs",
        f"{NEVER} where none does, or where there are no timesteps",
    ),
    "identified_arithmetic": Field(
        ("run",), "str", "1", "arithmetics that replay the recording bit for bit, best first"
    ),
    "mismatch_total": Field(
        ("run", "arithmetic", "stage"),
        "int64",
        "1",
        "elements of all timesteps whose replayed bits differ from the recorded ones",
        f"{NOT_AUDITED} where not audited, or where the arithmetic was not replayed",
    ),
    "wanted_count": Field(_PER_RUN, "int64", "1", "elements whose exact update is not zero"),
    "lost_count": Field(_PER_RUN, "int64", "1", "of these, elements whose weight did not change"),
    "norm_observed": Field(_PER_RUN, "float64", "1", "L2 norm of the recorded weight change"),
}

_PER_RUN_OF_EACH = ("run", "parameter")

#: A comparison of two audits of models: the root of its file.
MODEL_AUDIT_VARIABLES = {
    "group_path": _of_each("group of the parameter's comparison in this file", "empty: it has none", "str"),
    "is_identical": _of_each(
        "1 where every variable that both hold of it is identical", f"{NOT_AUDITED} where one has no audit of it", "int8"
    ),
    "variable_count": _of_each("variables that both hold"),
    "differing_variable_count": _of_each("of these, variables that differ"),
    "largest_differing_variable": _of_each(
        "variable of which the largest share of entries differs", "empty: none does", "str"
    ),
    "first_differing_timestep": _of_each(
        "first timestep with an entry that differs", f"{NEVER} where none does"
    ),
    "rank_by_differing_variables": _of_each(
        "rank by the variables that differ, 1 for the most", "then by the first timestep"
    ),
    "arithmetic": Field(_PER_RUN_OF_EACH, "str", "1", "arithmetic that is counted by"),
    "identified_arithmetic": Field(
        _PER_RUN_OF_EACH, "str", "1", "arithmetics that replay the parameter bit for bit, best first"
    ),
    "mismatch_total": Field(
        (*_PER_RUN_OF_EACH, "stage"), "int64", "1", "elements whose replayed bits differ, summed over timesteps",
        f"{NOT_AUDITED} where not audited",
    ),
    "wanted_total": Field(_PER_RUN_OF_EACH, "int64", "1", "updates that were not zero before rounding"),
    "lost_total": Field(_PER_RUN_OF_EACH, "int64", "1", "of these, updates that left their weight as it was"),
    "lost_share": Field(_PER_RUN_OF_EACH, "float64", "1", "share of the updates that were lost"),
}  # fmt: skip
