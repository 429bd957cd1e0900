"""One stage of a running pipeline: computes the steps it is sent, and passes the results on."""

from __future__ import annotations

import struct
import time
from typing import Literal

import torch

from llmpq.models.decoder import DecoderStage
from llmpq.models.step import Step
from llmpq.runtime.communication import Kind, Message, StageComm
from llmpq.runtime.emulation import Pace, SimulatedStage, SlowdownEmulator
from llmpq.runtime.memory_watch import MemoryWatch
from llmpq.runtime.sampling import SamplingParams, sample, uniform
from llmpq.spec import ModelSpec, Plan, Span
from llmpq.spec.trace import Phase

_SCORE_BYTES = 8 * 2**20  # of logits at once
_SCORE_ROWS = 64
_SENDING_NS = 200_000  # if sending takes longer, that is for its being the first time, or because of other processes
_RECENT = 8  # steps, over which sending is averaged


def _bits(number: float) -> int:
    """A float as the int64 that has its bits, to travel in a header."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def begin(params: SamplingParams, first_sequence: int) -> Message:
    """The message that says how the sequences in slots 0, 1, ... are sampled; the first is `first_sequence`."""
    numbers = (_bits(params.temperature), params.top_k, _bits(params.top_p), params.seed, first_sequence)
    return Message(Kind.BEGIN, parameters=numbers)


class StageRunner:
    """A loaded stage with its links and what it must remember between messages.

    `spans` are the steps of generation since it was last emptied, and the ways of those messages that this stage waited
    for, in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        stage_index: int,
        stage: DecoderStage | SimulatedStage,
        links: StageComm,
        memory: MemoryWatch,
    ) -> None:
        self.plan = plan
        self.index = stage_index
        self.links = links
        self.spans: list[Span] = []
        self._spec = spec
        self._stage = stage
        device = plan.cluster.device(plan.stages[stage_index].device)
        self._pace: Pace = stage if isinstance(stage, SimulatedStage) else SlowdownEmulator(device)
        self._memory = memory
        self._params = SamplingParams()
        self._first_sequence = 0
        self._steps = 0
        # Since when this stage could have been at its next step: what was before is done, and what it waited for there.
        self._free_ns = 0
        self._sending_ns = _SENDING_NS  # that sending takes lately, on average

    @property
    def last(self) -> bool:
        return self.index == len(self.plan.stages) - 1

    def receive_tokens(self, step: Step | None = None) -> torch.Tensor:
        """At the first stage: wait for the oldest values expected from the last; if of a `step`, its tokens."""
        self._memory.doing = f"waiting for the last stage after step {self._steps}"
        values = self.links.receive_tokens()
        self._free_ns = self.links.arrived_ns
        if step is not None:
            self._record("link", len(self.plan.stages) - 1, step, self.links.passage)
        return values

    def serve(self) -> None:
        """At any stage but the first: do what the previous one sends, until a batch is done."""
        while True:
            self._memory.doing = f"waiting for the previous stage after step {self._steps}"
            message = self.links.receive()
            self._free_ns = self.links.arrived_ns
            if message.kind is Kind.GENERATE and message.step is not None:
                self._record("link", self.index - 1, message.step, self.links.passage)
            self.handle(message)
            if message.kind is Kind.END:
                self.links.flush()
                return

    def handle(self, message: Message) -> None:
        """Do what a message asks and pass on what follows from it: to the next stage, or values to the first."""
        if message.kind is Kind.END:
            self._end(message)
        elif message.step is None:
            self._begin(message)
        else:
            self._compute(message.kind, message.step, message.hidden_states)

    def warm_up(self) -> None:
        """Compute a small step of both phases, so that the first real one takes no longer than the others."""
        if isinstance(self._stage, SimulatedStage):
            return  # a profile need not know such steps
        for tokens in (max(1, min(16, self.plan.max_length - 1)), 1):
            step = Step.of([0], [tokens], [0], [0] * tokens)
            hidden_states = None
            if self.index > 0:
                hidden_states = torch.zeros(tokens, self._spec.hidden_size, dtype=self._stage.dtype)
            hidden_states = self._stage(step, hidden_states)
            if self.last:
                self._stage.logits(hidden_states[-1:])

    def _begin(self, message: Message) -> None:
        temperature, top_k, top_p, seed, self._first_sequence = message.parameters[:5]
        self._params = SamplingParams(temperature=_float(temperature), top_k=top_k, top_p=_float(top_p), seed=seed)
        if not self.last:
            self.links.send(message)
        self._free_ns = time.monotonic_ns()

    def _end(self, message: Message) -> None:
        peaks = (*message.parameters[: self.index], self._memory.sample())
        if self.last:
            self.links.return_tokens(torch.tensor(peaks, dtype=torch.int64))
        else:
            self.links.send(Message(Kind.END, parameters=peaks))

    def _compute(self, kind: Kind, step: Step, hidden_states: torch.Tensor | None) -> None:
        self._steps += 1
        self._memory.doing = (
            f"computing step {self._steps} ({step.num_tokens} tokens of {step.num_sequences} sequences)"
        )
        began_ns = self._free_ns
        self._pace.begin(began_ns)
        result = self._stage(step, hidden_states)
        if self.last and kind is Kind.GENERATE:
            result = self._next_tokens(step, result)
        elif self.last:
            result = self._log_probabilities(step, result).view(torch.int64)
        elif hidden_states is not None and result.data_ptr() == hidden_states.data_ptr():
            # What a stage without layers received; NCCL would still be sending it while the next message arrives there.
            result = result.clone()
        self._pace.hold(self._sending_ns)
        computed_ns = time.monotonic_ns()
        if self.last:
            self.links.return_tokens(result)
        else:
            self.links.send(Message(kind, step, hidden_states=result))
        self._free_ns = time.monotonic_ns()
        self._sending_ns += (min(self._free_ns - computed_ns, _SENDING_NS) - self._sending_ns) // _RECENT
        if kind is Kind.GENERATE:
            self._record("stage", self.index, step, (began_ns, self._free_ns))

    def _record(self, kind: Literal["stage", "link"], index: int, step: Step, times: tuple[int, int] | None) -> None:
        """Keep a span of these nanoseconds, if they are known."""
        if times is not None:
            phase: Phase = "decode" if step.starts.any() else "prefill"
            start_s, end_s = (moment / 1e9 for moment in times)
            self.spans.append(Span(kind, index, phase, step.num_sequences, step.num_tokens, start_s, end_s))

    def _next_tokens(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """int64 [s]: the next token of each sequence."""
        logits = self._stage.logits(hidden_states[step.last_rows.to(hidden_states.device)]).cpu()
        sequences = step.slots.tolist()
        positions = step.context_lens.tolist()
        tokens = [
            sample(row, self._params, uniform(self._params.seed, self._first_sequence + sequence, position))
            for row, sequence, position in zip(logits, sequences, positions, strict=True)
        ]
        return torch.tensor(tokens, dtype=torch.int64)

    def _log_probabilities(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        """float64 [s]: sum of the log-probabilities of each sequence's tokens but its first."""
        sums = torch.zeros(step.num_sequences, dtype=torch.float64)
        first = 0
        for i, length in enumerate(step.query_lens.tolist()):
            sums[i] = self._log_probability(step.tokens[first : first + length], hidden_states[first : first + length])
            first += length
        return sums

    def _log_probability(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> float:
        rows = max(1, min(_SCORE_ROWS, _SCORE_BYTES // (4 * self._spec.vocab_size)))
        total = 0.0
        for start in range(0, len(tokens) - 1, rows):
            targets = tokens[start + 1 : start + 1 + rows]
            logits = self._stage.logits(hidden_states[start : start + len(targets)])
            for row, target in zip(logits, targets.tolist(), strict=True):
                row = row.double()
                total += float(row[target] - row.logsumexp(0))
        return total
