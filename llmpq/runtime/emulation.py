"""What is slower than it really is: a device with a slowdown, a link that holds messages back, a stage that only waits.

All wait with the clock that the processes of one host share, `time.monotonic_ns`.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

import torch

from llmpq.models.step import Step
from llmpq.spec import Context, Device, Link, ModelSpec, Plan, Profile, stage_seconds

_SPIN_NS = 200_000  # a sleep may end so much late


def wait_until(moment_ns: int) -> None:
    """Return at that moment of `time.monotonic_ns`, within microseconds; at once if it has passed."""
    left = moment_ns - time.monotonic_ns()
    if left > _SPIN_NS:
        time.sleep((left - _SPIN_NS) / 1e9)
    while time.monotonic_ns() < moment_ns:
        os.sched_yield()  # to the threads that carry messages: there may be fewer cores than devices


class Pace(Protocol):
    """How long a stage is at a step: a Slowness of its device or a TimedStage. Each needs a part of what it is told."""

    def begin(self, began_ns: int) -> None:
        """A step began at `began_ns`; what it computes begins now."""

    def hold(self, sending_ns: int) -> float:
        """Wait until the step may end, but for sending its result, which takes about `sending_ns`.

        Returns by how much longer computing took for that, as a factor.
        """


class SlowdownEmulator:
    """A Pace: what a device computes takes `slowdown` times as long as it really does, whatever else a step takes.

    On a CPU that is the time that the computing thread was on a core: what other processes of a crowded machine take
    from it is not multiplied. On a GPU it is the time until its stream is done.
    """

    def __init__(self, device: Device) -> None:
        self._factor, self._cuda = device.slowdown, device.kind == "cuda"
        self._work_ns = time.monotonic_ns if self._cuda else time.thread_time_ns
        self._began_ns = self._worked_ns = 0

    def begin(self, began_ns: int = 0) -> None:
        self._began_ns, self._worked_ns = time.monotonic_ns(), self._work_ns()

    def hold(self, sending_ns: int = 0) -> float:
        if self._factor == 1:
            return 1.0  # and on a GPU nothing waits: whoever sends the result does
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        took_ns = time.monotonic_ns() - self._began_ns
        takes_ns = max(took_ns, int(self._factor * (self._work_ns() - self._worked_ns)))
        wait_until(self._began_ns + takes_ns)
        return takes_ns / took_ns


class EmulatedLink:
    """The receiving end of an emulated link: one message after the other, each as long as the link says.

    Without a link, or with one that is not emulated, nothing is held back. `passage` is when the last message was on
    its way, if that is known: one that was sent before its receiver waited for it may have been there for long.
    """

    def __init__(self, link: Link | None) -> None:
        self._link = link if link is not None and link.emulated else None
        self._free_ns = 0
        self.passage: tuple[int, int] | None = None  # from when to when, of `time.monotonic_ns`

    def hold(self, sent_ns: int, size: int, arrived_ns: int, awaited_ns: int = 0) -> int:
        """Wait until a message of `size` bytes, sent at `sent_ns`, may have arrived; when that was, or really was.

        `awaited_ns` is since when its receiver waited for it.
        """
        if self._link is None:
            self.passage = (sent_ns, arrived_ns) if awaited_ns <= sent_ns <= arrived_ns else None
            return arrived_ns
        began_ns = max(sent_ns, self._free_ns)
        self._free_ns = began_ns + int(1e9 * self._link.seconds(size))
        self.passage = (began_ns, self._free_ns)
        wait_until(self._free_ns)
        return max(arrived_ns, self._free_ns)


class SimulatedStage:
    """In place of a DecoderStage, and its Pace: computes nothing, and a step takes what a table says.

    Hidden states and logits are zeros, so that all tokens are 0.
    """

    def __init__(self, plan: Plan, spec: ModelSpec, index: int, waits: Profile) -> None:
        """Raises NotMeasuredError if the stage's device is not in the profile."""
        self.dtype: torch.dtype = getattr(torch, plan.stages[index].compute_dtype)
        self._hidden_size, self._vocab_size = spec.hidden_size, spec.vocab_size
        self._seconds = stage_seconds(plan, spec, index, waits.table(plan.stages[index].device))
        self._began_ns = self._takes_ns = 0

    def begin(self, began_ns: int) -> None:
        self._began_ns = began_ns

    def __call__(self, step: Step, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Zeros [t, hidden_size]. Raises NotMeasuredError outside the measured range."""
        tokens = step.num_tokens
        spans = zip((step.starts + 1).tolist(), step.context_lens.tolist(), strict=True)
        self._takes_ns = int(1e9 * self._seconds(tokens, step.num_sequences, Context(tuple(spans))))
        return torch.zeros(tokens, self._hidden_size, dtype=self.dtype)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1).expand(len(hidden_states), self._vocab_size)

    def hold(self, sending_ns: int) -> float:
        wait_until(self._began_ns + self._takes_ns - sending_ns)
        return 1.0
