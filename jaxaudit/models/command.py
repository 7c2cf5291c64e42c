"""What scripts/run_audit.py does with the folder of a whole model, apart from parsing and printing."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from jaxaudit import commands, results, summary
from jaxaudit.auditing import Progress
from jaxaudit.commands import NOT_AS_EXPECTED, WRONG_USAGE, AuditRequest, Failure, Notice
from jaxaudit.ledger.subject import LedgerOptions
from jaxaudit.model_recording import ModelRecording, open_model
from jaxaudit.models import account
from jaxaudit.models.audits import ModelAudit
from jaxaudit.models.variables import PARAMETERS
from jaxaudit.parts import Parts
from jaxaudit.recording import open_token_groups
from jaxaudit.safetensors_file import FileError, printable
from jaxaudit.sources.model_folder import INDEX

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_audit(
    request: AuditRequest, progress: Progress | None = None, notice: Notice | None = None
) -> tuple[int, str]:
    """Audit a recording, or every parameter of a model; return the exit status and what goes to stdout.

    A folder with a recording.json is a model, unless one of its parameters is asked for by name. For the arguments
    see `commands.run_audit`.

    Raises:
        Failure: anything that people can mend.
    """
    if _is_model(request) and request.parameter is None:
        return _audit_model(request, progress, notice)
    if request.parameters is not None:
        hint = (
            "Leave --parameter out, or --parameters." if request.parameter else "Leave it out, or name one with --parameter."
        )  # fmt: skip
        raise Failure(
            f"--parameters chooses several of the folder of a whole model. {hint}", WRONG_USAGE
        )
    return commands.run_audit(request, progress, notice)


def _is_model(request: AuditRequest) -> bool:
    try:
        path = Path(request.recording or "")
        return bool(request.recording) and (path.name == INDEX or (path / INDEX).exists())
    except (OSError, ValueError):  # what cannot be a path is left to those who open it
        return False


def _audit_model(
    request: AuditRequest, progress: Progress | None, notice: Notice | None
) -> tuple[int, str]:
    with commands.failures(), contextlib.ExitStack() as opened:
        wanted, ledger = commands.begin(request)
        _refuse_single(request)
        model = open_model(request.recording or "")
        output = _output(request, model)
        outputs = [output]
        if request.plots:
            from jaxaudit.models import figures

            outputs += [Path(request.plots) / name for name in figures.FIGURES]
        read = [path for path in model.path.iterdir() if path.is_file()]
        read += [Path(path) for path in filter(None, [request.token_groups])]
        if request.report:
            outputs.append(Path(request.report))
        commands.check_outputs(outputs, read, overwrite=request.overwrite)
        audit, stated = _prepared(request, model, wanted, ledger, progress)
        parts = opened.enter_context(commands.kept_parts(request, output, stated, notice))
        told = progress and (lambda done, of: progress(done, of, model.steps))
        mine = commands.own_tasks(request, audit.tasks, parts, one_task, told)
        if mine is not None:
            audit.publish(parts, mine)
            last = opened.enter_context(parts.alone()) or request.shard is None
            if not last or not all(map(parts.has, audit.tasks)):
                return 0, commands.so_far(request, output, parts, audit.tasks)
        run = _Run(request, audit, output, parts)
        commands.write_together(run.writers(), overwrite=request.overwrite)
        parts.remove()
    return NOT_AS_EXPECTED if run.unmet else 0, run.text()


def one_task(request: AuditRequest, name: str) -> None:
    """Do a task of a model's audit and publish its part, in a process that does others too."""
    audit, parts = _held(request)
    audit.publish(parts, [name])


@functools.lru_cache(maxsize=1)
def _held(request: AuditRequest) -> tuple[ModelAudit, Parts]:
    wanted, ledger = commands.begin(request)
    model = open_model(request.recording or "")
    audit, stated = _prepared(request, model, wanted, ledger, None)
    return audit, Parts(commands.parts_path(_output(request, model)), stated)


def _output(request: AuditRequest, model: ModelRecording) -> Path:
    return Path(request.output or Path("results") / f"{model.path.absolute().name}.nc")


