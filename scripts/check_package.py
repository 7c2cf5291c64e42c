"""Build the package, install it where nothing else is, and audit the sample there, away from the checkout.

    python scripts/check_package.py

The source distribution is built from the checkout, and the wheel from that. Checked are: what the two hold, how large the
wheel is, what it asks for, that a new environment with the core packages alone can do what README promises, that
what needs an extra says so in one line, and how long the import takes beside JAX's. It takes half a minute.

Exit status: 0 all is as it should be; 1 something is not; 2 wrong usage; 130 interrupted.
"""

import argparse
import email
import json
import re
import resource
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from environments import ROOT, called, needed, uv
from reporting import Failure, guarded

#: Bytes of the largest wheel, the sample among them.
LARGEST_WHEEL = 12_000_000

#: What the wheel and the source distribution must hold, and what the wheel must not.
IN_WHEEL = (
    *("jaxaudit/py.typed", "jaxaudit/data/sample.safetensors", "jaxaudit/data/README.md"),
    *("jaxaudit/data/sample-token-groups.safetensors", "dist-info/licenses/LICENSE"),
    "dist-info/entry_points.txt",
)
IN_SOURCE = (
    *("scripts/run_audit.py", "tests/conftest.py", "docs/recording.md", "CONTRIBUTING.md"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "results/arithmetics.json"),
)
NOT_IN_WHEEL = re.compile(r"(^|/)(tests|scripts|results|docs|__pycache__)/")

#: What comes with extras only.
EXTRAS = ("torch", "transformers", "tokenizers", "optax", "h5py", "distributed", "dask")

#: The import may take so many times as long as JAX's.
LONGEST_IMPORT = 1.5
ROUNDS = 2


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=__doc__, formatter_class=kind)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Check the package; a failure says what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        needed(uv("build", "--quiet", "--out-dir", place, ROOT))
        wheel, source = next(place.glob("*.whl")), next(place.glob("*.tar.gz"))
        check_wheel(wheel)
        check_source(source)
        python = place / "venv" / "bin" / "python"
        needed(uv("venv", "--quiet", "--python", sys.executable, place / "venv"))
        needed(uv("pip", "install", "--quiet", "--python", python, wheel))
        elsewhere = place / "elsewhere"
        elsewhere.mkdir()
        check_commands(python, elsewhere)
        check_import(python)
        size = wheel.stat().st_size / 1e6
    print(f"package: {wheel.name}, {size:.1f} MB, installs and audits the sample on its own")
    return 0


def demand(met: object, problem: str) -> None:
    """Fail where something is not as it should be."""
    if not met:
        raise Failure(problem, 1)


def check_wheel(wheel: Path) -> None:
    """Check the wheel's size, files and metadata."""
    demand(wheel.stat().st_size <= LARGEST_WHEEL, f"{wheel.name} is over {LARGEST_WHEEL:,} bytes")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        stated = next(name for name in names if name.endswith("dist-info/METADATA"))
        found = email.message_from_bytes(file.read(stated))
    for wanted in IN_WHEEL:
        demand(any(name.endswith(wanted) for name in names), f"the wheel lacks {wanted}")
    strays = [name for name in names if NOT_IN_WHEEL.search(name)]
    demand(not strays, f"the wheel holds {strays[:3]}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    demand(found["Version"] == project["version"], f"the wheel says version {found['Version']}")
    demand(
        found["License-Expression"] == project["license"], "the wheel does not state its licence"
    )
    asked = [x for x in found.get_all("Requires-Dist", []) if "extra ==" not in x]
    extra = [x for x in asked if re.split(r"\W", x)[0] in EXTRAS]
    demand(not extra and len(asked) == len(project["dependencies"]), f"the wheel asks for {asked}")


def check_source(source: Path) -> None:
    """Check the files of the source distribution."""
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    lacking = [name for name in IN_SOURCE if name not in names]
    demand(not lacking, f"the source distribution lacks {lacking}")


def check_commands(python: Path, folder: Path) -> None:
    """Run the installed command from a folder of its own."""
    jaxaudit = python.with_name("jaxaudit")
    absent = f"import importlib.util as u; print([x for x in {EXTRAS} if u.find_spec(x)])"
    demand(needed([python, "-c", absent]).strip() == "[]", "an extra came along")
    audit = needed([jaxaudit, "audit", "--json", "--quiet", "--expect", "torch-cpu-loop"], folder)
    demand(json.loads(audit)["expectation_met"], "the sample does not replay")
    demand((folder / "results" / "sample.nc").stat().st_size, "the audit wrote nothing")
    again = ("results/sample.nc", "results/sample.nc", "--expect", "identical", "--output", "x.nc")
    needed([jaxaudit, "compare", *again], folder)
    needed([python, "-m", "jaxaudit", "preflight", "--json"], folder)
    refused = called([jaxaudit, "record", "--output", "run.safetensors"], folder)
    wanted = 'jaxaudit record: error: torch is missing: pip install "jaxaudit[torch]"\n'
    demand((refused.returncode, refused.stderr) == (2, wanted), f"record said {refused.stderr}")


def check_import(python: Path) -> None:
    """Compare the time of the import with that of JAX's, in processes of their own, by turns."""
    shortest = {"jax": 1e9, "jaxaudit": 1e9}
    for package in list(shortest) * ROUNDS:
        seconds = import_seconds(python, package)
        shortest[package] = min(shortest[package], seconds)
    ratio = shortest["jaxaudit"] / shortest["jax"]
    demand(ratio < LONGEST_IMPORT, f"the import takes {ratio:.2f} times as long as JAX's")
    print(f"import: {ratio:.2f} times the processor time of JAX's ({shortest['jax']:.2f} s)")


def import_seconds(python: Path, package: str) -> float:
    """Return the processor time of a process that imports a package; others' load does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    needed([python, "-c", f"import {package}"], python.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
