"""Run as a process of its own: describes an HDF5 file and reads from it; imports nothing of the package.

Takes one JSON object a line, and answers with one a line, after which raw bytes may follow.
"""

import itertools
import json
import math
import os
import sys
from typing import Any

import h5py
import numpy as np

MEMORY = 2 << 30
_MOST_GROUPS, _MOST_NAMES, _DEEPEST = 1000, 10_000, 4
_LARGEST_CHUNK = 1 << 30
_LARGEST_ATTRIBUTE = 1 << 16
_FLOATS = {
    (2, 15, 10, 5, 0, 10): "F16",
    (2, 15, 7, 8, 0, 7): "BF16",
    (4, 31, 23, 8, 0, 23): "F32",
    (8, 63, 52, 11, 0, 52): "F64",
}
#: Filters of the HDF5 library and of h5py that lose nothing: deflate, shuffle, fletcher32, szip, lzf.
_FILTERS = {1, 2, 3, 4, 32000}
_LAYOUTS = {
    h5py.h5d.CONTIGUOUS: "contiguous",
    h5py.h5d.COMPACT: "compact",
    h5py.h5d.CHUNKED: "chunked",
}


class Refusal(Exception):
    """What is wrong with a file, and what to do."""


def describe(file: h5py.File, group: str | None) -> dict[str, Any]:
    """Describe the datasets and attributes of the group that holds `W`; name all such groups."""
    holders = list(_holders(file))
    if group is not None and group.strip("/") not in holders:
        raise Refusal(f"no group {group[:80]!r} with a `W`; {_listed(holders)}.")
    if group is None and len(holders) > 1:
        raise Refusal(
            f"{len(holders)} groups hold a `W`: {_listed(holders)}. Name one with parameter=."
        )
    name = group.strip("/") if group is not None else holders[0] if holders else ""
    chosen: Any = file[name] if name else file
    datasets = {}
    for key in itertools.islice(chosen, _MOST_NAMES):
        described = _dataset(file, chosen, key)
        if described:
            datasets[key] = described
    attributes = _attributes(file) | (_attributes(chosen) if name else {})
    return {"group": name, "datasets": datasets, "attributes": attributes}


def _holders(file: h5py.File) -> Any:
    """Yield the paths of the groups with a dataset `W`; over hard links only, each group once."""
    todo: list[tuple[str, Any, int]] = [("", file, 0)]
    seen, known = 0, set()
    while todo:
        path, group, depth = todo.pop(0)
        seen += 1
        if seen > _MOST_GROUPS:
            raise Refusal(f"more than {_MOST_GROUPS} groups. Keep one recording in a file.")
        address = _LOW.h5o.get_info(group.id).addr
        if address in known:
            continue
        known.add(address)
        if _kind(group, "W") is h5py.Dataset:
            yield path
        if depth < _DEEPEST:
            for name in itertools.islice(group, _MOST_NAMES):
                if _kind(group, name) is h5py.Group:
                    todo.append((f"{path}/{name}".strip("/"), group[name], depth + 1))


def _kind(group: Any, name: str) -> Any:
    """Return the class behind a hard link; None for what is absent or linked in another way."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        if group.get(name, getlink=True) is not None and name in _KEYS:
            raise Refusal(f"`{name}` is a soft or external link. Copy the dataset itself.")
        return None
    return group.get(name, getclass=True)


#: The library's own calls.
_LOW: Any = h5py

_KEYS = ("W", "grad_W", "momentum_W", "variance_W", "max_variance_W", "compensation_W")


def _dataset(file: h5py.File, group: Any, key: str) -> dict[str, Any] | None:
    """Describe a dataset; None for what is none, or holds no numbers."""
    if _kind(group, key) is not h5py.Dataset:
        return None
    data = group[key]
    kind, swapped = _dtype(data.id.get_type())
    if kind is None or data.shape is None:
        if key in _KEYS:
            raise Refusal(
                f"`{key}` holds no numbers of 1 to 8 bytes. Write it as uint16 or float32."
            )
        return None
    listed = data.id.get_create_plist()
    if listed.get_external_count():
        raise Refusal(f"`{key[:80]}` is stored in another file. Copy it into this one.")
    layout = _LAYOUTS.get(listed.get_layout())
    if layout is None:
        raise Refusal(f"`{key[:80]}` is a virtual dataset. Copy it into this file.")
    found = {"dtype": kind, "shape": list(data.shape), "swapped": swapped, "layout": layout}
    stated = _attributes(data).get("dtype", {}).get("text")
    found["stated"] = stated[:40] if isinstance(stated, str) else None
    if layout == "chunked":
        _check_chunks(data, key, listed)
    elif layout == "contiguous":
        found["offset"] = data.id.get_offset()
        needed = math.prod(data.shape) * data.id.get_type().get_size()
        if needed and (found["offset"] is None or data.id.get_storage_size() != needed):
            raise Refusal(f"`{key[:80]}` was never written. Write the file again.")
    return found


def _check_chunks(data: Any, key: str, listed: Any) -> None:
    filters = {listed.get_filter(k)[0] for k in range(listed.get_nfilters())}
    unknown = sorted(filters - _FILTERS)
    if unknown:
        raise Refusal(
            f"`{key[:80]}` is compressed with filter {unknown[0]}; read are gzip, lzf, szip, shuffle and fletcher32. "
            "Repack it, for example with `h5repack -f GZIP=1`."
        )
    size = math.prod(data.chunks) * data.id.get_type().get_size()
    if size > _LARGEST_CHUNK:
        raise Refusal(
            f"`{key[:80]}` has chunks of {size} bytes; at most {_LARGEST_CHUNK} are read."
        )
    needed = math.prod(-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True))
    if 0 in data.shape:
        return
    written = data.id.get_num_chunks()
    if written != needed:
        raise Refusal(f"`{key[:80]}` has {written} of {needed} chunks. Write the file again.")


def _dtype(kind: Any) -> tuple[str | None, bool]:
    """Return safetensors' name of a type, and whether its bytes are in the other order."""
    size = kind.get_size()
    if isinstance(kind, h5py.h5t.TypeEnumID):
        base = kind.get_super()
        boolean = size == 1 and kind.get_nmembers() == 2
        return ("BOOL" if boolean and isinstance(base, h5py.h5t.TypeIntegerID) else None), False
    if isinstance(kind, h5py.h5t.TypeFloatID):
        name = _FLOATS.get((size, *kind.get_fields()))
    elif isinstance(kind, h5py.h5t.TypeIntegerID) and size in (1, 2, 4, 8):
        name = f"{'I' if kind.get_sign() == h5py.h5t.SGN_2 else 'U'}{8 * size}"
    else:
        name = None
    return name, name is not None and size > 1 and kind.get_order() != h5py.h5t.ORDER_LE


