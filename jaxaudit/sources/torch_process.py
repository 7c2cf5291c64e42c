"""Run as a process of its own: describes a file of torch.save; imports nothing of the package.

The pickle is looked at first, without running it: it may name what a state dict needs and nothing else. Then
`torch.load(weights_only=True)` reads it in fake mode, which makes tensors without memory that say where in the file
their data lie.
"""

import importlib
import json
import math
import os
import pickletools
import select
import struct
import sys
import zipfile
from typing import Any

MEMORY = 4 << 30
_IDLE_SECONDS = 60
_LARGEST_PICKLE, _MOST_NODES, _DEEPEST = 1 << 26, 1_000_000, 32
_MOST_FILES, _LONGEST_TEXT = 200_000, 10_000

_STORAGES = ("BFloat16", "Half", "Float", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
#: What the pickle may name: enough for state dicts, nothing that could ask for memory or time.
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    *(f"torch {name}Storage" for name in _STORAGES),
}
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "GLOBAL", "BINPERSID", "REDUCE", "BUILD", "MEMOIZE"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *(
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "EMPTY_SET",
        "ADDITEMS",
    ),
}


class Refusal(Exception):
    """What is wrong with a file, and what to do."""


def describe(path: str) -> dict[str, Any]:
    """Return what a file holds as a tree of JSON; tensors as {"tensor": dtype, "shape", "offset"}."""
    records = check_archive(path)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = torch.load(path, weights_only=True)
    return Tree(path, records).node(found, 0)


def check_archive(path: str) -> dict[int, int]:
    """Check the archive and its pickle; return the bytes of each record, by its offset in the file."""
    if not zipfile.is_zipfile(path):
        raise Refusal(
            "not in torch's zip format (torch.save of 1.6 or later). Load and save it again."
        )
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = archive.infolist()
        if len(entries) > _MOST_FILES:
            raise Refusal(f"{len(entries)} records in the archive; at most {_MOST_FILES} are read.")
        pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise Refusal(
                "compressed or without data.pkl, so not written by torch.save. Save it again."
            )
        if any(e.filename.endswith(("/constants.pkl", "/code/")) for e in entries):
            raise Refusal("a TorchScript archive. Save the state dict instead.")
        size = os.fstat(file.fileno()).st_size
        if pickles[0].file_size > _LARGEST_PICKLE or sum(e.file_size for e in entries) > size:
            raise Refusal("its records are larger than the file or their limit. Save it again.")
        check_pickle(archive.read(pickles[0]))
        for entry in entries:
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise Refusal("written on a big-endian machine, which is not supported.")
        return {_data_offset(file, e): e.file_size for e in entries}


def check_pickle(text: bytes) -> None:
    """Raise Refusal if a pickle names or does anything that state dicts do not need."""
    try:
        for opcode, argument, _ in pickletools.genops(text):
            if opcode.name not in _OPCODES:
                raise Refusal(
                    f"its pickle uses {opcode.name}, which a state dict does not need. Save it again."
                )
            if opcode.name == "GLOBAL" and argument not in ALLOWED:
                raise Refusal(
                    f"holds objects of {str(argument)[:80]!r}. Save tensors, numbers and texts alone, as "
                    "state_dict() gives them."
                )
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"its pickle is damaged ({str(error)[:80]}). Save or copy it again."
        ) from error


def _data_offset(file: Any, entry: zipfile.ZipInfo) -> int:
    file.seek(entry.header_offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise Refusal("its archive is damaged. Save or copy it again.")
    name, extra = struct.unpack("<HH", head[26:30])
    return entry.header_offset + 30 + name + extra


class Tree:
    """Turns what was loaded into JSON, with a limit on how much.

    Args:
        path: the file.
        records: bytes of each record, by offset.
    """

    def __init__(self, path: str, records: dict[int, int]):
        self._path, self._records, self._nodes = path, records, 0

    def node(self, value: Any, depth: int) -> Any:
        """Return a value as JSON; what is of another kind as null."""
        import torch

        self._nodes += 1
        if self._nodes > _MOST_NODES or depth > _DEEPEST:
            raise Refusal("holds too much, or nested too deep. Save state dicts alone.")
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            items = ((k, x) for k, x in value.items() if isinstance(k, str | int))
            return {"dict": {str(k): self.node(x, depth + 1) for k, x in items}}
        if isinstance(value, list | tuple):
            return {"list": [self.node(x, depth + 1) for x in value]}
        if isinstance(value, str):
            return {"value": value[:_LONGEST_TEXT]}
        plain = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 62)
        return {"value": value if plain else None}

    def _tensor(self, value: Any) -> dict[str, Any]:
        import torch

        storage = value.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        size = math.prod(value.shape) * value.element_size()
        begin = value.storage_offset() * value.element_size()
        room = self._records.get(start, -1)  # pyright: ignore[reportArgumentType, reportCallIssue]
        names = {
            torch.bfloat16: "BF16",
            torch.float16: "F16",
            torch.float32: "F32",
            torch.float64: "F64",
            torch.int64: "I64",
            torch.int32: "I32",
        }
        dtype = names.get(value.dtype, str(value.dtype))
        found: dict[str, Any] = {"tensor": dtype, "shape": list(value.shape)}
        if len(found["shape"]) > 32:
            raise Refusal("holds a tensor of more than 32 axes. Save it again.")
        if start is None or not value.is_contiguous():
            return found | {"offset": None}
        if begin < 0 or begin + size > room:
            raise Refusal(
                f"a tensor of shape {found['shape']!r:.80} reaches beyond its data. Save or copy the file again."
            )
        found["offset"] = start + begin
        formats = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
        if not found["shape"] and dtype in formats:
            with open(self._path, "rb") as file:
                file.seek(start + begin)
                found["value"] = struct.unpack(formats[dtype], file.read(size))[0]
        return found


def limit_memory() -> None:
    """Let this process take so much more memory, and no more."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):
        return  # another system


def answer(path: str) -> dict[str, Any]:
    """Describe a file, or say what is wrong with it."""
    try:
        return {"answer": describe(path)}
    except Refusal as refusal:
        return {"error": str(refusal)}
    except MemoryError:
        return {"error": "needs more memory than it may take. Save state dicts alone."}
    except Exception as error:  # whatever torch makes of a damaged file
        text = " ".join(str(error).split())[:160]
        return {
            "error": f"torch.load(weights_only=True) cannot read it ({text}). Save or copy the file again."
        }


def main() -> None:
    """Answer requests until there are none, or none came for a while."""
    importlib.import_module("torch._subclasses.fake_tensor")  # libraries take much address space
    limit_memory()
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        while select.select([0], [], [], _IDLE_SECONDS)[0] and (
            line := sys.stdin.buffer.readline()
        ):
            view = memoryview(json.dumps(answer(json.loads(line)["path"])).encode() + b"\n")
            while view:
                view = view[out.write(view) :]


if __name__ == "__main__":
    main()
