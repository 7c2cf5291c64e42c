#!/usr/bin/env python
"""The same as `jaxaudit compare`, from a checkout; see --help and jaxaudit/command_line/compare.py."""

import functools
import sys

from jaxaudit.command_line import compare

parser = functools.partial(compare.parser, "compare_runs.py")
main = functools.partial(compare.main, program="compare_runs.py")

if __name__ == "__main__":
    sys.exit(main())
