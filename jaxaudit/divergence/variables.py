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
