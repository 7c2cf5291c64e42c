"""Train a small language model and record its embedding after every optimizer step.

    jaxaudit record --output results/run.safetensors --steps 1000 --dtype bfloat16

The model reads English with a tokenizer that was trained on Japanese as well, so about a third of
its tokens are dead: never used, and frozen after a while. Beside the recording, the token groups
file says which. The defaults write 7.7 GB; `--rows dead:100,live:100` makes it 0.2 GB.

Interrupted with Ctrl-C, it ends early and leaves a valid, shorter recording.

Exit status: 0 the run was recorded to its end; 2 wrong usage, something to install, or an output that cannot be
written; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jaxaudit import terminal

if TYPE_CHECKING:  # torch takes seconds to import, and may be missing
    from jaxaudit.recorders.small_language_model import Outcome

#: Options that `record` takes under the same names.
PASSED_ON = ["device", "seed", "rows", "batch_size", "sequence_length", "moments", "overwrite"]

_NAME = "jaxaudit record"


def parser(program: str = _NAME) -> argparse.ArgumentParser:
    """Describe the command line of a program of this name."""
    result = terminal.described_parser(program, __doc__ or "", _NAME)
    add_outputs(result.add_argument_group("files"))
    add_training(result.add_argument_group("training"))
    add_optimizer(result.add_argument_group("optimizer"))
    return result


def add_outputs(group: argparse._ArgumentGroup) -> None:
    """Add the options that say what is written."""
    group.add_argument("--output", type=Path, required=True, help="the recording to write")
    group.add_argument(
        "--token-groups", type=Path, help="which rows are dead (OUTPUT's stem + -token-groups)"
    )
    group.add_argument("--rows", help="rows to record: 0:100,9000:9050 or dead:20,live:20 (all)")
    group.add_argument(
        "--moments",
        choices=["float32", "native"],
        default="float32",
        help="store the moments widened, or as the optimizer holds them (%(default)s)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing files")
    group.add_argument("--quiet", action="store_true", help="no progress")


def add_training(group: argparse._ArgumentGroup) -> None:
    """Add the options of the training loop."""
    dtypes, devices = ["bfloat16", "float16", "float32"], ["cpu", "cuda", "mps"]
    group.add_argument("--steps", type=positive, default=1000, help="steps (%(default)s)")
    group.add_argument("--dtype", choices=dtypes, default="bfloat16", help="(%(default)s)")
    group.add_argument("--device", choices=devices, default="cpu", help="(%(default)s)")
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    group.add_argument("--batch-size", type=positive, default=32, help="sequences (%(default)s)")
    group.add_argument("--sequence-length", type=positive, default=128, help="(%(default)s)")
    group.add_argument("--threads", type=positive, help="torch threads (torch's own choice)")


def add_optimizer(group: argparse._ArgumentGroup) -> None:
    """Add the options of the optimizer and its schedule."""
    implementations, shapes = ["loop", "foreach", "fused"], ["constant", "linear", "cosine"]
    group.add_argument("--optimizer", dest="name", choices=["adamw", "adam"], default="adamw")
    group.add_argument("--implementation", choices=implementations, default="loop")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    group.add_argument("--beta1", type=float, default=0.9, help="(%(default)s)")
    group.add_argument("--beta2", type=float, default=0.999, help="(%(default)s)")
    group.add_argument(
        "--epsilon", type=float, default=1e-8, help="float16 needs more (%(default)s)"
    )
    group.add_argument("--weight-decay", type=float, default=0.0, help="(%(default)s)")
    group.add_argument("--amsgrad", action="store_true")
    group.add_argument("--maximize", action="store_true")
    group.add_argument("--schedule", choices=shapes, default="constant", help="(%(default)s)")
    group.add_argument("--warmup", type=int, default=0, help="steps of warm-up (%(default)s)")


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def main(argv: Sequence[str] | None = None, program: str = _NAME) -> int:
    """Record a run; 0 if it ran to its end, 2 if it could not, 130 if it was interrupted."""
    return terminal.run(lambda: _main(parser(program).parse_args(argv), program))


def _main(arguments: argparse.Namespace, program: str) -> int:
    try:
        with terminal.importing():
            # Of what is missing, the first is named.
            for name in ("torch", "jaxaudit.recorders.small_language_model"):
                importlib.import_module(name)
        with one_interruption():
            return record(arguments, program)
    except KeyboardInterrupt:
        notify("interrupted before the first step was complete; nothing was written.", program)
        return 130
    except ImportError as failure:
        missing = failure.name or failure
        return complain(f'{missing} is missing: pip install "jaxaudit[torch]"', program)
    except OSError as failure:
        place = f"{failure.filename}: " if failure.filename else ""
        return complain(place + (failure.strerror or str(failure)), program)
    except (ValueError, TypeError, RuntimeError) as failure:
        return complain(str(failure).splitlines()[0], program)


def record(arguments: argparse.Namespace, program: str) -> int:
    """Record the run that the arguments describe, and say what came of it."""
    import torch

    from jaxaudit.recorders import small_language_model as experiment

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    groups = arguments.token_groups or arguments.output.with_name(
        f"{arguments.output.stem}-token-groups.safetensors"
    )
    names = [field.name for field in dataclasses.fields(experiment.OptimizerChoice)]
    outcome = experiment.record(
        arguments.output,
        groups,
        choice=experiment.OptimizerChoice(**{x: getattr(arguments, x) for x in names}),
        schedule=experiment.Schedule(
            shape=arguments.schedule, warmup=arguments.warmup, steps=arguments.steps
        ),
        dtype=getattr(torch, arguments.dtype),
        progress=progress_of(arguments.quiet),
        **{name: getattr(arguments, name) for name in PASSED_ON},
    )
    return report(arguments.output, groups, outcome, program)


def report(output: Path, groups: Path, outcome: "Outcome", program: str) -> int:
    """Print what a run left behind, and return the exit status."""
    if outcome.interrupted and not outcome.steps:
        raise KeyboardInterrupt
    if outcome.interrupted:
        notify(f"interrupted: {output} is valid and holds {outcome.steps} steps.", program)
    size = output.stat().st_size / 1e9
    lines = (
        f"{output}: {outcome.steps} steps, {outcome.dead + outcome.live} rows, {size:.3f} GB",
        f"{groups}: {outcome.dead} dead, {outcome.live} live",
        f"loss: {outcome.losses[0]:.3f} at step 1, {outcome.losses[-1]:.3f} at the last",
    )
    return terminal.put("\n".join(lines), program) or (130 if outcome.interrupted else 0)


def progress_of(quiet: bool) -> Callable[[range], Iterable[int]]:
    """Return a progress bar on a terminal, else nothing that shows."""
    if quiet or not sys.stderr.isatty():
        return iter
    try:
        from tqdm import tqdm
    except ImportError:
        return iter
    return lambda steps: tqdm(steps, unit="step", file=sys.stderr)


def notify(message: str, program: str) -> None:
    """Write a notice to stderr."""
    print(f"{program}: {message}", file=sys.stderr)


def complain(message: str, program: str) -> int:
    """Write an error to stderr; return the exit status."""
    notify(f"error: {message}", program)
    return 2


@contextlib.contextmanager
def one_interruption() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM interrupt the run, and none its orderly end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(each, interrupt) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
