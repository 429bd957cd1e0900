"""`python -m llmpq` is `llmpq`."""

import sys

from llmpq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
