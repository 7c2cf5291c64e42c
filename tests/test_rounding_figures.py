"""Figures and tables of a rounding certificate, drawn from datasets made by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import xarray as xr

from jaxaudit import results
from jaxaudit.rounding import figures, tables

MODES = ["pytorch", "eager", "jit", "jit-reduced", "jit-excess-precision-off", "jit-algsimp-off"]
MODES += ["jaxaudit", "jaxaudit-float32", "jaxaudit-float64"]
REFERENCES = ["ieee", "pytorch"]
CLASSES = ["normal", "subnormal", "zero", "infinity", "nan", "tie"]
BINADES = np.arange(-150, 129)
FIELDS = ["operand_1", "operand_2", "operand_3", "operand_4", "wanted", "found"]
ATTRIBUTES = {
    "jaxaudit_version": "0.1.0",
    "jax_version": "0.10.2",
    "jaxlib_version": "0.10.2",
    "torch_version": "2.13.0",
    "numpy_version": "2.4.0",
    "xla_flags": "",
    "backend": "cpu",
    "device": "cpu",
    "cpu_model": "AMD EPYC",
    "cpu_flags": "avx2",
    "created_at": "2026-01-01T00:00:00+00:00",
    "extent": "quick",
    "platform": "cpu",
    "notices": "",
}
OPERATIONS = ("float32 to bfloat16", "bfloat16 sqrt", "float32 sqrt", "float32 divide")
#: What there is to compare, of each operation in each mode.
TOTAL = 6000

FLUSHED = ("XLA flushes subnormal numbers on CPU", "use jaxaudit.operations")
ROOT = ("PyTorch takes MKL's root", "torch.sqrt(x.double()).float()")

#: (operation, mode, reference): results that differ, the largest distance, cause and remedy.
Differences = Mapping[tuple[str, str, str], tuple[int, float, str, str]]

SOME: Differences = {
    ("float32 sqrt", "pytorch", "ieee"): (1020, 1.0, *ROOT),
    ("float32 sqrt", "jit", "ieee"): (3, 8388607.0, *FLUSHED),
    ("float32 divide", "jit", "ieee"): (600, 8388607.0, *FLUSHED),
    ("float32 divide", "eager", "ieee"): (600, 8388607.0, *FLUSHED),
    ("bfloat16 sqrt", "jit-reduced", "ieee"): (60, 0.5, "not rounded", "lax.reduce_precision"),
    ("float32 sqrt", "eager", "pytorch"): (1020, 1.0, *ROOT),
}


def certificate(
    operations: Sequence[str] = OPERATIONS,
    differences: Differences = SOME,
    *,
    torch: bool = True,
    total: int = TOTAL,
    attributes: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Make the dataset of a certificate: half of the differences lie at subnormal numbers."""
    shape = (len(operations), len(MODES), len(REFERENCES))
    compared = np.full((*shape, len(CLASSES)), total // len(CLASSES))
    compared[:, 0, 1] = 0
    if not torch:
        compared[:, 0], compared[:, :, 1] = 0, 0
    compared[[name.startswith("bfloat16 Adam") for name in operations], 3] = 0
    differing = np.zeros_like(compared)
    farthest = np.zeros(compared.shape)
    first = np.zeros((*compared.shape, len(FIELDS)), np.uint64)
    by_binade = np.zeros((*shape, len(BINADES)), np.int64)
    causes, remedies = np.full(shape, "", object), np.full(shape, "", object)
    for (operation, mode, reference), (count, ulp, cause, remedy) in differences.items():
        if operation not in operations:
            continue
        at = list(operations).index(operation), MODES.index(mode), REFERENCES.index(reference)
        differing[at] = [count - count // 2, count // 2, 0, 0, 0, 0]
        if count == total:
            differing[at] = compared[at]
        farthest[at][: 1 + (count > 1)] = ulp
        first[at][0] = [0x3F800000, 0, 0, 0, 1, 2]
        by_binade[at] = np.minimum(_spread(count), _compared(total))
        causes[at], remedies[at] = cause, remedy
    texts = ("formula", "jax_expression", "torch_expression", "coverage")
    arrays = {
        "compared_count": compared,
        "differing_count": differing,
        "max_ulp_distance": farthest,
        "first_difference": first,
        "differing_by_binade": by_binade,
        "compared_by_binade": np.tile(_compared(total), (len(operations), 1)),
        "cause": causes,
        "remedy": remedies,
        "operand_formats": ["float32"] * len(operations),
        "result_format": ["float32"] * len(operations),
        **{name: ["?"] * len(operations) for name in texts},
    }
    coordinates = {
        "operation": list(operations),
        "mode": MODES,
        "reference": REFERENCES,
        "input_class": CLASSES,
        "binade": BINADES,
        "difference_field": FIELDS,
    }
    given = ATTRIBUTES | ({} if torch else {"torch_version": ""}) | dict(attributes or {})
    return results.label(arrays, coordinates, given, table=results.ROUNDING_VARIABLES)


def _compared(total: int) -> np.ndarray:
    """Compare as many in each binade, but none from 2^100 up, except infinity and NaN."""
    there = (BINADES < 100) | (BINADES == 128)
    return np.where(there, total // there.sum() + 1, 0)


def _spread(count: int) -> np.ndarray:
    """Put half of the differences among the subnormal binades, the others above 1."""
    found = np.zeros(len(BINADES), np.int64)
    low, high = (BINADES >= -149) & (BINADES <= -127), (BINADES >= 0) & (BINADES < 50)
    np.add.at(found, np.resize(np.flatnonzero(low), count // 2), 1)
    np.add.at(found, np.resize(np.flatnonzero(high), count - count // 2), 1)
    return found


NOTHING: Differences = {}
EVERYTHING: Differences = {
    (operation, mode, reference): (TOTAL, 1.0, *ROOT)
    for operation in OPERATIONS
    for mode in MODES
    for reference in REFERENCES
    if (mode, reference) != ("pytorch", "pytorch")
}


@pytest.fixture(params=["some", "nothing", "everything", "no torch", "one operation", "unicode"])
def any_certificate(request) -> xr.Dataset:
    wide = "float32 √x ÷ 走, $a_b$ | 50 %"
    made = {
        "some": lambda: certificate(),
        "nothing": lambda: certificate(differences=NOTHING),
        "everything": lambda: certificate(differences=EVERYTHING),
        "no torch": lambda: certificate(differences=NOTHING, torch=False),
        "one operation": lambda: certificate(["float32 divide"]),
        "unicode": lambda: certificate(
            [wide], {(wide, "jit", "ieee"): (1, 2.0, "weil $x^{", "schreibe\n`√`")}
        ),
    }
    return made[request.param]()


def images(axis: Any) -> np.ma.MaskedArray:
    return axis.get_images()[0].get_array()


def hatched(axis: Any) -> int:
    return sum(bool(patch.get_hatch()) for patch in axis.patches)


# --- figures ---


@pytest.mark.filterwarnings("ignore:Glyph")  # of an operation's name that is not in the font
@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_can_be_drawn_and_leaves_the_dataset_alone(any_certificate, name, tmp_path):
    before = any_certificate.copy(deep=True)
    figures.FIGURES[name](any_certificate).savefig(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    xr.testing.assert_identical(any_certificate, before)


def test_figures_of_a_saved_certificate_are_the_same(tmp_path):
    dataset = certificate()
    results.save(dataset, tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as opened:
        for draw in figures.FIGURES.values():
            draw(opened).savefig(tmp_path / "opened.png")
            draw(dataset).savefig(tmp_path / "made.png")
            assert (tmp_path / "opened.png").read_bytes() == (tmp_path / "made.png").read_bytes()


def test_heat_map_holds_the_shares_and_marks_what_is_exact():
    ieee, pytorch = figures.heat_map(certificate()).axes[:2]
    assert [axis.get_title() for axis in (ieee, pytorch)] == ["against IEEE 754", "against PyTorch"]
    shares = images(ieee)
    at = OPERATIONS.index("float32 sqrt"), MODES.index("pytorch")
    assert shares[at] == 0.17 and shares.count() == 5
    exact = set(zip(*(line.tolist() for line in ieee.get_lines()[0].get_data()), strict=True))
    assert len(exact) == shares.size - 5 and (at[1], at[0]) not in exact
    assert hatched(ieee) == hatched(pytorch) == 0
    assert {text.get_text() for text in ieee.texts} == {"17 %", "10 %", "5e-4", "1 %"}
    assert [label.get_text() for label in pytorch.get_xticklabels()] == MODES[1:]
    assert [label.get_text() for label in ieee.get_yticklabels()] == list(OPERATIONS)


def test_heat_map_tells_what_was_not_compared_from_what_is_exact():
    operations = ("bfloat16 Adam: param", *OPERATIONS)
    figure = figures.heat_map(certificate(operations, NOTHING, torch=False))
    panels = [axis for axis in figure.axes if axis.get_images() and axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["against IEEE 754"]
    assert images(panels[0]).count() == 0
    assert hatched(panels[0]) == len(operations) + 1  # PyTorch's column, and Adam under jit-reduced
    exact = panels[0].get_lines()[0].get_xdata()
    assert len(exact) == len(operations) * (len(MODES) - 1) - 1 and 0 not in exact


def test_heat_map_of_one_reference():
    figure = figures.heat_map(certificate(), "pytorch")
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["against PyTorch"]


def test_heat_map_separates_families():
    axis = figures.heat_map(certificate()).axes[0]
    lines = [line.get_ydata()[0] for line in axis.get_lines()[1:]]
    assert lines == [0.5, 2.5]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("float64 to float32 and back", "casts"),
        ("float16 reciprocal", "unary"),
        ("bfloat16 multiply", "binary"),
        ("bfloat16 multiply by a scalar", "optimizer parts"),
        ("float32 add a multiple", "optimizer parts"),
        ("float32 addcdiv", "optimizer parts"),
        ("float32 foreach lerp", "foreach forms"),
        ("float32 add a multiple (scalar loop)", "optimizer parts"),
        ("float32 Adam: exp_avg_sq", "Adam steps"),
        ("走", "unary"),
    ],
)
def test_family(name, family):
    assert figures.family(name) == family


def test_families_are_those_of_the_checks():
    checks = pytest.importorskip("jaxaudit.rounding.checks")
    for check in checks.all_checks("cpu"):
        assert figures.family(check.name) == check.family


def test_worst_differences_are_not_all_alike():
    chosen = figures.worst_differences(certificate())
    # Each cause with its worst; of float32 divide one mode only, and no second of float32 sqrt.
    assert chosen == [
        ("float32 sqrt", "pytorch", "ieee"),
        ("float32 divide", "eager", "ieee"),
        ("bfloat16 sqrt", "jit-reduced", "ieee"),
    ]
    assert figures.worst_differences(certificate(differences=NOTHING)) == []
    everything = figures.worst_differences(certificate(differences=EVERYTHING), 3)
    assert len(everything) == 3 == len({operation for operation, _, _ in everything})


def test_a_rare_cause_comes_before_a_second_of_a_frequent_one():
    differences: Differences = {
        **{(name, "jit", "ieee"): (600, 1.0, *FLUSHED) for name in OPERATIONS[:3]},
        ("float32 divide", "jit", "ieee"): (1, 1.0, *ROOT),
    }
    chosen = figures.worst_differences(certificate(differences=differences), 2)
    assert [operation for operation, _, _ in chosen] == ["float32 to bfloat16", "float32 divide"]


def test_worst_differences_show_each_cause_alone_where_they_can():
    both = ("A in float32; B.", "Mend A; Mend B.")
    differences: Differences = {
        ("float32 sqrt", "jit", "ieee"): (6000, 1.0, *both),
        ("float32 divide", "jit", "ieee"): (5000, 1.0, *both),
        ("bfloat16 sqrt", "jit", "ieee"): (3, 1.0, "A in bfloat16.", "Mend A."),
        ("bfloat16 sqrt", "eager", "ieee"): (2, 1.0, "A in bfloat16.", "Mend A."),
    }
    chosen = figures.worst_differences(certificate(differences=differences), 2)
    assert [key[:2] for key in chosen] == [("float32 sqrt", "jit"), ("bfloat16 sqrt", "jit")]


def test_number_line_shows_the_share_of_each_binade():
    dataset = certificate()
    figure = figures.number_line(dataset)
    axis = figure.axes[0]
    assert axis.get_title(loc="left").startswith(
        "float32 sqrt, pytorch against IEEE 754: 17 % differ, by up to 1 ulp\nPyTorch takes MKL"
    )
    at = {"operation": "float32 sqrt", "mode": "pytorch", "reference": "ieee"}
    share = dataset.differing_by_binade.sel(at) / dataset.compared_by_binade.sel(operation="float32 sqrt")  # fmt: skip
    drawn = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_y() + bar.get_height()
        for bar in axis.containers[0]
    }
    wanted = {int(b): float(s) for b, s in zip(BINADES, share.values, strict=True) if s > 0}
    assert drawn.keys() == wanted.keys()
    np.testing.assert_allclose([*drawn.values()], [*wanted.values()], rtol=1e-12)  # low + (s - low)
    assert axis.get_yscale() == "log" and axis.get_ylim()[0] < min(wanted.values())
    assert hatched(axis) == 1  # from 2^100 to 2^127 nothing was compared


# --- tables ---


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0"), (1, "100 %"), (0.17, "17 %"), (0.1, "10 %"), (0.0994, "9.9 %"), (0.015, "1.5 %")]
    + [(0.003, "0.3 %"), (0.00095, "0.1 %"), (0.0009, "9e-4"), (2e-6, "2e-6"), (1e-10, "1e-10")]
    + [(0.99999, "99.9 %"), (0.9951, "99.5 %"), (0.99, "99 %")],
)
def test_percent(share, text):
    assert tables.percent(share) == text


@pytest.mark.parametrize(
    ("distance", "text"),
    [(1.0, "1"), (0.5, "0.5"), (0.0078125, "0.0078"), (65535.0, "65,535"), (2139095041.0, "2e9")],
)
def test_ulp(distance, text):
    assert tables.ulp(distance) == text


def rows_of(markdown: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines()]  # fmt: skip
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


def test_markdown_of_every_operation():
    rows = rows_of(tables.markdown(certificate(), "operations"))
    assert rows["differs from IEEE 754"] == MODES
    zero = ["0"] * len(MODES)
    assert rows["float32 to bfloat16"] == zero
    assert rows["float32 sqrt"] == ["17 %, 1 ulp [2]", "0", "5e-4, 8e6 ulp [3]", *zero[3:]]
    assert rows["bfloat16 sqrt"] == [*zero[:3], "1 %, 0.5 ulp [1]", *zero[4:]]


def test_markdown_against_pytorch_leaves_pytorch_out():
    rows = rows_of(tables.markdown(certificate(), "operations", "pytorch"))
    assert rows["differs from PyTorch"] == MODES[1:]
    assert rows["float32 sqrt"][0] == "17 %, 1 ulp [2]"


def test_markdown_of_some_modes():
    rows = rows_of(tables.markdown(certificate(), modes=["jaxaudit", "jit"]))
    assert rows["differs from IEEE 754"] == ["jaxaudit", "jit"]
    assert rows["float32 to bfloat16; bfloat16 sqrt"] == ["0", "0"]
    assert rows["sqrt, divide (float32)"] == ["0", "5e-4 to 10 %, 8e6 ulp [3]"]


def test_markdown_marks_what_was_not_compared():
    operations = ("bfloat16 Adam: param", "float32 sqrt")
    rows = rows_of(tables.markdown(certificate(operations, NOTHING, torch=False), "operations"))
    assert rows["float32 sqrt"] == ["–", *["0"] * (len(MODES) - 1)]
    assert rows["bfloat16 Adam: param"][:4] == ["–", "0", "0", "–"]


def test_markdown_of_groups_that_differ_alike():
    differences: Differences = {
        ("float32 sqrt", "jit", "ieee"): (3, 1.0, *FLUSHED),
        ("bfloat16 sqrt", "jit", "ieee"): (600, 4.0, *FLUSHED),
        ("float32 divide", "jit", "ieee"): (600, 4.0, *ROOT),
    }
    rows = rows_of(tables.markdown(certificate(differences=differences)))
    assert [*rows][2:] == ["float32 to bfloat16", "sqrt (bfloat16, float32)", "float32 divide"]
    assert rows["sqrt (bfloat16, float32)"][2] == "5e-4 to 10 %, 4 ulp [1]"
    assert rows["float32 divide"][2] == "10 %, 4 ulp [2]"


def test_markdown_cells_stay_cells(any_certificate):
    for reference in REFERENCES:
        for rows in ("groups", "operations"):
            lines = tables.markdown(any_certificate, rows, reference).splitlines()
            bars = {line.replace(r"\|", "").count("|") for line in lines}
            assert bars == {len(MODES) + (2 if reference == "ieee" else 1)}


def test_explanations_are_one_line_per_cause():
    lines = tables.explanations(certificate()).splitlines()
    assert lines == [
        "1. not rounded. lax.reduce_precision. Against IEEE 754 in jit-reduced: bfloat16 sqrt.",
        "2. PyTorch takes MKL's root. torch.sqrt(x.double()).float(). Against IEEE 754 in pytorch: "
        "float32 sqrt; against PyTorch in eager: float32 sqrt.",
        "3. XLA flushes subnormal numbers on CPU. use jaxaudit.operations. Against IEEE 754 in eager: "
        "float32 divide; against IEEE 754 in jit: sqrt, divide (float32).",
    ]
    assert tables.explanations(certificate(differences=NOTHING)) == "Nothing differs.\n"


def test_difference_without_a_cause_is_not_explained():
    differences: Differences = {
        ("float32 sqrt", "jit", "ieee"): (1, 1.0, "", ""),
        ("float32 divide", "jit", "ieee"): (
            *(2, 1.0, "Not explained: no known cause gives one of the 2 differing samples."),
            "None is known.",
        ),
    }
    assert tables.explanations(certificate(differences=differences)) == (
        "1. Not explained by any known cause. Against IEEE 754 in jit: sqrt, divide (float32).\n"
    )


def test_causes_of_many_clauses_are_taken_apart():
    partly = "A (this explains 5 of 7 differing samples; the rest is not explained)."
    differences: Differences = {
        ("float32 sqrt", "jit", "ieee"): (3, 1.0, "A; B.", "Mend A; Mend B."),
        ("float32 divide", "jit", "ieee"): (3, 1.0, "B.", "Mend B."),
        ("bfloat16 sqrt", "jit", "ieee"): (3, 1.0, partly, "Mend A."),
        ("bfloat16 sqrt", "eager", "ieee"): (3, 1.0, "A; B.", "Mend both."),
    }
    dataset = certificate(differences=differences)
    rows = rows_of(tables.markdown(dataset, "operations"))
    assert [rows[name][2].split("[")[1] for name in OPERATIONS[1:]] == ["2, 3]", "2, 4]", "4]"]
    assert tables.explanations(dataset).splitlines() == [
        "1. A; B. Mend both. Against IEEE 754 in eager: bfloat16 sqrt.",
        "2. A. Mend A. Against IEEE 754 in jit: sqrt (bfloat16, float32).",
        "3. Not explained by any known cause. Against IEEE 754 in jit: bfloat16 sqrt.",
        "4. B. Mend B. Against IEEE 754 in jit: sqrt, divide (float32).",
    ]


def test_report_is_complete():
    page = tables.report(certificate())
    for part in (
        "## In short",
        "## Against IEEE 754",
        "## Against PyTorch",
        "## Explanations",
        "2.13.0",
    ):
        assert part in page
    assert "## Against PyTorch" not in tables.report(certificate(differences=NOTHING, torch=False))


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["float32 sqrt"], "float32 sqrt"),
        (["float32 sqrt", "float32 add"], "sqrt, add (float32)"),
        (["bfloat16 sqrt", "float16 sqrt", "float32 add"], "sqrt (bfloat16, float16); float32 add"),
        (["float32 to bfloat16", "float32 to float16"], "float32 to bfloat16, float16"),
        (["走"], "走"),
        ([], ""),
    ],
)
def test_together(names, text):
    assert tables.together(names) == text


def test_describe_says_what_differs_where():
    lines = tables.describe(certificate()).splitlines()
    assert lines[0] == "Backend     cpu (cpu), jax 0.10.2, PyTorch 2.13.0"
    assert lines[1].startswith("Extent      quick: 4 operations, ")
    table = {line[:30].rstrip(): line[30:].split() for line in lines}
    assert table["float32 sqrt"][:5] == ["17", "%", "0", "5e-4", "0"]
    verdict = " ".join(lines[lines.index("", 4) + 1 :])
    assert "As jaxaudit computes it: 0 of 24,000 results differ from IEEE 754, 0 of 24,0" in verdict
    assert "differs from IEEE 754 in 1 of 4 operations: float32 sqrt (1,020 of 6,000)." in verdict
    assert "eager 1 of 4, jit 2 of 4" in verdict


def test_describe_without_torch():
    text = tables.describe(certificate(differences=NOTHING, torch=False))
    assert "PyTorch not installed" in text and "PyTorch was not compared." in text


def test_describe_names_what_jaxaudit_gets_wrong():
    wrong = certificate(
        differences={("float32 sqrt", "jaxaudit-float64", "ieee"): (7, 1.0, "bug", "")}
    )
    assert tables.differs_from_ieee(wrong) and not tables.differs_from_ieee(certificate())
    text = " ".join(tables.describe(wrong).split())
    assert "7 of 24,000 in mode jaxaudit-float64; they differ in float32 sqrt." in text
    against_torch = {("float32 sqrt", "jaxaudit", "pytorch"): (7, 1.0, *ROOT)}
    assert not tables.differs_from_ieee(certificate(differences=against_torch))


def test_describe_fits_a_wide_terminal(any_certificate):
    """Lines are no wider than the names of all modes need."""
    for line in tables.describe(any_certificate).splitlines():
        assert len(line) <= 160 and line == line.rstrip()


def test_summary_is_null_where_nothing_was_compared():
    found = tables.summarize(certificate(differences=NOTHING, torch=False))
    one = found["operations"]["float32 sqrt"]
    assert one["pytorch"]["ieee"] == {
        "compared": 0,
        "differing": None,
        "max_ulp": None,
        "cause": "",
        "remedy": "",
    }
    assert one["jit"]["ieee"]["differing"] == 0 and found["exact"] is True


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("", []), ("one", ["one"]), (["one"], ["one"]), (["one", "two"], ["one", "two"]), ([], [])],
)
def test_notices(given, wanted, tmp_path):
    dataset = certificate(attributes={"notices": given})
    assert tables.notices(dataset) == wanted
    results.save(dataset, tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as opened:
        assert tables.notices(opened) == wanted
