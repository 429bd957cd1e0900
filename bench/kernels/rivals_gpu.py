"""Our kernels on this GPU against those of other libraries, and against what the device can do at most.

    python -m bench.kernels.rivals_gpu [--json-out FILE] [--shapes 8192x8192,...] [--rows 1,16,...] [--bits 4] [--dtypes
    bf16]
                               [--rivals 'Marlin int4,...'] [--backends cuda] [--rounds 7] [--budget-seconds 480]

All contenders on one weight run in one process, in turn, in an order shuffled in every round: each a CUDA graph of at
least 20 calls on copies of the weight that together are four times the L2 cache. A ratio is the median over the rounds
of the rival's time over ours in the same round. Every product is checked against float64, in the graph, too; a rival
whose product is wrong is missing. bench/kernels/rivals/goals_gpu.py says what we want to reach; this prints what we
did.

With --json-out the file is written after every cell (a shape and dtype with a number of rows). What it holds of this
device and commit already is not measured again; so calls of at most --budget-seconds each finish the work together.
Rivals: humming-kernels, gemlite and bitsandbytes if they can be imported, and vLLM's kernels from the library that
LLMPQ_VLLM_LIBRARY names. Exit code 2: no GPU, or a bad option; 1: one of our own kernels failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.kernels.rivals import GPU_DISTRIBUTIONS, GPU_RIVALS, VLLM_LIBRARY
from bench.kernels.rivals.command_line import VERDICTS, numbers, one_of, report, shapes
from bench.kernels.rivals.goals_gpu import GOALS, GpuGoal, contenders_at, selected
from bench.kernels.rivals.graphs import Clock, CudaClock
from bench.kernels.rivals.journal import Journal
from bench.kernels.rivals.measure_gpu import DTYPES, GpuTask, measure, rotated_bytes
from bench.kernels.rivals.ours import BITS, GPU_BACKENDS, gpu_name
from bench.kernels.rivals.pairing import met
from bench.kernels.rivals.pairing_gpu import rows_of
from bench.kernels.shapes import RIVAL_ROWS, RIVAL_SHAPES
from bench.machine import describe, versions
from bench.reasons import reason
from llmpq.spec import UsageError

OURS = frozenset(gpu_name(bits, backend) for bits in BITS for backend in GPU_BACKENDS)


def line(row: dict[str, Any]) -> str:
    percent = row["percent_of_ceiling"]
    share = "" if percent is None else f"{percent:.0f} %"
    notes = "" if row["graphed"] and row["rival_graphed"] else " not in a graph"
    return (
        f"{row['n']}x{row['k']} {row['dtype']} m={row['m']:<4} {row['backend']:<6} int{row['bits']}"
        f"{1e6 * row['seconds']:9.1f} us {share:>5}  {row['rival']:<27}{1e6 * row['rival_seconds']:9.1f} us"
        f"{row['ratio']:6.2f}x  {'' if row['goal'] is None else '>= {goal:.2f}'.format(**row):<8}"
        f"{VERDICTS[met(row)]}{notes}"
    ).rstrip()


def load(names: Sequence[str], journal: Journal) -> dict[str, str]:
    """Import these rivals; of those that cannot be, the reason."""
    missing = {}
    for name in names:
        journal.at_work({}, name)
        try:
            import_module(f"bench.kernels.rivals.{GPU_RIVALS[name][0]}")
        except Exception as error:  # some raise more than ImportError where a driver is missing
            missing[name] = reason(error)
    journal.rest()
    return missing


def installed() -> dict[str, str]:
    """Versions of the rivals; of a library without one, the beginning of its SHA-256."""
    path = Path(os.environ.get(VLLM_LIBRARY, ""))
    library = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]} if path.is_file() else {}
    return versions(GPU_DISTRIBUTIONS) | library


def tasks(
    arguments: argparse.Namespace, goals: Sequence[GpuGoal], missing: dict[str, str], journal: Journal, l2_bytes: int
) -> Iterator[GpuTask]:
    """What the journal does not hold yet: one dtype after the other, in each the shapes as they are listed."""
    for dtype in arguments.dtypes:
        for n, k in arguments.shapes:
            contenders = {}
            for m in arguments.rows:
                names = [name for name in contenders_at(goals, n, k, m, dtype) if name not in missing]
                if left := journal.remaining({"n": n, "k": k, "m": m, "dtype": dtype}, names):
                    contenders[m] = left
            if contenders:
                yield GpuTask(n, k, dtype, contenders, arguments.rounds, rotated_bytes(l2_bytes))


class Budget:
    """Seconds to work, of which as many must be left to go on as the longest piece of work so far has taken."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._longest, self._begun = now, 0.0, now()
        self._end = self._begun + seconds

    def allows_more(self) -> bool:
        """To be asked after each piece."""
        now = self._now()
        self._longest, self._begun = max(self._longest, now - self._begun), now
        return now + self._longest < self._end


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-out", metavar="FILE", type=Path)
    parser.add_argument("--shapes", type=shapes, default=list(RIVAL_SHAPES), metavar="NxK,...")
    parser.add_argument("--rows", type=numbers, default=list(RIVAL_ROWS), metavar="M,...")
    parser.add_argument("--bits", type=one_of(BITS, int), default=list(BITS), metavar="BITS,...")
    parser.add_argument("--dtypes", type=one_of(list(DTYPES)), default=list(DTYPES), metavar="bf16,fp16")
    parser.add_argument("--rivals", type=one_of(list(GPU_RIVALS)), metavar="NAME,...", help="default: all there are")
    parser.add_argument("--backends", type=one_of(GPU_BACKENDS), default=list(GPU_BACKENDS), metavar="cuda,triton")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    return parser.parse_args(argv)


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    from bench.kernels import gpu_ceilings  # needs triton

    return gpu_ceilings.measure(device, clock)


