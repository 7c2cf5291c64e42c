"""Feeds damaged and hostile files to everything that reads a recording.

    python scripts/fuzz_sources.py --inputs 100000 --output results/fuzzing.json

Every input must be read, or refused with `FileError` in one line, within a time and a memory limit. Inputs are made
from valid files by changing bytes, or by putting nasty values into their JSON; each can be made again from the seed, its kind
and its number. They run in batches, in a child each, so that a crash of a library is seen and counted. Of HDF5 and
torch files, the code of the processes that read them runs here; what it raises they turn into an answer.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import jaxaudit
from jaxaudit.provenance import cpu_name
from jaxaudit.safetensors_file import FileError
from jaxaudit.sources import hdf5_process, torch_process

sys.path.insert(0, str(Path(__file__).parent))
import source_writers as writers  # noqa: E402

SECONDS = 3.0
MEMORY = 1 << 30
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 1 << 31, (1 << 31) - 1, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 64, 10**30,
    -(1 << 63), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), "", "a", "..", "../x", "/etc/passwd", "W", "\0",
    "\ud800", "x" * 300, "%2E", "[1, 2]", "[[", "NaN", "1e999", [], [0], [-1], [1 << 62, 1 << 62], [0] * 40, {}, {"": 0},
    {"a": {"b": {}}}, "BF16", "F64", "U8", "BOOL", "I64", [[]], [None], ["a"], "\n", "7" * 4301,
]  # fmt: skip


# --- seeds ---


def tensors(steps: int = 3) -> dict[str, writers.Tensor]:
    """Return a small recording of random bits."""
    bits = np.random.default_rng(0)
    shape = (steps + 1, 4, 2)

    def patterns(kind: str) -> np.ndarray:
        return bits.integers(0, 1 << 15, shape).astype(kind)

    found = {"W": ("BF16", patterns("<u2")), "grad_W": ("BF16", patterns("<u2"))}
    found |= {"momentum_W": ("F32", patterns("<u4")), "variance_W": ("F32", patterns("<u4"))}
    found |= {
        "losses": ("F32", np.ones(steps + 1, "<f4")),
        "num_steps": ("I64", np.array(steps, "<i8")),
        "dead_mask": ("BOOL", np.array([True, False, True, False])),
        "token_group": ("U8", np.array([0, 1, 2, 1], np.uint8)),
        "learning_rate": ("F32", np.full(steps + 1, 0.1, "<f4")),
    }
    return found


def facts(steps: int = 3) -> dict[str, str]:
    """Return metadata of a recording."""
    given = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    rates = [0.1] * (steps + 1)
    return {
        "hyperparameters": json.dumps(given | {"learning_rate": rates}),
        "parameter_shape": "[9, 2]",
        "rows": "[0, 2, 4, 8]",
        "first_step": "1",
        "skipped_steps": "[2]",
        "group_names": '["a", "b", "c"]',
    }


STEP = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.0}
BIG = ("W", "grad_W", "momentum_W", "variance_W")


def checkpoint(folder: Path) -> bytes:
    """Return a torch file of a small run's state."""
    import torch

    weight = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    stream = io.BytesIO()
    torch.save({"model": {"w": weight.detach()}, "optimizer": optimizer.state_dict()}, stream)
    return stream.getvalue()


# --- mutations ---


