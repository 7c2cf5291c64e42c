"""The ledger's figures, drawn from made-up ledgers: what they show is what is in the data, and nothing collides."""

import itertools
import re

import numpy as np
import pytest
from made_ledgers import Made
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from jaxaudit.ledger import figures

CASES = {
    "usual": Made(decay=True),
    "healthy": Made(
        groups={}, lost=(0, 0), stuck=0, freezes=False, remedies=("recorded", "beta2-0.95")
    ),
    "thirty groups": Made(groups={f"a_group_with_a_rather_long_name_{k}": k for k in range(30)}),
    "one timestep": Made(steps=1),
    "late": Made(groups={"$x_{$ \\frac\udcff": 3, "none": 0, "$": 1}, first=100_001, steps=30),
    "nan": Made(nan=True),
}


@pytest.fixture(scope="module")
def trees():
    return {name: made.tree() for name, made in CASES.items()}


@pytest.fixture(scope="module")
def drawn(trees):
    """Draw what is asked for once."""
    found = {}

    def draw(case, name):
        if (case, name) not in found:
            groups, function = figures.FIGURES[name]
            figure = function(*(trees[case][group] for group in groups))
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
            found[case, name] = figure
        return found[case, name]

    return draw


def words(figure):
    """List every text that is seen, and where it lies."""
    texts = figure.findobj(Text)
    seen = [t for t in texts if t.get_visible() and t.get_text().strip()]
    ticks = {
        label
        for axis in figure.axes
        for side in (axis.xaxis, axis.yaxis)
        for label in side.get_ticklabels(which="both")
    }
    inside = {
        tick.label1
        for axis in figure.axes
        for side in (axis.xaxis, axis.yaxis)
        for tick in (*side._update_ticks(),)  # those within the axis' limits
    }
    kept = [t for t in seen if t not in ticks or t in inside]
    return [(t, t.get_window_extent()) for t in kept]


def title(figure):
    return " ".join(figure.get_suptitle().split())


@pytest.mark.parametrize("name", figures.FIGURES)
@pytest.mark.parametrize("case", CASES)
def test_no_text_collides_or_leaves_the_figure(drawn, case, name):
    figure = drawn(case, name)
    assert title(figure)
    width, height = figure.bbox.size
    found = words(figure)
    assert len(found) > 5
    for text, box in found:
        assert box.x0 > -1, text
        assert box.y0 > -1, text
        assert box.x1 < width + 1, text
        assert box.y1 < height + 1, text
    for (a, box), (b, other) in itertools.combinations(found, 2):
        if a.get_rotation() == b.get_rotation() == 40:
            continue  # the boxes of parallel slanted texts overlap, the texts do not
        x = min(box.x1, other.x1) - max(box.x0, other.x0)
        y = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(x, y) < 2, (a.get_text(), b.get_text())


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_that_is_given_is_drawn_in(trees, name):
    groups, function = figures.FIGURES[name]
    part = Figure(figsize=(8, 6), layout="constrained").subfigures(1, 1)
    assert function(*(trees["usual"][group] for group in groups), figure=part) is part
    assert part.axes


def test_cooling_stacks_the_shares_of_settled_regimes(trees, drawn):
    figure = drawn("usual", "cooling.png")
    lattice = trees["usual"]["lattice"]
    assert len(figure.axes) == 3
    assert title(figure).startswith(
        "How tokens cool down. 60 dead tokens: half frozen from timestep "
    )
    for axis, group in zip(figure.axes, ("all", "dead", "live"), strict=True):
        counts = lattice.settled_regime_count.sel(token_group=group).values
        assert axis.get_xscale() == "log"
        top = np.zeros(counts.shape[1])
        for area, regime in zip(axis.collections, counts, strict=True):
            top = top + regime / counts[:, 0].sum()
            corners = area.get_paths()[0].vertices
            for t in {0, 299, *np.flatnonzero(np.diff(top))[:9].tolist()}:
                for end in (t + 1, t + 2):  # each timestep reaches up to the next
                    heights = corners[np.isclose(corners[:, 0], end), 1]
                    assert np.isclose(heights, top[t]).any(), (group, t)
        half = counts[3] * 2 >= counts.sum(axis=0)
        assert f"half frozen from timestep {int(np.argmax(half)) + 1} on" in axis.get_title("left")


def test_lost_updates_are_drawn_and_summed_up(trees, drawn):
    figure = drawn("usual", "lost_updates.png")
    updates = trees["usual"]["updates"]
    above, below = figure.axes
    shares = []
    for line, median, group in zip(above.get_lines(), below.get_lines(), ("dead", "live"), strict=False):  # fmt: skip
        one = updates.sel(token_group=group)
        np.testing.assert_allclose(line.get_ydata(), one.lost_count / one.wanted_count)
        np.testing.assert_allclose(median.get_ydata(), one.margin_quantile[:, 2])
        shares.append(f"{100 * int(one.lost_count.sum()) / int(one.wanted_count.sum()):.0f} % of {group} tokens")  # fmt: skip
    assert title(figure) == f"Wanted updates that changed nothing: {', '.join(shares)}"
    assert any(list(line.get_ydata()) == [0, 0] for line in below.get_lines())
    assert "changed nothing: 0 % of all tokens" in title(drawn("healthy", "lost_updates.png"))


