"""What `jaxaudit compare` does, apart from parsing and printing."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from jaxaudit import results
from jaxaudit.commands import (
    BAD_INPUT,
    NOT_AS_EXPECTED,
    WRONG_USAGE,
    Failure,
    check_outputs,
    failures,
    parse_steps,
    refuse_empty_names,
    write_together,
)
from jaxaudit.divergence import account, figures, model_account, model_figures, model_results
from jaxaudit.divergence.audits import compare_results, opened
from jaxaudit.divergence.models import ModelComparison
from jaxaudit.divergence.runs import Progress, compare
from jaxaudit.model_recording import open_model
from jaxaudit.process import keep_freed_memory
from jaxaudit.recording import open_recording, open_token_groups
from jaxaudit.safetensors_file import FileError, printable
from jaxaudit.sources.model_folder import INDEX


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What the command line asks for; see command_line/compare.py."""

    a: str
    b: str
    parameters: str | None = None
    token_groups: str | None = None
    steps: str | None = None
    output: str | None = None
    plots: str | None = None
    expect: str | None = None
    overwrite: bool = False
    json: bool = False
    quiet: bool = False


_NOT_IDENTICAL = "Expected identical, but what both hold is not the same to the bit."


def compare_runs(request: CompareRequest, progress: Progress | None = None) -> tuple[int, str]:
    """Compare, write the files asked for, and return the exit status and what goes to stdout.

    Raises:
        Failure: anything that people can mend.
    """
    with failures():
        refuse_empty_names(request, ("a", "b", "parameters", "token_groups", "output", "plots"))
        steps = parse_steps(request.steps) if request.steps is not None else None
        are_results, are_models = _are_results(request), _are_models(request)
        output = Path(request.output or Path("results") / _default_name(request))
        inputs = [*_inputs(request.a), *_inputs(request.b), *filter(None, [request.token_groups])]
        drawn = [*figures.FIGURES, *model_figures.FIGURES, *model_figures.RESULT_FIGURES]
        outputs = (
            [Path(request.plots) / name for name in dict.fromkeys(drawn)] if request.plots else []
        )
        check_outputs([output, *outputs], inputs, overwrite=request.overwrite)
        keep_freed_memory()
        if are_models:
            job = _Models(request, output, steps, progress, results=are_results)
            write_together(job.writers(), overwrite=request.overwrite)
            return 0 if job.met else NOT_AS_EXPECTED, job.text()
        if are_results:
            dataset = compare_results(request.a, request.b)
        else:
            dataset = _compare_recordings(request, steps, progress)
        write_together(_writers(request, dataset, output), overwrite=request.overwrite)
    met = request.expect is None or account.identical(dataset)
    return 0 if met else NOT_AS_EXPECTED, _text(request, dataset, output, met=met)


def _compare_recordings(
    request: CompareRequest, steps: tuple[int | None, int | None] | None, progress: Progress | None
) -> xr.Dataset:
    with open_recording(request.a) as a, open_recording(request.b) as b:
        groups = open_token_groups(request.token_groups) if request.token_groups else None
        try:
            return compare(a, b, groups, steps=steps, progress=progress)
        except FileError:
            raise
        except ValueError as error:
            if not str(error).startswith("steps "):
                raise
            raise Failure(f"--steps: {error}", WRONG_USAGE) from error


def _are_results(request: CompareRequest) -> bool:
    """Tell whether both inputs are NetCDF files; options that only recordings know are refused."""
    kinds = [_is_netcdf(path) for path in (request.a, request.b)]
    if kinds[0] != kinds[1]:
        one, other = (request.a, request.b) if kinds[0] else (request.b, request.a)
        raise Failure(
            f"{one} is a NetCDF file, {other} is not. Give two recordings, or two results.",
            BAD_INPUT,
        )
    for name in ("token_groups", "steps"):
        if kinds[0] and getattr(request, name) is not None:
            raise Failure(
                f"--{name.replace('_', '-')} is for recordings; results are compared whole.",
                WRONG_USAGE,
            )
    return kinds[0]


def _is_netcdf(path: str) -> bool:
    """Tell by a file's first bytes; what cannot be read is left to those who open it."""
    try:
        if not Path(path).is_file():  # reading a named pipe would block
            return False
        with open(path, "rb") as file:
            lead = file.read(8)
    except (OSError, ValueError):
        return False
    return lead == b"\x89HDF\r\n\x1a\n" or lead.startswith(b"CDF")


def _are_models(request: CompareRequest) -> bool:
    """Tell whether both inputs are models, recorded or audited."""
    kinds = [_is_model(path) for path in (request.a, request.b)]
    if kinds[0] != kinds[1]:
        one, other = (request.a, request.b) if kinds[0] else (request.b, request.a)
        raise Failure(
            f"{one} holds a whole model, {other} does not. Give two of one kind.", BAD_INPUT
        )
    if request.parameters is not None and not kinds[0]:
        raise Failure(
            "--parameters chooses among those of two whole models. Leave it out.", WRONG_USAGE
        )
    return kinds[0]


def _is_model(path: str) -> bool:
    if _is_netcdf(path):
        with opened(path) as tree:
            return model_results.is_model(tree)
    try:
        return Path(path).name == INDEX or (Path(path) / INDEX).exists()
    except (OSError, ValueError):  # what cannot be a path is left to those who open it
        return False


