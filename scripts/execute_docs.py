"""Run the code of the documentation and keep what it prints and draws.

    python scripts/execute_docs.py
    python scripts/execute_docs.py docs/old-notebook.ipynb --check

A notebook is run by a Jupyter kernel of this interpreter, in its own folder, and gets its outputs anew. The Python
blocks of a page are run one after the other, as one script, in an empty folder that holds the project's `results`; the
figures that they save, and that the page shows from `figures/`, replace the stored ones. Nothing is written unless all
code ran.

With --check no document is written. It fails if a notebook prints anything else than it holds or draws another
number of figures, or if a page draws others than it shows. Pixels are not compared: they change with versions of
matplotlib, and what is drawn of a training run changes with the processor. The build of the pages does the same with
each notebook, and shows what came out. Where results/full.nc is missing, the old notebook's statements are checked on
the sample, which is audited first.

Exit status: 0 all code ran; 1 some code failed, or --check found a difference; 2 wrong usage, or an output that
cannot be written; 3 a document that is missing or is none; 130 interrupted.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting import Failure, guarded, notify

ROOT = Path(__file__).resolve().parents[1]

#: Its stored outputs are of FULL, which comes with the repository; without that it opens SAMPLE.
OLD_NOTEBOOK = ROOT / "docs/old-notebook.ipynb"
FULL, SAMPLE = ROOT / "results/full.nc", ROOT / "results/sample.nc"

#: What is run by default.
DOCUMENTS = (OLD_NOTEBOOK, ROOT / "docs/analyses.md")

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SHOWN = re.compile(r"!\[[^\]]+\]\(figures/([^)]+\.png)\)")

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # colours in a traceback
_ARROW = re.compile(r"^-+> *\d+ (.*)$", re.MULTILINE)  # the line at which it happened

_SECONDS = 300  # that a notebook may take


def blocks(page: str) -> list[tuple[int, str]]:
    """Return the Python blocks of a page, each with the number of its first line."""
    return [(page.count("\n", 0, m.start(1)) + 1, m[1]) for m in _BLOCK.finditer(page)]


def shown(page: str) -> list[str]:
    """Return the names of the figures that a page shows."""
    return _SHOWN.findall(page)


def run_page(path: Path, folder: Path) -> dict[str, Any]:
    """Run the blocks of a page in a folder, where they leave what they write.

    Returns:
        The names that the blocks leave behind.

    Raises:
        Failure: a block failed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    page = path.read_text(encoding="utf-8")
    (folder / "results").symlink_to(ROOT / "results")  # read, never written
    names: dict[str, Any] = {"__name__": path.stem}
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
            for line, block in blocks(page):
                # Blank lines in front make the numbers of lines those of the page.
                exec(compile("\n" * (line - 1) + block, str(path), "exec"), names)
    except Exception as error:
        raise Failure(f"{path}: {_told(error, path)}", 1) from error
    finally:
        pyplot.close("all")
    return names


def _told(error: Exception, path: Path) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]  # fmt: skip
    where = f"line {frames[-1].lineno}: " if frames else ""
    text = str(error).strip() or (frames[-1].line if frames else "") or ""
    return f"{where}{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def figures_of(path: Path, folder: Path) -> dict[Path, bytes]:
    """Return the figures that a page's blocks left in a folder, by where they belong.

    Raises:
        Failure: they are others than the page shows.
    """
    drawn = {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}
    wanted = {*shown(path.read_text(encoding="utf-8"))}
    if {*drawn} != wanted:
        odd = ", ".join(sorted({*drawn} ^ wanted))
        raise Failure(f"{path}: drawn but not shown, or shown but not drawn: {odd}.", 1)
    return {path.parent / "figures" / name: content for name, content in drawn.items()}


def run_notebook(path: Path) -> Any:
    """Run a notebook and return it with its new outputs; the file stays as it is.

    Raises:
        Failure: it is none, a cell failed or wrote to stderr, or what runs it is not installed.
    """
    try:
        import nbformat
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient
        from nbclient.exceptions import CellControlSignal
        from traitlets.config import Config
    except ImportError as error:
        text = f'{error.name} is missing; pip install "jaxaudit[docs]" to run notebooks.'
        raise Failure(text, 1) from error
    notebook = read_notebook(path)
    with tempfile.TemporaryDirectory() as folder:
        # Over sockets in a folder of its own, not over the network, and without anyone's settings.
        sockets = {"connection_file": f"{folder}/kernel.json", "ip": f"{folder}/kernel"}
        settings = Config({"KernelManager": {"transport": "ipc", **sockets}})
        end = time.monotonic() + _SECONDS
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout_func=lambda cell: max(1, int(end - time.monotonic())),
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        # Without the folders in which kernels are looked up, `python3` is this interpreter, whatever is installed.
        native = KernelSpecManager(kernel_dirs=[])
        client.km = AsyncKernelManager(config=settings, kernel_spec_manager=native)
        client.log.setLevel("WARNING")
        try:
            client.execute(env=_environment(folder))
        except (CellControlSignal, RuntimeError) as error:
            raise Failure(f"{path}: {_failed_cell(notebook, error)}", 1) from error
    nbformat.validate(notebook)
    return _cleaned(notebook, path)