def _attributes(holder: Any) -> dict[str, Any]:
    """Return texts and numbers; everything else is left out."""
    found = {}
    for name in itertools.islice(holder.attrs, 1000):
        attribute = holder.attrs.get_id(name)
        kind = attribute.get_type()
        plain = isinstance(
            kind,
            h5py.h5t.TypeStringID
            | h5py.h5t.TypeIntegerID
            | h5py.h5t.TypeFloatID
            | h5py.h5t.TypeEnumID,
        )
        if not plain or attribute.get_storage_size() > _LARGEST_ATTRIBUTE:
            continue
        value = holder.attrs[name]
        if isinstance(value, bytes | np.bytes_):
            value = value.decode(errors="replace")
        if isinstance(value, str):
            found[name] = {"text": value}
        elif isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf":
            found[name] = {"dtype": value.dtype.str[1:], "values": np.asarray(value).tolist()}
    return found


def read(data: Any, steps: list[int] | None, rows: list[int] | None) -> np.ndarray:
    """Read entries as their bits; all of a dataset where `steps` is None."""
    kind = data.id.get_type()
    lengths = [*data.shape] if steps is None else [steps[1] - steps[0], rows[1] - rows[0], *data.shape[2:]]  # type: ignore[index]  # fmt: skip
    size = kind.get_size()
    out = np.empty(lengths, np.dtype(f"V{size}") if size > 1 else np.uint8)
    space = data.id.get_space()
    if steps is not None and rows is not None:
        start = (steps[0], rows[0], *(0 for _ in data.shape[2:]))
        space.select_hyperslab(start, tuple(lengths))
    memory = h5py.h5s.create_simple(tuple(lengths)) if lengths else h5py.h5s.create(h5py.h5s.SCALAR)
    if out.size:
        data.id.read(memory, space, out, mtype=kind)
    raw = out.reshape(-1).view(np.uint8)
    return raw.reshape(-1, size)[:, ::-1].reshape(-1).copy() if _dtype(kind)[1] else raw


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name[:80] or "/") for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "there is none"


def limit_memory() -> None:
    """Let this process take so much more memory, and no more."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):
        return  # another system


def main() -> None:
    """Answer requests until there are none."""
    limit_memory()
    opened: dict[str, Any] = {}
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        for line in sys.stdin.buffer:
            request, data = json.loads(line), b""
            try:
                path = request["path"]
                if path not in opened:
                    opened[path] = h5py.File(path, "r", locking=False, rdcc_nbytes=1 << 27)
                if "dataset" in request:
                    found = opened[path][request["dataset"]]
                    data = read(found, request.get("steps"), request.get("rows")).data
                    answer = {"answer": len(data)}
                else:
                    answer = {"answer": describe(opened[path], request.get("group"))}
            except Refusal as refusal:
                answer, data = {"error": str(refusal)}, b""
            except MemoryError:
                answer, data = (
                    {"error": "needs more memory than it may take. Write smaller chunks."},
                    b"",
                )
            except Exception as error:  # whatever the library makes of a damaged file
                text = " ".join(str(error).split())[:160]
                answer = {"error": f"HDF5 cannot read it ({text}). Copy or write the file again."}
                data = b""
            out.write(json.dumps(answer).encode() + b"\n")
            view = memoryview(data).cast("B")
            while view:
                view = view[out.write(view) :]


if __name__ == "__main__":
    main()
