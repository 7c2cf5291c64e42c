"""The verdict on made-up ledgers: every number counted again, every statement only where the data bear it out."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_ledgers import LEDGER, Made

from jaxaudit.ledger import verdict

CASES = {
    "usual": Made(),
    "decay": Made(decay=True, lost=(1, 0)),
    "healthy": Made(lost=(0, 0), stuck=0, freezes=False, remedies=("recorded", "beta2-0.95")),
    "all only": Made(groups={}),
    "thirty groups": Made(groups={f"g{k}": k for k in range(30)}),
    "one timestep": Made(steps=1),
    "one token": Made(groups={"dead": 0, "live": 1}, first=101, steps=60),
    "nan": Made(nan=True),
    "strange names": Made(groups={"\u202e<b>\n" + "x" * 90: 3, "dead": 2}, decay=True),
    "no gradients": Made(gradients=False),
}


@pytest.fixture(scope="module")
def trees():
    return {name: made.tree() for name, made in CASES.items()}


def texts(tree):
    return verdict.lines(verdict.sentences(tree))


def one(tree, pattern):
    """Return the one sentence that matches a pattern; None where there is none."""
    found = [text for text in texts(tree) if re.search(pattern, text)]
    assert len(found) < 2, found
    return found[0] if found else None


def changed(tree, group, **arrays):
    """Return a tree in which variables of a group have other values."""
    dataset = tree[group].copy(deep=True)
    for name, values in arrays.items():
        dataset[name] = (dataset[name].dims, np.broadcast_to(values, dataset[name].shape).copy())
    return {**tree, group: dataset}


def counts(tree, group, variable, token_group):
    """Add up a count timestep by timestep."""
    dataset = tree[group]
    k = [str(name) for name in dataset.token_group.values].index(token_group)
    return sum(int(row[k]) for row in dataset[variable].values)


@pytest.mark.parametrize("case", CASES)
def test_every_sentence_is_whole_and_rests_on_variables_that_are_there(trees, case):
    tree = trees[case]
    told = verdict.sentences(tree)
    assert 2 <= len(told) <= 6
    assert len(told) >= 3 or case == "no gradients"
    for each in told:
        assert re.fullmatch(r"[A-Z0-9].*[^.]\.", each.text), each.text
        assert each.text.isprintable()
        assert not re.search(r"\bnan\b|\binf\b|  |None of 0|\b1 (tokens|cases|updates|clusters)\b", each.text)  # fmt: skip
        assert not re.search(r"\d{4}", each.text), "thousands are separated"
        assert each.variables
        for variable in each.variables:
            group, name = variable.split(".")
            assert name in tree[group], variable


@pytest.mark.parametrize("group", LEDGER)
@pytest.mark.parametrize("case", ["usual", "thirty groups"])
def test_a_missing_group_silences_what_rests_on_it(trees, case, group):
    tree = {name: dataset for name, dataset in trees[case].items() if name != group}
    told = verdict.sentences(tree)
    assert told
    assert not [each for each in told if any(v.startswith(f"{group}.") for v in each.variables)]


def test_nothing_is_said_of_nothing(trees):
    bare = {name: trees["usual"][name] for name in ("", "free_run")}
    assert verdict.sentences(bare) == []


def test_lost_updates_are_those_counted(trees):
    tree = trees["usual"]
    wanted, lost = (counts(tree, "updates", f"{n}_count", "dead") for n in ("wanted", "lost"))
    others = [counts(tree, "updates", f"{n}_count", "live") for n in ("lost", "wanted")]
    text = one(tree, "changed nothing")
    assert text is not None
    assert text.startswith(f"{lost:,} of the {wanted:,} wanted updates of dead tokens ({100 * lost / wanted:.0f} %)")  # fmt: skip
    assert text.endswith(f"of live tokens, {100 * others[0] / others[1]:.0f} %.")


@pytest.mark.parametrize("middle", [-12, -6, -3, -2, -1, 0, 3])
def test_the_size_of_the_typical_update_bounds_half_of_them(trees, middle):
    margins = trees["usual"]["updates"].margin.values
    histogram = np.zeros(len(margins), np.int64)
    histogram[margins == middle] = 2
    histogram[margins == 5] += 3
    histogram[margins == -20] += 3
    tree = changed(trees["usual"], "updates", margin_histogram=histogram)
    text = one(tree, "changed nothing")
    assert text is not None
    shown = re.search(r"smaller than (1/([\d,]+)|2\^-(\d+)) of", text)
    if middle >= -1:
        assert shown is None
        return
    assert shown is not None
    exponent = -int(shown[3]) if shown[3] else -int(math.log2(int(shown[2].replace(",", ""))))
    below, all_of_them = histogram[margins < exponent].sum(), histogram.sum()
    assert 2 * below >= all_of_them
    assert 2 * histogram[margins < exponent - 1].sum() < all_of_them, "the tightest bound"


def test_no_lost_update_is_good_news(trees):
    tree = trees["healthy"]
    wanted = counts(tree, "updates", "wanted_count", "all")
    assert one(tree, "lost") == f"No update was lost: all {wanted:,} wanted updates changed their weight."  # fmt: skip
    assert not one(tree, "would have landed")


def test_all_lost_and_none_wanted(trees):
    text = one(trees["decay"], "wanted update")
    wanted = counts(trees["decay"], "updates", "wanted_count", "dead")
    assert text is not None
    assert text.startswith(f"Every one of the {wanted:,} wanted updates of dead tokens changed")
    assert text.endswith("of live tokens, 0 %.")
    tree = changed(trees["usual"], "updates", wanted_count=0, lost_count=0)
    assert one(tree, "wanted to") == "No step wanted to change any weight."


def test_undefined_updates_are_named(trees):
    single = np.zeros(trees["usual"]["updates"].undefined_count.shape, np.int64)
    single[3] = 1
    tree = changed(trees["usual"], "updates", undefined_count=single)
    assert one(tree, "not counted: 1 update that is infinite or NaN")


def test_the_ratchet_is_told_only_where_it_turns(trees):
    tree = trees["usual"]
    should = counts(tree, "moments", "exp_avg_sq_fall_count", "all")
    last = tree["moments"].root_ratio_quantile.values[-1, 0, 2]
    assert one(tree, "second moment") == (
        f"The second moment should have fallen in {should:,} cases and never did; at the last timestep its root is on "
        f"median at least {last:.3g} times that of a second moment kept in float32."
    )
    assert one(trees["healthy"], "second moment") == (
        f"The second moment fell in all {counts(trees['healthy'], 'moments', 'exp_avg_sq_fall_count', 'all'):,} cases "
        "in which it should have."
    )
    none = changed(tree, "moments", exp_avg_sq_fall_count=0, exp_avg_sq_stuck_count=0)
    assert not one(none, "second moment")
    unknown = changed(tree, "moments", exp_avg_sq_stuck_count=-1)
    assert not one(unknown, "second moment")


def test_a_few_stuck_moments_are_not_rounded_to_none_or_all(trees):
    few = np.zeros(trees["usual"]["moments"].exp_avg_sq_stuck_count.shape, np.int64)
    few[0, 0] = 7
    text = one(changed(trees["usual"], "moments", exp_avg_sq_stuck_count=few), "second moment")
    assert text is not None
    assert "did not in 7 of them (less than 0.01 %)" in text
    should = trees["usual"]["moments"].exp_avg_sq_fall_count.values
    text = one(
        changed(trees["usual"], "moments", exp_avg_sq_stuck_count=should - few), "second moment"
    )
    assert text is not None
    assert "(more than 99.99 %)" in text


def test_the_root_is_told_at_the_last_timestep_that_has_one(trees):
    ratios = trees["usual"]["moments"].root_ratio_quantile.values.copy()
    ratios[200:] = np.nan
    text = one(changed(trees["usual"], "moments", root_ratio_quantile=ratios), "second moment")
    assert text is not None
    assert f"at timestep 200 its root is on median at least {ratios[199, 0, 2]:.3g} times" in text
    text = one(changed(trees["usual"], "moments", root_ratio_quantile=1.0), "second moment")
    assert text is not None
    assert "root" not in text


def test_weight_decay_is_told_where_there_is_some(trees):
    assert not one(trees["usual"], "decay")
    tree = trees["decay"]
    total = counts(tree, "updates", "decay_wanted_count", "all")
    assert one(tree, "decay") == f"Weight decay did nothing: it was rounded away in all {total:,} cases."  # fmt: skip
    tree = changed(tree, "updates", decay_lost_count=0)
    assert one(tree, "decay") == f"Weight decay acted in all {total:,} cases in which it should have."  # fmt: skip
    some = np.zeros(tree["updates"].decay_lost_count.shape, np.int64)
    some[:, 0] = trees["usual"]["updates"].wanted_count.values[:, 0] // 4
    text = one(changed(tree, "updates", decay_lost_count=some), "decay")
    assert text is not None
    assert f"in {some.sum():,} of the {total:,} cases" in text
    assert "(25 %)" in text


def test_frozen_tokens_are_those_counted(trees):
    tree = trees["usual"]
    onset = tree["tokens"].freeze_onset.values.tolist()
    dead, live = onset[:60], onset[60:]
    moved = sorted(t for t in dead if t > 0)
    never = sum(t == 0 for t in dead)
    assert -1 not in dead
    assert one(tree, "frozen") == (
        f"All 60 dead tokens are frozen at the end: {never} never moved and the median one of the others moved last at "
        f"timestep {moved[(len(moved) - 1) // 2]}; of 40 live tokens, {sum(t >= 0 for t in live)} are."
    )
    assert one(trees["healthy"], "frozen") == (
        "None of 60 dead tokens are frozen at the end; of 40 live tokens, none are."
    )
    assert not one(trees["one timestep"], "frozen")
    first = np.full(100, -1)
    first[0] = 1234
    assert one(changed(tree, "tokens", freeze_onset=first), "frozen") == (
        "1 of 60 dead tokens is frozen at the end: it moved last at timestep 1,234; of 40 live tokens, none are."
    )
    assert one(trees["one token"], "1 of 1 live token is frozen")
    early = np.concatenate([np.zeros(40, int), np.arange(20, 0, -1), np.full(40, -1)])
    assert one(changed(tree, "tokens", freeze_onset=early), "frozen") == (
        "All 60 dead tokens are frozen at the end: 40 never moved and the median one of the others moved last at "
        "timestep 10; of 40 live tokens, none are."
    )


def test_remedies_are_sorted_by_what_they_recover(trees):
    tree = trees["usual"]
    lost = counts(tree, "updates", "lost_count", "dead")
    shares = {
        str(name): 100 * sum(float(x) for x in rows[:, 1]) / lost
        for name, rows in zip(tree["counterfactual"].remedy.values, tree["counterfactual"].recovered_count.values, strict=True)
    }  # fmt: skip
    assert one(tree, "would have landed") == (
        "Of the lost updates of dead tokens, 100 % with float32 master weights, "
        f"{shares['float32-moments']:.0f} % with float32 moments, {shares['stochastic-rounding-expected']:.0f} % with "
        f"stochastic rounding and {shares['beta2-0.95']:.0f} % with beta2 = 0.95 would have landed, one step from the "
        "recorded weights."
    )
    recovered = tree["counterfactual"].recovered_count.values.copy()
    recovered[1, 5] = np.nan  # float32 moments
    text = one(changed(tree, "counterfactual", recovered_count=recovered), "would have landed")
    assert text is not None
    assert "float32 moments" not in text


def test_the_nearest_remedy_is_one_that_a_run_could_use(trees):
    tree = trees["usual"]
    text = one(tree, "Left to itself")
    assert text is not None
    moving = tree["counterfactual"].free_moving_tokens.values[:, -1, 0]
    assert text == (
        "Left to itself over the recorded gradients, Kahan summation ends nearest to float32 master weights: 1.25 away "
        f"(L2) instead of 9.5, and 100 of 100 tokens still move instead of {moving[0]}."
    )
    alike = tree["counterfactual"].free_moving_tokens.values.copy()
    alike[:] = alike[:1]
    same = one(changed(tree, "counterfactual", free_moving_tokens=alike), "Left to itself")
    assert same is not None
    assert same.endswith(f"instead of 9.5, and {moving[0]} of 100 tokens still move, as before.")
    apart = tree["counterfactual"].free_distance.values.copy()
    apart[4] = 0.001  # an expectation is no run
    assert one(changed(tree, "counterfactual", free_distance=apart), "Left to itself") == text
    apart[1:] = 20
    far = one(changed(tree, "counterfactual", free_distance=apart), "Left to itself")
    assert far is not None
    assert "no remedy ends nearer" in far
    assert not one(trees["healthy"], "Left to itself"), "nothing to measure from"
    assert not one(trees["nan"], "Left to itself")


def test_sentences_of_second_rank_fill_up(trees):
    tree = trees["no gradients"]
    lattice = tree["lattice"].settled_regime_count.values[:, :, 1]
    first = next(t for t in range(300) if 2 * (lattice[2, t] + lattice[3, t]) > 60) + 1
    assert one(tree, "by more than one ulp") == (
        f"From timestep {first} on, more than half of dead tokens never again moved an element by more than one ulp."
    )
    assert one(tree, "share all their bits") == (
        "In the end 2 of 100 tokens share all their bits with another one, in 1 cluster."
    )
    usual = {n: d for n, d in trees["usual"].items() if n not in ("counterfactual", "lattice", "tokens")}  # fmt: skip
    text = one(usual, "as far along")
    assert text is not None
    assert "of dead tokens went 0.5 times" in text


def test_the_group_spoken_of(trees):
    assert verdict.focus(trees["usual"]) == ("dead", "live")
    assert verdict.focus(trees["no gradients"]) == ("dead", "live")
    assert verdict.focus(trees["all only"]) == ("all", None)
    tree = trees["thirty groups"]
    shares = {
        f"g{k}": counts(tree, "updates", "lost_count", f"g{k}")
        / counts(tree, "updates", "wanted_count", f"g{k}")
        for k in range(1, 30)
    }
    assert verdict.focus(tree) == (max(shares, key=lambda name: shares[name]), "all")
    assert verdict.focus(trees["one token"]) == ("live", None), "nobody else to compare with"


def test_json_and_lines_hold_every_sentence(trees):
    told = verdict.sentences(trees["usual"])
    back = json.loads(json.dumps(verdict.as_json(told)))
    assert [each["sentence"] for each in back] == verdict.lines(told)
    assert [tuple(each["variables"]) for each in back] == [each.variables for each in told]


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (0, 7, "0 %"),
        (7, 7, "100 %"),
        (1, 3, "33 %"),
        (999, 1000, "99.9 %"),
        (9_999, 10_000, "99.99 %"),
        (999_999, 1_000_000, "more than 99.99 %"),
        (1, 25_000, "less than 0.01 %"),
        (24_999, 25_000, "more than 99.99 %"),
        (3, 1000, "0.3 %"),
        (3, 10_000, "0.03 %"),
        (0.5, 2.0, "25 %"),
    ],
)
def test_shares(part, whole, shown):
    assert verdict.percent(part, whole) == shown


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**12), st.floats(0, 1))
def test_a_share_is_all_or_none_only_where_it_is(whole, share):
    part = min(int(share * whole), whole)
    shown = verdict.percent(part, whole)
    assert (shown == "100 %") == (part == whole)
    assert (shown == "0 %") == (part == 0)
    value = float(re.findall(r"[\d.]+", shown)[0])
    exact = 100 * part / whole
    digits = len(shown.partition(".")[2].rstrip(" %")) if "." in shown else 0
    if "than" not in shown:
        assert abs(value - exact) <= 0.5 * 10**-digits + 1e-9
    else:
        assert exact < 0.01 or exact > 99.99


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.25, "1.25"), (99.96, "100"), (1234.5, "1,234"), (1e-7, "1.00e-07"), (2e7, "2.00e+07"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers(value, shown):
    assert verdict.number(value) == shown
