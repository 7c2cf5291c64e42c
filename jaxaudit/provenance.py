"""Where and with what a result was made: the attributes that every dataset carries."""

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxaudit.devices import Device

SCHEMA_VERSION = "1"


def provenance(device: Device, devices: int = 1) -> dict[str, Any]:
    """Describe the device (one of so many), the versions and the call that make a result."""
    return {
        "backend": device.platform,
        "device": device.device_kind,
        "device_count": devices,
        "jax_version": version_of("jax") or "unknown",
        "jaxlib_version": version_of("jaxlib") or "unknown",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    } | origin()


def origin() -> dict[str, Any]:
    """Describe the version and the call that make a result, for one that needs no device."""
    return {
        "jaxaudit_version": version_of("jaxaudit") or "unknown",
        "creation_library": "jaxaudit",
        "created_at": now(),
        "command": " ".join(_call(sys.argv)),
        "schema_version": SCHEMA_VERSION,
        "Conventions": "CF-1.11",
    }


def now() -> str:
    """Return the time in UTC; the one that SOURCE_DATE_EPOCH says, where that is set, as reproducible builds do."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    if fixed.isdecimal() and len(fixed) < 12:
        moment = datetime.datetime.fromtimestamp(int(fixed), datetime.UTC)
    else:
        moment = datetime.datetime.now(datetime.UTC)
    return moment.isoformat(timespec="seconds")


#: Options that say how a result is come by, and not what it is; those of the first line have a value.
_WITH_VALUE, _ALONE = ("--workers", "--scheduler", "--shard"), ("--overwrite", "--quiet")


def _call(arguments: Sequence[str]) -> list[str]:
    """Leave out what a result does not depend on, so that it is the same whoever did the work."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not skip and argument not in _ALONE and name not in _WITH_VALUE:
            kept.append(argument)
        skip = not skip and argument in _WITH_VALUE and not value
    return kept


def version_of(package: str) -> str | None:
    """Return an installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the CPU's name; virtual machines hide all but the family."""
    found = _cpu_table()
    if not found:
        return platform.processor()
    name = found.get("model name", platform.processor())
    return f"{name}, family {found.get('cpu family', '?')}, model {found.get('model', '?')}"


def cpu_flags() -> str:
    """Return what the CPU's instruction set offers, as far as the system tells: names between spaces."""
    found = _cpu_table()
    return found.get("flags", found.get("Features", ""))


def _cpu_table() -> dict[str, str]:
    """Read Linux's description of the first core; empty elsewhere."""
    table = Path("/proc/cpuinfo")
    if not table.exists():
        return {}
    pairs = [line.split(":", 1) for line in table.read_text().splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}
