"""What a recording's ledger comes to: three to six plain sentences, each with the variables that it rests on.

A sentence is there only where the recording supports it; see the condition of each. Numbers are those of the
datasets: counts are summed over timesteps, quantiles are lower edges of bins and therefore read "at least".
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.ledger.remedies import MASTER, RECORDED
from jaxaudit.safetensors_file import printable

#: The datasets of an audit's file by the name of their group; the audit's own is "".
Tree = Mapping[str, xr.Dataset]

#: Sentences at most, and how many there should be before those of second rank are left out.
MOST, ENOUGH = 6, 4

#: The expectation of stochastic rounding: no arithmetic that a run could use.
EXPECTED = "stochastic-rounding-expected"

_REMEDIES = {
    RECORDED: "the recorded arithmetic",
    "float32-moments": "float32 moments",
    MASTER: "float32 master weights",
    "stochastic-rounding": "stochastic rounding",
    EXPECTED: "stochastic rounding",
    "kahan": "Kahan summation",
}

_NAME = 28  # characters of a group's name
_NAMED = 4  # remedies in one sentence


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One statement about a recording.

    Attributes:
        text: one plain sentence.
        variables: what it rests on, as `group.variable` of the audit's file.
    """

    text: str
    variables: tuple[str, ...]


def sentences(tree: Tree) -> list[Sentence]:
    """Say what became of the updates, why, and what would have helped.

    Args:
        tree: the datasets of an audit; groups that the recording does not allow are missing.

    Returns:
        Three to six sentences where there are gradients and moments; fewer where the recording shows less.
    """
    told = _told(_FIRST_RANK, tree)
    if len(told) < ENOUGH:
        told += _told(_SECOND_RANK, tree)[: ENOUGH - len(told)]
    return told[:MOST]


def as_json(told: Sequence[Sentence]) -> list[dict[str, Any]]:
    """Return sentences as values that JSON can hold."""
    return [{"sentence": each.text, "variables": list(each.variables)} for each in told]


def lines(told: Sequence[Sentence]) -> list[str]:
    """Return sentences as lines for people."""
    return [each.text for each in told]


# What sentences, figures and tables have in common.


def percent(part: float, whole: float) -> str:
    """Write a share of something: "100 %" only for all of it, "0 %" only for nothing.

    Args:
        part: a number of 0 to `whole`.
        whole: positive.
    """
    if part in (0, whole):
        return "100 %" if part else "0 %"
    share = 100 * part / whole
    if share < 0.01 or share > 99.99:
        return "less than 0.01 %" if share < 50 else "more than 99.99 %"
    digits = 0 if 1 <= share <= 99 else 1 if 0.1 <= share <= 99.9 else 2
    return f"{share:.{digits}f} %"


def number(value: float) -> str:
    """Write a number with three significant digits, or as a whole number where these do not reach."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def remedy_name(name: str) -> str:
    """Return a remedy's name in prose."""
    known = _REMEDIES.get(name)
    return known or (f"beta2 = {name[6:]}" if name.startswith("beta2-") else short(name))


def short(name: str, length: int = _NAME) -> str:
    """Show a name that came from a file: printable, and not too long."""
    text = printable(name)
    return text if len(text) <= length else text[: length - 3] + "..."


def tokens_of(group: str, names: Sequence[str], count: int = 0) -> str:
    """Name the tokens of a group in prose: "dead tokens", "1 token of group rare", "all tokens".

    Args:
        group: the group.
        names: all groups: dead and live are known by these names where both are there.
        count: how many there are, to be named first; 0 for no number.
    """
    first = f"{count:,} " if count else "all " if group == "all" else ""
    noun = "token" if count == 1 else "tokens"
    if group == "all":
        return first + noun
    plain = group in ("dead", "live") and {"dead", "live"} <= set(names)
    return f"{first}{group} {noun}" if plain else f"{first}{noun} of group {short(group)}"


def group_names(dataset: xr.Dataset) -> list[str]:
    """List the token groups of a dataset."""
    return [str(name) for name in dataset.token_group.values]


