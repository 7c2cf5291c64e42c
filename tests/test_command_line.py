"""The installed command and the scripts of a checkout: one implementation each, and quick to answer."""

import functools
import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jaxaudit import __main__, commands
from jaxaudit.models import command as models
from jaxaudit.replay import SelfTestError
from jaxaudit.safetensors_file import FileError

#: Each subcommand, and the script that does the same.
SCRIPTS = {
    "audit": "run_audit",
    "record": "record_run",
    "certificate": "cross_check_rounding",
    "preflight": "preflight",
    "compare": "compare_runs",
}


def command(name):
    return importlib.import_module(f"jaxaudit.command_line.{name}")


def test_every_command_has_its_script(script):
    assert [*SCRIPTS] == [*__main__.COMMANDS]
    for name, file in SCRIPTS.items():
        main = script(file).main
        assert isinstance(main, functools.partial) and main.func is command(name).main
        assert main.keywords == {"program": f"{file}.py"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_describe_the_same_options(name):
    file = f"{SCRIPTS[name]}.py"
    own, its = (command(name).parser(program) for program in (f"jaxaudit {name}", file))

    def described(parser):
        return [(x.option_strings, x.dest, x.default, x.help) for x in parser._actions]

    assert described(own) == described(its)
    assert f"\n    jaxaudit {name}" in own.format_help()
    assert f"\n    python scripts/{file}" in its.format_help()
    assert "jaxaudit " + name not in its.format_help()
    assert "Exit status: 0 " in own.format_help()


def test_help_version_and_wrong_usage(capsys):
    def run(*words):
        status = __main__.main([*words])
        return status, *capsys.readouterr()

    status, out, err = run("--help")
    assert (status, err) == (0, "") and all(f"\n  {name} " in out for name in SCRIPTS)
    assert run("--version")[:2] == (0, run("audit", "--version")[1])
    for words, said in (
        ((), "a command is needed: audit, record"),
        (("audti",), "did you mean audit?"),
        (("nothing",), "there are audit, record"),
        (("--nothing",), "unrecognized arguments"),
        (("audit", "--nothing"), "unrecognized arguments"),
        (("compare", "one"), "two files are needed"),
        (("record",), "required: --output"),
        (("preflight", "--beta2", "2"), "beta2"),
    ):
        status, out, err = run(*words)
        assert (status, out) == (2, "") and said in err and err.count("\n") <= 2
        name = f"jaxaudit {words[0]}" if words and words[0] in SCRIPTS else "jaxaudit"
        assert err.startswith(f"{name}: error: ")


@pytest.mark.parametrize(
    "raised, status",
    [
        (commands.Failure("unmet", 1), 1),
        (commands.Failure("wrong", 2), 2),
        (FileError("bad"), 3),
        (SelfTestError("inexact."), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses_are_those_of_the_script(
    script, capsys, monkeypatch, tmp_path, raised, status
):
    """What the audit raises in its depths leads to the same status and words, whoever called."""

    def audit(*_, **__):
        raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands.auditing, "audit_groups", audit)
    monkeypatch.setattr(commands, "keep_programs", lambda: None)
    said = []
    for main in (functools.partial(__main__.main, ["audit"]), script("run_audit").main):
        assert main() == status
        said.append(capsys.readouterr().err.replace("jaxaudit audit", "run_audit.py"))
    assert said[0] == said[1] and said[0].count("\n") == 1


def test_an_unmet_expectation_is_status_1(monkeypatch, capsys):
    monkeypatch.setattr(models, "run_audit", lambda *_: (1, "not as expected"))
    assert __main__.main(["audit", "--expect", "float32"]) == 1
    assert capsys.readouterr().out == "not as expected\n"


def test_recording_without_torch_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert __main__.main(["record", "--output", str(tmp_path / "run.safetensors")]) == 2
    wanted = 'jaxaudit record: error: torch is missing: pip install "jaxaudit[torch]"\n'
    assert capsys.readouterr().err == wanted and not [*tmp_path.iterdir()]


def test_help_is_quick_and_loads_no_jax():
    """In processor time: others' load does not count."""
    code = (
        "import sys; from jaxaudit.__main__ import COMMANDS, main; "
        "status = [main([name, '--help']) for name in COMMANDS]; "
        "heavy = {'jax', 'numpy', 'torch', 'xarray', 'matplotlib', 'tqdm'} & {*sys.modules}; "
        "sys.exit(f'{status} {heavy}' if any(status) or heavy else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: jaxaudit ") == len(SCRIPTS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_the_package_names_the_command():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '\n[project.scripts]\njaxaudit = "jaxaudit.__main__:main"\n' in text
