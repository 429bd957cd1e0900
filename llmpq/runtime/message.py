"""What stages send each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from llmpq.models.step import Step
from llmpq.runtime.unread import Unread
from llmpq.spec.trace import Phase

Values = torch.Tensor | Unread  # that the last stage returns

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Admission:
    """Requests take slots. The last stage alone reads `requests`, JSON of an object.

    Its "requests" are sampler.Admitted; "vocabulary" is null, or what each token adds to a text, as grammar.packed.
    """

    requests: str


@dataclass(frozen=True, eq=False, slots=True)
class StepMessage:
    """Compute a step, of which the last stage returns values to the first; StageModel.compute says which.

    They are a token for each sequence; if `scored`, what log-probabilities the sequences' own tokens have instead. If
    it has a `prefix`, no token comes of its first sequence, as more of that one's prompt follows. With `latest`, which
    never leaves its process, the step's tokens are those that the stage chose last for its slots, not those that it
    names.
    """

    step: Step
    hidden_states: torch.Tensor | None = None  # [t, hidden_size]; None at the first stage, which embeds the tokens
    scored: bool = False
    prefix: bool = False
    latest: bool = False
    phase: Phase = "prefill"  # of its micro-batch: what is left of prompts may be one token of each, too

    @property
    def num_returned(self) -> int:
        """How many int64 values the last stage returns, without the log-probabilities that requests ask for."""
        if self.scored:
            return 2 * (self.step.num_tokens - self.step.num_sequences)
        return self.step.num_sequences - self.prefix


@dataclass(frozen=True, slots=True)
class Finish:
    """A command is done. Each stage adds its peak memory above idle; the last returns all of them to the first."""

    peaks: tuple[int, ...] = ()  # bytes


@dataclass(frozen=True, slots=True)
class Close:
    """No command follows."""


Message = Admission | StepMessage | Finish | Close


@dataclass(frozen=True, slots=True)
class Received(Generic[T_co]):
    """A message, or values on their way back, with its times in nanoseconds of `time.monotonic_ns`.

    `passage` is when it was on its link, if that is known: both ends have one clock, and it was sent while its receiver
    waited. One that was sent before may have been there for long.
    """

    content: T_co
    nbytes: int  # of hidden states or values, for which a link takes time
    sent_ns: int
    arrived_ns: int
    passage: tuple[int, int] | None


class StageLinks(Protocol):
    """The links of one stage: from the previous one, to the next, and from the last back to the first."""

    def receive(self) -> Received[Message]:
        """The previous stage's next message. Its hidden_states are valid until the next call."""

    def send(self, message: Message) -> None:
        """Send to the next stage, without waiting for it."""

    def expect(self, count: int) -> None:
        """At the first stage: be ready for `count` values of the message sent next. They come back in order."""

    def return_tokens(self, values: Values) -> None:
        """At the last stage: return int64 values to the first; unread ones only if it is the same."""

    def receive_tokens(self) -> Received[Values]:
        """At the first stage, on any thread: wait for the oldest values expected, int64."""

    def hold(self, received: Received[Values]) -> Received[Values]:
        """What `receive_tokens` returned, once it may have arrived: an emulated link takes its time."""

    def close(self) -> None:
        """At the first stage: expect no more. After the last values expected `receive_tokens` raises LinkLostError."""

    def flush(self) -> None:
        """Wait until everything sent has left."""
