"""One stage of a running pipeline: computes the steps it is sent, and passes the results on."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from llmpq.runtime.control import Status
from llmpq.runtime.memory_watch import MemoryWatch
from llmpq.runtime.message import Admission, Close, Finish, Message, Received, StageLinks, StepMessage, Values
from llmpq.runtime.unread import Unread
from llmpq.spec import Plan, Span, SpanLog

_SENDING_NS = 200_000  # a send that takes longer is the first one, or other processes held it up
_RECENT = 8  # steps, over which the time of sending is averaged


@dataclass(frozen=True, slots=True)
class Turn:
    """The moment at which a stage became ready for a step, of `time.monotonic_ns`, and what sending lately took."""

    began_ns: int
    sending_ns: int


class StageModel(Protocol):
    """What a stage computes."""

    def admit(self, requests: str) -> None:
        """On the last stage: requests take slots; see Admission."""

    def compute(self, message: StepMessage, turn: Turn) -> Values:
        """The result of a step of s sequences and t tokens: hidden states [t, hidden_size], or on the last stage int64.

        There it is [s + n]: the next token of each sequence, but for a prefix, then n values of log-probabilities
        (log_probs.py). Of a scored step it is [2 * (t - s)], for all tokens but the first of each sequence: the
        bits of their float64 log-probabilities, then the likeliest token in the place of each. A stage alone may
        return them unread.
        """


class StageRunner:
    """A stage's model with its links.

    `spans` are the steps of generation since they were last taken, and the passages of the messages that this stage
    waited for, in seconds of `time.monotonic`.
    """

    def __init__(
        self, plan: Plan, index: int, model: StageModel, links: StageLinks, memory: MemoryWatch, status: Status
    ) -> None:
        self.plan, self.index = plan, index
        self.links = links
        self.spans = SpanLog()
        self._model, self._memory, self._status = model, memory, status
        self._last = index == len(plan.stages) - 1
        self._steps = 0
        self._ready_ns = 0  # when the stage became ready for its next step
        self._began_ns: deque[int] = deque()  # when steps were started whose values have not been read
        self._read_ns = 0  # when the last of those that have been was over
        self._sending_ns = _SENDING_NS  # of a result, on average

    def returned(self, received: Received[Values], message: StepMessage | None = None) -> torch.Tensor:
        """At the first stage: the values that the last one returned. An emulated link is waited for, and a device.

        `message`: the step they are of, if it is one of generation, whose way back is then among the spans.
        """
        received = self.links.hold(received)
        self._ready_ns = max(self._ready_ns, received.arrived_ns)
        if isinstance(received.content, Unread):
            return self._read(received.content, message)
        if message is not None:
            self._record("link", len(self.plan.stages) - 1, message, received.passage)
        return received.content

    def _read(self, unread: Unread, message: StepMessage | None) -> torch.Tensor:
        """Values that a device was still at, as it takes one step after the other."""
        values = unread.read()
        began_ns, self._read_ns = max(self._began_ns.popleft(), self._read_ns), time.monotonic_ns()
        self._ready_ns = max(self._ready_ns, self._read_ns)
        if message is not None:
            self._done(message, began_ns, self._read_ns)
        return values

    def note_waiting(self, *, for_tokens: bool) -> None:
        """At the first stage: it waits, for the last stage or for something to do."""
        waiting = f"waiting for the last stage after step {self._steps}"
        self._status.doing = waiting if for_tokens else "waiting for work"

    def serve(self) -> bool:
        """At any stage but the first: do what the previous one sends until a command is done. False: none follows."""
        while True:
            self._status.doing = f"waiting for the previous stage after step {self._steps}"
            received = self.links.receive()
            self._ready_ns = received.arrived_ns
            message = received.content
            if isinstance(message, StepMessage) and not message.scored:
                self._record("link", self.index - 1, message, received.passage)
            self.handle(message)
            if isinstance(message, (Finish, Close)):
                self.links.flush()
                return isinstance(message, Finish)

    def handle(self, message: Message) -> None:
        """Do what a message asks, and send the next stage, or return to the first, what follows from it."""
        if isinstance(message, StepMessage):
            self._compute(message)
            return
        if isinstance(message, Finish):
            peaks = (*message.peaks, self._memory.sample())
            if self._last:
                self.links.return_tokens(torch.tensor(peaks, dtype=torch.int64))
            else:
                self.links.send(Finish(peaks))
        elif not self._last:
            self.links.send(message)
        elif isinstance(message, Admission):
            self._model.admit(message.requests)
        self._ready_ns = time.monotonic_ns()

    def _compute(self, message: StepMessage) -> None:
        step = message.step
        self._steps += 1
        self._status.doing = (
            f"computing step {self._steps} ({step.num_tokens} tokens of {step.num_sequences} sequences)"
        )
        began_ns = self._ready_ns
        started_ns = time.monotonic_ns()
        result = self._model.compute(message, Turn(began_ns, self._sending_ns))
        computed_ns = time.monotonic_ns()
        if self._last:
            self.links.return_tokens(result)
        elif isinstance(result, torch.Tensor):
            self.links.send(replace(message, hidden_states=result))
        if isinstance(result, Unread):  # its time is known when it is read
            self._began_ns.append(started_ns)
            self._ready_ns = time.monotonic_ns()
            return
        self._ready_ns = sent_ns = time.monotonic_ns()
        self._sending_ns += (min(sent_ns - computed_ns, _SENDING_NS) - self._sending_ns) // _RECENT
        if not message.scored:
            self._done(message, began_ns, sent_ns)

    def _done(self, message: StepMessage, began_ns: int, ended_ns: int) -> None:
        """A step of generation is over."""
        self._status.busy_s += (ended_ns - began_ns) / 1e9
        self._record("stage", self.index, message, (began_ns, ended_ns))

    def _record(
        self, kind: Literal["stage", "link"], index: int, message: StepMessage, times: tuple[int, int] | None
    ) -> None:
        """Keep a span of these nanoseconds, if they are known."""
        if times is not None:
            start_s, end_s = (moment / 1e9 for moment in times)
            step = message.step
            self.spans.add(Span(kind, index, message.phase, step.num_sequences, step.num_tokens, start_s, end_s))
