"""`python -m bench.faults`: inject faults, count how they end. Fails if one did not end well."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from bench.faults import files, processes
from bench.machine import ROOT, describe, write_results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="a few of each quick kind, in about a minute; writes no results"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, metavar="N", help="mutated files (default: 10000; short: 300)")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="faults of processes (default: 300; short: 1 a kind)"
    )
    parser.add_argument(
        "--only", action="append", choices=processes.FAULTS, help="this kind of process fault; repeatable"
    )
    parser.add_argument("--out", default=ROOT / "bench/results/faults.json", metavar="FILE")
    arguments = parser.parse_args()
    count = arguments.files if arguments.files is not None else 300 if arguments.short else 10_000
    counts = files.inject(arguments.seed, count)
    only = arguments.only or (processes.QUICK if arguments.short else ())
    number = arguments.processes if arguments.processes is not None else None if arguments.short else 300
    counts += processes.inject(arguments.seed, number, only)
    for kind in counts:
        print(*(f"{name} {value}" for name, value in asdict(kind).items() if name != "failures"), sep=", ")
        print(*(f"  {failure}" for failure in kind.failures), sep="\n", end="\n" if kind.failures else "")
    if not arguments.short:
        results = {**describe(), "seed": arguments.seed, "faults": [asdict(kind) for kind in counts]}
        write_results(arguments.out, results)
    return int(any(kind.failures for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
