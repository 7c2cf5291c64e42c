"""Audit a recorded training run: replay every optimizer step and compare it bit for bit.

    jaxaudit audit
    jaxaudit audit run.safetensors --token-groups groups.safetensors --plots figures
    jaxaudit audit run-folder --parameters 'attn.*weight'

Without a recording, the sample that ships with the package is audited. Of the folder of a whole model (with a
recording.json), every parameter is. The result is a NetCDF file for
xarray.open_dataset; a summary goes to stdout, progress and notices go to stderr.

Exit status: 0 the audit ran; 1 --expect was not met; 2 wrong usage, or an output that cannot be written;
3 input missing, unreadable, incomplete or inconsistent; 4 the self-test failed; 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxaudit.terminal import add_usual_options, answer, complete, described_parser, importing

_NAME = "jaxaudit audit"


def parser(program: str = _NAME) -> argparse.ArgumentParser:
    """Describe the command line of a program of this name."""
    p = described_parser(program, __doc__ or "", _NAME)
    p.add_argument("recording", nargs="?", help="the recording (default: the sample)")
    p.add_argument("--parameter", metavar="NAME", help="which one, of several in the source")
    p.add_argument("--parameters", metavar="REGEX", help="of a whole model, those it is found in")
    p.add_argument("--token-groups", metavar="FILE", help="sets of tokens to count by")
    p.add_argument("--backend", choices=("auto", "cpu", "gpu", "tpu"), default="auto")
    p.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many of the backend's devices (default: one CPU, or all of any other kind)",
    )
    p.add_argument(
        "--arithmetic",
        metavar="auto|all|NAME[,NAME...]",
        default="auto",
        help="what to replay (auto: identify, then replay that and float32-then-bfloat16)",
    )
    p.add_argument(
        "--steps", metavar="START:STOP", help="steps START..STOP-1, from 1 (default: all)"
    )
    p.add_argument("--output", metavar="PATH", help="NetCDF file (default: results/<stem>.nc)")
    p.add_argument("--csv", metavar="PATH", help="tables, one per group: PATH-GROUP-ARITHMETIC")
    p.add_argument("--plots", metavar="DIR", help="figures as PNG")
    p.add_argument("--report", metavar="FILE.html", help="also one page with everything in it")
    p.add_argument("--expect", metavar="NAME", help="exit 1 unless it replays exactly under NAME")
    p.add_argument("--only", choices=("accounting",), help="leave out where the updates went")
    p.add_argument(
        "--counterfactual-beta2",
        metavar="VALUE[,VALUE...]",
        default="0.95",
        help="values of beta2 to try on the recorded gradients (default: 0.95)",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of the draw of stochastic rounding (default: 0)"
    )
    p.add_argument(
        "--per-token", action="store_true", help="store every token's displacement in every step"
    )
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes of this machine that share the work"
    )
    p.add_argument(
        "--scheduler", metavar="ADDRESS", help="of dask.distributed, whose workers share the work"
    )
    p.add_argument(
        "--shard",
        metavar="I/N",
        help="do the I-th of N shares; the last one to end writes the result",
    )
    add_usual_options(p)
    return p


def main(argv: Sequence[str] | None = None, program: str = _NAME) -> int:
    """Run the command; return its exit status."""
    return answer(parser, _main, argv, program)


def _main(arguments: argparse.Namespace, program: str) -> int:
    with importing():
        from jaxaudit.commands import AuditRequest, Failure
        from jaxaudit.models.command import run_audit

    request = AuditRequest(**{k: v for k, v in vars(arguments).items() if k != "version"})

    def notice(text: str) -> None:
        if not arguments.quiet:
            print(f"{program}: {text}", file=sys.stderr)

    return complete(
        lambda progress: (*run_audit(request, progress, notice), ()),
        Failure,
        ("replaying", "B"),
        program,
        quiet=arguments.quiet,
    )
