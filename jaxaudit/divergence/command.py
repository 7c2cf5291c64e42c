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
from jaxaudit.divergence import account, figures
from jaxaudit.divergence.audits import compare_results
from jaxaudit.divergence.runs import Progress, compare
from jaxaudit.process import keep_freed_memory
from jaxaudit.recording import open_recording, open_token_groups
from jaxaudit.safetensors_file import FileError, printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """What the command line asks for; see command_line/compare.py."""

    a: str
    b: str
    token_groups: str | None = None
    steps: str | None = None
    output: str | None = None
    plots: str | None = None
    expect: str | None = None
    overwrite: bool = False
    json: bool = False
    quiet: bool = False


def compare_runs(request: CompareRequest, progress: Progress | None = None) -> tuple[int, str]:
    """Compare, write the files asked for, and return the exit status and what goes to stdout.

    Raises:
        Failure: anything that people can mend.
    """
    with failures():
        refuse_empty_names(request, ("a", "b", "token_groups", "output", "plots"))
        steps = parse_steps(request.steps) if request.steps is not None else None
        are_results = _are_results(request)
        default = f"{Path(request.a).stem}-against-{Path(request.b).stem}.nc"
        output = Path(request.output or Path("results") / default)
        inputs = [request.a, request.b, *filter(None, [request.token_groups])]
        check_outputs(list(_outputs(request, output)), inputs, overwrite=request.overwrite)
        keep_freed_memory()
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


def _outputs(request: CompareRequest, output: Path) -> Iterator[Path]:
    yield output
    if request.plots:
        yield from (Path(request.plots) / name for name in figures.FIGURES)


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
        lines.append("Expected identical, but what both hold is not the same to the bit.")
    return "\n".join([*lines, f"Written to {printable(str(output))}"])
