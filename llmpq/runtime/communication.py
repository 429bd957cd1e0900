"""How messages travel between stages: torch.distributed point to point, from each stage to the next and from the last
back to the first; see link_ends.py.

The transport of hidden states is a property of a link: NCCL if both ends are different GPUs, else gloo through host
memory, which is page-locked at the ends that are GPUs. Headers, tables, token ids and requests are small and always
go through gloo. No transport has a timeout: worker_group.py watches the workers, and frees or ends those that wait for
a lost one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from queue import SimpleQueue
from typing import Literal

import torch
import torch.distributed as dist

from llmpq.models.step import Step
from llmpq.runtime import link_ends
from llmpq.runtime.link_ends import (
    BACK,
    EXTRA,
    MESSAGE,
    Kind,
    Part,
    Receiver,
    Sender,
    bytes_of_header,
    bytes_of_tables,
    passage,
)
from llmpq.runtime.meeting import FOREVER, LinkLostError, links_may_end
from llmpq.runtime.message import Admission, Finish, Message, Received, StepMessage, Values
from llmpq.spec import Device, ModelSpec, Plan
from llmpq.spec.layers import blocks_for

Transport = Literal["nccl", "gloo"]


def transport(source: Device, target: Device) -> Transport:
    """How hidden states get from one device to another."""
    different_gpus = source.kind == target.kind == "cuda" and (source.host, source.index) != (target.host, target.index)
    return "nccl" if different_gpus and dist.is_nccl_available() else "gloo"


def place(device: Device) -> torch.device:
    """Where a stage's hidden states are: its GPU is this process's current one."""
    return torch.device(device.kind)


class StageComm:
    """StageLinks among processes that have joined. A stage alone returns to itself."""

    def __init__(self, plan: Plan, spec: ModelSpec, rank: int) -> None:
        self._last = len(plan.stages) - 1
        self._dtype: torch.dtype = getattr(torch, plan.wire_dtype)
        self._header_bytes = bytes_of_header(max(3 * plan.step_sequences, len(plan.stages)))
        self._expected: SimpleQueue[tuple[dist.Work, torch.Tensor] | None] = SimpleQueue()
        self._own: deque[Values] = deque()  # values of a stage alone
        shape = (plan.step_tokens, spec.hidden_size)
        tables_bytes = bytes_of_tables(plan.step_sequences, blocks_for(plan.max_length))
        largest = self._header_bytes + tables_bytes + shape[0] * shape[1] * self._dtype.itemsize
        self._next = Sender(rank + 1, largest) if rank < self._last else None
        self._back = Sender(0, self._header_bytes) if rank == self._last > 0 else None
        devices = [plan.cluster.device(stage.device) for stage in plan.stages]
        self._one_clock = devices[rank - 1].host == devices[rank].host  # the first stage receives from the last
        self._device = place(devices[rank])
        self._hidden_size = spec.hidden_size
        # Every process takes part in making every group.
        with links_may_end():
            groups = [
                dist.new_group([i, i + 1], timeout=FOREVER, backend="nccl") if transport(*ends) == "nccl" else None
                for i, ends in enumerate(pairwise(devices))
            ]
        self._out = groups[rank] if rank < self._last else None
        self._previous = None
        if rank > 0:
            self._previous = Receiver(
                rank - 1,
                self._header_bytes,
                tables_bytes,
                shape,
                self._dtype,
                groups[rank - 1],
                self._one_clock,
                self._device,
            )

    def warm_up(self) -> None:
        """Pass a token through all stages and back: NCCL and the network make their connections at the first message.

        All stages have to call it, before any other message. Returns when this one's part is done.
        """
        if self._last == 0:
            return
        if self._previous is None:
            self.expect(1)
        else:
            self.receive()
        if self._next is None:
            self.return_tokens(torch.zeros(1, dtype=torch.int64))
        else:
            hidden_states = torch.zeros(1, self._hidden_size, dtype=self._dtype, device=self._device)
            self.send(StepMessage(Step.of([0], [1], [0], [0]), hidden_states))
        if self._previous is None:
            self.receive_tokens()

    def receive(self) -> Received[Message]:
        if self._previous is None:
            raise ValueError("the first stage receives no messages")
        return self._previous.receive()

    def send(self, message: Message) -> None:
        if self._next is None:
            raise ValueError("the last stage has no next one")
        if isinstance(message, StepMessage):
            self._next.send(self._step_parts(message))
        elif isinstance(message, Admission):
            text = torch.frombuffer(bytearray(message.requests.encode()), dtype=torch.uint8)
            self._next.send([(MESSAGE, self._header(Kind.ADMISSION, 0, len(text)), None), (EXTRA, text, None)])
        elif isinstance(message, Finish):
            header = self._header(Kind.FINISH, 0, len(message.peaks), body=message.peaks)
            self._next.send([(MESSAGE, header, None)])
        else:
            self._next.send([(MESSAGE, self._header(Kind.CLOSE, 0, 0), None)])

    def _step_parts(self, message: StepMessage) -> list[Part]:
        step, hidden_states = message.step, message.hidden_states
        if hidden_states is None:
            raise ValueError("hidden_states is missing; no stage but the first embeds tokens")
        if hidden_states.is_cuda:
            torch.cuda.current_stream().synchronize()  # sending begins when they have been computed
        described = torch.cat((step.slots, step.query_lens, step.starts)).tolist()
        columns = 0 if step.tables is None else step.tables.shape[1]
        tables_bytes = bytes_of_tables(step.num_sequences, columns)
        size = tables_bytes + (hidden_states.numel() * self._dtype.itemsize if self._out is None else 0)
        buffer = self._header(Kind.of(message), step.num_sequences, step.num_tokens, columns, described, size)
        behind = buffer[self._header_bytes :]
        if step.tables is not None:
            behind[: step.tables.nbytes].view(torch.int32).copy_(step.tables.flatten())
        parts: list[Part] = [(MESSAGE, buffer, None)]
        if message.scored:
            # The receiver's buffer, which step.tokens may be, is overwritten by the next message.
            parts.append((EXTRA, step.tokens.clone(), None))
        if self._out is not None:
            # The next step may write to the stage's own buffer while this one is still being sent.
            parts.append((0, hidden_states.to(self._dtype, copy=True), self._out))
        else:
            behind[tables_bytes:].view(self._dtype).view(hidden_states.shape).copy_(hidden_states)
        return parts

    def _header(
        self, kind: Kind, sequences: int, size: int, columns: int = 0, body: Sequence[int] = (), behind: int = 0
    ) -> torch.Tensor:
        """A header, uint8, with room for so many bytes behind it."""
        locked = self._device.type == "cuda" and behind > 0
        buffer = torch.empty(self._header_bytes + behind, dtype=torch.uint8, pin_memory=locked)
        fields = buffer[: self._header_bytes].view(torch.int64)
        written = (kind, sequences, size, columns, time.monotonic_ns(), *body)
        fields.copy_(torch.tensor((*written, *[0] * (len(fields) - len(written))), dtype=torch.int64))
        return buffer

    def expect(self, count: int) -> None:
        if self._last > 0:
            values = torch.empty(count + 1, dtype=torch.int64)
            self._expected.put((link_ends.started(dist.irecv, self._last, (BACK, values, None)), values))

    def return_tokens(self, values: Values) -> None:
        if self._back is None:
            self._own.append(values)
        else:
            assert isinstance(values, torch.Tensor)
            sent_ns = torch.tensor([time.monotonic_ns()])
            self._back.send([(BACK, torch.cat((values, sent_ns)), None)])

    def receive_tokens(self) -> Received[Values]:
        awaited_ns = time.monotonic_ns()
        if self._last == 0:
            return Received(self._own.popleft(), 0, awaited_ns, awaited_ns, None)
        expected = self._expected.get()
        if expected is None:
            raise LinkLostError("nothing is expected any more")
        work, received = expected
        link_ends.wait(work)
        arrived_ns = time.monotonic_ns()
        values, sent_ns = received[:-1], int(received[-1])
        known = passage(self._one_clock, sent_ns, awaited_ns, arrived_ns)
        return Received(values, values.nbytes, sent_ns, arrived_ns, known)

    def hold(self, received: Received[Values]) -> Received[Values]:
        return received

    def close(self) -> None:
        self._expected.put(None)

    def flush(self) -> None:
        for sender in (self._next, self._back):
            if sender is not None:
                sender.flush()
