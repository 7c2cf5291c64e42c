"""Audits that are interrupted, shared or tampered with: what is done is kept, and the result is the same to the bit."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from recordings import short_run, write

import jaxaudit
from jaxaudit import auditing, commands, strips
from jaxaudit.commands import AuditRequest, Failure
from jaxaudit.models.command import run_audit
from jaxaudit.parts import Parts
from jaxaudit.safetensors_file import FileError

#: Three rows of 64 elements, of ten: four strips, of which the last has one row of its own.
STRIP = 192
TASKS = [f"strip-{k:06}" for k in range(4)]
HOW = {"arithmetic": "torch-cpu-loop,float32-then-bfloat16", "only": "accounting"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", STRIP)
    write(tmp_path / "run.safetensors", *short_run())
    return tmp_path


def run(**options: Any) -> tuple[int, str]:
    return run_audit(AuditRequest(recording="run.safetensors", **(HOW | options)))


OUTPUT, PARTS = Path("results/run.nc"), Path("results/run.nc.parts")


@pytest.fixture
def whole(folder) -> bytes:
    """Return the result of an audit that was left alone, of the same recording in another folder."""
    here = Path.cwd()
    (folder / "other").mkdir()
    shutil.copy2("run.safetensors", "other")
    os.chdir("other")
    try:
        assert run()[0] == 0 and not PARTS.exists()
        return OUTPUT.read_bytes()
    finally:
        os.chdir(here)
        shutil.rmtree("other")


@pytest.fixture
def stop(monkeypatch) -> Callable[[int, BaseException], None]:
    """Raise something in place of keeping the n-th part from now on; once."""

    def after(count: int, error: BaseException) -> None:
        write, left = Parts.write, [count]

        def failing(self: Parts, *arguments: Any) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise error
            write(self, *arguments)

        monkeypatch.setattr(Parts, "write", failing)

    return after


def parts() -> list[str]:
    return sorted(str(path.relative_to(PARTS).with_suffix("")) for path in PARTS.rglob("*.npz"))


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """Note which tasks are done."""
    done: list[str] = []
    do = auditing.Audit._do

    def noted(self: auditing.Audit, name: str) -> None:
        done.append(name)
        do(self, name)

    patch.setattr(auditing.Audit, "_do", noted)
    return done


def test_an_interrupted_audit_goes_on(whole, stop, monkeypatch):
    for count in (1, 2, 3):
        stop(count, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="kept in .*parts: the same command goes on"):
            run()
        assert parts() == TASKS[:count] and not OUTPUT.exists()
        told: list[str] = []
        with monkeypatch.context() as patch:
            done = counted(patch)
            request = AuditRequest(recording="run.safetensors", **HOW)
            assert run_audit(request, notice=told.append)[0] == 0
        assert done == TASKS[count:]
        assert told == [f"going on with the audit of 2023-11-14T22:13:20+00:00 in {PARTS}"]
        assert OUTPUT.read_bytes() == whole and not PARTS.exists()
        OUTPUT.unlink()


def test_nothing_is_kept_of_an_audit_that_did_nothing(folder, stop):
    stop(0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run()
    assert os.listdir(folder) == ["run.safetensors"]


def test_every_number_of_the_file_is_the_same(folder):
    """With the ledger, groups that a strip has none of, and elements that are no numbers."""
    tensors, metadata = short_run()
    weights = tensors["W"][1].copy()
    weights[5, 8, 3], weights[7:, 2, 1] = 0x7F80, 0x7FC1
    mask = np.zeros(10, bool)
    mask[[0, 9]] = True
    tensors |= {"W": ("BF16", weights), "ends_mask": ("BOOL", mask)}
    with jaxaudit.open_recording(write(folder / "odd.safetensors", tensors, metadata)) as odd:
        how: dict[str, Any] = {"arithmetics": "torch-cpu-loop", "window_steps": 5}
        alone = auditing.audit_groups(odd, **how)
        kept = Parts(folder / "parts", {"source": "odd", "started_at": "now"})
        with auditing.Audit(odd, ledger=jaxaudit.LedgerOptions(), **how) as audit:
            assert audit.tasks == [*TASKS, auditing.CLUSTERS]
            audit.publish(kept, reversed(audit.tasks))  # nothing depends on the order
        found = auditing.audit_groups(odd, parts=kept, **how)
    assert found.keys() == alone.keys() and len(found) == 7
    for name, dataset in found.items():
        other = alone[name]
        assert dataset.variables.keys() == other.variables.keys()
        for key, variable in dataset.variables.items():
            assert variable.dtype == other[key].dtype
            assert variable.values.tobytes() == other[key].values.tobytes() or (
                variable.dtype.kind == "U" and np.array_equal(variable, other[key])
            ), (name, key)
        differing = {k for k in dataset.attrs if dataset.attrs[k] != other.attrs[k]}
        assert differing <= {"created_at"}


def test_shards_in_any_order(whole):
    for order in ((1, 2, 3), (3, 1, 2)):
        texts = [run(shard=f"{k}/3")[1] for k in order]
        assert [re.match(r"\d of 4", text)[0] for text in texts[:2]]  # type: ignore[index]
        assert texts[2].endswith("Written to results/run.nc")
        assert OUTPUT.read_bytes() == whole and not PARTS.exists()
        OUTPUT.unlink()
    assert json.loads(run(shard="2/4", json=True)[1]) == {
        "output": None,
        "tasks_done": 1,
        "tasks": 4,
    }
    # Without --shard, what is left is done, and a shard that was asked for twice has nothing to do.
    assert run(shard="2/4")[1].startswith("1 of 4 tasks")
    assert run()[1].endswith("Written to results/run.nc")
    assert OUTPUT.read_bytes() == whole


def test_more_shards_than_tasks(whole):
    texts = [run(shard=f"{k}/6")[1] for k in (6, 1, 2, 3, 5, 4)]
    assert texts[0].startswith("Another process") or texts[0].startswith("0 of 4")
    assert texts[-1].endswith("Written to results/run.nc") and OUTPUT.read_bytes() == whole


def test_one_of_two_last_shards_writes(whole, monkeypatch):
    run(shard="1/2")
    merging = auditing.audit_groups

    def other_first(*arguments: Any, **options: Any) -> Any:
        # While this one puts the parts together, the other finds all of them there, too.
        status, text = run(shard="1/2")
        assert status == 0 and text.startswith("Another process writes")
        return merging(*arguments, **options)

    monkeypatch.setattr(auditing, "audit_groups", other_first)
    run(shard="2/2")
    assert OUTPUT.read_bytes() == whole


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_wrong_shards(text, folder):
    with pytest.raises(Failure, match="--shard: .* needed I/N with I from 1 to N") as caught:
        run(shard=text)
    assert caught.value.status == 2 and os.listdir(folder) == ["run.safetensors"]


def test_options_that_exclude_each_other(folder):
    with pytest.raises(Failure, match="--workers and --shard exclude each other") as caught:
        run(shard="1/2", workers=2)
    assert caught.value.status == 2
    with pytest.raises(Failure, match="--workers: got 0, needed at least 1"):
        run(workers=0)


@pytest.fixture
def begun(folder, stop) -> None:
    """Leave an audit of which two parts are done."""
    stop(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run()
    assert parts() == TASKS[:2]


def refused(status: int, **options: Any) -> str:
    """Expect a refusal that leaves parts as they are."""
    before = {path: path.read_bytes() for path in PARTS.rglob("*") if path.is_file()}
    with pytest.raises(Failure) as caught:
        run(**options)
    assert caught.value.status == status
    assert {path: path.read_bytes() for path in PARTS.rglob("*") if path.is_file()} == before
    return str(caught.value)


def test_parts_of_other_options_are_refused(begun, whole):
    message = refused(2, arithmetic="torch-cpu-fused")
    assert "another arithmetics" in message and "--overwrite" in message
    assert "another steps" in refused(2, steps="1:5")
    assert "another ledger" in refused(2, only=None)
    shutil.copy(jaxaudit.sample_paths()[1], "groups.safetensors")
    assert "another token_groups" in refused(2, token_groups="groups.safetensors")
    assert run(arithmetic="torch-cpu-fused", overwrite=True)[0] == 0  # begins anew
    assert not PARTS.exists()
    with xr.open_dataset(OUTPUT) as dataset:
        assert dataset.arithmetic.values.tolist() == ["torch-cpu-fused"]


def test_a_changed_recording_is_refused(begun, whole):
    path = Path("run.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "before it was changed" in refused(3)
    other = write(Path("other.safetensors"), *short_run(5))
    with pytest.raises(Failure, match="of another recording"):
        run_audit(AuditRequest(recording=str(other), output=str(OUTPUT), **HOW))
    assert run(overwrite=True)[0] == 0


def test_what_is_in_the_way(folder, whole):
    PARTS.mkdir(parents=True)
    (PARTS / "strip-000000.npz").write_bytes(b"no manifest")
    assert "is in the way" in refused(3)
    assert "is in the way" in refused(3, overwrite=True)  # whose these are, nobody knows
    (PARTS / "manifest.json").write_text("{")
    assert "is in the way" in refused(3)
    (PARTS / "manifest.json").write_text("[" * 100_000)
    assert "is in the way" in refused(3)
    shutil.rmtree(PARTS)
    PARTS.write_text("")
    with pytest.raises(Failure):
        run()
    PARTS.unlink()
    PARTS.mkdir()
    (PARTS / ".part-torn").write_bytes(b"half")  # of a process that was killed in the middle
    assert run()[0] == 0 and OUTPUT.read_bytes() == whole


def test_a_damaged_part_is_not_used(begun, whole):
    part = PARTS / f"{TASKS[0]}.npz"
    good = part.read_bytes()
    evil = np.empty(1, object)
    evil[0] = Path
    for content in (b"", good[: len(good) // 2], good[:1000] + b"\x55" * 50 + good[1050:], None):
        if content is None:
            np.savez(part, words=evil, allow_pickle=True)
        else:
            part.write_bytes(content)
        with pytest.raises(Failure, match="cannot be read. Delete it") as caught:
            run()
        assert caught.value.status == 3 and not OUTPUT.exists()
    part.unlink()
    assert run()[0] == 0 and OUTPUT.read_bytes() == whole


def test_a_full_disk_leaves_what_is_done(whole, stop):
    stop(1, OSError(errno.ENOSPC, "No space left on device", str(PARTS / "x.npz")))
    with pytest.raises(Failure, match="no space left on the device"):
        run()
    assert parts() == TASKS[:1] and not OUTPUT.exists()
    assert run()[0] == 0 and OUTPUT.read_bytes() == whole


def test_a_recording_that_vanishes_meanwhile(whole, monkeypatch):
    good, written = Path("run.safetensors").read_bytes(), Parts.write
    date = Path("run.safetensors").stat().st_mtime_ns

    def cut(self: Parts, *arguments: Any) -> None:
        written(self, *arguments)
        os.truncate("run.safetensors", 4000)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", cut)
        with pytest.raises(Failure, match="became shorter while it was read") as caught:
            run()
    assert caught.value.status == 3 and parts() == TASKS[:1]
    with open("run.safetensors", "r+b") as file:
        file.write(good)
    os.utime("run.safetensors", ns=(date, date))  # the mount is back
    assert run()[0] == 0 and OUTPUT.read_bytes() == whole


def test_two_that_begin_at_once_agree(folder):
    one = Parts(folder / "p", {"source": "a", "x": [1], "started_at": "first"})
    two = Parts(folder / "p", {"source": "a", "x": (1,), "started_at": "second"})
    assert (one.started_at, two.started_at) == ("first", "first")
    one.write("a/b", {"n": np.arange(3)}, "words")
    numbers, words = two.within("a").read("b")
    assert numbers["n"].tolist() == [0, 1, 2] and words == "words"
    with one.alone() as first, two.alone() as second:
        assert first and not second
    with pytest.raises(FileError, match="of another recording"):
        Parts(folder / "p", {"source": "b", "x": [1], "started_at": "third"})


def test_a_second_audit_to_the_same_output_is_refused_and_spoils_nothing(folder, whole):
    held = []

    def second(done: int, of: int, step: int) -> None:
        for options in ({}, {"overwrite": True}, {"overwrite": True, "steps": "1:3"}):
            with pytest.raises(Failure, match="in use: another process") as caught:
                run(**options)
            held.append(caught.value.status)

    assert run_audit(AuditRequest(recording="run.safetensors", **HOW), second)[0] == 0
    assert {*held} == {2} and OUTPUT.read_bytes() == whole and not PARTS.exists()


CHILD = """
import sys
from jaxaudit import strips
strips.STRIP_ELEMENTS = 192
from jaxaudit.process import keep_programs
from jaxaudit.commands import AuditRequest
from jaxaudit.models.command import run_audit
sys.argv = ["run_audit.py"]
print("started", flush=True)
run_audit(AuditRequest(recording="run.safetensors", arithmetic="torch-cpu-loop,float32-then-bfloat16", only="accounting"))
"""


def test_kill_at_any_moment(folder, monkeypatch):
    """As soon as a part appears, and at a random moment after the start."""
    monkeypatch.setattr(sys, "argv", ["run_audit.py"])
    run()
    whole = OUTPUT.read_bytes()
    OUTPUT.unlink()
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    for wait_for_part in (True, False):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout and child.stdout.readline() == "started\n"
        if wait_for_part:
            while child.poll() is None and not parts():
                time.sleep(0.001)
        else:
            time.sleep(float(np.random.default_rng().uniform(0, 3)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert not OUTPUT.exists() or OUTPUT.read_bytes() == whole
    subprocess.run([sys.executable, "-c", CHILD], env=environment, check=not OUTPUT.exists())
    assert OUTPUT.read_bytes() == whole and not PARTS.exists()


def test_one_task_holds_one_audit_at_a_time(folder):
    request = AuditRequest(recording=str(folder / "run.safetensors"), **HOW)
    commands.one_task(request, TASKS[2])
    assert parts() == [TASKS[2]]
    assert commands._held and commands._held[0] == request
    other = AuditRequest(
        recording=str(folder / "run.safetensors"), steps="1:4", output="x.nc", **HOW
    )
    commands.one_task(other, TASKS[0])
    assert commands._held and commands._held[0] == other
    commands._held[1].close()
    commands._held = None