def _folder(path: str) -> Path:
    return Path(path).parent if Path(path).name == INDEX else Path(path)


def _default_name(request: CompareRequest) -> str:
    """Name the result after both inputs; a folder by its own name, even if that is a path's `.`."""
    names = []
    for path in (request.a, request.b):
        folder = _folder(path)
        try:
            is_folder = folder.is_dir()
        except (OSError, ValueError):
            is_folder = False
        names.append(folder.absolute().name if is_folder else Path(path).stem)
    return "-against-".join(names) + ".nc"


def _inputs(path: str) -> list[str | Path]:
    """Name the files that are read, which no output may replace."""
    try:
        folder = _folder(path)
        return [f for f in folder.iterdir() if f.is_file()] if folder.is_dir() else [path]
    except (OSError, ValueError):
        return [path]


class _Models:
    """The comparison of two models with its outputs: what it finds is written as it comes."""

    def __init__(
        self,
        request: CompareRequest,
        output: Path,
        steps: tuple[int | None, int | None] | None,
        progress: Progress | None,
        *,
        results: bool,
    ):
        self._request, self._output, self._results = request, output, results
        self._account = model_results if results else model_account
        self._figures = model_figures.RESULT_FIGURES if results else model_figures.FIGURES
        self._overview, self._ungrouped = xr.Dataset(), []
        try:
            self._parts = self._results_parts() if results else self._recorded(steps, progress)
        except FileError:
            raise
        except ValueError as error:
            raise _as_failure(error) from error

    def writers(self) -> Iterator[tuple[Path, Callable[[Path], None]]]:
        """Pair each output with the function that writes it; the first does the work."""
        yield self._output, self._write
        for name, draw in self._figures.items() if self._request.plots else ():
            figure = functools.partial(_write_figure, self._overview, draw)
            yield Path(self._request.plots or "") / name, figure

    @property
    def met(self) -> bool:
        """Whether what was expected is so."""
        return self._request.expect is None or self._account.identical(self._overview)

    def text(self) -> str:
        """Return what goes to stdout."""
        if self._request.json:
            one = self._account.summarize(self._overview)
            if not self._results:
                one["without_token_groups"] = self._ungrouped
            if self._request.expect:
                one |= {"expected": self._request.expect, "expectation_met": self.met}
            return json.dumps(one | {"output": str(self._output)}, allow_nan=False)
        lines = [self._account.describe(self._overview)]
        if self._ungrouped:
            lines.append(
                f"The token groups are over other rows than those of {len(self._ungrouped):,} parameters: counted as "
                "`all` only."
            )
        if not self.met:
            lines.append(_NOT_IDENTICAL)
        return "\n".join([*lines, f"Written to {printable(str(self._output))}"])

    def _recorded(
        self, steps: tuple[int | None, int | None] | None, progress: Progress | None
    ) -> Iterator[dict[str, xr.Dataset]]:
        request = self._request
        groups = open_token_groups(request.token_groups) if request.token_groups else None
        comparison = ModelComparison(
            open_model(request.a), open_model(request.b), groups,
            parameters=request.parameters, steps=steps, progress=progress,
        )  # fmt: skip
        self._ungrouped = comparison.ungrouped

        def parts() -> Iterator[dict[str, xr.Dataset]]:
            yield from comparison
            yield {"": comparison.overview()}

        return parts()

    def _results_parts(self) -> Iterator[dict[str, xr.Dataset]]:
        request = self._request
        return model_results.compare_model_results(
            Path(request.a), Path(request.b), parameters=request.parameters
        )

    def _write(self, path: Path) -> None:
        try:
            with results.GrowingFile(path) as file:
                for part in self._parts:
                    self._overview = part.get("", self._overview)
                    file.add(part)
        except FileError:
            raise
        except ValueError as error:
            raise _as_failure(error) from error


def _as_failure(error: ValueError) -> Exception:
    """Turn what the library says of its arguments into what the command says of its options."""
    text = str(error)
    if not text.startswith(("parameters: ", "steps ")):
        return error
    return Failure(("--" if text.startswith("parameters") else "--steps: ") + text, WRONG_USAGE)


def _writers(
    request: CompareRequest, dataset: xr.Dataset, output: Path
) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Pair each output with the function that writes it."""
    yield output, functools.partial(results.write, dataset)
    for name, (needed, draw) in figures.FIGURES.items() if request.plots else ():
        if needed in dataset:
            yield Path(request.plots or "") / name, functools.partial(_write_figure, dataset, draw)


def _write_figure(dataset: xr.Dataset, draw: Callable[[xr.Dataset], Figure], path: Path) -> None:
    draw(dataset).savefig(path, format="png", dpi=110)


def _text(request: CompareRequest, dataset: xr.Dataset, output: Path, *, met: bool) -> str:
    if request.json:
        one = account.summarize(dataset)
        if request.expect:
            one |= {"expected": request.expect, "expectation_met": met}
        return json.dumps(one | {"output": str(output)}, allow_nan=False)
    lines = [account.describe(dataset)]
    if not met:
        lines.append(_NOT_IDENTICAL)
    return "\n".join([*lines, f"Written to {printable(str(output))}"])
