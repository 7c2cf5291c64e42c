#!/usr/bin/env python
"""Tell before a run which parts of an Adam step cannot act in its format, and from which number on they do.

    python scripts/preflight.py --learning-rate 1e-3 --weight-decay .1
    python scripts/preflight.py --beta2 .99 --dtype float16 --epsilon 1e-4 --weight-scale .02 --json

No recording is needed. For the 16-bit formats the formulas of the optimizer are replayed for every positive value;
thresholds are exact: the next double below or above does the opposite.

Exit status: 0 the answer was printed, whatever it is; 2 wrong usage, or stdout cannot be written;
130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxaudit.terminal import described_parser, put, run

_NAME = "preflight.py"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = described_parser(_NAME, __doc__ or "")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run(lambda: _main(parser().parse_args(argv)))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from importlib.metadata import version

        return put(f"jaxaudit {version('jaxaudit')}", _NAME)
    import json

    from jaxaudit.preflight import preflight

    others = ("json", "l2", "quiet", "version")
    asked = {k: v for k, v in vars(arguments).items() if k not in others}
    try:
        found = preflight(**asked, decoupled=not arguments.l2)
    except ValueError as error:
        print(f"{_NAME}: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        return put(json.dumps(found.as_json(), indent=2, allow_nan=False), _NAME)
    return put(found.describe(), _NAME)


if __name__ == "__main__":
    sys.exit(main())
