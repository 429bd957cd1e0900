"""Which model families load from what, and how far they have been run: by the tests that show it.

    python -m bench.families [--json-out FILE]

Runs every test marked `family`, those of `make test-full` included, and notes by family how many cases passed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    out = parser.parse_args().json_out
    options = [] if out is None else ["--families-out", str(out)]
    marked = ["-m", "family and (full or not full)", "-p", "no:benchmark"]
    return subprocess.run([sys.executable, "-m", "pytest", *marked, *options, "tests"]).returncode


if __name__ == "__main__":
    sys.exit(main())
