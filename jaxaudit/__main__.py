"""Replays recorded training runs and proves to the bit which arithmetic they used.

    jaxaudit audit run.safetensors
    jaxaudit COMMAND --help

Exit status: that of the command; 2 without a known one. In all of them 0 is success, 1 an expectation that was not met,
2 wrong usage, 3 bad input, 4 a failed self-test, and 130 an interruption.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from jaxaudit.terminal import described_parser, put_version, run

#: What each module of jaxaudit.command_line does.
COMMANDS = {
    "audit": "replay a recorded run, or a whole model's, and compare it bit for bit",
    "record": "train a small language model and record it (needs the extra `torch`)",
    "certificate": "compare JAX's and PyTorch's operations with IEEE 754",
    "preflight": "tell before a run which parts of an Adam step cannot act",
    "compare": "tell where two recorded runs, or two results, part",
}


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = described_parser("jaxaudit", __doc__ or "")
    p.usage = "jaxaudit COMMAND [options]"
    commands = p.add_argument_group("commands")
    for name, described in COMMANDS.items():
        commands.add_argument(name, nargs="?", help=described)
    p.add_argument("--version", action="store_true", help="print the version and exit")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in COMMANDS:
        command = importlib.import_module(f"jaxaudit.command_line.{arguments[0]}")
        return command.main(arguments[1:])
    return run(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    p = parser()
    if not arguments:
        p.error(f"a command is needed: {', '.join(COMMANDS)}")
    if not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        p.error(f"unknown command {arguments[0]!r}; {meant}")
    if p.parse_args(arguments).version:
        return put_version("jaxaudit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
