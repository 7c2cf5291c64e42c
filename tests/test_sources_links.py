"""Links: what people put into their folders is followed to regular files; names from JSON lead nowhere else."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from recordings import short_run, write
from test_sources import NAME, bits, model, refusal, writers

import jaxaudit

STEPS = 6


@pytest.fixture(scope="module")
def run():
    return short_run(STEPS)


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory) -> dict[str, bytes]:
    path = write(tmp_path_factory.mktemp("reference") / "run.safetensors", *run)
    with jaxaudit.open_recording(path) as recording:
        return bits(recording, 4, 100)


def as_in_the_hub_cache(folder: Path, cache: Path) -> Path:
    """Lay a folder's files out as the cache of the Hugging Face hub does; return the snapshot."""
    snapshot, blobs = cache / "snapshots" / "a1b2c3", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sorted(folder.iterdir()):
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blobs / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def read(path: Path, *arguments: str) -> dict[str, bytes]:
    with jaxaudit.open_recording(path, *arguments) as recording:
        return bits(recording, 4, 100)


def test_one_file_that_is_named(tmp_path, run, expected):
    write(tmp_path / "real", *run)
    (tmp_path / "link.safetensors").symlink_to("real")
    (tmp_path / "again.safetensors").symlink_to(tmp_path / "link.safetensors")
    assert read(tmp_path / "again.safetensors") == expected


def test_shards_in_the_hub_cache(tmp_path, run, expected):
    folder = writers.write_shards(tmp_path / "run", *run).parent
    snapshot = as_in_the_hub_cache(folder, tmp_path / "models--me--run")
    assert read(snapshot) == expected
    assert read(snapshot / "run.safetensors.index.json") == expected
    (tmp_path / "linked").symlink_to(snapshot)
    assert read(tmp_path / "linked") == expected


def test_model_in_the_hub_cache(tmp_path, run, expected):
    snapshot = as_in_the_hub_cache(model(tmp_path / "run", run), tmp_path / "cache")
    assert read(snapshot, NAME) == expected
    with jaxaudit.open_model(snapshot).open(NAME) as recording:
        assert bits(recording, 4, 100) == expected


def test_checkpoints_in_the_hub_cache(tmp_path, run):
    tensors, metadata = run
    folder = writers.write_safetensors_series(tmp_path / "run", NAME, tensors, metadata)
    wanted = read(folder, NAME)
    for place in sorted(folder.iterdir()):
        snapshot = as_in_the_hub_cache(place, tmp_path / "cache" / place.name)
        place.rmdir()
        place.symlink_to(snapshot)  # and the folder of each state elsewhere, too
    first, last = min(folder.iterdir()), max(folder.iterdir())
    (folder / "latest-99").symlink_to(last.name)  # another name of one that is here
    (folder / "best-98").symlink_to(first)
    assert read(folder, NAME) == wanted


def test_checkpoint_links_that_lead_nowhere(tmp_path, run):
    tensors, metadata = run
    folder = writers.write_safetensors_series(tmp_path / "run", NAME, tensors, metadata)
    (folder / "circle-90").symlink_to("circle-90")  # no checkpoint by its name
    assert read(folder, NAME)
    (folder / "step-91.safetensors").symlink_to("absent")
    assert "a link to absent: cannot be opened (No such file" in refusal(folder, NAME)
    (folder / "step-91.safetensors").unlink()
    (folder / "step-91.safetensors").symlink_to("step-91.safetensors")
    assert "cannot be opened (Too many levels" in refusal(folder, NAME)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "sub/secret", "a\\b"])
def test_names_from_an_index_lead_nowhere(tmp_path, run, name):
    """Not even where a link of that folder would lead there."""
    index = writers.write_shards(tmp_path / "run", *run)
    write(tmp_path / "secret", *run)
    (index.parent / "sub").symlink_to(tmp_path)
    found = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": found["weight_map"] | {"W": name}}))
    assert "is not the plain name of a file in the same folder" in refusal(index)


def shard(tmp_path: Path, run) -> Path:
    """Write shards; return the one with `W`, removed."""
    index = writers.write_shards(tmp_path / "run", *run)
    path = index.parent / json.loads(index.read_text())["weight_map"]["W"]
    path.unlink()
    return path


def test_shards_that_lead_to_no_regular_file(tmp_path, run):
    path = shard(tmp_path, run)
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "absent": "a link to absent: cannot be opened (No such file",
        path.name: f"a link to {path.name}: cannot be opened (Too many levels",
        "/dev/zero": "a link to /dev/zero: not a regular file",
        str(tmp_path / "pipe"): "not a regular file",
        str(tmp_path): "a folder",
        "/proc/self/environ": "not a safetensors file",
    }
    for target, said in cases.items():
        path.symlink_to(target)
        for given in (path.parent, path.parent / "run.safetensors.index.json"):
            assert said in refusal(given)
        path.unlink()


def test_linked_file_that_is_of_something_else(tmp_path, run):
    """What a link leads to must be what the folder says: it is no way to read other files as numbers."""
    path = shard(tmp_path, run)
    (tmp_path / "secret").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n" * 500)
    path.symlink_to(tmp_path / "secret")
    said = refusal(path.parent)
    assert "not a safetensors file" in said and "OPENSSH" not in said


def test_growing_files_are_no_links(tmp_path, run):
    """They have no header: any file at all would pass for recorded numbers."""
    folder = model(tmp_path / "run", run, finished=False)
    growing = folder / f"{NAME}.growing"
    growing.rename(tmp_path / "secret")
    for target in (tmp_path / "secret", "absent", growing.name):
        growing.symlink_to(target)
        assert "a link. Put the file itself there" in refusal(folder, NAME)
        growing.unlink()


def test_finished_file_that_leads_nowhere(tmp_path, run):
    folder = model(tmp_path / "run", run)
    path = folder / f"{NAME}.safetensors"
    path.unlink()
    path.symlink_to("absent")
    assert "a link to absent: cannot be opened" in refusal(folder, NAME)