def _prepared(
    request: AuditRequest,
    model: ModelRecording,
    wanted: list[str],
    ledger: LedgerOptions | None,
    progress: Progress | None,
) -> tuple[ModelAudit, dict[str, Any]]:
    """Return the audit, and what decides its result (see `parts.Parts`)."""
    groups = open_token_groups(request.token_groups) if request.token_groups else None
    options: dict[str, Any] = {
        "arithmetics": wanted,
        "backend": request.backend,
        "steps": _steps(request, model),
        "ledger": ledger,
    }
    path, state = model.path.absolute(), str(model.steps)
    stated = commands.manifest(path, state, groups, options) | {"parameters": request.parameters}
    try:
        audit = ModelAudit(
            model,
            groups,
            parameters=request.parameters,
            devices=request.devices,
            progress=progress,
            **options,
        )
        return audit, stated
    except FileError:
        raise
    except ValueError as error:
        if not str(error).startswith(("parameters: ", "steps ")):
            raise
        option = "--" if str(error).startswith("parameters") else "--steps: "
        raise Failure(f"{option}{error}", WRONG_USAGE) from error


def _refuse_single(request: AuditRequest) -> None:
    """Refuse what is made of one recording only."""
    if request.csv is not None:
        raise Failure(
            "--csv is for one parameter: add --parameter NAME. The NetCDF file holds all of them.",
            WRONG_USAGE,
        )


def _steps(request: AuditRequest, model: ModelRecording) -> tuple[int, int] | None:
    if request.steps is None:
        return None
    first, end = commands.parse_steps(request.steps)
    last = int(model.timesteps[-1]) if model.steps else 0
    return 1 if first is None else first, last + 1 if end is None else end


class _Run:
    """One audit with its outputs: what it finds is written as it comes, and only the overview is kept."""

    def __init__(self, request: AuditRequest, audit: ModelAudit, output: Path, parts: Parts):
        self._request, self._audit, self._output = request, audit, output
        self._parts = parts
        self._overview = xr.Dataset()
        #: Parameters that do not replay under what was expected.
        self.unmet: list[str] = []

    def writers(self) -> Iterator[tuple[Path, Callable[[Path], None]]]:
        """Pair each output with the function that writes it; the first does the work."""
        yield self._output, self._write
        if self._request.plots:
            from jaxaudit.models import figures

            for name, draw in figures.FIGURES.items():
                yield Path(self._request.plots) / name, functools.partial(self._write_figure, draw)
        if self._request.report:
            yield Path(self._request.report), self._write_page

    def text(self) -> str:
        """Return what goes to stdout."""
        expected, unmet = self._request.expect, self.unmet
        ungrouped = self._audit.ungrouped
        if self._request.json:
            one = account.summarize(self._overview) | {"without_token_groups": ungrouped}
            if expected:
                one |= {
                    "expected": expected,
                    "expectation_met": not unmet,
                    "not_as_expected": unmet,
                }
            return json.dumps(one | {"output": str(self._output)}, allow_nan=False)
        lines = [account.describe(self._overview), *self._notes(), *self._where_to_look()]
        return "\n".join([*lines, f"Written to {printable(str(self._output))}"])

    def _where_to_look(self) -> list[str]:
        """Say how to be told more of the worst parameter, if it does not replay."""
        ranked = self._overview.sortby("rank_by_mismatches")
        wrong = ranked.parameter.values[(ranked.mismatch_total > 0).any("stage").values]
        return [f"`--parameter {printable(wrong[0])}` says what to look at."] if wrong.size else []

    def _notes(self) -> list[str]:
        """Say what was asked for and is not so."""
        lines, ungrouped = [], self._audit.ungrouped
        if ungrouped:
            verb = "has" if len(ungrouped) == 1 else "have"
            lines.append(
                f"The token groups are over other rows than {account.in_words(ungrouped)} {verb}: counted as `all` only."
            )
        if self.unmet:
            verb = "does" if len(self.unmet) == 1 else "do"
            lines.append(
                f"Expected {self._request.expect}, but {account.in_words(self.unmet)} {verb} not replay bit for bit "
                "under it."
            )
        return lines

    def _write(self, path: Path) -> None:
        with results.GrowingFile(path) as file:
            for tree in self._audit.through(self._parts):
                self._check(tree)
                file.add(tree)
            self._overview = self._audit.overview(self._parts.started_at)
            file.add({"": self._overview})

    def _check(self, tree: dict[str, xr.Dataset]) -> None:
        root = next(
            each for name, each in tree.items() if name.count("/") == PARAMETERS.count("/") + 1
        )
        expected = self._request.expect
        if expected and not summary.replays_exactly(root, expected):
            self.unmet.append(root.attrs["parameter"])

    def _write_page(self, path: Path) -> None:
        from jaxaudit.models import page

        path.write_text(page.html(self._overview, self._notes()), encoding="utf-8")

    def _write_figure(self, draw: "Callable[[xr.Dataset], Figure]", path: Path) -> None:
        draw(self._overview).savefig(path, format="png", dpi=110)
