"""Make the sample recording that ships inside the package: a few rows of a run.

    python scripts/make_sample.py --overwrite
    python scripts/make_sample.py --recording results/run.safetensors --output results/sample

Without `--recording` it runs the defaults of `record_run.py` first and records these rows alone,
which takes some minutes. Of the dead tokens it takes those at the positions
floor(k * count / DEAD), k = 0..DEAD-1, of the ascending list of all dead tokens, and of the live
ones likewise; of the steps the first STEPS. Values are copied as they are.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxaudit.recorders.writing import RecordingWriter, RowLayout, check_free, write_tensors

DATA = Path(__file__).parents[1] / "jaxaudit" / "data"
#: The sample travels with the package.
LARGEST = 8_000_000
#: How the bits of a safetensors dtype are read here.
BITS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}


@dataclass(frozen=True)
class Tensors:
    """A safetensors file, mapped into memory.

    Attributes:
        arrays: each tensor; BF16 as uint16.
        dtypes: safetensors dtype of each.
        metadata: strings of the header.
    """

    arrays: dict[str, np.ndarray]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def open_tensors(path: Path) -> Tensors:
    """Map a safetensors file, whose tensors are then read where they are touched."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = data[begin:end].view(BITS[entry["dtype"]]).reshape(entry["shape"])
    return Tensors(arrays, {name: entry["dtype"] for name, entry in header.items()}, metadata)


