"""The dataset of an audit: one table of variables that labels, checks, saves and loads it."""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr
from xarray.backends import NetCDF4DataStore

#: What stands in an integer variable where a stage was not audited; no count is negative.
NOT_AUDITED = -1

_LARGE = 1 << 18  # bytes of an array that is worth compressing

_LABEL_BYTES = 1 << 20  # more than names, units and attributes take in a file

#: Fields of `first_mismatch`, in order.
MISMATCH_FIELDS = ("timestep", "token", "position", "recorded_bits", "replayed_bits")


@dataclasses.dataclass(frozen=True)
class Field:
    """How a variable is labelled.

    Attributes:
        dims: names of its dimensions, in order.
        dtype: NumPy dtype name; "str" for names.
        units: "1" for counts and ratios.
        long_name: what it is, for axis labels.
        comment: what the long name cannot hold; "" for nothing.
    """

    dims: tuple[str, ...]
    dtype: str
    units: str
    long_name: str
    comment: str = ""


_PER_STAGE = ("arithmetic", "stage", "timestep", "token_group")
_PER_ARITHMETIC = ("arithmetic", "timestep", "token_group")
_PER_FRACTION = ("arithmetic", "token_group", "fraction_bin")
_PER_TENSOR = ("tensor", "timestep", "token_group")

COORDINATES = {
    "timestep": Field(("timestep",), "int64", "1", "optimizer step, from 1"),
    "token_group": Field(("token_group",), "str", "1", "group of tokens"),
    "arithmetic": Field(("arithmetic",), "str", "1", "arithmetic of the replay"),
    "stage": Field(("stage",), "str", "1", "part of the optimizer step"),
    "tensor": Field(("tensor",), "str", "1", "recorded tensor"),
    "mismatch_field": Field(("mismatch_field",), "str", "1", "what is told of a mismatch"),
    "fraction_bin": Field(
        ("fraction_bin",), "float64", "1", "fraction of the way to the neighbour away from zero"
    ),
    "token": Field(("token",), "int64", "1", "token: row of the parameter, from 0"),
    "quantile": Field(("quantile",), "float64", "1", "share of the elements at or below"),
    "margin": Field(
        ("margin",),
        "int64",
        "1",
        "visibility margin, as floor of log2",
        "log2 of the size of the exact update over half an ulp of the weight in its direction; the first and the "
        "last bin hold everything beyond",
    ),
    "regime": Field(("regime",), "str", "1", "regime of a token"),
    "measure": Field(
        ("measure",),
        "str",
        "1",
        "measure of displacement",
        "ulp: in ulp of the weight before the step, a fraction where a binade edge is crossed; line: steps on the "
        "ordered integer line of the weights' format",
    ),
    "norm": Field(("norm",), "str", "1", "norm over the elements of a token"),
    "traced_token": Field(("traced_token",), "int64", "1", "token that is followed step by step"),
    "remedy": Field(("remedy",), "str", "1", "what is done otherwise"),
    "run": Field(("run",), "str", "1", "which of the two that are compared"),
    "ulp_bin": Field(
        ("ulp_bin",),
        "int64",
        "ulp",
        "largest ulp distance of the bin",
        "0, 1, 2, then up to the next power of two: 3 to 4, 5 to 8, ...",
    ),
    "divergence_field": Field(
        ("divergence_field",), "str", "1", "what is told of the first difference"
    ),
    "compared_timestep": Field(
        ("compared_timestep",), "int64", "1", "optimizer step of a parameter, by its own step count"
    ),
    "compared_tensor": Field(
        ("compared_tensor",),
        "str",
        "1",
        "recorded tensor, in the order in which a step computes them",
    ),
    "variable": Field(("variable",), "str", "1", "variable of an audit's file, as group/variable"),
    "parameter": Field(("parameter",), "str", "1", "parameter of the model"),
    "run_timestep": Field(
        ("run_timestep",),
        "int64",
        "1",
        "timestep of the training run, from 1",
        "a parameter that was left out of some of them has fewer steps of its own",
    ),
    "operation": Field(("operation",), "str", "1", "operation"),
    "mode": Field(("mode",), "str", "1", "what computed it"),
    "reference": Field(("reference",), "str", "1", "what it is compared with"),
    "input_class": Field(
        ("input_class",),
        "str",
        "1",
        "class of the input",
        "the first that applies of NaN and infinity (an operand is one), subnormal (an operand is, or the "
        "exact result is smaller than the smallest normal number and not zero), zero (an operand is), tie (the "
        "exact result lies midway between two numbers of the result's format), normal",
    ),
    "binade": Field(
        ("binade",),
        "int64",
        "1",
        "floor of log2 of the size of the IEEE result",
        "-150 for zero and anything below 2^-149, 128 for infinity and NaN",
    ),
    "difference_field": Field(
        ("difference_field",), "str", "1", "what is told of a difference, as bit patterns"
    ),
}

