"""From the seconds of all contenders to rows: ours beside a rival's, their ratio, the goal. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.kernels.rivals import ours
from bench.kernels.rivals.goals import GOALS, SMALL_GOALS, SMALL_GROUP_SIZE, Goal, label_of, small_limit
from bench.kernels.rivals.measure import Measured, Task
from bench.kernels.rivals.timing import Timing

_OPERATIONS = {"a16": ("fp32_flop_per_s", 2), "a8x2": ("int8_op_per_s", 4), "a8": ("int8_op_per_s", 2)}  # per weight


def spread(seconds: Sequence[float]) -> float:
    """(third quartile - first) / median."""
    if len(seconds) < 2:
        return 0.0
    first, median, third = statistics.quantiles(seconds, n=4)
    return (third - first) / median


def paired_ratio(rival: Timing, mine: Timing) -> float:
    """Median over the rounds of the rival's time over ours; reading memory counts for as many bytes as our weight."""
    scale = mine.nbytes / rival.nbytes if rival.error is None else 1.0
    return statistics.median(scale * theirs / my for theirs, my in zip(rival.seconds, mine.seconds))


def fraction_of_ceiling(
    n: int, k: int, m: int, activations: str, mine: Timing, ceilings: dict[str, float]
) -> float | None:
    """On the CPU: see `fraction_of_peak`."""
    peak, operations = _OPERATIONS[activations]
    return fraction_of_peak(operations * m * n * k, peak, mine, ceilings)


def fraction_of_peak(operations: int, peak: str, mine: Timing, ceilings: dict[str, float]) -> float | None:
    """The time that reading the weight, or else the arithmetic, takes at least, over ours. None: not measured.

    `peak` names the ceiling of the arithmetic.
    """
    if not ceilings.get(peak):
        return None
    least = max(mine.nbytes / ceilings["read_bytes_per_s"], operations / ceilings[peak])
    return least / statistics.median(mine.seconds)


def fastest_measured(rivals: Iterable[str], timings: dict[str, Timing]) -> str | None:
    """Of those that were timed."""
    found = [name for name in rivals if name in timings]
    return min(found, key=lambda name: statistics.median(timings[name].seconds), default=None)


def compared(mine: Timing, rivals: Sequence[str], timings: dict[str, Timing]) -> dict[str, Any] | None:
    """Ours beside the fastest of its rivals, as part of a row; None if none was timed.

    Reading memory is given for as many bytes as our weight has.
    """
    name = fastest_measured(rivals, timings)
    if name is None:
        return None
    rival = timings[name]
    seconds = statistics.median(rival.seconds)
    return {
        "seconds": statistics.median(mine.seconds),
        "spread": spread(mine.seconds),
        "error": mine.error,
        "against": label_of(rivals),
        "rival": name,
        "rival_seconds": seconds if rival.error is not None else seconds * mine.nbytes / rival.nbytes,
        "rival_error": rival.error,
        "ratio": paired_ratio(rival, mine),
    }


def pair(goal: Goal, m: int, threads: int, timings: dict[str, Timing]) -> dict[str, Any] | None:
    """Ours against the fastest of the goal's rivals, as part of a row; None if there is nothing to compare."""
    if goal.only_goals and m not in goal.at:
        return None
    mine = timings.get(ours.name(goal.bits, goal.activations, goal.zero))
    found = None if mine is None else compared(mine, goal.rivals, timings)
    if found is None:
        return None
    kind = {"bits": goal.bits, "zero": goal.zero, "activations": goal.activations}
    return {**kind, **found, "goal": goal.ratio(m, threads)}


def rows_of(task: Task, measured: Measured, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each comparison of GOALS that could be made."""
    for m, timings in measured.timings.items():
        for goal in GOALS:
            if row := pair(goal, m, task.threads, timings):
                mine = timings[ours.name(goal.bits, goal.activations, goal.zero)]
                fraction = fraction_of_ceiling(task.n, task.k, m, goal.activations, mine, ceilings)
                percent = None if fraction is None else 100 * fraction
                pace = measured.paces.get(m)
                yield _place(task, m) | row | {"percent_of_ceiling": percent, "tile_op_per_s": pace or None}


def small_rows_of(task: Task, measured: Measured, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The same for SMALL_GOALS; `limit_seconds` is the goal for our own time, on one of the rows of each product."""
    cache = "cold" if task.rotated_bytes else "warm"
    for m, timings in measured.timings.items():
        for goal in SMALL_GOALS:
            if row := pair(goal, m, task.threads, timings):
                nbytes = timings[ours.name(goal.bits, goal.activations)].nbytes
                limit = small_limit(task.n, task.k, cache, nbytes, ceilings.get("read_bytes_per_s"))
                yield _place(task, m) | row | {"cache": cache, "limit_seconds": limit if goal.at else None}


def _place(task: Task, m: int) -> dict[str, Any]:
    return {"threads": task.threads, "n": task.n, "k": task.k, "m": m, "group_size": task.group_size}


def met(row: dict[str, Any]) -> bool | None:
    """None: there is no goal."""
    reached = [] if row["goal"] is None else [row["ratio"] >= row["goal"]]
    if row.get("limit_seconds") is not None:
        reached.append(row["seconds"] <= row["limit_seconds"])
    if row.get("error_limit") is not None:
        reached.append(row["error"] <= row["error_limit"])
    return all(reached) if reached else None


def results_of(done: Iterable[tuple[Task, Measured]]) -> dict[str, Any]:
    """All that was found so far. A ceiling is the best of what was measured with that number of threads."""
    done = list(done)
    ceilings: dict[int, dict[str, float]] = {}
    for threads in dict.fromkeys(task.threads for task, _ in done):
        found = [measured.ceilings for task, measured in done if task.threads == threads and measured.ceilings]
        ceilings[threads] = {name: max(one[name] for one in found) for name in (found or [{}])[0]}
    rows: list[dict[str, Any]] = []
    small: list[dict[str, Any]] = []
    for task, measured in done:
        if task.group_size == SMALL_GROUP_SIZE:
            small += small_rows_of(task, measured, ceilings[task.threads])
        else:
            rows += rows_of(task, measured, ceilings[task.threads])
    return {
        "ceilings": {str(threads): found for threads, found in ceilings.items()},
        "missing": {name: why for _, measured in done for name, why in measured.missing.items()},
        "rounds": sum(measured.rounds for _, measured in done),
        "disturbed_rounds": sum(measured.disturbed for _, measured in done),
        "rows": rows,
        "small": small,
    }
