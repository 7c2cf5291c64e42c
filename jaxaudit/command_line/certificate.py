"""Certify roundings: compare JAX, PyTorch and jaxaudit with IEEE 754, bit for bit.

    jaxaudit certificate
    jaxaudit certificate --full --plots results/rounding
    jaxaudit certificate --operations "float32 sqrt,bfloat16 add"

Casts, single operations, parts of optimizers and whole Adam steps are computed as one writes them in JAX and
in PyTorch, and as jaxaudit computes them. The result is a NetCDF file for xarray.open_dataset; a table of the
shares that differ goes to stdout, progress and notices go to stderr.

Finished operations are kept in a file next to the output, named as that with .unfinished after it; after an
interruption the same command continues there. It is deleted once the output is written.

Exit status: 0 what jaxaudit computes differs from IEEE 754 nowhere; 1 it does; 2 wrong usage, an output that
cannot be written, or not enough memory; 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxaudit.terminal import add_usual_options, answer, complete, described_parser, importing

_NAME = "jaxaudit certificate"


def parser(program: str = _NAME) -> argparse.ArgumentParser:
    """Describe the command line of a program of this name."""
    p = described_parser(program, __doc__ or "", _NAME)
    p.add_argument("--backend", choices=("auto", "cpu", "gpu", "tpu"), default="auto")
    extent = p.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a sample of operands (default)")
    extent.add_argument(
        "--full", action="store_true", help="every operand where that can be done; takes long"
    )
    p.add_argument("--operations", metavar="NAME[,NAME...]", help="only these (default: all)")
    p.add_argument(
        "--output", metavar="PATH", help="NetCDF file (default: results/rounding_<backend>.nc)"
    )
    p.add_argument("--table", metavar="PATH", help="tables and explanations as Markdown")
    p.add_argument("--plots", metavar="DIR", help="figures as PNG")
    add_usual_options(p)
    return p


def main(argv: Sequence[str] | None = None, program: str = _NAME) -> int:
    """Run the command; return its exit status."""
    return answer(parser, _main, argv, program)


def _main(arguments: argparse.Namespace, program: str) -> int:
    with importing():
        from jaxaudit.commands import Failure
        from jaxaudit.rounding.command import CrossCheckRequest, cross_check_rounding

    wanted = {k: v for k, v in vars(arguments).items() if k not in ("version", "quick", "quiet")}

    def work(progress: Any) -> tuple[int, str, Sequence[str]]:
        outcome = cross_check_rounding(CrossCheckRequest(**wanted), progress)
        return outcome.status, outcome.text, outcome.notices

    return complete(work, Failure, ("comparing", " results"), program, quiet=arguments.quiet)