VARIABLES = {
    "element_count": Field(("token_group",), "int64", "1", "elements per timestep"),
    "mismatch_count": Field(
        _PER_STAGE,
        "int64",
        "1",
        "elements whose replayed bits differ from the recorded ones",
        f"+0 and -0 differ, all NaNs are alike; {NOT_AUDITED} where the stage was not audited",
    ),
    "max_ulp_distance": Field(
        _PER_STAGE,
        "int64",
        "ulp",
        "largest distance between replayed and recorded value",
        "steps on the ordered integer line of the recorded format, to which a replayed value of another "
        f"format is rounded; both zeros are one point; {NOT_AUDITED} where the stage was not audited",
    ),
    "audited": Field(
        ("arithmetic", "stage"), "int8", "1", "1 where the recording holds what the stage needs"
    ),
    "first_mismatch": Field(
        ("arithmetic", "stage", "mismatch_field"),
        "int64",
        "1",
        "first element whose bits differ",
        "lowest timestep, then token, then position within the token's row (C order); bits are those of the "
        f"recorded format and of the replayed one; {NOT_AUDITED} where there is none",
    ),
    "norm_observed": Field(
        ("timestep", "token_group"), "float64", "1", "L2 norm of the recorded weight change"
    ),
    "norm_predicted": Field(
        _PER_ARITHMETIC, "float64", "1", "L2 norm of the replayed weight change"
    ),
    "norm_difference": Field(
        _PER_ARITHMETIC, "float64", "1", "L2 norm of replayed minus recorded weight change"
    ),
    "cosine_similarity": Field(
        _PER_ARITHMETIC,
        "float64",
        "1",
        "cosine between replayed and recorded weight change",
        "NaN where either change is zero",
    ),
    "ratio": Field(
        _PER_ARITHMETIC,
        "float64",
        "1",
        "norm of the replayed over norm of the recorded weight change",
        "NaN where both are zero, which is exact agreement",
    ),
    "nonfinite_count": Field(
        _PER_TENSOR, "int64", "1", "recorded elements that are infinite or NaN"
    ),
    "unrepresentable_count": Field(
        _PER_TENSOR,
        "int64",
        "1",
        "recorded elements that the parameter's format does not hold exactly",
        "0 for a moment stored as float32 that has in truth the parameter's precision",
    ),
    "rounded_away_count": Field(
        _PER_ARITHMETIC,
        "float64",
        "1",
        "weights that stochastic rounding took away from zero",
        "NaN for arithmetics without stochastic rounding; weights that are neither neighbour do not count",
    ),
    "rounded_away_expected": Field(
        _PER_ARITHMETIC, "float64", "1", "expected number of weights rounded away from zero"
    ),
    "rounding_p_value": Field(
        _PER_ARITHMETIC,
        "float64",
        "1",
        "p-value of stochastic rounding",
        "Pearson's chi-square over bins of the fraction between the two neighbours",
    ),
    "rounded_away_count_by_fraction": Field(
        _PER_FRACTION, "float64", "1", "weights rounded away from zero, by fraction"
    ),
    "rounded_away_expected_by_fraction": Field(
        _PER_FRACTION,
        "float64",
        "1",
        "expected number of weights rounded away from zero, by fraction",
    ),
    "rounding_p_value_of_all_timesteps": Field(
        ("arithmetic", "token_group"),
        "float64",
        "1",
        "p-value of stochastic rounding over all timesteps",
    ),
    "loss": Field(("timestep",), "float64", "1", "training loss"),
    "learning_rate": Field(("timestep",), "float64", "1", "learning rate"),
}


