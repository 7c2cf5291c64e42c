"""The report: well-formed, accessible and harmless HTML, opened in a real browser where there is one."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from browsers import Browser, find_browser
from made_ledgers import ATTRIBUTES, Made
from matplotlib.image import imread

from jaxaudit import report
from jaxaudit.ledger import verdict
from jaxaudit.safetensors_file import printable

VOID = {"meta", "link", "img", "br"}

EVIL = '<script>window.hacked = 1</script><img src=x onerror="hacked=1">\'&amp;\u202e\udcff\x07'
HOSTILE = Made(
    groups={EVIL: 2, "dead": 3},
    steps=4,
    gradients=False,
    attributes={
        "title": EVIL,
        "source": EVIL,
        "storage_format": EVIL,
        "identified_arithmetic": EVIL,
        EVIL: EVIL,
        "recording_metadata": json.dumps({EVIL: [EVIL, "C:\\new\\\\name\nnext"]}),
        "deep": "[" * 3000,
    },
)


class Page(html.parser.HTMLParser):
    """What a page holds; parsing fails where a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), "an attribute is given twice"
        self.tags.append((tag, dict(attrs), list(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((data, list(self.open)))

    def all(self, tag):
        return [attributes for name, attributes, _ in self.tags if name == tag]

    def words(self, *within):
        return [text.strip() for text, path in self.texts if text.strip() and path[-len(within) :] == [*within]]  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    return Made(groups={"dead": 6, "live": 4}, steps=40, decay=True).tree()


@pytest.fixture(scope="module")
def text(tree):
    return report.html(tree)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def hostile():
    return report.html(HOSTILE.tree())


def cells(page, first):
    """Return the cells of the only row whose header is as given."""
    starts = [k for k, (text, path) in enumerate(page.texts) if text == first and path[-1] == "th"]
    found = []
    for start in starts:
        row = []
        for text, path in page.texts[start + 1 :]:
            if "td" not in path:
                break
            row.append(text)
        found.append(row)
    return found


def test_the_page_stands_alone(text, page):
    assert text.startswith("<!DOCTYPE html>\n")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
    names = {tag for tag, _, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base", "audio", "video", "a"}  # fmt: skip
    for _, attributes, _ in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", report._STYLE)


def test_the_page_can_be_read_aloud(page):
    assert page.all("html") == [{"lang": "en"}]
    assert page.words("head", "title") == page.words("main", "h1") == [ATTRIBUTES["title"]]
    assert page.words("section", "h2") == ["Verdict", "Figures", "Tables", "Provenance"]
    ids = [attributes["id"] for _, attributes, _ in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {each["aria-labelledby"] for each in page.all("section")} <= set(ids)
    assert all(len(image["alt"]) > 40 for image in page.all("img"))
    assert all(each.get("scope") in ("row", "col") for each in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == 6


def test_the_verdict_is_on_the_page(tree, page):
    told = verdict.sentences(tree)
    assert page.words("ol", "li") == verdict.lines(told)
    assert page.words("li", "code") == [", ".join(each.variables) for each in told]


def test_every_figure_is_on_the_page_and_described(page):
    names = [figure["id"] for figure in page.all("figure")]
    assert names == ["cooling", "lost_updates", "ratchet", "freeze_onset", "remedies", "agreement"]
    for image in page.all("img"):
        data = image["src"].removeprefix("data:image/png;base64,")
        pixels = imread(io.BytesIO(base64.b64decode(data, validate=True)))
        assert pixels.shape[:2] == (int(image["height"]), int(image["width"]))
        assert pixels.std() > 0.01
    assert page.all("img")[3]["alt"].startswith("Frozen at the end: ")


def test_tables_hold_the_sums(tree, page):
    (agreement, *_) = cells(page, "torch-cpu-loop")
    assert agreement == ["0", "0", "0"]
    (other,) = cells(page, "float32-then-bfloat16")
    assert other == [f"{int(tree[''].element_count[0]) // 10 * 40:,}"] * 3
    updates, moments, tokens = cells(page, "dead")
    rows = {name: tree["updates"][f"{name}_count"].values[:, 1].tolist() for name in ("wanted", "lost", "one_ulp", "more_ulp")}  # fmt: skip
    sums = {name: sum(row) for name, row in rows.items()}
    share = f"{100 * sums['lost'] / sums['wanted']:.0f} %"
    assert updates[:4] == [f"{sums['wanted']:,}", f"{sums['lost']:,} ({share})", f"{sums['one_ulp']:,}", f"{sums['more_ulp']:,}"]  # fmt: skip
    assert updates[4:] == ["0", f"{sums['wanted']:,}", f"{sums['wanted']:,} (100 %)"]
    fallen = sum(tree["moments"].exp_avg_sq_fall_count.values[:, 1].tolist())
    assert moments[:4] == [f"{fallen:,}", f"{fallen:,} (100 %)", f"{fallen:,}", "0 (0 %)"]
    onsets = tree["tokens"].freeze_onset.values[:6].tolist()
    moved = sorted(t for t in onsets if t > 0)
    assert tokens == ["6", "6 (100 %)", str(onsets.count(0)), str(moved[(len(moved) - 1) // 2])]
    (kahan,) = cells(page, "kahan, dead tokens")
    found = tree["counterfactual"].sel(remedy="kahan", token_group="dead")
    assert kahan == [
        f"{sum(found.landed_count.values.tolist()):,.0f}", "2 %", f"{float(found.free_distance[-1]):.3g}", "6"
    ]  # fmt: skip


def test_what_was_not_audited_is_not_zero(tree):
    unknown = tree["moments"].copy(deep=True)
    unknown["exp_avg_stuck_count"][:] = -1
    landed = tree["counterfactual"].copy(deep=True)
    landed["landed_count"][:] = np.nan
    only = {"": tree[""], "moments": unknown, "updates": tree["updates"], "tokens": tree["tokens"]}
    text = report._tables({**only, "counterfactual": landed})
    assert text.count("<td>not audited</td>") == 3
    assert text.count("<td>unknown</td>") == landed.sizes["remedy"] * 3


def test_all_attributes_are_on_the_page(tree, page):
    names = page.words("tr", "th")[-len(tree[""].attrs) :]
    assert names == list(tree[""].attrs)
    assert cells(page, "jax_version") == [["0.10.2"]]


def test_text_from_files_does_nothing(hostile):
    hostile.encode()  # no lone surrogate is left
    page = Page(hostile)
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    shown = printable(EVIL)
    assert page.words("main", "h1") == [shown]
    assert shown in page.words("tr", "th")
    assert f"Replays bit for bit under {shown}." in page.words("main", "p")
    assert "window.hac" in "".join(image["alt"] for image in page.all("img")), "groups in titles"
    (pre,) = [text for text in page.words("details", "pre") if "new" in text]
    assert '"C:\\\\new\\\\\\\\name\nnext"' in pre, "as JSON has it, with its line break"
    assert "[" * 3000 in page.words("details", "pre")


@pytest.mark.parametrize("exact", [0, 1])
def test_what_the_ledger_followed_is_said(tree, exact):
    given = {"ledger_arithmetic": "optax (jit)", "ledger_arithmetic_replays_exactly": exact}
    text = report._lead(tree[""].assign_attrs(given))
    assert "Updates and moments are those of optax (jit)" in text
    assert ("does not replay it exactly" in text) == (not exact)


def test_what_is_missing_is_left_out(hostile, tree):
    page = Page(hostile)
    names = [figure["id"] for figure in page.all("figure")]
    assert names == ["cooling", "freeze_onset", "agreement"]
    bare = Page(report.html({"": tree[""].drop_attrs(), "free_run": tree["free_run"]}))
    assert bare.words("section", "h2") == ["Figures", "Tables", "Provenance"]
    assert bare.words("main", "h1") == ["jaxaudit"]


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("no browser of the Chromium family on PATH, nor in JAXAUDIT_BROWSER")
    with Browser(path, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def opened(browser, tmp_path):
    def show(text):
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        return browser.open(file.as_uri())

    return show


def test_a_browser_shows_the_page_and_asks_for_nothing_else(opened, text):
    page = opened(text)
    assert page.evaluate("document.title") == ATTRIBUTES["title"]
    images = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(images) == 6
    assert all(width > 900 for width in images)
    asked = page.requests()
    assert [address for address in asked if not address.startswith("data:")] == [
        page.evaluate("location.href")
    ]
    assert page.complaints() == []


def test_a_browser_fits_the_page_to_phone_night_and_paper(opened, text):
    page, colours = opened(text), {}
    for width in (320, 412, 1200):
        page.resize(width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        rgb = "getComputedStyle(document.body)"
        found = page.evaluate(f"[{rgb}.color, {rgb}.backgroundColor]")
        colours[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in found]
    assert colours["light"][0] < 0.2 < 0.9 < colours["light"][1]
    assert colours["dark"][1] < 0.2 < 0.8 < colours["dark"][0]
    assert imread(io.BytesIO(page.screenshot())).std() > 0.05
    assert page.printed().startswith(b"%PDF-")


def test_a_browser_runs_nothing_that_came_from_a_file(opened, hostile):
    page = opened(hostile)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.querySelector('h1').textContent") == printable(EVIL)
    assert page.complaints() == []


def test_a_browser_refuses_what_the_policy_forbids(opened, text):
    """What the tests above look for would be seen: a page that does both is stopped, and says so."""
    evil = "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/x.png'></main>"
    page = opened(text.replace("</main>", evil))
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("[...document.images].at(-1).naturalWidth") == 0
    complaints = page.complaints()
    assert any("inline script" in each for each in complaints)
    assert any("127.0.0.1:9" in each for each in complaints)
