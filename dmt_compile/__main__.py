"""``python -m dmt_compile``: the command line."""

import sys

from dmt_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
