"""Compare two recorded runs, or two results: where they part, how far apart they grow, what differs.

    jaxaudit compare loop.safetensors fused.safetensors --plots figures
    jaxaudit compare bfloat16.nc float32-master.nc
    jaxaudit compare run-folder other-folder --parameters 'attn.*weight'

Recordings are laid upon each other by timestep and token; tensors of one format are compared bit for bit, of different
formats by their exact values. Of the folders of two whole models, parameters of one name are; of NetCDF files, such as
two audits, every variable is compared. The result is a NetCDF file for xarray.open_dataset; a summary goes to stdout,
progress and notices go to stderr.

Exit status: 0 the comparison ran, whatever differs; 1 --expect was not met; 2 wrong usage, or an output that cannot
be written; 3 input missing, unreadable, incomplete or inconsistent; 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxaudit.terminal import add_usual_options, answer, complete, described_parser, importing

_NAME = "jaxaudit compare"


def parser(program: str = _NAME) -> argparse.ArgumentParser:
    """Describe the command line of a program of this name."""
    p = described_parser(program, __doc__ or "", _NAME)
    p.add_argument(
        "a", metavar="A", nargs="?", help="a recording, the folder of a model, or a NetCDF file"
    )
    p.add_argument("b", metavar="B", nargs="?", help="another of the same kind")
    p.add_argument("--parameters", metavar="REGEX", help="of whole models, those it is found in")
    p.add_argument(
        "--token-groups", metavar="FILE", help="sets of tokens to count by (default: those in A)"
    )
    p.add_argument(
        "--steps", metavar="START:STOP", help="steps START..STOP-1 (default: all common ones)"
    )
    p.add_argument("--output", metavar="PATH", help="NetCDF file (default: results/A-against-B.nc)")
    p.add_argument("--plots", metavar="DIR", help="figures as PNG")
    p.add_argument(
        "--expect",
        choices=("identical",),
        help="exit 1 unless every tensor (or variable) that both hold is the same to the bit",
    )
    add_usual_options(p)
    return p


def main(argv: Sequence[str] | None = None, program: str = _NAME) -> int:
    """Run the command; return its exit status."""
    return answer(parser, _main, argv, program)


def _main(arguments: argparse.Namespace, program: str) -> int:
    if arguments.b is None:  # not argparse's to check, or --version would need both
        print(f"{program}: error: two files are needed, A and B; see --help", file=sys.stderr)
        return 2
    with importing():
        from jaxaudit.commands import Failure
        from jaxaudit.divergence.command import CompareRequest, compare_runs

    request = CompareRequest(**{k: v for k, v in vars(arguments).items() if k != "version"})
    return complete(
        lambda progress: (*compare_runs(request, progress), ()),
        Failure,
        ("comparing", "B"),
        program,
        quiet=arguments.quiet,
    )
