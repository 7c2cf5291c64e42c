"""Kill audits, workers and the scheduler at random moments, and compare every result with one that was left alone.

    python scripts/prove_resume.py --output results/resume.json
    python scripts/prove_resume.py big.safetensors --kills 200 --seed 3

Audits run with the ledger, two thirds of those that are killed without; each result must be the same file, byte for byte. The recording needs several strips of rows;
by default one is made of the sample.
Exit status: 0 all are; 1 some are not.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from reporting import add_files, check_output, guarded, machine_facts, notify, positive, write_json

import jaxaudit
from jaxaudit.recorders import RecordingWriter, RowLayout
from jaxaudit.safetensors_file import SafetensorsFile

SCRIPT = Path(__file__).parent / "run_audit.py"

#: Rows and steps of the recording that is made, if none is given: four strips.
ROWS, STEPS = 14_000, 6


def made_recording(path: Path) -> Path:
    """Write the sample's first steps with its rows repeated."""
    with SafetensorsFile(jaxaudit.sample_paths()[0]) as sample:
        arrays = {name: sample.read(name) for name in sample.tensors}
        small = {
            name: sample.read_floats(name) for name, array in arrays.items() if array.ndim != 3
        }
        dtypes = {name: tensor.dtype for name, tensor in sample.tensors.items()}
        metadata = dict(sample.metadata)
    big = {name: array[: STEPS + 1] for name, array in arrays.items() if array.ndim == 3}
    copies = -(-ROWS // big["W"].shape[1])
    layouts = {
        name: RowLayout(dtypes[name], (ROWS, *array.shape[2:])) for name, array in big.items()
    }
    with RecordingWriter(path, layouts, metadata=metadata) as writer:
        for name, whole in small.items():
            if name != "num_steps":
                writer.small[name] = whole[: STEPS + 1] if whole.size > 1 else whole
        for k in range(STEPS + 1):
            writer.append({name: np.tile(x[k], (copies, 1))[:ROWS] for name, x in big.items()})
    return path


class Audits:
    """Audits of one recording in a folder, one after the other or at once."""

    def __init__(self, recording: Path, folder: Path):
        self._folder = folder
        self.output = folder / "result.nc"
        self.parts = folder / "result.nc.parts"
        self._arguments = [str(recording.absolute()), "--output", str(self.output), "--quiet"]
        self._arguments += ["--arithmetic", "torch-cpu-loop,float32-then-bfloat16"]
        self._environment = os.environ | {
            "SOURCE_DATE_EPOCH": "1700000000",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def start(self, *options: str) -> subprocess.Popen:
        """Start the command in a group of processes of its own."""
        return self._popen(str(SCRIPT), *self._arguments, *options)

    def worker(self, address: str) -> subprocess.Popen:
        """Start a worker of a scheduler."""
        options = [
            address,
            "--nthreads",
            "1",
            "--no-nanny",
            "--no-dashboard",
            "--death-timeout",
            "20",
        ]
        return self._popen("-m", "distributed.cli.dask_worker", *options)

    def scheduler(self, file: Path) -> tuple[subprocess.Popen, str]:
        """Start a scheduler; return it and its address."""
        file.unlink(missing_ok=True)
        options = ["--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        started = self._popen("-m", "distributed.cli.dask_scheduler", *options)
        while not file.exists():
            time.sleep(0.1)

        return started, json.loads(file.read_text())["address"]

    def finish(self, *options: str) -> str:
        """Run the command to its end; return the digest of its result, and remove it."""
        status = self.start(*options).wait()
        return f"exit status {status}" if status else self.digest()

    def digest(self) -> str:
        """Return the digest of the result, and remove it."""
        if not self.output.exists():
            return "no result"
        found = hashlib.sha256(self.output.read_bytes()).hexdigest()
        self.output.unlink()
        return found if not self.parts.exists() else "parts were left"

    def count(self) -> int:
        """Return how many parts there are."""
        return sum(1 for _ in self.parts.rglob("*.npz"))

    def _popen(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *arguments], env=self._environment, cwd=self._folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def killed_at_random(
    audits: Audits, kills: int, length: float, rng: random.Random, *options: str
) -> list[str]:
    """Kill audits at random moments, go on with each, and return the digests of their results."""
    found = []
    for k in range(kills):
        moment = rng.uniform(0, length)
        process = audits.start(*options)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            kill(process)
        there = audits.count()
        found.append(audits.digest() if audits.output.exists() else audits.finish(*options))
        notify(f"kill {k + 1} of {kills}: after {moment:.1f} s, {there} parts were there")
    return found


def with_killed_worker(audits: Audits, workers: int) -> str:
    """Kill a worker of several as soon as a part is there; the audit must end by itself."""
    process = audits.start("--workers", str(workers))
    while process.poll() is None and not audits.count():
        time.sleep(0.02)
    victims = worker_processes(process.pid)
    if victims:
        os.kill(victims[0], signal.SIGKILL)
    status = process.wait()
    return f"exit status {status}" if status else audits.digest()


def worker_processes(group: int) -> list[int]:
    """Return the processes of a command that dask's nannies started: those whose parents are not the command."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            line = (folder / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if int(fields[2]) == group and b"spawn_main" in line:
            found.append(int(folder.name))
    return sorted(found)


def with_killed_scheduler(audits: Audits, folder: Path) -> dict[str, Any]:
    """Kill the scheduler as soon as a part is there; then start another, and the same command again."""
    running: list[subprocess.Popen] = []
    try:
        scheduler, address = audits.scheduler(folder / "scheduler.json")
        running += [scheduler, audits.worker(address)]
        process = audits.start("--scheduler", address)
        while process.poll() is None and not audits.count():
            time.sleep(0.02)
        kill(scheduler)
        killed = time.monotonic()
        status = process.wait()
        seconds = time.monotonic() - killed
        parts = audits.count()
        scheduler, address = audits.scheduler(folder / "scheduler.json")
        running += [scheduler, audits.worker(address)]
        return {
            "status": status,
            "seconds_until_the_command_ended": round(seconds, 1),
            "parts_kept": parts,
            "digest": audits.finish("--scheduler", address),
        }
    finally:
        for each in running:
            kill(each)


def proof(arguments: argparse.Namespace) -> int:
    """Do all of it; return the exit status."""
    if arguments.output:
        check_output(arguments)
    with tempfile.TemporaryDirectory() as folder:
        recording = arguments.recording or made_recording(Path(folder) / "run.safetensors")
        audits = Audits(recording, Path(folder))
        audits.finish()  # compiles what is kept for all others
        start = time.monotonic()
        whole = audits.finish()
        length = time.monotonic() - start
        notify(f"left alone: {whole[:16]} in {length:.1f} s")
        rng, brief = random.Random(arguments.seed), ("--only", "accounting")
        start = time.monotonic()
        wanted = audits.finish(*brief)
        short = time.monotonic() - start
        some = arguments.kills // 3  # the others without the ledger, which takes longer to start
        killed = killed_at_random(audits, some, length, rng)
        also = killed_at_random(audits, arguments.kills - some, short, rng, *brief)
        found: dict[str, Any] = {
            "seconds_of_an_audit_left_alone": round(length, 1),
            "digest": whole,
            "digest_without_ledger": wanted,
            "killed_at_random": killed,
            "killed_at_random_without_ledger": also,
        }
        for workers in (2, 4):
            found[f"workers_{workers}"] = audits.finish("--workers", str(workers))
            notify(f"{workers} workers: {found[f'workers_{workers}'][:16]}")
        for k in (1, 2, 3):
            status = audits.start("--shard", f"{k}/3").wait()
        found["shards_3"] = audits.digest() if not status else f"exit status {status}"
        found["worker_killed"] = with_killed_worker(audits, 2)
        found["scheduler_killed"] = with_killed_scheduler(audits, Path(folder))
    return told(found, whole, arguments)


def told(found: Mapping[str, Any], whole: str, arguments: argparse.Namespace) -> int:
    """Print what came of it, and store it."""
    scheduler = found["scheduler_killed"]
    same = {name: found[name] == whole for name in ("workers_2", "workers_4", "shards_3", "worker_killed")}  # fmt: skip
    same["scheduler_killed"] = (
        scheduler["digest"] == whole and scheduler["status"] not in (0, None)
        and scheduler["seconds_until_the_command_ended"] < 60
    )  # fmt: skip
    resumed = sum(digest == whole for digest in found["killed_at_random"])
    brief = found["digest_without_ledger"]
    resumed += sum(digest == brief for digest in found["killed_at_random_without_ledger"])
    print(
        f"{resumed} of {arguments.kills} audits that were killed at a random moment ended in the same file"
    )
    for name, good in same.items():
        verdict = "the same file" if good else f"NOT THE SAME: {found[name]}"
        print(f"{name.replace('_', ' ')}: {verdict}")
    if arguments.output:
        facts = {"kills": arguments.kills, "identical_after_kills": resumed, "identical": same}
        details = {
            key: sorted({*value}) if isinstance(value, list) else value
            for key, value in found.items()
        }
        write_json(arguments.output, facts | {"found": details, "machine": machine_facts()})
    return 0 if all(same.values()) and resumed == arguments.kills else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_files(p, None)
    p.add_argument("--kills", type=positive, default=60, help="at random moments (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    return p


if __name__ == "__main__":
    sys.exit(guarded(proof, parser().parse_args()))
