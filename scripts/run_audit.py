#!/usr/bin/env python
"""The same as `jaxaudit audit`, from a checkout; see --help and jaxaudit/command_line/audit.py."""

import functools
import sys

from jaxaudit.command_line import audit

parser = functools.partial(audit.parser, "run_audit.py")
main = functools.partial(audit.main, program="run_audit.py")

if __name__ == "__main__":
    sys.exit(main())