def shown_groups(dataset: xr.Dataset, most: int, sizes: Mapping[str, int]) -> list[str]:
    """Choose which groups to show: all, dead and live before others, none that is empty.

    Args:
        dataset: any of a ledger.
        most: how many at most.
        sizes: what is in each group.
    """
    names = [name for name in group_names(dataset) if sizes[name]]
    first = [name for name in ("all", "dead", "live") if name in names]
    chosen = (first + [name for name in names if name not in first])[:most]
    return [name for name in names if name in chosen] or ["all"]


def middle(values: NDArray[np.int64]) -> int:
    """Return the median of at least one number: the lower one of two."""
    return int(np.sort(values)[(len(values) - 1) // 2])


def total(dataset: xr.Dataset | None, variable: str, group: str) -> int | None:
    """Sum a count over timesteps; None where it is missing or was not audited."""
    if dataset is None or variable not in dataset:
        return None
    values = dataset[variable].sel(token_group=group).values
    return None if (values < 0).any() else int(values.sum())


def remedy_total(dataset: xr.Dataset, variable: str, remedy: str, group: str) -> float:
    """Sum a number of a remedy over timesteps; NaN where one of them is."""
    return float(dataset[variable].sel(remedy=remedy, token_group=group).values.sum())


def focus(tree: Tree) -> tuple[str, str | None]:
    """Choose the group of tokens to speak of, and the one to compare it with.

    Dead and live tokens where there are both; else the group that lost the largest share of its updates (of whose
    tokens most are frozen, without gradients) and all tokens; else all tokens and nothing.
    """
    shares = _lost_shares(tree) or _frozen_shares(tree)
    if {"dead", "live"} <= shares.keys():
        return "dead", "live"
    others = {name: share for name, share in shares.items() if name != "all"}
    if not others:
        return "all", None
    chosen = max(others, key=lambda name: others[name])
    return chosen, None if _holds_all(tree, chosen) else "all"


def _holds_all(tree: Tree, group: str) -> bool:
    tokens = tree.get("tokens")
    return tokens is not None and bool(tokens.in_group.sel(token_group=group).values.all())


def _lost_shares(tree: Tree) -> dict[str, float]:
    updates, found = tree.get("updates"), {}
    for name in group_names(updates) if updates is not None else []:
        wanted, lost = total(updates, "wanted_count", name), total(updates, "lost_count", name)
        if wanted and lost is not None:
            found[name] = lost / wanted
    return found


def _frozen_shares(tree: Tree) -> dict[str, float]:
    tokens = tree.get("tokens")
    if tokens is None:
        return {}
    onsets = {name: onsets_of(tokens, name) for name in group_names(tokens)}
    return {name: float((found >= 0).mean()) for name, found in onsets.items() if len(found)}


def onsets_of(tokens: xr.Dataset, group: str) -> NDArray[np.int64]:
    """Return `freeze_onset` of a group's tokens."""
    return tokens.freeze_onset.values[tokens.in_group.sel(token_group=group).values == 1]


# The sentences. Each returns None where the recording does not support it.


def _told(rank: Sequence[Callable[[Tree], Sentence | None]], tree: Tree) -> list[Sentence]:
    return [found for say in rank if (found := say(tree)) is not None]


def _second_moment(tree: Tree) -> Sentence | None:
    """Say whether the second moment falls where it should, where it should at all."""
    moments = tree.get("moments")
    should = total(moments, "exp_avg_sq_fall_count", "all")
    stuck = total(moments, "exp_avg_sq_stuck_count", "all")
    if moments is None or not should or stuck is None:
        return None
    names = ("moments.exp_avg_sq_fall_count", "moments.exp_avg_sq_stuck_count")
    if stuck == 0:
        where = "the one case" if should == 1 else f"all {should:,} cases"
        return Sentence(f"The second moment fell in {where} in which it should have.", names)
    if stuck == should:
        text = f"The second moment should have fallen in {_counted(should, 'case')} and never did"
    else:
        text = (
            f"The second moment should have fallen in {_counted(should, 'case')} and did not in {stuck:,} of them "
            f"({percent(stuck, should)})"
        )
    root = _root_clause(moments)
    return Sentence(text + root + ".", (*names, "moments.root_ratio_quantile") if root else names)


def _root_clause(moments: xr.Dataset) -> str:
    """Say how much too large the root is in the end, where the median is at least one bin too large."""
    if "root_ratio_quantile" not in moments:
        return ""
    ratios = moments.root_ratio_quantile.sel(token_group="all").sel(quantile=0.5, method="nearest")
    known = ratios.values[np.isfinite(ratios.values)]
    if not len(known) or known[-1] <= 1:
        return ""
    last = np.isfinite(ratios.values[-1])
    t = int(moments.timestep.values[np.isfinite(ratios.values)][-1])
    when = "at the last timestep" if last else f"at timestep {t:,}"
    return (
        f"; {when} its root is on median at least {number(known[-1])} times that of a second moment kept in "
        "float32"
    )


def _lost_updates(tree: Tree) -> Sentence | None:
    """Say how many updates were lost, where any was wanted."""
    updates = tree.get("updates")
    wanted, lost = total(updates, "wanted_count", "all"), total(updates, "lost_count", "all")
    if updates is None or wanted is None or lost is None:
        return None
    names = ("updates.wanted_count", "updates.lost_count")
    beyond = _undefined_clause(updates)
    if beyond:
        names = (*names, "updates.undefined_count")
    if wanted == 0:
        return Sentence(f"No step wanted to change any weight{beyond}.", names)
    if lost == 0:
        what = "the one wanted update" if wanted == 1 else f"all {wanted:,} wanted updates"
        return Sentence(f"No update was lost: {what} changed their weight{beyond}.", names)
    group, other = focus(tree)
    size = _size_clause(updates, group)
    text = _lost_clause(updates, group) + size + _lost_elsewhere(updates, other) + beyond
    return Sentence(text + ".", (*names, "updates.margin_histogram") if size else names)


def _undefined_clause(updates: xr.Dataset) -> str:
    count = total(updates, "undefined_count", "all")
    verb = "is" if count == 1 else "are"
    return (
        f"; not counted: {_counted(count, 'update')} that {verb} infinite or NaN" if count else ""
    )


def _lost_clause(updates: xr.Dataset, group: str) -> str:
    wanted, lost = total(updates, "wanted_count", group), total(updates, "lost_count", group)
    assert wanted and lost is not None
    whose = tokens_of(group, group_names(updates))
    if lost == 0:
        return f"None of the {_counted(wanted, 'wanted update')} of {whose} was lost"
    if lost == wanted:
        return f"Every one of the {_counted(wanted, 'wanted update')} of {whose} changed nothing"
    return f"{lost:,} of the {_counted(wanted, 'wanted update')} of {whose} ({percent(lost, wanted)}) changed nothing"


def _lost_elsewhere(updates: xr.Dataset, other: str | None) -> str:
    if other is None:
        return ""
    wanted, lost = total(updates, "wanted_count", other), total(updates, "lost_count", other)
    if not wanted or lost is None:
        return ""
    return f"; of those of {tokens_of(other, group_names(updates))}, {percent(lost, wanted)}"


def _size_clause(updates: xr.Dataset, group: str) -> str:
    """Bound the median of the wanted updates' sizes, where it is below half of what is visible."""
    if "margin_histogram" not in updates:
        return ""
    histogram = updates.margin_histogram.sel(token_group=group).sum("timestep").values
    below = np.cumsum(histogram)
    if not below[-1]:
        return ""
    found = int(np.searchsorted(below, (below[-1] + 1) // 2))
    exponent = -(int(updates.margin.values[found]) + 1)  # of the bin's upper edge
    if exponent < 1:
        return ""
    bound = f"1/{1 << exponent:,}" if exponent <= 10 else f"2^-{exponent}"
    return f", and at least half of them were smaller than {bound} of the smallest visible one"


def _weight_decay(tree: Tree) -> Sentence | None:
    """Say whether weight decay acts, where it should act at all."""
    updates = tree.get("updates")
    wanted = total(updates, "decay_wanted_count", "all")
    lost = total(updates, "decay_lost_count", "all")
    if not wanted or lost is None:
        return None
    names = ("updates.decay_wanted_count", "updates.decay_lost_count")
    cases = "the one case" if wanted == 1 else f"all {wanted:,} cases"
    if lost == 0:
        return Sentence(f"Weight decay acted in {cases} in which it should have.", names)
    if lost == wanted:
        return Sentence(f"Weight decay did nothing: it was rounded away in {cases}.", names)
    text = (
        f"Weight decay was rounded away in {lost:,} of the {_counted(wanted, 'case')} in which it should have acted "
        f"({percent(lost, wanted)})."
    )
    return Sentence(text, names)


def _frozen(tree: Tree) -> Sentence | None:
    """Say how many tokens do not move any more at the end; one timestep has no end."""
    tokens = tree.get("tokens")
    if tokens is None or tokens.sizes.get("timestep", 0) < 2:
        return None
    (group, other), names = focus(tree), group_names(tokens)
    onsets = onsets_of(tokens, group)
    if not len(onsets):
        return None
    text = _frozen_clause(onsets, tokens_of(group, names, len(onsets))) + _onset_clause(onsets)
    compared = onsets_of(tokens, other) if other else onsets[:0]
    if other and len(compared):
        count = int((compared >= 0).sum())
        text += f"; of {tokens_of(other, names, len(compared))}, {_none(count)} {_are(count)}"
    return Sentence(text + ".", ("tokens.freeze_onset", "tokens.in_group"))


def _frozen_clause(onsets: NDArray[np.int64], whose: str) -> str:
    frozen = int((onsets >= 0).sum())
    if frozen == len(onsets) > 1:
        return f"All {whose} are frozen at the end"
    return f"{_none(frozen).capitalize()} of {whose} {_are(frozen)} frozen at the end"


def _onset_clause(onsets: NDArray[np.int64]) -> str:
    never, moved = int((onsets == 0).sum()), onsets[onsets > 0]
    clauses = [f"{never:,} never moved"] if never else []
    if len(moved):
        who = "the median one" if len(moved) > 1 else "the other one" if never else "it"
        others = " of the others" if never and len(moved) > 1 else ""
        clauses.append(f"{who}{others} moved last at timestep {middle(moved):,}")
    return ": " + " and ".join(clauses) if clauses else ""


def _one_step(tree: Tree) -> Sentence | None:
    """Say which share of the lost updates each remedy would have landed, where updates were lost."""
    counterfactual, updates = tree.get("counterfactual"), tree.get("updates")
    group, _ = focus(tree)
    lost = total(updates, "lost_count", group)
    if counterfactual is None or not lost:
        return None
    found = {
        name: remedy_total(counterfactual, "recovered_count", name, group)
        for name in tried(counterfactual)
    }
    found = {name: count for name, count in found.items() if math.isfinite(count)}
    best = sorted(found, key=lambda name: -found[name])[:_NAMED]
    if not best:
        return None
    shares = [f"{percent(found[name], lost)} with {remedy_name(name)}" for name in best]
    whose = tokens_of(group, group_names(counterfactual))
    text = f"Of the lost updates of {whose}, {_listed(shares)} would have landed, one step from the recorded weights."
    return Sentence(text, ("counterfactual.recovered_count", "updates.lost_count"))


def tried(counterfactual: xr.Dataset) -> list[str]:
    """List the remedies for one step: an expectation stands for the draw."""
    names = [str(name) for name in counterfactual.remedy.values if name != RECORDED]
    return [name for name in names if f"{name}-expected" not in names]


def left_alone(counterfactual: xr.Dataset) -> list[str]:
    """List the remedies that a run could use instead of float32 masters."""
    names = [str(name) for name in counterfactual.remedy.values]
    return [name for name in names if name not in (RECORDED, MASTER, EXPECTED)]


def _left_alone(tree: Tree) -> Sentence | None:
    """Say which remedy comes nearest to float32 masters, where these and the recorded arithmetic were run."""
    counterfactual = tree.get("counterfactual")
    if counterfactual is None or RECORDED not in counterfactual.remedy.values:
        return None
    end = counterfactual.isel(timestep=-1).sel(token_group="all")
    apart = {str(n): float(end.free_distance.sel(remedy=n)) for n in end.remedy.values}
    before = apart[RECORDED]
    others = {n: apart[n] for n in left_alone(counterfactual) if math.isfinite(apart[n])}
    if not others or not math.isfinite(before) or MASTER not in apart:
        return None
    best = min(others, key=lambda name: others[name])
    if others[best] >= before:
        text = (
            "Left to itself over the recorded gradients, no remedy ends nearer to float32 master weights than the "
            f"recorded arithmetic, which ends {number(before)} away (L2)."
        )
        return Sentence(text, ("counterfactual.free_distance",))
    text = (
        f"Left to itself over the recorded gradients, {remedy_name(best)} ends nearest to float32 master weights: "
        f"{number(others[best])} away (L2) instead of {number(before)}{_moving_clause(end, best)}."
    )
    return Sentence(text, ("counterfactual.free_distance", "counterfactual.free_moving_tokens"))


def _moving_clause(end: xr.Dataset, remedy: str) -> str:
    moving = end.free_moving_tokens
    now, before = int(moving.sel(remedy=remedy)), int(moving.sel(remedy=RECORDED))
    verb, count = "moves" if now == 1 else "move", _counted(end.sizes["token"], "token")
    if now == before:
        return f", and {_none(now)} of {count} still {verb}, as before"
    return f", and {_none(now)} of {count} still {verb} instead of {_none(before)}"


def _quality(tree: Tree) -> Sentence | None:
    """Say how far the recorded steps went along the exact ones, where these are finite and not zero."""
    updates = tree.get("updates")
    if updates is None or not {"inner_product", "wanted_norm"} <= set(updates.variables):
        return None
    group, _ = focus(tree)
    one = updates.sel(token_group=group)
    with np.errstate(over="ignore", invalid="ignore"):
        inner = float(one.inner_product.sum(skipna=False))
        square = float((one.wanted_norm**2).sum(skipna=False))
    if not (math.isfinite(inner) and math.isfinite(square)) or square <= 0:
        return None
    whose = tokens_of(group, group_names(updates))
    text = (
        f"Over all timesteps, the recorded steps of {whose} went {number(inner / square)} times as far along the "
        "exact ones as these."
    )
    return Sentence(text, ("updates.inner_product", "updates.wanted_norm"))


def _cooled(tree: Tree) -> Sentence | None:
    """Say from when on most tokens move by an ulp at most, where they do before the last timestep."""
    lattice = tree.get("lattice")
    if lattice is None or "settled_regime_count" not in lattice:
        return None
    group, _ = focus(tree)
    counts = lattice.settled_regime_count.sel(token_group=group)
    cold = 2 * counts.sel(regime=["late", "frozen"]).sum("regime") > counts.sum("regime")
    if not cold.values[:-1].any():
        return None
    t = int(lattice.timestep.values[np.argmax(cold.values)])
    whose = tokens_of(group, group_names(lattice))
    text = f"From timestep {t:,} on, more than half of {whose} never again moved an element by more than one ulp."
    return Sentence(text, ("lattice.settled_regime_count",))


def _clustered(tree: Tree) -> Sentence | None:
    """Say how many tokens have the same bits in the end, where some have."""
    tokens = tree.get("tokens")
    if tokens is None or "clustered_token_count" not in tokens:
        return None
    end = tokens.isel(timestep=-1).sel(token_group="all")
    count, clusters = int(end.clustered_token_count), int(end.cluster_count)
    if count <= 0 or clusters <= 0:
        return None
    text = (
        f"In the end {count:,} of {_counted(tokens.sizes['token'], 'token')} share all their bits with another one, "
        f"in {_counted(clusters, 'cluster')}."
    )
    return Sentence(text, ("tokens.clustered_token_count", "tokens.cluster_count"))


#: In the order in which they are told.
_FIRST_RANK = (_second_moment, _lost_updates, _weight_decay, _frozen, _one_step, _left_alone)

#: Told where the others are few.
_SECOND_RANK = (_cooled, _clustered, _quality)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _none(count: int) -> str:
    return f"{count:,}" if count else "none"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
