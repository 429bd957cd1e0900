"""A contender for tests of bench.end_to_end: its seconds are made up, and it fails as its options say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.end_to_end.child import Job


class Fake:
    def __init__(self, job: Job) -> None:
        self._job, self._generated = job, 0

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
            "threads": [os.environ["OMP_NUM_THREADS"], self._job.threads],
        }

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-0.5] * (len(window) - 1) for window in windows]


def load(job: Job) -> Fake:
    fails = job.options.get("fails")
    if fails == "import":
        raise ImportError("no engine here")
    if fails == "load":
        print("the engine has crashed", file=sys.stderr)
        os._exit(7)
    return Fake(job)
