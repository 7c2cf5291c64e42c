"""How the package hangs together: imports run one way, and some things are imported nowhere."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxaudit"

#: What an audit may import; the standard library is free.
CORE = {"jax", "jaxaudit", "ml_dtypes", "netCDF4", "numpy", "xarray"}
#: What nothing of an audit loads; JAX's own choice of packages is not ours.
HEAVY = {"torch", "transformers", "optax", "h5py", "matplotlib", "dask", "distributed"}
#: Where an audit starts; what they lead to is the audit.
AUDIT = ("auditing", "models.audits", "identification", "divergence.runs", "preflight", "results")

NETWORK = {"ftplib", "http", "httpx", "requests", "smtplib", "socket", "socketserver", "ssl"}
NETWORK |= {"telnetlib", "urllib", "urllib3", "webbrowser", "xmlrpc", "aiohttp"}
#: What runs code that a file holds.
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


class Import(NamedTuple):
    """An import statement: what is imported, and whether importing the module runs it."""

    name: str
    runs: bool


def module_of(path: Path) -> str:
    """Name a file of the package without the package's name; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def unit(module: str) -> str:
    """Return the entry of the map that a module belongs to: itself, or its subpackage."""
    return module.split(".")[0]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def statements(node: ast.AST, runs: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield every import statement, and whether importing the file runs it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, runs
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from statements(child, runs and not later)


@cache
def imports(module: str) -> tuple[Import, ...]:
    """List what a module of the package imports: modules of it by their name without the package's."""
    found = []
    for statement, runs in statements(tree(FILES[module])):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert not statement.level, f"{module}: relative import"
            home = statement.module or ""
            below = [f"{home}.{alias.name}" for alias in statement.names]
            names = [name if name.removeprefix("jaxaudit.") in FILES else home for name in below]
        found += [Import(name, runs) for name in names]
    return tuple(found)


def internal(module: str, *, runs_only: bool = False) -> set[str]:
    """Name the modules of the package that a module imports."""
    names = {each.name for each in imports(module) if each.runs or not runs_only}
    return {name.removeprefix("jaxaudit.") for name in names if name.startswith("jaxaudit.")}


def reachable(starts: tuple[str, ...]) -> set[str]:
    """Name every module that importing some modules runs."""
    found, waiting = set(), list(starts)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            parents = {module.rpartition(".")[0]} - {""}  # a subpackage's own file runs as well
            waiting += internal(module, runs_only=True) | parents
    return found


def the_map() -> list[str]:
    """Read the modules in CONTRIBUTING.md, from the ground up."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.split("<!-- the map -->")[1].split("<!-- end of the map -->")[0]
    return re.findall(r"^\| `(\w+)` \| \S", table, re.MULTILINE)


def test_the_map_is_the_package():
    known, there = the_map(), {unit(module) for module in FILES} - {""}
    assert len(known) == len({*known})
    assert {*known} == there, (
        f"CONTRIBUTING.md's map lacks {sorted(there - {*known})} and has {sorted({*known} - there)}, which are "
        "gone. Put a new module below everything that it imports, with a line on what it is for."
    )


@pytest.mark.parametrize("module", [module for module in FILES if module])
def test_imports_run_one_way(module):
    """A module imports what stands above its entry in the map, or belongs to the same subpackage."""
    place = {name: k for k, name in enumerate(the_map())}
    wrong = [
        other
        for other in internal(module)
        if unit(other) != unit(module) and place.get(unit(other), 0) > place.get(unit(module), 0)
    ]
    assert not wrong, f"{module} imports {wrong}, which stand below it in CONTRIBUTING.md's map"


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way, module))}"
        if module not in done:
            for other in sorted(internal(module)):
                follow(other, (*way, module))
            done.add(module)

    for module in FILES:
        follow(module, ())


def test_no_package_file_imports_the_package():
    """The names of `import jaxaudit` are for users; inside, modules name each other."""
    assert not [m for m in FILES for each in imports(m) if m and each.name == "jaxaudit"]


def test_an_audit_imports_core_packages_alone():
    assert reachable(("auditing",)) > {"floats", "ledger.ledger", "sources.checkpoints"}
    for module in sorted(reachable(AUDIT)):
        asked = {each.name.split(".")[0] for each in imports(module) if each.runs}
        strange = asked - CORE - {*sys.stdlib_module_names}
        assert not strange, f"{module}, part of the audit, imports {sorted(strange)}"


def test_recorders_import_nothing_of_the_audit():
    for module in FILES:
        if unit(module) == "recorders":
            others = {unit(other) for other in internal(module)} - {"recorders"}
            assert others <= {"safetensors_file"}, f"{module} imports {others}"


def test_command_lines_import_nothing_heavy():
    found = reachable(("__main__", *(m for m in FILES if unit(m) == "command_line")))
    assert found == {*found} & {"terminal", "__main__"} | {
        m for m in FILES if unit(m) == "command_line"
    }
    for module in found:
        strange = {x.name.split(".")[0] for x in imports(module) if x.runs} - {"jaxaudit"}
        assert strange <= {*sys.stdlib_module_names}, f"{module} imports {strange}"


def loaded_by(statement: str) -> set[str]:
    """Return the packages that a statement loads in a process of its own."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_importing_the_package_loads_next_to_nothing():
    loaded = loaded_by("import jaxaudit")
    assert "jaxaudit" in loaded and not loaded & (HEAVY | {"jax", "xarray", "numpy", "tqdm"})


def test_the_audit_itself_loads_nothing_of_the_extras():
    """xarray may load dask where it is installed, and JAX what it likes."""
    loaded = loaded_by("from jaxaudit import audit, audit_model, identify, compare")
    theirs = loaded_by("import jax, xarray, netCDF4")
    assert "jax" in loaded and not (loaded - theirs) & HEAVY


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_nothing_runs_code_from_elsewhere(path):
    for statement, _ in statements(tree(path)):
        names = (
            [alias.name for alias in statement.names]
            if isinstance(statement, ast.Import)
            else [getattr(statement, "module", None) or ""]
        )
        banned = {name.split(".")[0] for name in names} & (NETWORK | PICKLES)
        assert not banned, f"{path.name}, line {statement.lineno}: {banned}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert_harmless(node, path)


def assert_harmless(call: ast.Call, path: Path) -> None:
    where, called = f"{path.name}, line {call.lineno}", ast.unparse(call.func)
    assert called not in ("eval", "exec", "compile", "__import__", "os.system"), where
    told = {word.arg: ast.unparse(word.value) for word in call.keywords}
    assert called != "torch.load" or told.get("weights_only") == "True", where
    assert told.get("allow_pickle", "False") == "False", where
    assert told.get("shell", "False") == "False", where


def test_names_say_what_a_module_holds():
    vague = re.compile(r"^_?(utils?|utilities|helpers?|common|misc|tools?)$|_(utils?|helpers?)$")
    paths = [path for name in ("jaxaudit", "scripts", "tests") for path in (ROOT / name).rglob("*")]
    assert not [str(path) for path in paths if vague.search(path.stem)]
