"""A contender for tests of bench.end_to_end: its seconds are made up, and it fails as its options say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.end_to_end.child import Job


class Fake:
    def __init__(self, job: Job) -> None:
        self._job, self._generated = job, 0
        self._spins: subprocess.Popen[bytes] | None = None
        if job.options.get("spins"):
            self._spins = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def prepare(self, batch: int, length: int) -> None:
        print("not an answer", flush=True)

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        self._generated += 1
        if self._job.options.get("fails") == "second" and self._generated == 2:
            os._exit(3)
        left = subprocess.Popen(["sleep", "600"]).pid if self._job.options.get("starts") else None
        speed = self._job.options.get("speed", 1.0)
        return {
            "prefill_s": len(prompts) * len(prompts[0]) / speed,
            "decode_s": len(prompts) * output / speed,
            "busy": [1.0],
            "left": left,
            "spun": self._spins is not None and _ticks(self._spins.pid),
            "threads": [os.environ["OMP_NUM_THREADS"], self._job.threads],
        }

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-0.5] * (len(window) - 1) for window in windows]


def _ticks(pid: int) -> int:
    """Of the processor, after some more."""

    def now() -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    before = now()
    deadline = time.monotonic() + 10
    while now() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    return now() - before


def load(job: Job) -> Fake:
    fails = job.options.get("fails")
    if fails == "import":
        raise ImportError("no engine here")
    if fails == "load":
        print("the engine has crashed", file=sys.stderr)
        os._exit(7)
    return Fake(job)
