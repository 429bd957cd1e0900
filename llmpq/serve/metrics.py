"""What a server counts, as Prometheus reads it (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from llmpq.runtime.session import Load
from llmpq.spec import Prediction, RequestTimes

Family = tuple[str, str, str, Iterable[tuple[str, float]]]  # name, kind, what it is, samples
_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Live(NamedTuple):
    """What a session says of itself now, and for how many tokens its KV cache has room."""

    kv_tokens: int
    kv_room: int
    loads: Sequence[Load]  # of each stage


class _Histogram:
    """Of seconds."""

    def __init__(self, limits: tuple[float, ...]) -> None:
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self._limits, seconds)] += 1
        self._sum_s += seconds

    def samples(self, name: str) -> Iterable[tuple[str, float]]:
        limits = [*map("{:g}".format, self._limits), "+Inf"]
        for limit, count in zip(limits, accumulate(self._counts), strict=True):
            yield f'{name}_bucket{{le="{limit}"}}', count
        yield f"{name}_sum", self._sum_s
        yield f"{name}_count", sum(self._counts)


class Metrics:
    """Counts sequences: one for each answer that is sampled. `predicted` is of a whole batch of the plan's workload."""

    def __init__(self, slots: int, predicted: Prediction | None) -> None:
        self.slots, self._predicted = slots, predicted
        self.open = 0  # handed in, and not ended
        self.refused = 0
        self._ended = Counter[str]()
        self._prompt_tokens = self._tokens = self._progress = 0
        self._ttft, self._tpot = _Histogram(_TTFT_S), _Histogram(_TPOT_S)
        self._active_s, self._active_since = 0.0, 0.0
        self._before_s = 0.0  # of these, those of plans before this one

    def replanned(self, slots: int) -> None:
        """A device was lost, or is back: another plan runs from now on, of which nothing was predicted."""
        self.slots, self._predicted = slots, None
        self._before_s = self.active_s

    def begin(self, prompt_tokens: int) -> None:
        """A sequence has been handed in."""
        if self.open == 0:
            self._active_since = time.monotonic()
        self.open += 1
        self._prompt_tokens += prompt_tokens

    def progress(self, generated: int) -> None:
        """So many tokens have been generated so far, those of sequences that run included. From any thread."""
        self._progress = generated

    def end(self, reason: str, times: RequestTimes | None = None) -> None:
        """One has ended; without times, by an error."""
        self.open -= 1
        if self.open == 0:
            self._active_s += time.monotonic() - self._active_since
        self._ended[reason] += 1
        if times is None:
            return
        self._tokens += times.tokens
        if times.ttft_s is not None:
            self._ttft.add(times.ttft_s)
        if times.tpot_s is not None:
            self._tpot.add(times.tpot_s)

    @property
    def active_s(self) -> float:
        """Seconds in which there was a sequence."""
        return self._active_s + (time.monotonic() - self._active_since if self.open else 0.0)

    @property
    def seconds_per_sequence(self) -> float:
        """In which one more ended, while there were any; 0 before the first."""
        return self.active_s / max(1, sum(self._ended.values()))

    def text(self, live: Live) -> str:
        """All of it, with what is so now."""
        running = min(self.open, self.slots)
        tokens = max(self._tokens, self._progress)  # the latter is told now and then
        rate = tokens / self.active_s if self.active_s else 0.0
        families: list[Family] = [
            _single("running", "gauge", "Sequences that are computed.", running),
            _single("waiting", "gauge", "Sequences that wait for a slot.", self.open - running),
            _single("slots", "gauge", "Sequences that the plan computes at once.", self.slots),
            (
                "llmpq_sequences_total",
                "counter",
                "Sequences that have ended, by how.",
                [(f'llmpq_sequences_total{{reason="{reason}"}}', n) for reason, n in sorted(self._ended.items())],
            ),
            _single(
                "refused_total", "counter", "Requests that were refused for want of room in the queue.", self.refused
            ),
            _single("prompt_tokens_total", "counter", "Tokens of the prompts of all sequences.", self._prompt_tokens),
            _single("generated_tokens_total", "counter", "Tokens generated.", tokens),
            _histogram("ttft_seconds", "Seconds from a request to its first token.", self._ttft),
            _histogram("tpot_seconds", "Seconds between two tokens of a sequence, its mean.", self._tpot),
            _single("tokens_per_second", "gauge", "Generated tokens per second, while there were sequences.", rate),
        ]
        families += _live(live, self.active_s, self.active_s - self._before_s)
        if self._predicted is not None:
            about = "What the plan was predicted to generate per second with all slots in use."
            families.append(_single("predicted_tokens_per_second", "gauge", about, self._predicted.tokens_per_s))
            numbered = enumerate(self._predicted.memory_bytes)
            about = "Bytes that the plan was predicted to take of a stage's memory at most."
            families.append(_by_stage("predicted_memory_bytes", "gauge", about, numbered))
        return "".join(
            f"# HELP {name} {about}\n# TYPE {name} {kind}\n" + "".join(f"{label} {value}\n" for label, value in samples)
            for name, kind, about, samples in families
        )


def _live(live: Live, active_s: float, since_s: float) -> list[Family]:
    """`active_s`: seconds in which there was something to do; `since_s`: those since these stages run."""
    loads = list(enumerate(live.loads))
    bubbles = ((stage, max(0.0, since_s - load.busy_s)) for stage, load in loads)
    return [
        _single("kv_tokens", "gauge", "Tokens that the KV cache's blocks in use have room for.", live.kv_tokens),
        _single("kv_room_tokens", "gauge", "Tokens that all of its blocks have room for.", live.kv_room),
        _single("active_seconds_total", "counter", "Seconds in which there was a sequence.", active_s),
        _by_stage("busy_seconds_total", "counter", "Seconds of steps.", ((i, load.busy_s) for i, load in loads)),
        _by_stage("bubble_seconds_total", "counter", "Active seconds without a step.", bubbles),
        _by_stage(
            "memory_bytes", "gauge", "Peak memory above an idle worker.", ((i, load.memory_bytes) for i, load in loads)
        ),
    ]


def _by_stage(name: str, kind: str, about: str, values: Iterable[tuple[int, float]]) -> Family:
    name = f"llmpq_stage_{name}"
    return name, kind, about, [(f'{name}{{stage="{stage}"}}', value) for stage, value in values]


def _single(name: str, kind: str, about: str, value: float) -> Family:
    name = f"llmpq_{name}"
    return name, kind, about, [(name, value)]


def _histogram(name: str, about: str, found: _Histogram) -> Family:
    name = f"llmpq_{name}"
    return name, "histogram", about, found.samples(name)
