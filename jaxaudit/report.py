"""An audit on one page: HTML that needs nothing but itself, neither network nor script."""

import base64
import html as markup
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from jaxaudit import plots
from jaxaudit.ledger import figures, verdict
from jaxaudit.ledger.verdict import Tree, group_names, number, percent, remedy_total, total
from jaxaudit.safetensors_file import printable

#: Of the audit's own figures those that go on the page, if it has no more groups than this.
AUDIT_FIGURES, AUDIT_GROUPS = {"agreement.png": plots.agreement}, 4

_DOTS_PER_INCH = 130
_LONG = 160  # characters of an attribute that is folded up

_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f3f5f7; --note: #57606a;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #14181d; --line: #3a424c; --soft: #1f252c;
  --note: #9aa5b1; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.note { color: var(--note); font-size: 0.9rem; }
ol.verdict { border-left: 0.3rem solid var(--mark); margin: 0; padding: 0.3rem 0 0.3rem 2.2rem; }
ol.verdict li { margin: 0.4rem 0; } code { font: 0.85em ui-monospace, monospace; }
figure { margin: 1.2rem 0; } img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; margin: 1.4rem 0; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; color: var(--note); padding-bottom: 0.3rem; max-width: calc(100vw - 2rem); }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { background: var(--soft); vertical-align: bottom; white-space: normal; } th[scope=row], th.first { text-align: left; }
table.facts { width: 100%; table-layout: fixed; } table.facts :is(td, th) { white-space: normal; } table.facts td { text-align: left; overflow-wrap: anywhere; }
table.facts th { width: 12rem; overflow-wrap: anywhere; font-weight: 600; }
pre { margin: 0.3rem 0; white-space: pre-wrap; font: 0.8rem/1.4 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--mark); }
@media screen and (max-width: 40rem) { body { padding: 0.6rem; } figure { overflow-x: auto; } img { width: 36rem; }
  table.facts th { width: 7.5rem; } th, td { padding: 0.25rem 0.4rem; }
  th[scope=row] { white-space: normal; min-width: 6.5rem; } }
@media print { body { max-width: none; font-size: 10pt; color: #000; background: #fff; }
  .wide { overflow: visible; } table { font-size: 7pt; } th, td { padding: 0.15rem 0.35rem; white-space: normal; }
  figure, tr, li, .wide { break-inside: avoid; } h2 { break-after: avoid; }
  details::details-content { content-visibility: visible !important; block-size: auto !important; } }
"""


def html(tree: Tree) -> str:
    """Write the page: verdict, figures, tables and provenance.

    Args:
        tree: the datasets of an audit by the name of their group, the audit's own as "". What belongs to a group
            that is missing is left out.

    Returns:
        A whole HTML document. Every text that came from the recording is escaped; whatever is not printable is a
        question mark.
    """
    root = tree[""]
    sections = [_verdict(tree), _figures(tree), _tables(tree), provenance(root)]
    return document(str(root.attrs.get("title", "jaxaudit")), _lead(root), sections)


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """Put a page together.

    Args:
        title: of the page, not escaped.
        lead: HTML below the title.
        sections: HTML of `section`; empty ones are left out.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escaped(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{escaped(title)}</h1>",
            lead,
            *filter(None, sections),
            "</main>",
            "</body>",
            "</html>\n",
        ]
    )


def escaped(value: Any) -> str:
    """Escape a value for HTML, in text and in quoted attributes."""
    return markup.escape(printable(str(value)), quote=True)


def _lead(root: xr.Dataset) -> str:
    """Say in a line what was audited and which arithmetic it replays under."""
    t, sizes = root.timestep.values, root.element_count.values
    groups = ", ".join(
        f"{name} {size:,}" for name, size in zip(group_names(root), sizes.tolist(), strict=True)
    )
    fits = str(root.attrs.get("identified_arithmetic", "")).replace(",", ", ")
    told = (
        f"Replays bit for bit under {fits}."
        if fits
        else "No arithmetic that was tried replays this recording bit for bit."
        if root.sizes["arithmetic"]
        else "The recording lacks what a replay needs: no arithmetic was tried."
    )
    followed = root.attrs.get("ledger_arithmetic", "")
    if followed:
        exactly = int(root.attrs.get("ledger_arithmetic_replays_exactly", 1))
        told += f" Updates and moments are those of {followed}"
        told += (
            "." if exactly else ", the nearest that was tried, which does not replay it exactly."
        )
    stored = root.attrs.get("storage_format", "")
    return (
        f'<p>{escaped(told)}</p>\n<p class="note">Timesteps {int(t[0]):,} to {int(t[-1]):,}, weights in '
        f"{escaped(stored)}; elements per timestep: {escaped(groups)}.</p>"
    )


