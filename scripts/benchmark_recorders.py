"""Time the training of a small language model with and without the recorder of its whole optimizer.

    python scripts/benchmark_recorders.py
    python scripts/benchmark_recorders.py --steps 40 --rounds 3 --dtype float32 --fused

Blocks of steps with and without the recorder alternate in one process, so that both see the same
machine. `ratio` is the median of the blocks' ratios of step times. `peak` is the largest resident
memory; what the recorder adds to it is bounded, whatever the number of steps. On a busy machine the
ratios scatter; `share_in_hooks` is the time that the recorder's own hooks took, of the whole step.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """Describe the command."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--steps", type=int, default=20, help="steps of a block (%(default)s)")
    found.add_argument("--rounds", type=int, default=3, help="pairs of blocks (%(default)s)")
    found.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    found.add_argument("--fused", action="store_true", help="the fused optimizer")
    found.add_argument("--vocabulary", type=int, default=10_000, help="tokens (%(default)s)")
    found.add_argument("--batch-size", type=int, default=32, help="sequences (%(default)s)")
    found.add_argument("--folder", type=Path, help="where to record (a temporary folder)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one JSON object."""
    arguments = parser().parse_args(argv)
    import torch
    from torch.nn import functional

    from jaxaudit.recorders.hooks import OptimizerRecorder, record
    from jaxaudit.recorders.small_language_model import SmallLanguageModel

    torch.manual_seed(0)
    model = SmallLanguageModel(arguments.vocabulary, 64, 128).to(getattr(torch, arguments.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=arguments.fused)

    def train() -> float:
        start = time.perf_counter()
        for _ in range(arguments.steps):
            tokens = torch.randint(arguments.vocabulary, (arguments.batch_size, 129))
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        return (time.perf_counter() - start) / arguments.steps

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    in_hooks: list[float] = []
    original = OptimizerRecorder._after

    def timed(*given: Any) -> None:
        start = time.perf_counter()
        original(*given)
        in_hooks.append(time.perf_counter() - start)

    OptimizerRecorder._after = timed  # pyright: ignore[reportAttributeAccessIssue]
    train()
    before, plain, recorded, closing = peak(), [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number in range(arguments.rounds):
            plain.append(train())
            recorder = record(optimizer, Path(folder) / "run", model=model, overwrite=number > 0)
            recorded.append(train())
            start = time.perf_counter()
            recorder.close()
            closing.append((time.perf_counter() - start) / arguments.steps)
        size = sum(path.stat().st_size for path in (Path(folder) / "run").iterdir())
    ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
    result = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "share_in_hooks": statistics.median(in_hooks) / statistics.median(recorded),
        "seconds_per_step": statistics.median(plain),
        "seconds_per_step_recorded": statistics.median(recorded),
        "seconds_per_step_closing": statistics.median(closing),
        "bytes_per_step": size / arguments.steps,
        "peak_bytes_before": before,
        "peak_bytes": peak(),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
