"""`python -m weaver`: the command line, from a source tree that is not installed."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