def section(name: str, parts: Iterable[str]) -> str:
    """Write a section with a heading; nothing where there are no parts."""
    body = "\n".join(parts)
    key = name.lower().replace(" ", "-")
    heading = f'<h2 id="{key}">{name}</h2>'
    return f'<section aria-labelledby="{key}">\n{heading}\n{body}\n</section>' if body else ""


def _verdict(tree: Tree) -> str:
    return verdict_section((each.text, each.variables) for each in verdict.sentences(tree))


def verdict_section(told: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Write sentences, each with the names of the variables that it was made of."""
    items = [
        f'<li>{escaped(text)}<br><code class="note">{escaped(", ".join(names))}</code></li>'
        for text, names in told
    ]
    return section("Verdict", ['<ol class="verdict">', *items, "</ol>"] if items else [])


# Figures.


def _figures(tree: Tree) -> str:
    return section("Figures", (image(name, figure) for name, figure in _drawn(tree)))


def _drawn(tree: Tree) -> Iterator[tuple[str, Figure]]:
    for name, (groups, draw) in figures.FIGURES.items():
        if tree.keys() >= set(groups):
            yield name, draw(*(tree[group] for group in groups))
    root = tree[""]
    names = [verdict.short(name) for name in group_names(root)]
    if root.sizes["arithmetic"] and len(names) == len(set(names)) <= AUDIT_GROUPS:
        for name, draw in AUDIT_FIGURES.items():
            yield name, draw(root.assign_coords(token_group=names))


def image(name: str, figure: Figure) -> str:
    """Put a figure into the page, described by its titles."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    width, height = (round(inches * _DOTS_PER_INCH) for inches in figure.get_size_inches())
    titles = [figure.get_suptitle(), *(axis.get_title(loc="left") for axis in figure.axes)]
    described = "; ".join(" ".join(title.split()) for title in titles if title)
    described = described.replace(r"\$", "$")  # matplotlib's way to write one
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure id="{name.removesuffix(".png")}" tabindex="0"><img alt="{escaped(described)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


# Tables.


def _tables(tree: Tree) -> str:
    tables = [_agreement(tree[""]), _updates(tree), _moments(tree), _tokens(tree), _remedies(tree)]
    return section("Tables", filter(None, tables))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table whose first row and column are headers."""
    first, *others = header
    cells = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in others)
    lines = [
        f'<div class="wide" role="region" tabindex="0" aria-label="{escaped(caption)}">',
        f"<table><caption>{escaped(caption)}</caption>",
        f'<thead><tr><th scope="col" class="first">{escaped(first)}</th>{cells}</tr></thead>',
        "<tbody>",
    ]
    for name, *values in rows:
        cells = "".join(f"<td>{escaped(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _agreement(root: xr.Dataset) -> str:
    stages = [str(stage) for stage in root.stage.values]
    rows = []
    for name in root.arithmetic.values:
        one = root.sel(arithmetic=name, token_group="all")
        counts = [
            f"{int(one.mismatch_count.sel(stage=stage).sum()):,}"
            if int(one.audited.sel(stage=stage))
            else "not audited"
            for stage in stages
        ]
        rows.append([str(name), *counts])
    elements = int(root.element_count.sel(token_group="all")) * root.sizes["timestep"]
    caption = f"Elements whose replayed bits differ from the recorded ones, of {elements:,}"
    return table(caption, ["arithmetic", *stages], rows)


_UPDATE_COLUMNS = {
    "wanted": "wanted_count",
    "lost": "lost_count",
    "one ulp": "one_ulp_count",
    "more": "more_ulp_count",
    "against": "against_count",
    "decay wanted": "decay_wanted_count",
    "decay lost": "decay_lost_count",
}

_MOMENT_COLUMNS = {
    "second should fall": "exp_avg_sq_fall_count",
    "second did not": "exp_avg_sq_stuck_count",
    "first should fall": "exp_avg_fall_count",
    "first did not": "exp_avg_stuck_count",
    "second underflows": "exp_avg_sq_underflow_count",
    "eps dominates": "epsilon_dominates_count",
}

#: Counts that are shown as shares, too, and of what.
_WHOLES = {
    "lost_count": "wanted_count",
    "decay_lost_count": "decay_wanted_count",
    "exp_avg_sq_stuck_count": "exp_avg_sq_fall_count",
    "exp_avg_stuck_count": "exp_avg_fall_count",
}


def _sums(dataset: xr.Dataset, caption: str, columns: Mapping[str, str]) -> str:
    rows = [
        [name, *(_count(dataset, variable, name) for variable in columns.values())]
        for name in group_names(dataset)
    ]
    return table(caption, ["tokens", *columns], rows)


def _count(dataset: xr.Dataset, variable: str, group: str) -> str:
    """Write a count, summed over timesteps, with its share where there is one."""
    count = total(dataset, variable, group)
    if count is None:
        return "not audited"
    whole = total(dataset, _WHOLES[variable], group) if variable in _WHOLES else None
    return f"{count:,} ({percent(count, whole)})" if whole else f"{count:,}"


def _updates(tree: Tree) -> str:
    caption = "Updates over all timesteps: what the exact rule wanted, and what the weights did"
    return _sums(tree["updates"], caption, _UPDATE_COLUMNS) if "updates" in tree else ""


def _moments(tree: Tree) -> str:
    caption = "Moments over all timesteps: elements whose first or second moment should fall in size, and did not"
    return _sums(tree["moments"], caption, _MOMENT_COLUMNS) if "moments" in tree else ""


def _tokens(tree: Tree) -> str:
    if "tokens" not in tree:
        return ""
    tokens, rows = tree["tokens"], []
    for name in group_names(tokens):
        onsets = verdict.onsets_of(tokens, name)
        frozen, moved = int((onsets >= 0).sum()), onsets[onsets > 0]
        share = f" ({percent(frozen, len(onsets))})" if len(onsets) else ""
        median = f"{verdict.middle(moved):,}" if len(moved) else ""
        never = int((onsets == 0).sum())
        rows.append([name, f"{len(onsets):,}", f"{frozen:,}{share}", f"{never:,}", median])
    header = ["tokens", "count", "frozen at the end", "never moved", "median last move"]
    return table("Tokens: frozen ones did not move in the last timestep", header, rows)


def _remedies(tree: Tree) -> str:
    """Compare remedies for the groups that the figures show."""
    if not tree.keys() >= {"counterfactual", "updates", "tokens"}:
        return ""
    counterfactual, tokens = tree["counterfactual"], tree["tokens"]
    sizes = {name: len(verdict.onsets_of(tokens, name)) for name in group_names(tokens)}
    shown = verdict.shown_groups(counterfactual, figures.MOST_GROUPS, sizes)
    rows = [
        [f"{remedy}, {verdict.tokens_of(group, group_names(tokens))}", *_remedy(tree, str(remedy), group)]
        for remedy in counterfactual.remedy.values
        for group in shown
    ]  # fmt: skip
    header = ["remedy", "landed", "of the lost ones", "distance", "tokens moving"]
    caption = (
        "Remedies over the recorded gradients: updates that land one step from the recorded weights; left to itself, "
        "L2 distance to float32 master weights and tokens that move, at the last timestep"
    )
    note = str(counterfactual.attrs.get("gradients", ""))
    told = f'\n<p class="note">{escaped(note[:1].upper() + note[1:])}.</p>' if note else ""
    return table(caption, header, rows) + told


def _remedy(tree: Tree, remedy: str, group: str) -> list[str]:
    counterfactual = tree["counterfactual"]
    landed, recovered = (
        remedy_total(counterfactual, name, remedy, group)
        for name in ("landed_count", "recovered_count")
    )
    lost = total(tree["updates"], "lost_count", group)
    end = counterfactual.isel(timestep=-1).sel(remedy=remedy, token_group=group)
    apart, alone = float(end.free_distance), remedy != verdict.EXPECTED  # an expectation is no run
    return [
        f"{landed:,.0f}" if math.isfinite(landed) else "unknown",
        percent(recovered, lost) if lost and math.isfinite(recovered) else "",
        (number(apart) if math.isfinite(apart) else "unknown") if alone else "",
        f"{int(end.free_moving_tokens):,}" if alone else "",
    ]


# Provenance.


def provenance(root: xr.Dataset) -> str:
    """Write the section of a dataset's attributes."""
    rows = [
        f'<tr><th scope="row">{escaped(name)}</th><td>{_value(name, value)}</td></tr>'
        for name, value in root.attrs.items()
        if name != "verdict"
    ]
    lines = [
        '<table class="facts"><caption>How this was made: the attributes of the dataset</caption><tbody>',
        *rows,
        "</tbody></table>",
    ]
    return section("Provenance", lines)


def _value(name: str, value: Any) -> str:
    """Write an attribute; JSON with its structure, folded up where it is long."""
    text = _unfolded(str(value))
    if "\n" not in text and len(text) <= _LONG:
        return escaped(text)
    body = "\n".join(escaped(line) for line in text.splitlines())
    return f"<details><summary>{escaped(name)}</summary><pre>{body}</pre></details>"


def _unfolded(text: str) -> str:
    """Write a JSON object on several lines, line breaks in its texts as such; leave other texts as they are."""
    try:
        found = json.loads(text) if text[:1] in "{[" else None
    except (ValueError, RecursionError):
        return text
    if not found or not isinstance(found, dict | list):
        return text
    shown = json.dumps(found, indent=2, ensure_ascii=False)
    return re.sub(
        r"(?<!\\)((?:\\\\)*)\\n", r"\1\n", shown
    )  # but no backslash that stands before an n