def changed_bytes(rng: random.Random, content: bytes, among: int | None = None) -> bytes:
    """Change a few bytes, of the first `among` if given: flip, overwrite, insert, remove, repeat, cut."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        at = rng.randrange(min(len(data), among or len(data)))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, ord("{"), ord('"'), ord("9")))
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            value = rng.choice(
                (0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), rng.getrandbits(8 * width))
            )
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 4:
            del data[at : at + rng.choice((1, 2, 8, 64, 512))]
        elif kind == 5:
            data[at:at] = data[at : at + rng.choice((4, 16, 64))] * rng.choice((1, 2, 50))
        elif kind == 6:
            del data[at:]
        else:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def changed_json(rng: random.Random, value: Any) -> Any:
    """Put nasty values, missing, foreign or exchanged entries somewhere into JSON."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for key, child in items:
            places.append((node, key))
            walk(child)

    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places.clear()
        walk(value)
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind <= 2:
            node[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3 and isinstance(node[key], int):
            node[key] += rng.choice((-1, 1, 7, 1 << 20, 1 << 40))
        elif kind == 4:
            del node[key]
        elif kind == 5 and isinstance(node, dict):
            node[str(rng.choice(NASTY))[:400]] = node[key]
        else:
            other, place = rng.choice(places)
            node[key] = json.loads(json.dumps(other[place]))
    return value


def as_text(rng: random.Random, value: Any) -> bytes:
    """Return JSON as text, sometimes with an object's first key twice, or nested very deep."""
    text = json.dumps(value)
    kind = rng.randrange(40)
    if kind == 0:
        text = text.replace("{", '{"format": 1, "format": 2, ', 1)
    elif kind == 1:
        text = text.replace(": ", ": " + "[" * 100_000, 1)
    elif kind == 2:
        text = text.replace(": ", ': {"a"' * 20_000 + ": ", 1)
    return text.encode("utf-8", "surrogatepass")


def text_or_bytes(rng: random.Random, content: bytes, lines: bool = False) -> bytes:
    """Change a JSON text, of one value or one a line, by its structure or by its bytes."""
    if rng.random() < 0.3:
        return changed_bytes(rng, content)
    if not lines:
        return as_text(rng, changed_json(rng, json.loads(content)))
    parts = content.splitlines()
    k = rng.randrange(len(parts))
    parts[k] = as_text(rng, changed_json(rng, json.loads(parts[k]))).replace(b"\n", b" ")
    if rng.random() < 0.2:
        rng.shuffle(parts)
    return b"\n".join(parts) + b"\n" * rng.randrange(2)


def changed_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change a safetensors file: its bytes, or the JSON of its header."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.25:
        return changed_bytes(rng, content, 8 + length)
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.4:  # texts that are JSON themselves
        name = rng.choice(list(header["__metadata__"]))
        text = header["__metadata__"][name].encode()
        header["__metadata__"][name] = text_or_bytes(rng, text).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = as_text(rng, changed_json(rng, header))
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


# --- what reads them ---


def read_through(recording: jaxaudit.Recording) -> None:
    """Read everything that an opened recording has, as an audit does."""
    with recording:
        recording.coverage()
        recording.fingerprint()
        recording.parameter_elements()
        if recording.bytes < 1 << 24:
            span = (1, recording.steps + 1)
            for _ in recording.windows(span, 2, 3, tuple(recording.formats)):
                pass
        jaxaudit.token_groups_of(recording)


def read_hdf5(path: Path) -> None:
    """Do what the process for HDF5 does."""
    import h5py

    with contextlib.suppress(Exception), h5py.File(path, "r", locking=False) as file:
        found = hdf5_process.describe(file, None)
        for name, data in found["datasets"].items():
            size = int(np.prod([float(n) for n in data["shape"]]))
            if size < 1 << 22:
                with contextlib.suppress(Exception):
                    place = f"{found['group']}/{name}" if found["group"] else name
                    hdf5_process.read(file[place], None, None)


def read_torch(path: Path) -> None:
    """Do what the process for torch files does."""
    json.dumps(torch_process.answer(str(path)))


@dataclasses.dataclass
class Kind:
    """Inputs of one kind: `make` writes one into a folder, `read` reads it.

    What is `contained` runs in a process of its own when people use it, whose end, time or memory are a FileError.
    """

    share: int
    make: Callable[[random.Random, Path], Any]
    read: Callable[[Any], Any]
    contained: bool = False


def kinds(folder: Path) -> dict[str, Kind]:
    """Return every kind, with its share of the inputs in percent; seeds are written into a folder."""
    whole = writers.write_safetensors(folder / "a.safetensors", tensors(), facts()).read_bytes()
    masks = {k: v for k, v in tensors().items() if k in ("dead_mask", "token_group")}
    groups = writers.write_safetensors(folder / "g.safetensors", masks, facts()).read_bytes()
    shards = writers.write_shards(folder / "shards", tensors(), facts())
    big = {k: v for k, v in tensors().items() if k in BIG}
    model = writers.write_model(
        folder / "model", {"w": big, "v/x": big}, [STEP] * 3, finished=False, skipped={0: [2]}, losses=[None, 1.0, 2.0, 3.0]
    )  # fmt: skip
    series = writers.write_safetensors_series(
        folder / "series", "w", tensors(), {"hyperparameters": json.dumps(STEP)}
    )
    h5 = [
        writers.write_hdf5(folder / "a.h5", tensors(), facts()).read_bytes(),
        writers.write_hdf5(
            folder / "b.h5", tensors(), facts(), compression="gzip", chunks=(1, 2, 2)
        ).read_bytes(),
        writers.write_hdf5(folder / "c.h5", tensors(), facts(), group="a/b").read_bytes(),
    ]
    saved = checkpoint(folder)

    def file(name: str, change: Callable[[random.Random], bytes]) -> Callable[..., Path]:
        def make(rng: random.Random, at: Path) -> Path:
            (at / name).write_bytes(change(rng))
            return at / name

        return make

    def tree(source: Path, change: Callable[[random.Random, Path], None]) -> Callable[..., Path]:
        def make(rng: random.Random, at: Path) -> Path:
            target = at / "tree"
            shutil.copytree(source, target, symlinks=True)
            change(rng, target)
            return target

        return make

    def change_model(rng: random.Random, at: Path) -> None:
        if rng.random() < 0.5:
            path = at / "recording.json"
            path.write_bytes(text_or_bytes(rng, path.read_bytes()))
        elif rng.random() < 0.9:
            path = at / "steps.jsonl"
            path.write_bytes(text_or_bytes(rng, path.read_bytes(), lines=True))
        else:
            path = at / "w.growing"
            path.write_bytes(changed_bytes(rng, path.read_bytes()))

    def change_series(rng: random.Random, at: Path) -> None:
        path = rng.choice(sorted(at.rglob("*.safetensors")))
        roll = rng.random()
        if roll < 0.6:
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            text = text_or_bytes(rng, content[8 : 8 + length])
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        elif roll < 0.8:
            names = [
                "x",
                "step_1",
                "checkpoint-007",
                "9" * 200,
                "a\n1",
                "checkpoint-1e3",
                ".5",
                "-1",
            ]
            path.parent.rename(at / rng.choice(names))
        elif roll < 0.9:
            path.unlink()
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(changed_bytes(rng, path.read_bytes()))

    def open_and_read(path: Path) -> None:
        read_through(jaxaudit.open_recording(path))

    def open_model(path: Path) -> None:
        for name in [*jaxaudit.open_model(path)][:3]:
            read_through(jaxaudit.open_recording(path, name))

    def change_shards(rng: random.Random, at: Path) -> None:
        path = at / shards.name
        path.write_bytes(text_or_bytes(rng, path.read_bytes()))

    return {
        "safetensors": Kind(30, file("f.safetensors", lambda r: changed_safetensors(r, whole)), open_and_read),
        "token groups": Kind(12, file("f.safetensors", lambda r: changed_safetensors(r, groups)), jaxaudit.open_token_groups),
        "index": Kind(13, tree(shards.parent, change_shards), lambda p: open_and_read(p / shards.name)),
        "model folder": Kind(20, tree(model, change_model), open_model),
        "checkpoints": Kind(7, tree(series, change_series), open_and_read),
        "hdf5": Kind(10, file("f.h5", lambda r: changed_bytes(r, r.choice(h5))), read_hdf5, contained=True),
        "torch": Kind(8, file("f.pt", lambda r: changed_torch(r, saved)), read_torch, contained=True),
    }  # fmt: skip


def changed_torch(rng: random.Random, content: bytes) -> bytes:
    """Change a torch file: anywhere, or in its pickle and its directory, which is where it matters."""
    start = content.find(b"\x80\x02}")
    roll = rng.random()
    if roll < 0.5:  # the pickle, in place
        end = content.find(b"PK\x03\x04", start)
        part = bytearray(content[start:end])
        for _ in range(rng.choice((1, 2, 4))):
            part[rng.randrange(len(part))] = rng.choice(
                (rng.randrange(256), 0, 255, ord("."), ord("R"))
            )
        return content[:start] + bytes(part) + content[end:]
    if roll < 0.75:  # the directory at the end
        at = content.find(b"PK\x01\x02")
        return content[:at] + changed_bytes(rng, content[at:])
    return changed_bytes(rng, content)


# --- running them ---


class Late(BaseException):
    """An input took too long."""


def late(*_: object) -> None:
    """Interrupt an input."""
    raise Late


def one(kind: Kind, rng: random.Random, at: Path) -> tuple[str, str]:
    """Make and read one input; return how it ended, and what is to be said of it."""
    given: Any = at
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)  # kills a library that hears no signal
    try:
        given = kind.make(rng, at)
        kind.read(given)
    except FileError as error:
        text = str(error)
        bad = "\n" in text.removeprefix(str(given)) or len(text) > 1200
        return ("finding", f"long or broken message: {text[:300]!r}") if bad else ("refused", "")
    except Late:
        return "contained" if kind.contained else "finding", f"took longer than {SECONDS:g} s"
    except MemoryError:
        return "contained" if kind.contained else "finding", "took more memory than it may"
    except Exception:
        return "finding", traceback.format_exc()[-900:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read", ""


def batch(name: str, kind: Kind, seed: str, numbers: range, folder: Path) -> dict[str, Any]:
    """Run inputs in a child; a number that it did not get past is a finding of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        status = 1
        try:
            _run_batch(name, kind, seed, numbers, folder, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        lines = [json.loads(line) for line in stream.read().splitlines()]
    _, status = os.waitpid(child, 0)
    found = {
        "ended": Counter(x["how"] for x in lines),
        "findings": [x for x in lines if x["how"] == "finding"],
    }
    found["seconds"] = max((x["seconds"] for x in lines), default=0.0)
    found["next"] = numbers.start + len(lines)
    if status:
        number = numbers.start + len(lines)
        what = f"the library ended the process ({'signal ' + str(status & 127) if status & 127 else 'exit'})"
        how = "contained" if kind.contained and status & 127 else "finding"
        found["ended"][how] += 1
        if how == "finding":
            found["findings"].append({"number": number, "how": how, "what": what})
        found["next"] += 1
    return found


def _run_batch(name: str, kind: Kind, seed: str, numbers: range, folder: Path, writer: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in numbers:
        at = Path(tempfile.mkdtemp(dir=folder))
        started = time.monotonic()
        how, what = one(kind, random.Random(f"{seed}/{name}/{number}"), at)
        line = {"number": number, "how": how, "what": what, "seconds": time.monotonic() - started}
        shutil.rmtree(at, ignore_errors=True)
        os.write(writer, json.dumps(line).encode() + b"\n")


def fuzz(inputs: int, seed: str, only: Sequence[str] = (), size: int = 500) -> dict[str, Any]:
    """Run so many inputs, and return the report."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "seeds").mkdir()
        report: dict[str, Any] = {}
        for name, kind in kinds(folder / "seeds").items():
            if only and name not in only:
                continue
            total = max(1, inputs * kind.share // 100)
            ended, findings, slowest, number = Counter(), [], 0.0, 0
            while number < total:
                span = range(number, min(number + size, total))
                found = batch(name, kind, seed, span, folder)
                ended += found["ended"]
                findings += found["findings"]
                slowest = max(slowest, found["seconds"])
                number = found["next"]
            report[name] = {
                "inputs": sum(ended.values()),
                "read": ended["read"],
                "refused": ended["refused"],
            }
            report[name]["contained"] = ended["contained"]
            report[name] |= {"findings": len(findings), "slowest_seconds": round(slowest, 3)}
            report[name]["first_findings"] = findings[:20]
            print(f"{name}: {report[name]}"[:400], file=sys.stderr, flush=True)
    return report


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--inputs", metavar="N", type=int, default=100_000, help="files to damage (%(default)s)"
    )
    p.add_argument("--seed", default="1", help="of the damage (%(default)s)")
    p.add_argument(
        "--only", metavar="KIND", action="append", default=[], help="a kind; may be repeated"
    )
    p.add_argument("--output", metavar="PATH", type=Path, help="the report (JSON)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the report, and return 1 if there was a finding."""
    given = parser().parse_args(argv)
    import torch._subclasses.fake_tensor  # noqa: F401  # before the children, not in each

    started = time.monotonic()
    found = fuzz(given.inputs, given.seed, given.only)
    packages = ("jaxaudit", "numpy", "h5py", "torch", "safetensors")
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": cpu_name(),
        "versions": {"python": platform.python_version()}
        | {p: metadata.version(p) for p in packages},
        "seed": given.seed,
        "inputs": sum(kind["inputs"] for kind in found.values()),
        "findings": sum(kind["findings"] for kind in found.values()),
        "limits": {"seconds": SECONDS, "bytes": MEMORY},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "kinds": found,
    }
    text = json.dumps(report, indent=1) + "\n"
    if given.output:
        given.output.write_text(text)
    else:
        print(text, end="")
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
