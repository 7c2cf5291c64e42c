#!/usr/bin/env python
"""The same as `jaxaudit certificate`, from a checkout; see --help and jaxaudit/command_line/certificate.py."""

import functools
import sys

from jaxaudit.command_line import certificate

parser = functools.partial(certificate.parser, "cross_check_rounding.py")
main = functools.partial(certificate.main, program="cross_check_rounding.py")

if __name__ == "__main__":
    sys.exit(main())