#: The group `free_run` of an audit's file: each arithmetic left to itself from the recording's start.
FREE_RUN_VARIABLES = {
    "mismatch_count": Field(
        _PER_ARITHMETIC,
        "int64",
        "1",
        "weights whose bits differ from the recorded ones",
        f"{NOT_AUDITED} where the recording lacks what the run starts from, or where chance decides",
    ),
    "max_ulp_distance": Field(
        _PER_ARITHMETIC, "int64", "ulp", "largest distance between its own and the recorded weight"
    ),
    "norm_divergence": Field(
        _PER_ARITHMETIC, "float64", "1", "L2 norm of its own minus the recorded weights"
    ),
    "first_divergence": Field(
        ("arithmetic", "token_group"),
        "int64",
        "1",
        "first timestep at which a weight differs",
        f"0 where none ever does; {NOT_AUDITED} as for mismatch_count",
    ),
}


_PER_COMPARISON = ("operation", "mode", "reference")
_PER_CLASS = (*_PER_COMPARISON, "input_class")
_PER_OPERATION = ("operation",)

#: A rounding certificate: the dataset of `cross_check`.
ROUNDING_VARIABLES = {
    "compared_count": Field(
        _PER_CLASS, "int64", "1", "results compared", "0 where the reference is not there"
    ),
    "differing_count": Field(
        _PER_CLASS,
        "int64",
        "1",
        "results whose bits differ from those of the reference",
        "+0 and -0 differ (but not after a sum, which forgets the sign of zero), all NaNs are alike",
    ),
    "max_ulp_distance": Field(
        _PER_CLASS,
        "float64",
        "ulp",
        "largest distance from the reference",
        "on the ordered line of the result's format, on which neighbouring values are 1 apart; a fraction "
        "where the result was not rounded to that format; NaN lies one step beyond infinity",
    ),
    "first_difference": Field(
        (*_PER_CLASS, "difference_field"),
        "uint64",
        "1",
        "first result that differs, as bit patterns",
        "operands in their formats, wanted in that of the result, found likewise or, in mode jit-reduced, in "
        "the format of the sum; all 0 where nothing differs",
    ),
    "differing_by_binade": Field(
        (*_PER_COMPARISON, "binade"), "int64", "1", "results that differ, by binade"
    ),
    "compared_by_binade": Field(
        ("operation", "binade"), "int64", "1", "results compared, by binade"
    ),
    "cause": Field(_PER_COMPARISON, "str", "1", "why results differ", "empty where none does"),
    "remedy": Field(
        _PER_COMPARISON, "str", "1", "what to write instead", "empty where none differs"
    ),
    "formula": Field(
        _PER_OPERATION, "str", "1", "what the reference ieee computes, with its roundings"
    ),
    "jax_expression": Field(_PER_OPERATION, "str", "1", "how it is written in JAX"),
    "torch_expression": Field(_PER_OPERATION, "str", "1", "how it is written in PyTorch"),
    "operand_formats": Field(_PER_OPERATION, "str", "1", "formats of the operands"),
    "result_format": Field(_PER_OPERATION, "str", "1", "format of the result"),
    "coverage": Field(_PER_OPERATION, "str", "1", "which operands were tried"),
}

#: Variables that only some audits have.
OPTIONAL = {"loss", *(name for name in VARIABLES if name.startswith("round"))}


def label(
    arrays: Mapping[str, np.ndarray],
    coordinates: Mapping[str, Any],
    attributes: Mapping[str, Any],
    table: Mapping[str, Field] = VARIABLES,
) -> xr.Dataset:
    """Put names, units and dtypes to arrays, as a table of variables says.

    Raises:
        KeyError: an array that the table does not know.
    """
    coords = {
        name: (COORDINATES[name].dims, np.asarray(values), _attributes(COORDINATES[name]))
        for name, values in coordinates.items()
    }
    variables = {
        name: (
            table[name].dims,
            np.asarray(array, table[name].dtype),
            _attributes(table[name]),
        )
        for name, array in arrays.items()
    }
    return xr.Dataset(variables, coords, dict(attributes))


