"""The variables of the ledger's groups: names, dimensions, units and meanings."""

from jaxaudit.results import NOT_AUDITED, Field

_PER_STEP = ("timestep", "token_group")
_PER_QUANTILE = (*_PER_STEP, "quantile")
_PER_REMEDY = ("remedy", *_PER_STEP)
_PER_NORM = ("measure", "norm", *_PER_STEP)
_PER_TRACE = ("timestep", "traced_token")


def _count(long_name: str, comment: str = "") -> Field:
    return Field(_PER_STEP, "int64", "1", long_name, comment)


def _number(long_name: str, comment: str = "") -> Field:
    return Field(_PER_STEP, "float64", "1", long_name, comment)


#: Regimes of a token, from hot to cold.
REGIMES = ("early", "midlife", "late", "frozen")

#: Measures and norms of a token's displacement.
MEASURES, NORMS = ("ulp", "line"), ("l1", "l2", "linf")

_DECAY = (
    "decoupled: of the weight, as if decay alone acted; L2: of the gradient that it is added to"
)
_ROOT = "quantiles of sqrt(exp_avg_sq) as stored over that of a float32 second moment"

#: Group `updates`: what each step wanted and what became of it.
UPDATES = {
    "wanted_count": _count(
        "elements whose exact update is not zero",
        "the arithmetic's own formula in float64 before any rounding, from the recorded state and gradient",
    ),
    "lost_count": _count("of these, elements whose stored weight did not change"),
    "one_ulp_count": _count("of these, elements whose stored weight moved by one ulp"),
    "more_ulp_count": _count("of these, elements whose stored weight moved by more than one ulp"),
    "against_count": _count(
        "of these, elements whose stored weight moved against the exact update"
    ),
    "unwanted_count": _count("elements that moved although their exact update is zero"),
    "undefined_count": _count("elements whose exact update is infinite or NaN"),
    "decay_wanted_count": _count("elements that weight decay should change", _DECAY),
    "decay_lost_count": _count("of these, elements that weight decay leaves as they are", _DECAY),
    "decay_one_ulp_count": _count("of these, elements that weight decay moves by one ulp", _DECAY),
    "decay_more_ulp_count": _count("of these, elements that it moves by more than one ulp", _DECAY),
    "decay_against_count": _count("of these, elements that it moves the other way", _DECAY),
    "wanted_sum": _number("sum of the exact updates"),
    "realised_sum": _number("sum of the recorded changes"),
    "wanted_absolute_sum": _number("sum of the sizes of the exact updates"),
    "realised_absolute_sum": _number("sum of the sizes of the recorded changes"),
    "wanted_norm": _number("L2 norm of the exact updates"),
    "realised_norm": _number("L2 norm of the recorded changes"),
    "inner_product": _number("inner product of exact updates and recorded changes"),
    "descent_quality": _number(
        "share of the exact step that the recorded one took",
        "inner product over squared norm of the exact updates; NaN where that is zero",
    ),
    "signed_bias": _number("mean of recorded change minus exact update"),
    "margin_quantile": Field(
        _PER_QUANTILE,
        "float64",
        "1",
        "visibility margin: log2 of exact update over half an ulp",
        "half the distance to the weight's neighbour in the direction of the update; below 0 rounding to nearest "
        "leaves the weight as it is. Lower edges of bins, 32 to a binade",
    ),
    "margin_histogram": Field(
        (*_PER_STEP, "margin"), "int64", "1", "elements by visibility margin"
    ),
}

_FALL = "the exact new value, from the stored old one, is smaller in size"

#: Group `moments`: the ratchet of the second moment, and its consequences.
MOMENTS = {
    "exp_avg_sq_fall_count": _count("elements whose second moment should fall", _FALL),
    "exp_avg_sq_stuck_count": _count("of these, elements whose stored second moment did not fall"),
    "exp_avg_sq_stuck_steps_max": _count("steps in a row that this happened, at most"),
    "exp_avg_sq_stuck_steps_mean": _number(
        "steps in a row that this happened, mean of the elements to which it did"
    ),
    "exp_avg_fall_count": _count("elements whose first moment should fall in size", _FALL),
    "exp_avg_stuck_count": _count("of these, elements whose stored first moment did not"),
    "exp_avg_stuck_steps_max": _count("steps in a row that this happened, at most"),
    "exp_avg_stuck_steps_mean": _number(
        "steps in a row that this happened, mean of the elements to which it did"
    ),
    "root_ratio_count": _count(
        "elements of which both second moments are positive",
        "the stored one, and one accumulated in float32 from the recorded gradients",
    ),
    "root_ratio_quantile": Field(
        _PER_QUANTILE,
        "float64",
        "1",
        _ROOT,
        "lower edges of bins: less than 1/64 below the quantile",
    ),
    "step_size_ratio_quantile": Field(
        _PER_QUANTILE,
        "float64",
        "1",
        "quantiles of the effective step size over that with a float32 second moment",
        "lr / (sqrt(v / (1 - beta2^t)) + eps), of the same elements; lower edges of bins: less than 1/32 below the "
        "quantile",
    ),
    "exp_avg_sq_underflow_count": _count(
        "elements whose stored second moment is zero, but not the exact one"
    ),
    "exp_avg_underflow_count": _count(
        "elements whose stored first moment is zero, but not the exact one"
    ),
    "epsilon_dominates_count": _count(
        "elements whose corrected root of the stored second moment is smaller than eps"
    ),
    "exp_avg_low_bits_zero_count": _count(
        "float32 values of the first moment whose low 16 bits are zero",
        f"{NOT_AUDITED} where it was not recorded as float32",
    ),
    "exp_avg_sq_low_bits_zero_count": _count(
        "float32 values of the second moment whose low 16 bits are zero",
        f"{NOT_AUDITED} where it was not recorded as float32",
    ),
    "stored_root": Field(_PER_TRACE, "float64", "1", "root of the token's mean stored exp_avg_sq"),
    "float32_root": Field(
        _PER_TRACE, "float64", "1", "root of the token's mean exp_avg_sq accumulated in float32"
    ),
    "traced_group": Field(("traced_token",), "str", "1", "group that the token was chosen from"),
}

