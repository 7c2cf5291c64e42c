"""Writes one recording in every form that `jaxaudit.open_recording` reads; for the tests and the fuzzing.

Independent of the package: a mistake in its readers cannot hide in the same mistake of a writer. A recording is given
as safetensors hold it: for each key a dtype and an array of bits, and metadata.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: A tensor: its safetensors dtype, and an array whose bits are taken as they are.
Tensor = tuple[str, np.ndarray]

BIG = ("W", "grad_W", "momentum_W", "variance_W", "max_variance_W", "compensation_W")
_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    name: str = "run",
    count: int = 3,
) -> Path:
    """Write safetensors files with an index; the metadata go into each file, as Hugging Face does."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    homes = {key: names[k % count] for k, key in enumerate(tensors)}
    for file in names:
        part = {key: tensor for key, tensor in tensors.items() if homes[key] == file}
        write_safetensors(folder / file, part, metadata)
    total = sum(array.nbytes for _, array in tensors.values())
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": homes}))
    return index


def write_hdf5(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    group: str = "",
    **layout: Any,
) -> Path:
    """Write an HDF5 file; big tensors with the given chunks or compression, bfloat16 as uint16."""
    import h5py

    with h5py.File(path, "w") as file:
        holder = file.create_group(group) if group else file
        for name, (dtype, array) in tensors.items():
            values = array.view(_FLOATS[dtype]) if dtype in _FLOATS else array
            how = layout if name in BIG else {}
            holder.create_dataset(name, data=values, **how)
        for name, value in (metadata or {}).items():
            holder.attrs[name] = value
    return path


def file_name(name: str) -> str:
    """Return a parameter's file name in a model folder, by the format's rule."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
    text = "".join(chr(b) if chr(b) in letters else "%" + format(b, "02X") for b in name.encode())
    text = "%2E" + text[1:] if text[:1] == "." else text
    digest = hashlib.sha256(name.encode()).hexdigest()
    return text if len(text) <= 180 else text[:150] + "~" + digest[:16]


def write_model(
    folder: Path,
    parameters: Mapping[str, Mapping[str, Tensor]],
    hyperparameters: Sequence[Mapping[str, float]],
    *,
    metadata: Mapping[str, str] | None = None,
    finished: bool = True,
    losses: Sequence[float | None] | None = None,
    skipped: Mapping[int, Sequence[int]] | None = None,
    extra: bytes = b"",
) -> Path:
    """Write the folder of a whole-model recording.

    Args:
        folder: where.
        parameters: the big tensors of each parameter, by name; of (T+1, row, ...).
        hyperparameters: of each step, for the one group.
        metadata: of the run.
        finished: write complete files, else growing ones.
        losses: of each timestep.
        skipped: timesteps without a step, by the parameter's number.
        extra: bytes of a torn step, behind each growing file and the steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, skipped = [], dict(skipped or {})
    for number, (name, tensors) in enumerate(parameters.items()):
        places, room, timesteps = {}, 0, tensors["W"][1].shape[0]
        for key, (dtype, array) in tensors.items():
            places[key] = {"dtype": dtype, "shape": list(array.shape[1:]), "offset": room}
            room += array[0].nbytes
        facts = {
            key: json.loads(text)
            for key, text in (metadata or {}).items()
            if key in ("rows", "parameter_shape")
        }
        shape = facts.get("parameter_shape", list(tensors["W"][1].shape[1:]))
        entry = {"name": name, "file": file_name(name), "group": 0, "shape": shape}
        entry["rows"] = facts.get("rows")
        entries.append(entry | {"first_step": 1, "tensors": places, "record_bytes": room})
        rates = [step["learning_rate"] for step in hyperparameters]
        given = dict(hyperparameters[0]) | {"learning_rate": [rates[0], *rates]}
        own = dict(metadata or {}) | {"hyperparameters": json.dumps(given)}
        if number in skipped:
            own["skipped_steps"] = json.dumps(list(skipped[number]))
        if finished:
            steps = np.asarray(timesteps - 1, "<i8")
            whole = {**tensors, "num_steps": ("I64", steps)}
            if losses is not None:
                values = np.array([np.nan if x is None else x for x in losses], "<f8")
                whole["losses"] = "F64", values
            write_safetensors(folder / f"{file_name(name)}.safetensors", whole, own)
        else:
            records = b"".join(
                np.ascontiguousarray(array[t]).tobytes()
                for t in range(timesteps)
                for _, array in tensors.values()
            )
            (folder / f"{file_name(name)}.growing").write_bytes(records + extra)
    index = {"format": "jaxaudit model recording 1", "finished": finished}
    index |= {"metadata": dict(metadata or {}), "groups": [{"metadata": {}}], "parameters": entries}
    (folder / "recording.json").write_text(json.dumps(index))
    lines = []
    for t in range(len(hyperparameters) + 1):
        line: dict[str, Any] = {
            "timestep": t,
            "hyperparameters": [dict(hyperparameters[t - 1])] if t else None,
        }
        line["loss"] = None if losses is None else losses[t]
        if left := [number for number, steps in skipped.items() if t in steps]:
            line["skipped"] = left
        lines.append(json.dumps(line) + "\n")
    (folder / "steps.jsonl").write_bytes("".join(lines).encode() + extra)
    return folder


def write_safetensors_series(
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    form: str = "exp_avg.{name}",
    first: int = 0,
    numbers: Sequence[int] | None = None,
) -> Path:
    """Write one folder with model.safetensors and optimizer.safetensors per state; no gradients.

    Args:
        folder: where.
        name: of the parameter.
        tensors: a recording's, of which `W` and the moments are written.
        metadata: texts for the optimizer's files.
        form: how the optimizer's tensors are called; `exp_avg` in it stands for any of them.
        first: number and step count of the first state.
        numbers: which states; by default all.
    """
    keys = {"momentum_W": "exp_avg", "variance_W": "exp_avg_sq", "max_variance_W": "max_exp_avg_sq"}
    states = range(tensors["W"][1].shape[0]) if numbers is None else numbers
    for t in states:
        place = folder / f"checkpoint-{first + t}"
        place.mkdir(parents=True)
        dtype, array = tensors["W"]
        write_safetensors(place / "model.safetensors", {name: (dtype, array[t])}, {"format": "pt"})
        state = {
            form.replace("exp_avg", key).format(name=name): (
                tensors[tensor][0],
                tensors[tensor][1][t],
            )
            for tensor, key in keys.items()
            if tensor in tensors
        }
        count = {"optimizer_step": str(first + t)}
        write_safetensors(place / "optimizer.safetensors", state, {**metadata, **count})
    return folder
