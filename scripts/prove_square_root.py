"""Compare the emulations of MKL's square root with PyTorch's, for every one of the 2^32 float32 patterns.

    python scripts/prove_square_root.py
    python scripts/prove_square_root.py --output results/square-root-intel.json

PyTorch's float32 `sqrt` on x86 CPUs is MKL's. Where its probe says that it is the one of AMD processors
(`jaxaudit.mkl_sqrt`), these are held against it, all NaNs being alike:

    numpy          NumpyOperations.mkl_amd_sqrt, for every pattern
    xla-float64    Float64Operations.mkl_amd_sqrt, for every pattern
    xla-float32    Float32Operations.mkl_amd_sqrt, for zeros, normal numbers, infinities and NaNs

and for information, how many roots are not the correctly rounded ones. After that, vectors of mixed
numbers, of 1 to 70 elements at every alignment and of some lengths that PyTorch divides among its threads,
must give the same bits on one thread and on two as each number alone. It takes some minutes.

Exit status: 0 no difference; 1 differences; 2 wrong usage, or an output that cannot be written; 3 torch's
root is not MKL's of AMD processors; 130 interrupted.
"""

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from reporting import Failure, check_output, guarded, machine_facts, notify, write_json

from jaxaudit.floats import FLOAT32, differ
from jaxaudit.mkl_sqrt import root_of_probe
from jaxaudit.operations import (
    Float32Operations,
    Float64Operations,
    NumpyOperations,
    Operations,
    compile_exactly,
)

try:
    import torch

    from jaxaudit.recorders.pytorch import probe_sqrt
except ImportError:
    sys.exit('prove_square_root.py: error: torch is missing; pip install "jaxaudit[torch]"')

#: Patterns at a time: a few arrays of this many stay in a core's cache.
CHUNK = 1 << 18

PATTERNS = 1 << 32

#: Lengths about those from which PyTorch divides a vector among its threads.
LONG = (32767, 32768, 32769, 65537, 100_003)

