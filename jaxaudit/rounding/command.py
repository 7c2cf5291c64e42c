"""What `jaxaudit certificate` does, apart from parsing and printing."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import xarray as xr
from matplotlib.figure import Figure

from jaxaudit import results
from jaxaudit.commands import (
    NOT_AS_EXPECTED,
    WRONG_USAGE,
    Failure,
    check_outputs,
    failures,
    refuse_empty_names,
    write_together,
)
from jaxaudit.devices import find_device
from jaxaudit.process import keep_freed_memory
from jaxaudit.rounding import certificate, figures, tables
from jaxaudit.safetensors_file import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossCheckRequest:
    """What the command line asks for; see command_line/certificate.py."""

    backend: Any = "auto"
    full: bool = False
    operations: str | None = None
    output: str | None = None
    table: str | None = None
    plots: str | None = None
    overwrite: bool = False
    json: bool = False


class Outcome(NamedTuple):
    """What the command is to do at its end.

    Attributes:
        status: its exit status.
        text: goes to stdout.
        notices: go to stderr.
    """

    status: int
    text: str
    notices: list[str]


def cross_check_rounding(
    request: CrossCheckRequest, progress: Callable[[int, int], None] | None = None
) -> Outcome:
    """Compare, and write the files asked for.

    Raises:
        Failure: anything that people can mend.
        KeyboardInterrupt: its message says where the finished operations are kept.
    """
    with failures():
        refuse_empty_names(request, ("output", "table", "plots"))
        operations = _operations(request)
        platform = find_device(request.backend).platform
        output = Path(request.output or Path("results") / f"rounding_{platform}.nc")
        unfinished = output.parent / f"{output.name}.unfinished"
        _check(list(_outputs(request, output)), unfinished, overwrite=request.overwrite)
    keep_freed_memory()
    with _kept(unfinished), failures():
        dataset = _certificate(request, operations, progress, unfinished)
        write_together(_writers(request, dataset, output), overwrite=request.overwrite)
        unfinished.unlink(missing_ok=True)
    status = NOT_AS_EXPECTED if tables.differs_from_ieee(dataset) else 0
    return Outcome(status, _text(request, dataset, output), tables.notices(dataset))


def _operations(request: CrossCheckRequest) -> list[str] | None:
    if request.operations is None:
        return None
    names = [name.strip() for name in request.operations.split(",")]
    if not all(names):
        raise Failure(
            f"--operations: got {request.operations!r}, needed NAME[,NAME...].", WRONG_USAGE
        )
    return names


def _outputs(request: CrossCheckRequest, output: Path) -> Iterator[Path]:
    yield output
    if request.table:
        yield Path(request.table)
    if request.plots:
        yield from (Path(request.plots) / name for name in figures.FIGURES)


def _check(outputs: list[Path], unfinished: Path, *, overwrite: bool) -> None:
    """Refuse before any work what cannot be written; the unfinished file may be there already."""
    check_outputs(outputs, overwrite=overwrite)
    if unfinished in outputs:
        raise Failure(
            f"{unfinished} is kept for unfinished operations. Choose another name.", WRONG_USAGE
        )
    check_outputs([unfinished], overwrite=True)


def _certificate(
    request: CrossCheckRequest,
    operations: list[str] | None,
    progress: Callable[[int, int], None] | None,
    unfinished: Path,
) -> xr.Dataset:
    """Compute the dataset; what is wrong with the names or the memory is the user's to mend."""
    try:
        return certificate.cross_check(
            backend=request.backend,
            full=request.full,
            operations=operations,
            progress=progress,
            unfinished=unfinished,
        )
    except certificate.UnfinishedError as error:
        raise Failure(str(error), WRONG_USAGE) from error
    except ValueError as error:
        if not str(error).startswith("unknown operation"):
            raise
        raise Failure(f"--operations: {error}", WRONG_USAGE) from error
    except MemoryError as error:
        raise Failure(_out_of_memory(), WRONG_USAGE) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Failure(_out_of_memory(), WRONG_USAGE) from error


def _out_of_memory() -> str:
    return "out of memory. Free some, or check fewer --operations at a time."


@contextlib.contextmanager
def _kept(unfinished: Path) -> Iterator[None]:
    """Where the work stops before its end, say what is kept of it."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {_what_is_kept(unfinished)}") from error
    except Failure as failure:
        foreign = isinstance(failure.__cause__, certificate.UnfinishedError)
        if unfinished.exists() and not foreign:
            raise Failure(f"{failure} {_what_is_kept(unfinished)}", failure.status) from failure
        raise


def _what_is_kept(unfinished: Path) -> str:
    if not unfinished.exists():
        return "no result was written"
    try:
        with xr.open_dataset(unfinished, engine="netcdf4") as dataset:
            count = dataset.sizes["operation"]
    except (OSError, KeyError, ValueError):
        return f"what was finished is kept in {printable(str(unfinished))}"
    operations = f"{count} operation{'s are' if count != 1 else ' is'}"
    return (
        f"{operations} kept in {printable(str(unfinished))}; the same command continues from there"
    )


def _writers(
    request: CrossCheckRequest, dataset: xr.Dataset, output: Path
) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Pair each output with the function that writes it."""
    yield output, functools.partial(results.write, dataset)
    if request.table:
        yield Path(request.table), functools.partial(_write_report, dataset)
    if request.plots:
        for name, draw in figures.FIGURES.items():
            yield Path(request.plots) / name, functools.partial(_write_figure, dataset, draw)


def _write_report(dataset: xr.Dataset, path: Path) -> None:
    path.write_text(tables.report(dataset), encoding="utf-8")


def _write_figure(dataset: xr.Dataset, draw: Callable[[xr.Dataset], Figure], path: Path) -> None:
    draw(dataset).savefig(path, format="png", dpi=130)


def _text(request: CrossCheckRequest, dataset: xr.Dataset, output: Path) -> str:
    if request.json:
        return json.dumps(tables.summarize(dataset) | {"output": str(output)}, allow_nan=False)
    return f"{tables.describe(dataset)}\nWritten to {printable(str(output))}"
