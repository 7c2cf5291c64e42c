"""The dataset of an audit: one table of variables that labels, checks, saves and loads it."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

SCHEMA_VERSION = "1"

#: What stands in an integer variable where a stage was not audited; no count is negative.
NOT_AUDITED = -1

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
_PER_TENSOR = ("tensor", "timestep", "token_group")

COORDINATES = {
    "timestep": Field(("timestep",), "int64", "1", "optimizer step, from 1"),
    "token_group": Field(("token_group",), "str", "1", "group of tokens"),
    "arithmetic": Field(("arithmetic",), "str", "1", "arithmetic of the replay"),
    "stage": Field(("stage",), "str", "1", "part of the optimizer step"),
    "tensor": Field(("tensor",), "str", "1", "recorded tensor"),
    "mismatch_field": Field(("mismatch_field",), "str", "1", "what is told of a mismatch"),
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
    "loss": Field(("timestep",), "float64", "1", "training loss"),
    "learning_rate": Field(("timestep",), "float64", "1", "learning rate"),
}


def label(
    arrays: Mapping[str, np.ndarray], coordinates: Mapping[str, Any], attributes: Mapping[str, Any]
) -> xr.Dataset:
    """Put names, units and dtypes to arrays, as the table of variables says.

    Raises:
        KeyError: an array that the table does not know.
    """
    coords = {
        name: (COORDINATES[name].dims, np.asarray(values), _attributes(COORDINATES[name]))
        for name, values in coordinates.items()
    }
    variables = {
        name: (
            VARIABLES[name].dims,
            np.asarray(array, VARIABLES[name].dtype),
            _attributes(VARIABLES[name]),
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
    target.parent.mkdir(parents=True, exist_ok=True)
    # No fill values: xarray would read integers that have one back as floating point.
    encoding = {str(name): {"_FillValue": None} for name in dataset.variables}
    handle, temporary = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}-", suffix=".tmp"
    )
    os.close(handle)
    try:
        dataset.to_netcdf(temporary, engine="netcdf4", encoding=encoding)
        publish(temporary, target)
    except RuntimeError as error:  # netCDF's own word for a failed write
        raise OSError(f"{target} cannot be written ({error}).") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def publish(temporary: str | os.PathLike[str], target: Path) -> None:
    """Give a finished temporary file its name, once its bytes are on the disk."""
    os.chmod(temporary, 0o666 & ~_umask())
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read an audit's dataset into memory.

    Raises:
        ValueError: the file lacks a variable of the table.
    """
    dataset = xr.load_dataset(path, engine="netcdf4")
    missing = [name for name in VARIABLES if name not in dataset and name != "loss"]
    if missing:
        raise ValueError(f"{path}: not the dataset of an audit; it lacks {', '.join(missing)}.")
    return dataset


def _attributes(field: Field) -> dict[str, str]:
    found = {"long_name": field.long_name, "units": field.units}
    return found | ({"comment": field.comment} if field.comment else {})


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