_LAST = "0 where it never was"

#: Group `lattice`: how far tokens move on the lattice of the format's numbers.
LATTICE = {
    "displacement_mean": Field(
        _PER_NORM, "float64", "ulp", "displacement of a token in a step, mean over tokens"
    ),
    "displacement_max": Field(
        _PER_NORM, "float64", "ulp", "displacement of a token in a step, largest"
    ),
    "signed_displacement": Field(
        ("measure", *_PER_STEP), "float64", "ulp", "sum of the signed displacements of all elements"
    ),
    "edge_crossing_count": _count(
        "elements that crossed a binade edge or zero in the step",
        "their displacements in ulp and on the line differ in size",
    ),
    "regime_count": Field(
        ("regime", *_PER_STEP),
        "int64",
        "1",
        "tokens by regime of the step",
        "of the displacement in ulp over the D elements of a token: frozen L1 = 0; early L2 > sqrt(D); midlife "
        "Linf > 1; late the rest",
    ),
    "settled_regime_count": Field(
        ("regime", *_PER_STEP),
        "int64",
        "1",
        "tokens by regime that they have not left for good",
        "a token stays early up to its last early step, midlife up to its last step with Linf > 1, late up to its "
        "last move, and is frozen from then on",
    ),
    "displacement": Field(
        ("measure", "norm", "timestep", "token"),
        "float64",
        "ulp",
        "displacement of each token in each step",
    ),
}

#: Group `tokens`: the life of every token.
TOKENS = {
    "in_group": Field(("token", "token_group"), "int8", "1", "1 where the token is in the group"),
    "last_early": Field(("token",), "int64", "1", "last timestep with L2 > sqrt(D)", _LAST),
    "last_midlife": Field(("token",), "int64", "1", "last timestep with Linf > 1", _LAST),
    "freeze_onset": Field(
        ("token",),
        "int64",
        "1",
        "timestep after which it never moves",
        "0 where it never moved, -1 where it moved in the last step",
    ),
    "thaw_count": Field(
        ("token",), "int64", "1", "times that it moved after a step without a move"
    ),
    "weight_path": Field(("token",), "float64", "1", "sum of the L2 norms of its changes"),
    "weight_displacement": Field(
        ("token",), "float64", "1", "L2 norm of its last minus its first weights"
    ),
    "lattice_path": Field(
        ("token",), "int64", "ulp", "steps on the ordered line, summed over elements and timesteps"
    ),
    "lattice_displacement": Field(
        ("token",), "int64", "ulp", "steps on the ordered line between its first and last weights"
    ),
    "norm_at_start": Field(("token",), "float64", "1", "L2 norm before the first step"),
    "norm_at_end": Field(("token",), "float64", "1", "L2 norm after the last step"),
    "cluster": Field(
        ("token",),
        "int64",
        "1",
        "number of the set of tokens with the same bits at the end",
        "in the order of the first token of each; a token that is like no other has a number of its own",
    ),
    "distinct_row_count": _count("different rows"),
    "cluster_count": _count("sets of at least two tokens with the same bits"),
    "clustered_token_count": _count("tokens whose bits some other token has too"),
}

_FREE = "left to itself from the start over the recorded gradients"

#: Group `counterfactual`: the recorded gradients under other arithmetics.
COUNTERFACTUAL = {
    "landed_count": Field(
        _PER_REMEDY,
        "float64",
        "1",
        "weights that one step from the recorded weights would have changed",
        "from the recorded moments where the remedy keeps these, else from its own, accumulated from the recorded "
        "gradients; an expected number with the expectation of stochastic rounding",
    ),
    "recovered_count": Field(
        _PER_REMEDY,
        "float64",
        "1",
        "of the recorded lost updates, those that would have changed their weight",
        "as landed_count; lost updates: see updates.lost_count",
    ),
    "free_landed_count": Field(
        _PER_REMEDY, "int64", "1", f"weights that changed in the step, {_FREE}"
    ),
    "free_distance": Field(
        _PER_REMEDY,
        "float64",
        "1",
        f"L2 distance of the weights from those of float32-master, {_FREE}",
    ),
    "free_moving_tokens": Field(
        _PER_REMEDY, "int64", "1", f"tokens of which a weight changed in the step, {_FREE}"
    ),
    "last_move": Field(
        ("remedy", "token"), "int64", "1", f"last timestep at which the token moved, {_FREE}", _LAST
    ),
}
