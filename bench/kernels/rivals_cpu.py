"""Our kernels on this CPU against those of other libraries, and against what the machine can do at most.

    python -m bench.kernels.rivals_cpu [--threads 1,2] [--shapes 4096x4096,...] [--rows 1,4,...] [--small]
                                       [--json-out FILE]
    python -m bench.kernels.rivals_cpu --zeros: our three kinds of zero alone, 4 bits

All contenders on one weight run in one process, in turn, in an order shuffled in every round, on copies of the weight
that together exceed the caches several times (one copy where m > 16: there the weights hardly count). A ratio is the
median over the rounds of the rival's time over ours in the same round. Rivals: pip install '.[rivals]'; what is
missing is listed. bench/kernels/rivals/goals.py says what we want to reach; this prints what we did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.kernels.rivals import DISTRIBUTIONS, RIVALS, ours
from bench.kernels.rivals.command_line import VERDICTS, numbers, report, shapes
from bench.kernels.rivals.goals import GOALS, SMALL_GOALS, SMALL_GROUP_SIZE, SMALL_SHAPES, Goal
from bench.kernels.rivals.measure import Measured, Task
from bench.kernels.rivals.pairing import met, results_of
from bench.machine import ROOT, describe, versions, write_results
from bench.markdown import product
from llmpq.spec import GROUP_SIZES
from llmpq.spec.precision import ACTIVATION_MODES

ROTATED_BYTES = 160 * 2**20
ROTATED_ROWS = 16  # up to that many rows the weights are cold
GROUP_SIZE = 128


def run(task: Task) -> Measured:
    """In a process of its own, whose libraries all see the number of threads; again without a rival that ends it."""
    count = str(task.threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    died: dict[str, str] = {}
    while True:
        alive = {**asdict(task), "rivals": [name for name in task.rivals if name not in died]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "measured.json"
            command = [sys.executable, "-m", "bench.kernels.rivals.measure", json.dumps(alive), str(path)]
            status = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
            text = path.read_text() if path.exists() else ""
        if status == 0:
            measured = Measured.from_json(text)
            measured.missing |= died
            return measured
        if text not in alive["rivals"]:
            raise SystemExit(
                f"bench.kernels.rivals.measure ended with {status} at {text or 'its start'}: {json.dumps(alive)}"
            )
        died[text] = f"ended the process with {status}"


def line(row: dict[str, Any]) -> str:
    wanted = [] if row["goal"] is None else [f">= {row['goal']:.2f}"]
    if row.get("limit_seconds") is not None:
        wanted.append(f"<= {1e6 * row['limit_seconds']:.1f} us")
    percent = row.get("percent_of_ceiling")
    state = row.get("cache") or ("" if percent is None else f"{percent:.0f} %")
    return (
        f"t={row['threads']} {row['n']}x{row['k']} m={row['m']:<4}"
        f"{product(row):<15}{1e6 * row['seconds']:10.1f} us {state:>5}  "
        f"{row['rival']:<19}{1e6 * row['rival_seconds']:10.1f} us {row['ratio']:6.2f}x  "
        f"{' '.join(wanted):<19} {VERDICTS[met(row)]}"
    ).rstrip()


def rivals_in(goals: Iterable[Goal]) -> tuple[str, ...]:
    """Those that something of ours is compared with."""
    named = {name for goal in goals if goal.activations in ACTIVATION_MODES for name in goal.rivals}
    return tuple(name for name in RIVALS if name in named)


def tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """The large linears, then the small ones; each shape with cold weights, then with one copy."""
    for threads in arguments.threads:
        for n, k in arguments.shapes:
            cold = tuple(m for m in arguments.rows if m <= ROTATED_ROWS)
            rest = tuple(m for m in arguments.rows if m > ROTATED_ROWS)
            for rows, rotated_bytes in ((cold, ROTATED_BYTES), (rest, 0)):
                if rows:
                    rivals = () if arguments.zeros else rivals_in(GOALS)
                    task = Task(n, k, arguments.group_size, rows, threads, arguments.rounds, rotated_bytes, rivals)
                    yield replace(task, weights=ours.ZEROS) if arguments.zeros else task
    if arguments.small:
        for n, k in SMALL_SHAPES:
            for rotated_bytes in (ROTATED_BYTES, 0):
                rivals = rivals_in(SMALL_GOALS)
                yield Task(n, k, SMALL_GROUP_SIZE, (1,), 1, arguments.rounds, rotated_bytes, rivals)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=numbers, default=[1, 2], metavar="T,...")
    parser.add_argument("--shapes", type=shapes, default="4096x4096,11008x4096,4096x11008", metavar="NxK,...")
    parser.add_argument("--rows", type=numbers, default=[1, 4, 16, 128, 512], metavar="M,...")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=GROUP_SIZE, help="of the large linears")
    parser.add_argument("--zeros", action="store_true", help="symmetric, integer zeros and offsets against each other")
    parser.add_argument("--small", action="store_true", help="the linears of SmolLM2, too (--shapes '': only those)")
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    done: list[tuple[Task, Measured]] = []
    head = describe() | {"versions": versions(DISTRIBUTIONS)}
    for task in tasks(arguments):
        print(f"{task.n}x{task.k}, {task.threads} thread(s)", file=sys.stderr, flush=True)
        done.append((task, run(task)))
        if arguments.json_out:  # what is done is kept if a later task is cut short
            write_results(arguments.json_out, head | results_of(done))
    results = results_of(done)
    for row in results["rows"] + results["small"]:
        print(line(row))
    report(results["rows"] + results["small"], results["missing"], line)
    print(f"{results['disturbed_rounds']} of {results['rounds']} rounds were disturbed")


if __name__ == "__main__":
    main()