def note(journal: Journal, task: GpuTask, m: int, contender: str | None) -> None:
    """Note who is at work on which cell of a task."""
    journal.at_work({"n": task.n, "k": task.k, "m": m, "dtype": task.dtype}, contender)


def run(
    arguments: argparse.Namespace,
    journal: Journal,
    device: torch.device,
    clock: Clock,
    l2_bytes: int,
    ceilings: Callable[[torch.device, Clock], dict[str, float]] = ceilings,
) -> int:
    """Measure what is left until time is up; return how many cells are left then.

    Raises RuntimeError if the device is in no state to go on.
    """
    budget = Budget(arguments.budget_seconds)
    goals = selected(arguments.bits, arguments.rivals, arguments.backends)
    named = [name for name in GPU_RIVALS if arguments.rivals is None or name in arguments.rivals]
    missing = load([name for name in named if name not in journal.results["ended"]], journal)
    journal.results["missing"] = missing
    todo = list(tasks(arguments, goals, missing, journal, l2_bytes))
    left = sum(len(task.contenders) for task in todo)
    reached = ceilings(device, clock) if todo else {}
    journal.reach(reached)
    journal.write()
    for task in todo:
        torch.cuda.empty_cache()
        for cell in measure(task, device, clock, partial(note, journal, task)):
            journal.rest()
            rows = list(rows_of(cell, GOALS, reached))  # whoever was timed before was timed again
            journal.add(cell, rows)
            left -= 1
            for row in rows:
                print(line(row), flush=True)
            if not budget.allows_more():
                return left
    return left


def main(argv: Sequence[str] | None = None) -> int:
    arguments, began = parse(argv), time.monotonic()
    try:
        if not torch.cuda.is_available():
            raise UsageError("bench.kernels.rivals_gpu needs a CUDA device, and torch sees none")
        journal = Journal(arguments.json_out, describe() | {"versions": installed()})
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    # Being told to stop is not the end that a contender brought about.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with torch.inference_mode():
            device = torch.device("cuda", torch.cuda.current_device())
            left = run(arguments, journal, device, CudaClock(), torch.cuda.get_device_properties(device).L2_cache_size)
    except RuntimeError as error:
        if not journal.is_at_work:  # nobody to be left out: it would be the same again
            raise
        print(f"{reason(error)}; going on in a new process", file=sys.stderr, flush=True)
        given = list(sys.argv[1:] if argv is None else argv)
        seconds = arguments.budget_seconds - (time.monotonic() - began)
        os.execv(
            sys.executable, [sys.executable, "-m", "bench.kernels.rivals_gpu", *given, f"--budget-seconds={seconds}"]
        )
    except (KeyboardInterrupt, SystemExit):
        journal.rest()
        raise
    report(journal.results["rows"], journal.results["missing"], line)
    for name, value in journal.results["ceilings"].items():
        print(f"{name}: {value:.4g}")
    if left:
        print(f"{left} cells are left: call again", file=sys.stderr)
    return int(bool(OURS & journal.results["missing"].keys()))


if __name__ == "__main__":
    sys.exit(main())
