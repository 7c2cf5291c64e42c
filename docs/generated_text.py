"""The parts of the pages that are made from the package itself, when the pages are built.

A line `<!-- generated: NAME -->` of a page is replaced by the text of that name, with ARGUMENT where there is one:
`<!-- generated: NAME ARGUMENT -->`.
"""

import argparse
import importlib
import json
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jaxaudit
from jaxaudit.arithmetics import VARIANTS, Arithmetic
from jaxaudit.results import COORDINATES, Field

ROOT = Path(__file__).parents[1]

_PLACE = re.compile(r"^<!-- generated: (\S+)(?: (.+?))? -->$", re.MULTILINE)

#: Where the diagram of an arithmetic lies; `scripts/draw_docs.py` draws it.
DIAGRAM = "figures/{}.svg"


def fill_in(page: str) -> str:
    """Replace every place of a page that asks for generated text."""
    return _PLACE.sub(lambda match: _TEXTS[match[1]](*filter(None, [match[2]])), page)


def variables(name: str) -> str:
    """Return a table of the variables of `MODULE:TABLE`."""
    return "\n".join(_table(_variables_of(name)))


def _variables_of(name: str) -> Mapping[str, Field]:
    module, table = name.split(":")
    return getattr(importlib.import_module(module), table)


def coordinates() -> str:
    """Return a table of all coordinates."""
    return "\n".join(_table(COORDINATES))


def _table(fields: Mapping[str, Field]) -> Iterator[str]:
    yield "| variable | dimensions | dtype | units | long_name, comment |"
    yield "|---|---|---|---|---|"
    for name, field in fields.items():
        comment = f"<br>*{_cell(field.comment)}*" if field.comment else ""
        yield (
            f"| `{name}` | {', '.join(field.dims)} | {field.dtype} | {field.units} | "
            f"{_cell(field.long_name)}{comment} |"
        )


def _cell(text: str) -> str:
    """Keep a text from being taken for markup: names in backticks stay code."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_|<>\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def options(name: str) -> str:
    """Describe the command line of a script from its own parser."""
    parser = parser_of(name)
    # What argparse would put into the help, such as the default's value.
    formatter = argparse.HelpFormatter(parser.prog)
    lines = ["```{program} " + f"{name}.py", "```", ""]
    # Wrapped at a width that no terminal decides.
    positional = [a.metavar or a.dest for a in parser._actions if not a.option_strings]
    words = " ".join(f"[{word}]" for word in map(str, positional))
    lines += ["```", f"python scripts/{name}.py {words}".rstrip() + " [options]", "```", ""]
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        told = formatter._expand_help(action) if action.help else ""
        shown = _invocation(action)
        lines += ["```{option} " + shown, _sentence(told, action), "```", ""]
    return "\n".join(lines)


def _invocation(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else ""
        value = str(action.metavar or choices or action.dest.upper())
    if not action.option_strings:
        return str(action.metavar or action.dest)
    return ", ".join(f"{option} {value}".rstrip() for option in action.option_strings)


def _sentence(told: str, action: argparse.Action) -> str:
    text = _cell(" ".join(told.split()))
    if action.choices:
        one_of = "One of " + ", ".join(f"`{choice}`" for choice in action.choices)
        text = f"{text}. {one_of}" if text else one_of
    # Of lists, which do not read well, the help says what is meant.
    silent = action.default in (None, False, argparse.SUPPRESS) or action.nargs == 0
    silent = silent or isinstance(action.default, list)
    if not silent and str(action.default) not in told:
        text += f" (default: `{action.default}`)"
    return (text[:1].upper() + text[1:] or "On or off") + "."


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return a script's own parser."""
    folder = str(ROOT / "scripts")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name).parser()


def catalogue() -> str:
    """Describe every arithmetic: what it replays, its formula, a diagram, its variants, and what was compared."""
    return "\n".join(line for each in VARIANTS.values() for line in _arithmetic(each))


