"""How much faster than the best other engine ours should be, with two threads; and what else is asked of it."""

from __future__ import annotations

from pathlib import Path

THREADS = 2  # that the goals of engines are about
PREFILL = {1: 3.0, 8: 3.0, 32: 4.0}  # batch -> our tokens/s over the best other's, at least
PREFILL_AMX = {1: 5.0, 8: 5.0, 32: 6.0}
DECODE = {1: 1.5, 8: 2.5, 32: 4.0}
DECODE_BOUND = {1: 0.55}  # batch -> share of the bound, at least
SECOND_THREAD = {8: 1.7, 32: 1.7}  # batch -> tokens/s of two threads over those of one, at least
PIPELINE = 0.9  # tokens/s of two stages of one thread over those of one process of two, at least
BUSY = 0.9  # share of decode that the pipeline's slowest stage is at work, at least


def has_amx() -> bool:
    """Whether the processor has tiles, as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_tile" in cpuinfo.read_text().split()


def ratio(phase: str, batch: int, threads: int, amx: bool) -> float | None:
    """Against the best other; None: there is no goal."""
    if threads != THREADS:
        return None
    by_phase = {"prefill": PREFILL_AMX if amx else PREFILL, "decode": DECODE}
    return by_phase.get(phase, {}).get(batch)


def bound_share(phase: str, batch: int, threads: int) -> float | None:
    return DECODE_BOUND.get(batch) if phase == "decode" and threads == THREADS else None
