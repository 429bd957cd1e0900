"""Devices and links that are slower than they are, as wrappers: a slowed stage, a simulated one, an emulated link.

All wait by the clock that the processes of one host share, `time.monotonic_ns`.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TypeVar

import torch

from llmpq.runtime.message import Message, Received, StageLinks, StepMessage, Values
from llmpq.runtime.stage import StageModel, Turn
from llmpq.spec import Context, Device, Link, ModelSpec, Plan, Profile, stage_seconds

T = TypeVar("T")

_SPIN_NS = 200_000  # a sleep may end this much late


def wait_until(moment_ns: int) -> None:
    """Return at that moment of `time.monotonic_ns`, within microseconds; at once if it has passed."""
    left = moment_ns - time.monotonic_ns()
    if left > _SPIN_NS:
        time.sleep((left - _SPIN_NS) / 1e9)
    while time.monotonic_ns() < moment_ns:
        os.sched_yield()  # to the threads that carry messages: there may be fewer cores than devices


class SlowdownEmulator:
    """Makes computing take a device's `slowdown` times as long as it really does.

    On a CPU that is the time that the computing thread was on a core: the share of other processes on a crowded machine
    is not multiplied. On a GPU it is the time until its stream is done.
    """

    def __init__(self, device: Device) -> None:
        self._factor, self._cuda = device.slowdown, device.kind == "cuda"
        self._work_ns = time.monotonic_ns if self._cuda else time.thread_time_ns
        self._began_ns = self._worked_ns = 0

    def begin(self) -> None:
        self._began_ns, self._worked_ns = time.monotonic_ns(), self._work_ns()

    def hold(self) -> float:
        """Wait until what began may end. Returns by which factor that took longer."""
        if self._factor == 1:
            return 1.0  # without waiting for a GPU: sending the result does
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        took_ns = time.monotonic_ns() - self._began_ns
        takes_ns = max(took_ns, int(self._factor * (self._work_ns() - self._worked_ns)))
        wait_until(self._began_ns + takes_ns)
        return takes_ns / took_ns


class SlowedStage:
    """A StageModel on a device with a slowdown."""

    def __init__(self, stage: StageModel, device: Device) -> None:
        self._stage, self._emulator = stage, SlowdownEmulator(device)

    def admit(self, requests: str) -> None:
        self._stage.admit(requests)

    def compute(self, message: StepMessage, turn: Turn) -> Values:
        self._emulator.begin()
        result = self._stage.compute(message, turn)
        self._emulator.hold()
        return result


class SimulatedStage:
    """A StageModel that computes nothing: a step, with sending its result, takes the seconds of a table.

    Hidden states, tokens and log-probabilities are zeros.
    """

    def __init__(self, plan: Plan, spec: ModelSpec, index: int, profile: Profile) -> None:
        """Raises NotMeasuredError if the stage's device is not in the profile."""
        stage = plan.stages[index]
        self._dtype: torch.dtype = getattr(torch, stage.compute_dtype)
        self._last, self._hidden_size = index == len(plan.stages) - 1, spec.hidden_size
        self._seconds = stage_seconds(plan, spec, index, profile.table(stage.device))

    def admit(self, requests: str) -> None:
        """Sampling parameters choose among tokens; all are 0 here."""

    def compute(self, message: StepMessage, turn: Turn) -> torch.Tensor:
        """Raises NotMeasuredError outside the measured range."""
        step = message.step
        spans = zip((step.starts + 1).tolist(), step.context_lens.tolist(), strict=True)
        rows = 0 if message.prefix and step.num_sequences == 1 else step.num_sequences
        seconds = self._seconds(step.num_tokens, rows, Context.of_step([*spans]))
        wait_until(turn.began_ns + int(1e9 * seconds) - turn.sending_ns)
        if self._last:
            return torch.zeros(message.num_returned, dtype=torch.int64)
        return torch.zeros(step.num_tokens, self._hidden_size, dtype=self._dtype)


class EmulatedLink:
    """StageLinks whose receiving link passes one message after the other, each in the time that `link` says."""

    def __init__(self, links: StageLinks, link: Link) -> None:
        self._link, self._links = link, links
        self._free_ns = 0

    def receive(self) -> Received[Message]:
        received = self._links.receive()
        return self._held(received) if isinstance(received.content, StepMessage) else received

    def receive_tokens(self) -> Received[Values]:
        return self._links.receive_tokens()

    def hold(self, received: Received[Values]) -> Received[Values]:
        return self._held(received)

    def _held(self, received: Received[T]) -> Received[T]:
        """Wait until what was received may have arrived."""
        began_ns = max(received.sent_ns, self._free_ns)
        self._free_ns = began_ns + int(1e9 * self._link.seconds(received.nbytes))
        wait_until(self._free_ns)
        arrived_ns = max(received.arrived_ns, self._free_ns)
        return replace(received, arrived_ns=arrived_ns, passage=(began_ns, self._free_ns))

    def send(self, message: Message) -> None:
        self._links.send(message)

    def expect(self, count: int) -> None:
        self._links.expect(count)

    def return_tokens(self, values: Values) -> None:
        self._links.return_tokens(values)

    def close(self) -> None:
        self._links.close()

    def flush(self) -> None:
        self._links.flush()


def emulated(links: StageLinks, plan: Plan, rank: int) -> StageLinks:
    """The links of stage `rank`, with the one that it receives on emulated if the plan's cluster says so."""
    source, target = plan.stages[rank - 1].device, plan.stages[rank].device  # the first receives from the last
    given = [link for link in plan.cluster.links if (link.source, link.target) == (source, target)]
    return EmulatedLink(links, given[0]) if given and given[0].emulated else links
