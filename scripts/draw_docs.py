"""Draw the figures of the documentation, from the catalogue and from the sample recording.

    python scripts/draw_docs.py
    python scripts/draw_docs.py --check

The first writes docs/figures/*.svg, a diagram of each arithmetic, and docs/figures/finding.png, what an audit of the
sample finds. The second writes nothing: it exits with 1 where a diagram is not what the catalogue gives now.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import step_diagrams
import xarray as xr
from matplotlib.figure import Figure

import jaxaudit
from jaxaudit.arithmetics import CATALOGUE

FOLDER = Path(__file__).parents[1] / "docs" / "figures"

_ASSUMED = "float32-then-bfloat16"
_COLOURS = {"dead": "#D55E00", "live": "#0072B2"}


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    p.add_argument("--check", action="store_true", help="compare the diagrams, write nothing")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, or check; 1 where a diagram is out of date."""
    arguments = parser().parse_args(argv)
    wanted = diagrams()
    if arguments.check:
        old = [path for path, text in wanted.items() if not _holds(path, text)]
        for path in old:
            print(f"{path} is out of date; run scripts/draw_docs.py", file=sys.stderr)
        return int(bool(old))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    tree = audited_sample()
    described = {"Software": None, "Description": json.dumps(numbers(tree))}
    finding(tree).savefig(FOLDER / "finding.png", dpi=150, metadata=described)
    return 0


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def diagrams() -> dict[Path, str]:
    """Draw every arithmetic of the catalogue."""
    return {
        FOLDER / f"{name}.svg": step_diagrams.svg(step_diagrams.trace(each))
        for name, each in CATALOGUE.items()
    }


def audited_sample() -> xr.DataTree:
    """Audit the recording that ships with the package."""
    path, groups = jaxaudit.sample_paths()
    with jaxaudit.open_recording(path) as recording:
        return jaxaudit.audit_tree(recording, jaxaudit.open_token_groups(groups), backend="cpu")


def numbers(tree: xr.DataTree) -> dict[str, float]:
    """Return what the figure says in numbers: values that differ, and percent of updates lost."""
    found: dict[str, float] = {"values": int(tree.element_count.sel(token_group="all"))}
    found["values"] *= tree.sizes["timestep"] * tree.sizes["stage"]
    for name in (tree.attrs["identified_arithmetic"].split(",")[0], _ASSUMED):
        part = tree.mismatch_count.sel(arithmetic=name, token_group="all")
        found[name] = int(part.sum())
    sums = tree["updates"].to_dataset().sum("timestep")
    for group in _COLOURS:
        one = sums.sel(token_group=group)
        found[group] = round(100 * float(one.lost_count / one.wanted_count))
    return found


def finding(tree: xr.DataTree) -> Figure:
    """Draw what an audit of the sample finds: which arithmetic it was, and where the updates of dead tokens go."""
    root, updates, said = tree.to_dataset(), tree["updates"].to_dataset(), numbers(tree)
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    part = root.cosine_similarity.sel(token_group="dead")
    exact = next(name for name in said if name in CATALOGUE)
    for name, colour, width in ((_ASSUMED, "#D55E00", 0.8), (exact, "#0072B2", 1.6)):
        label = f"{name}: {said[name]:,} of {said['values']:,} values differ"
        left.plot(part.timestep, part.sel(arithmetic=name), lw=width, color=colour, label=label)
    left.set(title="Replayed against recorded change, dead tokens", ylabel="cosine")
    share = updates.lost_count / updates.wanted_count
    for group, colour in _COLOURS.items():
        label = f"{group}: {said[group]} % over the run"
        right.plot(share.timestep, share.sel(token_group=group), lw=1.2, color=colour, label=label)
    right.set(title="Wanted updates that changed no weight", ylabel="share", ylim=(-0.03, 1.03))
    for axis in (left, right):
        axis.set_xlabel("timestep")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.5)
        axis.legend(fontsize=9.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


if __name__ == "__main__":
    sys.exit(main())
