"""Tell before a run which parts of an Adam step cannot act in its format, and from which number on they do.

    jaxaudit preflight --learning-rate 1e-3 --weight-decay .1
    jaxaudit preflight --beta2 .99 --dtype float16 --epsilon 1e-4 --weight-scale .02 --json

No recording is needed. For the 16-bit formats the formulas of the optimizer are replayed for every positive value;
thresholds are exact: the next double below or above does the opposite.

Exit status: 0 the answer was printed, whatever it is; 2 wrong usage, or stdout cannot be written;
130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxaudit.terminal import answer, described_parser, importing, put

_NAME = "jaxaudit preflight"


def parser(program: str = _NAME) -> argparse.ArgumentParser:
    """Describe the command line of a program of this name."""
    p = described_parser(program, __doc__ or "", _NAME)
    p.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="default: 1e-3")
    p.add_argument("--beta1", type=float, default=0.9, metavar="X", help="default: 0.9")
    p.add_argument("--beta2", type=float, default=0.999, metavar="X", help="default: 0.999")
    p.add_argument("--epsilon", type=float, default=1e-8, metavar="X", help="default: 1e-8")
    p.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="default: 0.01")
    p.add_argument("--l2", action="store_true", help="Adam's weight decay instead of AdamW's")
    p.add_argument(
        "--dtype", default="bfloat16", metavar="NAME", help="bfloat16 (default), float16 or float32"
    )
    p.add_argument(
        "--weight-scale",
        type=float,
        metavar="X",
        help="standard deviation of the weights: which share of them moves",
    )
    p.add_argument(
        "--arithmetic", default="torch-cpu-loop", metavar="NAME", help="default: torch-cpu-loop"
    )
    # No file is written: there is nothing to overwrite.
    p.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    p.add_argument("--quiet", action="store_true", help="no progress (there is none)")
    p.add_argument("--version", action="store_true", help="print the version and exit")
    return p


def main(argv: Sequence[str] | None = None, program: str = _NAME) -> int:
    """Run the command; return its exit status."""
    return answer(parser, _main, argv, program)


def _main(arguments: argparse.Namespace, program: str) -> int:
    import json

    with importing():
        from jaxaudit.preflight import preflight

    others = ("json", "l2", "quiet", "version")
    asked = {k: v for k, v in vars(arguments).items() if k not in others}
    try:
        found = preflight(**asked, decoupled=not arguments.l2)
    except ValueError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        return put(json.dumps(found.as_json(), indent=2, allow_nan=False), program)
    return put(found.describe(), program)