def test_the_ratchet_is_drawn_of_traced_tokens_and_of_all(trees, drawn):
    figure = drawn("usual", "ratchet.png")
    moments = trees["usual"]["moments"]
    above, below = figure.axes
    assert above.get_yscale() == below.get_yscale() == "log"
    lines = {line.get_label(): line for line in above.get_lines()}
    for k, token in enumerate(moments.traced_token.values):
        line = lines[f"token {token} ({moments.traced_group.values[k]})"]
        np.testing.assert_array_equal(line.get_ydata(), moments.stored_root[:, k])
        assert line.get_linestyle() == "-"
    np.testing.assert_array_equal(below.get_lines()[0].get_ydata(), moments.root_ratio_quantile[:, 1, 2])  # fmt: skip
    last = float(moments.root_ratio_quantile[-1, 0, 2])
    assert title(figure) == (
        "The second moment never fell where it should have; "
        f"its root ends at least {last:.3g} times that of a float32 one (median)"
    )
    assert title(drawn("healthy", "ratchet.png")) == "The second moment always fell where it should have"  # fmt: skip


def test_each_token_is_in_one_bar(trees, drawn):
    figure = drawn("usual", "freeze_onset.png")
    onsets = trees["usual"]["tokens"].freeze_onset.values.tolist()
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_xticklabels()]
    for bars, own in zip(axis.containers, (onsets[:60], onsets[60:]), strict=True):
        heights = [bar.get_height() for bar in bars]
        assert sum(heights) == pytest.approx(1)
        for height, name in zip(heights, names, strict=True):
            if name in ("never moved", "still moving"):
                found = sum(t == (0 if name.startswith("never") else -1) for t in own)
            else:
                ends = [int(end.replace(",", "")) for end in name.split("-")]
                found = sum(ends[0] <= t <= ends[-1] for t in own)
            assert height == pytest.approx(found / len(own)), name
    first = min(t for t in onsets if t > 0)
    assert re.match(rf"{first}\b", names[1])
    assert names[-2].endswith("-300")
    assert title(figure).startswith("Frozen at the end: 60 of 60 dead tokens, ")


def test_remedies_are_compared_by_their_numbers(trees, drawn):
    figure = drawn("usual", "remedies.png")
    tree = trees["usual"]
    shown = [[line for line in axis.get_lines() if len(line.get_xdata()) == 7] for axis in figure.axes]  # fmt: skip
    for k, group in enumerate(("dead", "live")):
        found = tree["counterfactual"].sel(token_group=group)
        lost = int(tree["updates"].lost_count.sel(token_group=group).sum())
        np.testing.assert_allclose(shown[0][k].get_xdata(), found.recovered_count.sum("timestep") / lost)  # fmt: skip
        alone = [0, 1, 2, 3, 5, 6]  # an expectation is no run
        for axis, name, whole in ((1, "free_distance", 1), (2, "free_moving_tokens", (60, 40)[k])):
            drawn_at = np.asarray(shown[axis][k].get_xdata())
            np.testing.assert_allclose(drawn_at[alone], found[name].values[alone, -1] / whole)
            assert np.isnan(drawn_at[4])
    assert (
        title(figure)
        == "Over the recorded gradients, Kahan summation ends nearest to float32 masters"
    )
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "recorded"
    assert title(drawn("nan", "remedies.png")) == "Remedies compared, over the recorded gradients"
    dots = [text for text in figure.axes[2].texts if isinstance(text, Annotation)]
    assert [text.get_text() for text in dots].count("60") == 1


@pytest.mark.parametrize(("name", "left"), [("cooling.png", 26), ("lost_updates.png", 25), ("ratchet.png", 25), ("freeze_onset.png", 25), ("remedies.png", 25)])  # fmt: skip
def test_what_is_left_out_is_said(drawn, name, left):
    told = [text.get_text() for text, _ in words(drawn("thirty groups", name))]
    assert any(f"{left} more groups are not shown" in text for text in told)
    told = [text.get_text() for text, _ in words(drawn("usual", name))]
    assert not any("not shown" in text for text in told)


@pytest.mark.parametrize("name", ["lost_updates.png", "ratchet.png"])
def test_nothing_finite_is_said_to_be_nothing(drawn, name):
    assert "no finite numbers" in [text.get_text() for text, _ in words(drawn("nan", name))]
    assert "no finite numbers" not in [text.get_text() for text, _ in words(drawn("usual", name))]


def test_timesteps_are_whole_numbers(drawn):
    for name in ("lost_updates.png", "ratchet.png", "cooling.png"):
        for case in ("one timestep", "late"):
            axis = drawn(case, name).axes[-1]
            inside = [t for t in axis.xaxis._update_ticks() if t.label1.get_text()]
            labels = [tick.label1.get_text() for tick in inside]
            assert labels
            assert len(set(labels)) == len(labels)
            assert all(re.fullmatch(r"[\d,]+", label) for label in labels)
            for tick, label in zip(inside, labels, strict=True):
                assert tick.get_loc() == pytest.approx(int(label.replace(",", "")))