Patterns = NDArray[np.uint32]
Root = Callable[[Patterns], Patterns]


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    default = Path("results/square-root.json")
    result.add_argument("--output", type=Path, default=default, help="to write (%(default)s)")
    result.add_argument("--overwrite", action="store_true", help="replace an existing output")
    result.add_argument(
        "--stride", type=int, default=1, help="take every n-th chunk alone (%(default)s)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 0 if nothing differs, 1 if something does, 2 or 3 if it could not be done."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Compare, write, print."""
    check_output(arguments)
    if arguments.stride < 1:
        raise Failure(f"--stride is {arguments.stride}; use 1 or more.", 2)
    probe = probe_sqrt(torch.device("cpu"))
    if root_of_probe(str(probe["sha256"])) != "mkl-amd":
        raise Failure("torch's float32 square root is not that of MKL on AMD processors here.", 3)
    with jax.enable_x64(True):
        found = {"probe": probe, **compared(arguments.stride), "placements": placements()}
    agree = not any([*found["different"].values(), *found["placements"]["different"].values()])
    write_json(arguments.output, {"machine": machine(), "agree": agree, **found})
    print(table(found))
    print(f"Written to {arguments.output}")
    return 0 if agree else 1


def machine() -> dict[str, Any]:
    """Describe what computes here, with the version of MKL that torch was built with."""
    version = re.search(r"Math Kernel Library Version (\S+)", torch.__config__.show())
    mkl = version.group(1) if version else "not found in torch.__config__.show()"
    capability = torch.backends.cpu.get_cpu_capability()
    return machine_facts() | {"mkl": mkl, "torch_cpu_capability": capability}


def torch_root(patterns: Patterns) -> Patterns:
    """Take PyTorch's square root."""
    return torch.sqrt(torch.from_numpy(patterns.view(np.float32))).numpy().view(np.uint32)


def roots() -> dict[str, Root]:
    """Return the roots to hold against PyTorch's, as functions on patterns."""
    device = jax.devices("cpu")[0]
    zero = np.uint32(0)

    def root(ops: Operations, patterns: Any, name: str = "mkl_amd_sqrt") -> Any:
        return ops.patterns32(getattr(ops, name)(ops.decode(patterns, FLOAT32)))

    float32 = compile_exactly(lambda z, p: root(Float32Operations(z), p), device)
    float64 = compile_exactly(lambda p: root(Float64Operations(jax.numpy.uint32(0)), p), device)
    return {
        "numpy": lambda p: root(NumpyOperations(), p),
        "xla-float64": lambda p: np.asarray(float64(p)),
        "xla-float32": lambda p: np.asarray(float32(zero, p)),
        "correctly rounded": lambda p: root(NumpyOperations(), p, "sqrt"),
    }


def compared(stride: int) -> dict[str, Any]:
    """Count where each root differs from PyTorch's, chunk by chunk.

    `different` counts all that must be zero, `not_correctly_rounded` PyTorch's own.
    """
    torch.set_num_threads(1)
    candidates = roots()
    counts = {name: [0, 0] for name in candidates}
    starts, before = range(0, PATTERNS, CHUNK * stride), time.monotonic()
    for number, start in enumerate(starts):
        patterns = np.arange(start, start + CHUNK, dtype=np.int64).astype(np.uint32)
        exact = torch_root(patterns)
        for name, root in candidates.items():
            differing = differ(root(patterns), exact)
            if name == "xla-float32":
                differing = differing[~subnormal(patterns)]
            counts[name][0] += differing.size
            counts[name][1] += int(np.count_nonzero(differing))
        if number % (len(starts) // 16 or 1) == 0:
            notify(f"{number} of {len(starts)} chunks, {time.monotonic() - before:.0f} s")
    ieee = counts.pop("correctly rounded")
    return {
        "compared": {name: patterns for name, (patterns, _) in counts.items()},
        "different": {name: different for name, (_, different) in counts.items()},
        "not_correctly_rounded": ieee[1],
        "seconds": round(time.monotonic() - before, 1),
    }


def subnormal(patterns: Patterns) -> NDArray[np.bool_]:
    """Tell which patterns are subnormal numbers."""
    magnitude = patterns & np.uint32(0x7FFFFFFF)
    return (magnitude > 0) & (magnitude < 0x00800000)


def placements() -> dict[str, Any]:
    """Compare PyTorch on vectors of many lengths, alignments and threads with the emulation.

    A third of the numbers are those that MKL sets aside: subnormal, negative, huge, infinite, NaN.
    """
    rng = np.random.default_rng(0)
    pool = rng.integers(0x00800000, 0x7F7FF000, max(LONG) + 16, dtype=np.uint32)
    aside = rng.integers(0, 1 << 32, pool.size, dtype=np.uint64).astype(np.uint32)
    aside = np.where(aside % 2, aside | 0x7F7FF000, aside & 0x807FFFFF)
    pool = np.where(rng.integers(0, 3, pool.size) == 0, aside, pool).astype(np.uint32)
    expected = NumpyOperations().mkl_amd_sqrt(pool.view(np.float32)).view(np.uint32)
    different, vectors = {}, 0
    for threads, name in ((1, "1 thread"), (2, "2 threads")):
        torch.set_num_threads(threads)
        torch_root(pool[:1])  # MKL's first call in a process must not be one of many threads
        counts = [
            np.count_nonzero(differ(torch_root(pool[at : at + size]), expected[at : at + size]))
            for size in (*range(1, 71), *LONG)
            for at in range(16)
        ]
        vectors, different[name] = len(counts), int(sum(counts))
    digest = hashlib.sha256(pool.tobytes()).hexdigest()
    return {"vectors": vectors, "different": different, "sha256_of_numbers": digest}


def table(found: Mapping[str, Any]) -> str:
    """Lay the counts out in columns."""
    total = found["compared"]["numpy"]
    lines = [f"{'against torch.sqrt':<24}{'compared':>14}{'different':>12}"]
    for name, count in found["compared"].items():
        lines.append(f"{name:<24}{count:>14}{found['different'][name]:>12}")
    lines.append(f"{'correctly rounded root':<24}{total:>14}{found['not_correctly_rounded']:>12}")
    for name, different in found["placements"]["different"].items():
        lines.append(f"{'vectors, ' + name:<24}{found['placements']['vectors']:>14}{different:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