def _arithmetic(variants: Sequence[Arithmetic]) -> Iterator[str]:
    one = variants[0]
    formats = [fmt.name for fmt in dict.fromkeys(f for each in variants for f in each.storages)]
    yield f"### {one.name}\n"
    yield f"{_cell(one.summary)}.\n"
    yield f"```text\n{one.formula}\n```\n"
    yield f"![Rounding points of {one.name}]({DIAGRAM.format(one.name)})\n"
    confirmed = one.confirmed or "nothing yet; see [Limits](limits.md)"
    for term, text in {
        "formats of the weights": ", ".join(formats),
        "options": ", ".join(_options_of(one)) or "none",
        "variants": "; ".join(_cell(each.variant) for each in variants[1:]) or "none",
        "source": _cell(one.source),
        "compared bit for bit with": confirmed if not one.confirmed else _cell(confirmed),
    }.items():
        yield f"{term}\n: {text}.\n"


def scalars() -> str:
    """List the scalars of a step, as the module that computes them does."""
    module = importlib.import_module("jaxaudit.scalars")
    return "\n".join(re.findall(r"^\* .*(?:\n  .*)*", module.__doc__ or "", re.MULTILINE))


def _options_of(one: Arithmetic) -> Iterator[str]:
    yield from ({"decoupled": "decoupled decay", "l2": "L2 decay"}[decay] for decay in one.decays)
    yield from (name for name in ("amsgrad", "maximize") if getattr(one, name))


def evidence() -> str:
    """Sum up results/arithmetics.json: what was compared with real runs, by arithmetic and format."""
    found = json.loads((ROOT / "results" / "arithmetics.json").read_text(encoding="utf-8"))
    sums: dict[tuple[str, str, str], list[int]] = {}
    for each in found["compared"]:
        key = each["arithmetic"], each["format"], each["against"]
        added = (each["recordings"], each["elements"], sum(each["different"].values()))
        sums[key] = [a + b for a, b in zip(sums.get(key, (0, 0, 0)), added, strict=True)]
    machine = found["machine"]
    lines = [
        f"{machine['cpu']} ({machine['torch_cpu_capability']}), {machine['system']}, Python {machine['python']}, "
        f"{machine['date'][:10]}:",
        "",
        "| arithmetic | format | compared with | recordings | elements | mismatches |",
        "|---|---|---|---:|---:|---:|",
    ]
    for (name, fmt, against), counts in sorted(sums.items(), key=_place):
        numbers = " | ".join(f"{n:,}" for n in counts)
        lines.append(
            f"| [{name}](adam-arithmetics.md#{name}) | {fmt} | {_cell(against)} | {numbers} |"
        )
    return "\n".join(lines)


def _place(row: tuple[tuple[str, str, str], list[int]]) -> tuple[int, tuple[str, str, str]]:
    return list(VARIANTS).index(row[0][0]), row[0]


def unconfirmed() -> str:
    """List the arithmetics that no real run was compared with."""
    names = [name for name, each in VARIANTS.items() if not each[0].confirmed]
    return "\n".join(f"- [{name}](adam-arithmetics.md#{name})" for name in names)


def members(name: str) -> str:
    """Describe names of the package, or everything public in one of its modules.

    Names with a dot are of types that one gets and does not import.
    """
    for module in {each.rpartition(".")[0] for each in name.split()} - {""}:
        importlib.import_module(f"jaxaudit.{module}")
    lines = ["```{eval-rst}"]
    for each in name.split():
        found = operator.attrgetter(each)(jaxaudit)
        if type(found).__name__ == "module":
            lines += [f".. automodule:: jaxaudit.{each}", "   :members:", "   :imported-members:" if each == "recorders" else ""]  # fmt: skip
        elif isinstance(found, type):
            lines += [f".. autoclass:: jaxaudit.{each}", "   :members:"]
        elif callable(found):
            lines += [f".. autofunction:: jaxaudit.{each}"]
        else:
            home = jaxaudit._HOME[each]  # where the comment is that describes it
            lines += [f".. autodata:: jaxaudit.{home}.{each}", "   :no-value:"]
        lines.append("")
    return "\n".join([*lines, "```"])


_TEXTS: dict[str, Callable[..., str]] = {
    "variables": variables,
    "coordinates": coordinates,
    "options": options,
    "catalogue": catalogue,
    "scalars": scalars,
    "evidence": evidence,
    "unconfirmed": unconfirmed,
    "members": members,
}
