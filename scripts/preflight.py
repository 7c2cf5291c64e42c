#!/usr/bin/env python
"""The same as `jaxaudit preflight`, from a checkout; see --help and jaxaudit/command_line/preflight.py."""

import functools
import sys

from jaxaudit.command_line import preflight

parser = functools.partial(preflight.parser, "preflight.py")
main = functools.partial(preflight.main, program="preflight.py")

if __name__ == "__main__":
    sys.exit(main())