def read_notebook(path: Path) -> Any:
    """Read a notebook.

    Raises:
        Failure: it is none.
    """
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise Failure(f"{path}: not a Jupyter notebook of version 4.", 3) from error


def _environment(settings: str) -> dict[str, str]:
    # A backend that was chosen for scripts would keep figures out of the notebook.
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return kept | {"IPYTHONDIR": settings, "JUPYTER_CONFIG_DIR": settings}


def _failed_cell(notebook: Any, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"not done after {_SECONDS} seconds."
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                lines = _ARROW.findall(_ESCAPE.sub("", "\n".join(output.traceback)))
                text = output.evalue.strip() or (lines or cell.source.splitlines())[0].strip()
                return f"cell {number}: {output.ename}: {text.splitlines()[0]}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _cleaned(notebook: Any, path: Path) -> Any:
    """Leave out of a notebook what changes from run to run, or only repeats a figure in words."""
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise Failure(f"{path}: cell {number} wrote to stderr: {output.text.strip()}", 1)
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": output.data["image/png"]}
                output["metadata"] = {}
    return notebook


def outputs(notebook: Any) -> list[tuple[str, int]]:
    """Return of each code cell what it printed, and how many figures it drew."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            texts = ["".join(output.get("text", "")) for output in cell["outputs"]]
            drawn = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
            found.append(("".join(texts), drawn))
    return found


def check_notebook(path: Path, new: Any) -> None:
    """Fail if a notebook holds other outputs than those of a new run."""
    old = outputs(read_notebook(path))
    differ = [str(k) for k, pair in enumerate(zip(old, outputs(new), strict=True), 1) if pair[0] != pair[1]]  # fmt: skip
    if differ:
        raise Failure(
            f"{path}: code cells {', '.join(differ)} give something else than is stored. "
            f"Read what changed, then run: python scripts/execute_docs.py {path}",
            1,
        )


def checked(path: Path) -> Any:
    """Run a notebook, compare what it gives with what it holds, and return it with its new outputs.

    Raises:
        Failure: it cannot be run, a statement in it is not true, or the outputs differ.
    """
    if path == OLD_NOTEBOOK:
        make_result()
    notebook = run_notebook(path)
    if path != OLD_NOTEBOOK or FULL.exists():
        check_notebook(path, notebook)
    return notebook


def make_result() -> None:
    """Audit the sample where there is no result for the old notebook to open.

    Raises:
        Failure: the audit failed.
    """
    if FULL.exists() or SAMPLE.exists():
        return
    notify(f"Auditing the sample, as there is no {FULL}")
    command = [sys.executable, "-m", "jaxaudit", "audit", "--quiet", "--output", str(SAMPLE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"the sample's audit failed: {done.stderr.strip()[-500:]}", 1)


def check_figures(figures: Mapping[Path, bytes]) -> None:
    """Fail if a figure is not stored, or has another size in pixels."""
    for file, content in figures.items():
        if not file.exists():
            raise Failure(f"{file} is missing. Run: python scripts/execute_docs.py", 1)
        if size(file.read_bytes()) != size(content):
            raise Failure(f"{file} has another size than what is drawn now.", 1)


def size(png: bytes) -> tuple[int, int]:
    """Return width and height of a PNG file's content."""
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as unfinished:
            unfinished.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def made(path: Path, *, check: bool) -> dict[Path, bytes]:
    """Run a document and return the files that come of it; with `check`, compare instead and return none."""
    if path.suffix != ".ipynb":
        with tempfile.TemporaryDirectory() as folder:
            run_page(path, Path(folder))
            files = figures_of(path, Path(folder))
        if check:
            check_figures(files)
        return {} if check else files
    if check:
        checked(path)
        return {}
    if path == OLD_NOTEBOOK and not FULL.exists():
        raise Failure(f"{FULL} is missing, of which {path.name} shows the outputs.", 3)
    notebook = run_notebook(path)
    import nbformat

    return {path: (nbformat.writes(notebook) + "\n").encode()}


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    told = "notebooks (.ipynb) and pages (.md) (docs/old-notebook.ipynb and docs/analyses.md)"
    p.add_argument("documents", nargs="*", type=Path, default=list(DOCUMENTS), help=told)
    p.add_argument("--check", action="store_true", help="write nothing; fail if anything differs")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the documents; return the exit status."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Look at all documents, run them all, then write."""
    for path in arguments.documents:
        if path.suffix not in (".ipynb", ".md"):
            raise Failure(f"{path}: needed a notebook (.ipynb) or a page (.md).", 2)
        if not path.is_file():
            raise Failure(f"{path}: there is no such file.", 3)
    files: dict[Path, bytes] = {}
    for path in arguments.documents:
        notify(f"Running {path}")
        files |= made(path.resolve(), check=arguments.check)
    for file, content in files.items():
        write(file, content)
        print(f"Written {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
