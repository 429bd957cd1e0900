"""What a server counts, as Prometheus reads it (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from llmpq.spec import Prediction, RequestTimes

_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


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
        self._busy_s, self._busy_since = 0.0, 0.0

    def begin(self, prompt_tokens: int) -> None:
        """A sequence has been handed in."""
        if self.open == 0:
            self._busy_since = time.monotonic()
        self.open += 1
        self._prompt_tokens += prompt_tokens

    def progress(self, generated: int) -> None:
        """So many tokens have been generated so far, those of sequences that run included. From any thread."""
        self._progress = generated

    def end(self, reason: str, times: RequestTimes | None = None) -> None:
        """One has ended; without times, by an error."""
        self.open -= 1
        if self.open == 0:
            self._busy_s += time.monotonic() - self._busy_since
        self._ended[reason] += 1
        if times is None:
            return
        self._tokens += times.tokens
        if times.ttft_s is not None:
            self._ttft.add(times.ttft_s)
        if times.tpot_s is not None:
            self._tpot.add(times.tpot_s)

    @property
    def busy_s(self) -> float:
        """Seconds in which there was a sequence."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.open else 0.0)

    @property
    def seconds_per_sequence(self) -> float:
        """In which one more ended, while there were any; 0 before the first."""
        return self.busy_s / max(1, sum(self._ended.values()))

    def text(self) -> str:
        """All of it."""
        running = min(self.open, self.slots)
        tokens = max(self._tokens, self._progress)  # the latter is told now and then
        rate = tokens / self.busy_s if self.busy_s else 0.0
        families: list[tuple[str, str, str, Iterable[tuple[str, float]]]] = [
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
        if self._predicted is not None:
            about = "What the plan was predicted to generate per second with all slots in use."
            families.append(_single("predicted_tokens_per_second", "gauge", about, self._predicted.tokens_per_s))
        return "".join(
            f"# HELP {name} {about}\n# TYPE {name} {kind}\n" + "".join(f"{label} {value}\n" for label, value in samples)
            for name, kind, about, samples in families
        )


def _single(name: str, kind: str, about: str, value: float) -> tuple[str, str, str, list[tuple[str, float]]]:
    name = f"llmpq_{name}"
    return name, kind, about, [(name, value)]


def _histogram(name: str, about: str, found: _Histogram) -> tuple[str, str, str, Iterable[tuple[str, float]]]:
    name = f"llmpq_{name}"
    return name, "histogram", about, found.samples(name)