def choose(dead: np.ndarray, dead_count: int, live_count: int) -> np.ndarray:
    """Choose rows evenly from the dead and from the live ones; int64, ascending."""
    chosen = []
    for members, count in ((np.flatnonzero(dead), dead_count), (np.flatnonzero(~dead), live_count)):
        if not 0 < count <= len(members):
            raise ValueError(f"{count} rows were asked for, but the group has {len(members)}.")
        chosen.append(members[np.arange(count) * len(members) // count])
    return np.sort(np.concatenate(chosen))


def cut(run: Tensors, rows: np.ndarray, steps: int, output: Path, overwrite: bool) -> None:
    """Write the first steps of some rows as a recording of its own."""
    taken = run.arrays["W"].shape[0] - 1
    if not 0 < steps <= taken:
        raise ValueError(f"{steps} steps were asked for, but the recording has {taken}.")
    names = [name for name in run.arrays if name.endswith("W")]
    streamed = {name: run.arrays[name] for name in names}
    layouts = {k: RowLayout(run.dtypes[k], (len(rows), *x.shape[2:])) for k, x in streamed.items()}
    metadata = cut_metadata(run, rows, steps)
    with RecordingWriter(output, layouts, metadata=metadata, overwrite=overwrite) as writer:
        for timestep in range(steps + 1):
            writer.append({name: array[timestep, rows] for name, array in streamed.items()})
        for name in run.arrays.keys() - streamed.keys() - {"num_steps"}:
            array = run.arrays[name]
            writer.small[name] = np.array(array[: steps + 1] if array.ndim else array)


def cut_metadata(run: Tensors, rows: np.ndarray, steps: int) -> dict[str, str]:
    """Return the run's metadata, with the rows and the learning rates that are left."""
    hyperparameters = json.loads(run.metadata["hyperparameters"])
    if isinstance(hyperparameters["learning_rate"], list):
        hyperparameters["learning_rate"] = hyperparameters["learning_rate"][: steps + 1]
    changed = {"hyperparameters": json.dumps(hyperparameters)}
    return run.metadata | changed | {"rows": json.dumps(token_ids(run, rows))}


def token_ids(run: Tensors, rows: np.ndarray) -> list[int]:
    """Return the rows of the whole parameter; a run may hold a part of it."""
    ids = json.loads(run.metadata["rows"]) if "rows" in run.metadata else None
    return [ids[row] if ids else int(row) for row in rows]


def make(recording: Path, groups: Path, arguments: argparse.Namespace) -> Path:
    """Cut the sample and write it with its token groups and its README; returns the sample."""
    run, mask = open_tensors(recording), open_tensors(groups)
    rows = choose(mask.arrays["dead_mask"] != 0, arguments.dead, arguments.live)
    dead = np.array(mask.arrays["dead_mask"][rows])
    sample = arguments.output / "sample.safetensors"
    marked = arguments.output / "sample-token-groups.safetensors"
    cut(run, rows, arguments.steps, sample, arguments.overwrite)
    notes = mask.metadata | {"rows": json.dumps(token_ids(run, rows))}
    write_tensors(marked, {"dead_mask": dead}, metadata=notes, overwrite=arguments.overwrite)
    text = readme(run, token_ids(run, rows), dead != 0, arguments)
    (arguments.output / "README.md").write_text(text, encoding="utf-8")
    return sample


def readme(run: Tensors, ids: list[int], dead: np.ndarray, arguments: argparse.Namespace) -> str:
    """Say how the sample was made."""
    told = run.metadata
    tokens = [
        ", ".join(str(token) for token, is_dead in zip(ids, dead, strict=True) if is_dead == kind)
        for kind in (True, False)
    ]
    command = " ".join(["python scripts/make_sample.py", *arguments.words])
    return f"""# The sample recording

`sample.safetensors` holds {len(ids)} rows of the embedding of a small language model, with their gradients
and the moments of the optimizer, after each of its first {arguments.steps} steps.
`sample-token-groups.safetensors` says which rows belong to dead tokens, which the text never uses.

Made on {arguments.date} by

    {command}

- Run: `scripts/record_run.py` with its defaults, or as the metadata of the files say; recorded at
  {told["created_at"]} with torch {told["torch_version"]} on {told["device"]}
  ({told["num_threads"]} threads, kernels for {told["cpu_capability"]}).
- Optimizer: {told["optimizer"]}, {told["implementation"]}, {told["hyperparameters"]}
- Experiment: parameter {told["parameter_shape"]}, {told["experiment"]}
- Machine that made the files: {processor()}; {platform.system()}, Python {platform.python_version()}, NumPy {np.__version__}.
- Dead tokens: {tokens[0]}. Live tokens: {tokens[1]}.
  From the ascending list of all dead tokens, those at the positions floor(k * length / {int(dead.sum())}); of the
  live ones likewise, with {int((~dead).sum())}.
- Weights and gradients are {run.dtypes["W"]}, moments {run.dtypes["momentum_W"]}, bit for bit as recorded.
- Text: {told["text"]}.
  The files hold no text.
"""  # noqa: E501


def processor() -> str:
    """Name the processor of this machine."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def record(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Record the sample's rows into a folder; returns the recording and its token groups."""
    from jaxaudit.recorders import small_language_model as experiment

    recording, groups = folder / "run.safetensors", folder / "run-token-groups.safetensors"
    outcome = experiment.record(
        recording,
        groups,
        choice=experiment.OptimizerChoice(),
        schedule=experiment.Schedule(steps=arguments.steps),
        rows=f"dead:{arguments.dead},live:{arguments.live}",  # chosen as `choose` does
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    return recording, groups


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    result.add_argument("--recording", type=Path, help="a run by record_run.py (recorded anew)")
    result.add_argument("--token-groups", type=Path, help="(RECORDING's stem + -token-groups)")
    result.add_argument("--output", type=Path, default=DATA, help="folder (the package's data)")
    result.add_argument("--dead", type=int, default=6, help="dead rows (%(default)s)")
    result.add_argument("--live", type=int, default=4, help="live rows (%(default)s)")
    result.add_argument("--steps", type=int, default=1000, help="steps (%(default)s)")
    result.add_argument("--date", default="2026-11-22", help="for the README (%(default)s)")
    result.add_argument("--overwrite", action="store_true", help="replace existing files")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Make the sample; 0 if it was made, 2 if not, 130 if it was interrupted."""
    arguments = parser().parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    try:
        sample = run(arguments)
    except KeyboardInterrupt:
        print("make_sample: interrupted.", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError, KeyError) as failure:
        print(f"make_sample: {failure}", file=sys.stderr)
        return 2
    size = sample.stat().st_size
    print(
        f"{sample}: {arguments.steps} steps, {arguments.dead + arguments.live} rows, {size} bytes"
    )
    if size > LARGEST:
        print(f"make_sample: larger than {LARGEST} bytes; take fewer steps.", file=sys.stderr)
    return 0


def run(arguments: argparse.Namespace) -> Path:
    """Make the sample from the given recording, or from one recorded for it."""
    for name in ("sample", "sample-token-groups"):
        check_free(arguments.output / f"{name}.safetensors", arguments.overwrite)
    if arguments.recording is not None:
        name = f"{arguments.recording.stem}-token-groups.safetensors"
        groups = arguments.token_groups or arguments.recording.with_name(name)
        return make(arguments.recording, groups, arguments)
    with tempfile.TemporaryDirectory() as folder:
        return make(*record(Path(folder), arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
