"""How Sphinx builds these pages: offline, with every warning an error.

    sphinx-build -W --keep-going -q docs build/docs

Nothing is fetched: the theme's files are local, there are no inventories of other projects, and a page that asks for
anything from the network is a warning.
"""

import importlib
import re
import sys
from html.parser import HTMLParser
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import nbformat
from sphinx.application import Sphinx
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))
import generated_text

execute_docs: Any = importlib.import_module("execute_docs")

project = "jaxaudit"
author = "The jaxaudit developers"
project_copyright = "The jaxaudit developers"
version = release = version_of("jaxaudit")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build", "_build"]
default_role = "code"
highlight_language = "none"

# Internal links and anchors must exist, and so must everything of this package that a docstring's types name.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!jaxaudit).*"),  # the types of other projects, whose pages are not at hand
    (r"py:.*", r"(.*\.)?_\w+"),
]

myst_enable_extensions = ["deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Notebooks are run by `_execute` below, so that the pages show what scripts/execute_docs.py stores.
nb_execution_mode = "off"
nb_output_stderr = "warn"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"jaxaudit {release}"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

_EXTERNAL = re.compile(r"(https?:)?//")


class _Loads(HTMLParser):
    """Lists what a page loads from elsewhere; links that a reader may follow are not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at the attributes that make a browser load something."""
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "author", "search"):
            return
        names = ("src", "srcset", "data", "poster") + (("href",) if tag == "link" else ())
        self.found += [
            value for name in names if (value := given.get(name)) and _EXTERNAL.match(value)
        ]


def _mark_up_docstring(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:  # fmt: skip
    """Keep docstrings' formulas and examples as they are written.

    Outside of code, `beta1*m` begins no emphasis and `v_` is no link. What is indented below a paragraph is code.
    """
    if (
        what in ("property", "attribute", "data") and lines
    ):  # what is before a colon would be taken for a type
        lines[0] = lines[0].replace(": ", " – ")
    last, code, marked = "", False, []
    for k, line in enumerate(lines):
        if line.strip():
            begins = line.startswith("    ") and k and not lines[k - 1].strip()
            if begins and not code and not last.startswith(" ") and not last.endswith(":"):
                marked += ["::", ""]
                code = True
            code = code and line.startswith("    ")
            last = line
        marked.append(line if code else _escaped(line))
    lines[:] = marked


def _escaped(line: str) -> str:
    parts = re.split(r"(``.*?``|`[^`]*`)", line)
    parts[::2] = [re.sub(r"\*|\||(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def _execute(app: Sphinx, name: str, source: list[str]) -> None:
    """Run a notebook, and show its new outputs; one that fails, or gives something else than it holds, is a warning."""
    path = Path(app.env.doc2path(name))
    if path.suffix != ".ipynb":
        return
    app.env.note_dependency(str(execute_docs.FULL))
    try:
        source[0] = nbformat.writes(execute_docs.checked(path))
    except execute_docs.Failure as failure:
        logging.getLogger(__name__).warning("%s", failure, location=name)


def _fill_in(app: Sphinx, name: str, source: list[str]) -> None:
    # On GitHub the link leads to the file itself.
    text = source[0].replace("(../results/rounding_cpu.md)", "(rounding-on-cpu.md)")
    # `PAGE?` in a table of contents is a page that may be missing.
    text = re.sub(r"^(\S+)\?\n", lambda m: f"{m[1]}\n" * _exists(m[1]), text, flags=re.MULTILINE)
    source[0] = generated_text.fill_in(text)


def _exists(page: str) -> bool:
    return any(Path(__file__).with_name(page + ending).exists() for ending in (".md", ".ipynb"))


def _list_generated(app: Sphinx, env: Any, added: Any, changed: Any, removed: Any) -> list[str]:
    """Name the pages to read anew though their own text has not changed."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in Path(app.srcdir).glob("*.md")}
    return [name for name, text in pages.items() if "<!-- generated: " in text or "?\n" in text]


def _check_offline(app: Sphinx, failure: Exception | None) -> None:
    if failure or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        reader = _Loads()
        reader.feed(page.read_text(encoding="utf-8"))
        for address in reader.found:
            where = page.relative_to(app.outdir)
            logging.getLogger(__name__).warning("%s would load %s", where, address)


def setup(app: Sphinx) -> None:
    """Connect what these pages need beside the extensions."""
    app.connect("env-get-outdated", _list_generated)
    app.connect("source-read", _execute)
    app.connect("source-read", _fill_in)
    # Before napoleon, which makes its own markup of the text.
    app.connect("autodoc-process-docstring", _mark_up_docstring, priority=400)
    app.connect("build-finished", _check_offline)
