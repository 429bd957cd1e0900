"""`python -m llmpq.run` is `llmpq run`."""

import sys

from llmpq.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