def save(dataset: xr.Dataset, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a NetCDF file whole or not at all.

    Raises:
        FileExistsError: the file exists and `overwrite` is off.
        OSError: it cannot be written; nothing is left behind.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another name or overwrite it.")
    with temporary_beside(target) as temporary:
        write(dataset, temporary)
        publish(temporary, target)


def write(dataset: xr.Dataset, path: Path, groups: Mapping[str, xr.Dataset] | None = None) -> None:
    """Write a NetCDF file in place.

    Args:
        dataset: what `xr.open_dataset` shows.
        path: the file.
        groups: further datasets, by the name of their group (see `xr.open_datatree`).

    Raises:
        OSError: it cannot be written.
    """
    _write_group(dataset, path, None)
    for name, group in (groups or {}).items():
        _write_group(group, path, name)


def _write_group(dataset: xr.Dataset, path: Path, group: str | None) -> None:
    with _explained(path, dataset.nbytes):
        _with_text(dataset).to_netcdf(
            path.absolute(),  # xarray would take some relative names for addresses
            engine="netcdf4",
            encoding=_encodings(dataset),
            mode="w" if group is None else "a",
            group=group,
        )


@contextlib.contextmanager
def _explained(path: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # netCDF does not tell why a write failed
        full = shutil.disk_usage(path.parent).free < needed + _LABEL_BYTES
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error


class GrowingFile:
    """A NetCDF file that takes datasets one after the other, so that they need not be in memory together.

    A context manager. It holds the same as what `write` makes of the same datasets.

    Args:
        path: the file, which is made anew.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        with _explained(path, 0):
            self._file = netCDF4.Dataset(path.absolute(), "w", format="NETCDF4")

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file.isopen():
            with _explained(self._path, 0):
                self._file.close()

    def add(self, datasets: Mapping[str, xr.Dataset]) -> None:
        """Write datasets by the name of their group, "" for the root.

        Raises:
            OSError: they cannot be written.
        """
        later = _Values()
        with _explained(self._path, sum(dataset.nbytes for dataset in datasets.values())):
            for name, dataset in datasets.items():
                group = self._file.createGroup(name) if name else self._file
                store: Any = NetCDF4DataStore(
                    group
                )  # an open file is no argument that its types know
                _with_text(dataset).dump_to_store(store, writer=later, encoding=_encodings(dataset))
            later.write()


class _Values:
    """Holds the values of variables back until all are declared, in the place of xarray's writer.

    After each declaration netCDF goes over all groups of the file when the next value is written: with hundreds of
    groups, that took a hundred times as long as the writing.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Any, Any, Any]] = []

    def add(self, source: Any, target: Any, region: Any = None) -> None:
        """Take the values of one variable."""
        self._held.append((source, target, region))

    def write(self) -> None:
        """Write them all."""
        for source, target, region in self._held:
            target[... if region is None else region] = source
        self._held.clear()


def _with_text(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.assign_attrs({name: _encodable(value) for name, value in dataset.attrs.items()})


def _encodings(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    # No fill values: xarray would read integers that have one back as floating point.
    return {str(name): _encoding(array) for name, array in dataset.variables.items()}


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Make an empty file in the target's folder, and the folder where it is missing.

    Neither is left behind unless `publish` gives the file its name.
    """
    missing = [folder for folder in target.parents if not os.path.lexists(folder)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".jaxaudit-", suffix=".tmp")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # something else has come into it
                folder.rmdir()
        raise


def publish(temporary: Path, target: Path) -> None:
    """Give a finished temporary file its name, once its bytes are on the disk."""
    temporary.chmod(0o666 & ~_umask())
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read an audit's dataset into memory.

    Raises:
        ValueError: the file lacks a variable of the table.
    """
    dataset = xr.load_dataset(path, engine="netcdf4")
    missing = [name for name in VARIABLES if name not in dataset and name not in OPTIONAL]
    if missing:
        raise ValueError(f"{path}: not the dataset of an audit; it lacks {', '.join(missing)}.")
    return dataset


def _encoding(array: xr.Variable) -> dict[str, Any]:
    """Compress large arrays of numbers, most of which are zeros or repeat themselves; netCDF refuses strings."""
    compressed = {"zlib": True, "complevel": 4} if array.nbytes > _LARGE and array.dtype.kind in "iuf" else {}  # fmt: skip
    return {"_FillValue": None} | compressed


def _attributes(field: Field) -> dict[str, str]:
    found = {"long_name": field.long_name, "units": field.units}
    return found | ({"comment": field.comment} if field.comment else {})


def _encodable(value: Any) -> Any:
    """Escape what is not Unicode: the undecodable bytes of a file name."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
