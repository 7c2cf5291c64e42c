#!/usr/bin/env python
"""The same as `jaxaudit record`, from a checkout; see --help and jaxaudit/command_line/record.py."""

import functools
import sys

from jaxaudit.command_line import record

parser = functools.partial(record.parser, "record_run.py")
main = functools.partial(record.main, program="record_run.py")

if __name__ == "__main__":
    sys.exit(main())
