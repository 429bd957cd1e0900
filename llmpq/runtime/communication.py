"""What travels between stages, and how: torch.distributed point to point, from each stage to the next and from the last
back to the first.

A message is a header of fixed size and, behind it, hidden states: one buffer, because each that is sent has to wait for
its turn on a core at the other end. Receive buffers are allocated once, for the largest step, and twice: while a stage
computes on one, the next message arrives in the other. Sends do not wait either; what is being sent is kept until it
has left.

The transport of hidden states is a property of a link: NCCL if both ends are different GPUs, else gloo through host
memory. Headers and token ids are small and always go through gloo.

Headers, and values on their way back, say when they were sent: the receiving end of an emulated link holds them back
until they have taken their time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist

from llmpq.models.step import Step
from llmpq.runtime.emulation import EmulatedLink
from llmpq.spec import Device, ModelSpec, Plan

Transport = Literal["nccl", "gloo"]

# An idle pipeline waits for its next message as long as it takes; who watches the workers is runtime/launch.py.
_FOREVER = timedelta(days=365)
_LARGEST_IN_FLIGHT = 2  # of the largest messages; as many small ones as have their bytes

_MESSAGE, _TOKENS, _BACK = range(3)  # tags
_FIELDS = 4  # of a header: kind, sequences, tokens, when it was sent; its body follows


class Kind(IntEnum):
    """What a message asks of a stage."""

    BEGIN = 0  # a wave of sequences begins; parameters: how to sample them
    GENERATE = 1  # compute a step; the last stage samples a token for each sequence
    SCORE = 2  # compute a step; the last stage sums log-probabilities, for which it needs the token ids
    END = 3  # a batch is done; parameters: each stage writes its peak memory


@dataclass(frozen=True, eq=False)
class Message:
    kind: Kind
    step: Step | None = None  # of GENERATE and SCORE
    parameters: tuple[int, ...] = ()  # of BEGIN and END
    hidden_states: torch.Tensor | None = None  # [t, hidden_size], with a step


def transport(source: Device, target: Device) -> Transport:
    """How hidden states get from one device to another."""
    different_gpus = source.kind == target.kind == "cuda" and (source.host, source.index) != (target.host, target.index)
    return "nccl" if different_gpus and dist.is_nccl_available() else "gloo"


def open_store(address: str, world_size: int) -> dist.Store:
    """The store through which processes find each other: `file:PATH` or, of a running one, `tcp:HOST:PORT:PREFIX`."""
    kind, _, rest = address.partition(":")
    if kind == "file":
        return dist.FileStore(rest, world_size)
    host, port, prefix = rest.rsplit(":", 2)
    return dist.PrefixStore(prefix, dist.TCPStore(host, int(port), is_master=False, timeout=_FOREVER))


def join(store: dist.Store, rank: int, world_size: int) -> None:
    """Meet the other stages. Returns when all are there."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_FOREVER)


class _Sender:
    """Sends to one rank without waiting, unless more bytes than two of the largest messages have are on their way."""

    def __init__(self, target: int, largest_bytes: int) -> None:
        self._target = target
        self._room = _LARGEST_IN_FLIGHT * largest_bytes
        self._in_flight: deque[list[tuple[Any, torch.Tensor]]] = deque()

    def send(self, parts: Sequence[tuple[int, torch.Tensor, dist.ProcessGroup | None]]) -> None:
        """Send tensors, each with its tag and group. They must not change until they have left."""
        self._room -= sum(tensor.nbytes for _, tensor, _ in parts)
        while self._in_flight and self._room < 0:
            self._wait()
        self._in_flight.append(
            [(dist.isend(tensor, self._target, group=group, tag=tag), tensor) for tag, tensor, group in parts]
        )

    def flush(self) -> None:
        while self._in_flight:
            self._wait()

    def _wait(self) -> None:
        """Until the oldest message has left."""
        for work, tensor in self._in_flight.popleft():
            work.wait()
            self._room += tensor.nbytes


class _Receiver:
    """Receives from one rank into two sets of buffers in turn; one is always waiting for the next message."""

    def __init__(
        self,
        source: int,
        header_bytes: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        link: EmulatedLink,
    ) -> None:
        self._source, self._group, self._link = source, group, link
        self._token_bytes = shape[1] * dtype.itemsize
        on_gpu = None if group is None else torch.empty(shape, dtype=dtype, device="cuda")
        # Each with its header [int64] and its hidden states [t, hidden_size].
        self._buffers: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque()
        for _ in range(2):
            size = header_bytes + (shape[0] * self._token_bytes if on_gpu is None else 0)
            buffer = torch.empty(size, dtype=torch.uint8)
            hidden_states = buffer[header_bytes:].view(dtype).view(shape) if on_gpu is None else on_gpu
            self._buffers.append((buffer, buffer[:header_bytes].view(torch.int64), hidden_states))
        self._tokens = torch.empty(shape[0], dtype=torch.int64)
        self.arrived_ns = 0  # when the last message was there
        self.passage: tuple[int, int] | None = None  # of the last message with a step
        self._post()

    def _post(self) -> None:
        """Be ready for the next message. gloo takes one that is shorter than the buffer."""
        self._work = dist.irecv(self._buffers[0][0], self._source, tag=_MESSAGE)

    def receive(self) -> Message:
        """The next message. Its hidden_states are valid until the next call."""
        awaited_ns = time.monotonic_ns()
        self._work.wait()
        self.arrived_ns = time.monotonic_ns()
        _, header, hidden_states = self._buffers[0]
        self._buffers.rotate()
        self._post()
        number, sequences, tokens, sent_ns, *body = header.tolist()
        kind = Kind(number)
        if kind in (Kind.BEGIN, Kind.END):
            return Message(kind, parameters=tuple(body))
        if kind is Kind.SCORE:
            dist.recv(self._tokens[:tokens], self._source, tag=_TOKENS)
        hidden_states = hidden_states[:tokens]
        if self._group is not None:
            dist.recv(hidden_states, self._source, group=self._group)  # NCCL wants the exact size
        slots, query_lens, starts = torch.tensor(body[: 3 * sequences], dtype=torch.int32).view(3, sequences)
        step = Step(slots, query_lens, starts, self._tokens[:tokens])
        self.arrived_ns = self._link.hold(sent_ns, tokens * self._token_bytes, self.arrived_ns, awaited_ns)
        self.passage = self._link.passage
        return Message(kind, step, hidden_states=hidden_states)


class StageComm:
    """The links of one stage, among processes that have joined. A stage alone has none, and returns to itself.

    Of what was last received, `arrived_ns` (of `time.monotonic_ns`) is when it was there, while this stage waited for
    it, and `passage` when it was on its link (see HeldLink), if both ends have one clock.
    """

    def __init__(self, plan: Plan, spec: ModelSpec, rank: int) -> None:
        self._last = len(plan.stages) - 1
        self._rank = rank
        self._dtype: torch.dtype = getattr(torch, plan.wire_dtype)
        self._header_bytes = 8 * (_FIELDS + max(3 * plan.step_sequences, 8, len(plan.stages)))
        self._awaited: deque[tuple[Any, torch.Tensor]] = deque()
        self.arrived_ns = 0
        self.passage: tuple[int, int] | None = None
        shape = (plan.step_tokens, spec.hidden_size)
        largest = self._header_bytes + shape[0] * shape[1] * self._dtype.itemsize
        self._next = _Sender(rank + 1, largest) if rank < self._last else None
        self._back = _Sender(0, self._header_bytes) if rank == self._last > 0 else None
        devices = [plan.cluster.device(stage.device) for stage in plan.stages]
        given = {(link.source, link.target): link for link in reversed(plan.cluster.links)}
        self._way_back = EmulatedLink(given.get((devices[-1].name, devices[0].name)))
        self._one_clock = devices[rank - 1].host == devices[rank].host  # the first stage receives from the last
        ways = [transport(*ends) for ends in pairwise(devices)]
        # Every process takes part in making every group.
        groups = [dist.new_group([i, i + 1], backend="nccl") if way == "nccl" else None for i, way in enumerate(ways)]
        self._out = groups[rank] if rank < self._last else None
        self._previous = None
        if rank > 0:
            link = EmulatedLink(given.get((devices[rank - 1].name, devices[rank].name)))
            self._previous = _Receiver(rank - 1, self._header_bytes, shape, self._dtype, groups[rank - 1], link)

    def receive(self) -> Message:
        """The previous stage's next message."""
        if self._previous is None:
            raise ValueError("the first stage receives no messages")
        message = self._previous.receive()
        self.arrived_ns = self._previous.arrived_ns
        self.passage = self._previous.passage if self._one_clock else None
        return message

    def send(self, message: Message) -> None:
        """Send to the next stage, without waiting for it."""
        if self._next is None:
            raise ValueError("the last stage has no next one")
        step, hidden_states = message.step, message.hidden_states
        if hidden_states is not None and hidden_states.is_cuda:
            torch.cuda.current_stream().synchronize()  # sending begins when they have been computed
        sent_ns = time.monotonic_ns()
        if step is None or hidden_states is None:
            buffer = self._buffer((message.kind, 0, 0, sent_ns, *message.parameters), 0)
            self._next.send([(_MESSAGE, buffer, None)])
            return
        described = torch.cat((step.slots, step.query_lens, step.starts)).tolist()
        size = hidden_states.numel() * self._dtype.itemsize if self._out is None else 0
        buffer = self._buffer((message.kind, step.num_sequences, step.num_tokens, sent_ns, *described), size)
        parts: list[tuple[int, torch.Tensor, dist.ProcessGroup | None]] = [(_MESSAGE, buffer, None)]
        if message.kind is Kind.SCORE:
            # The receiver's buffer, which step.tokens may be, is overwritten by the next message.
            parts.append((_TOKENS, step.tokens.clone(), None))
        if self._out is not None:
            parts.append((0, hidden_states.to(self._dtype).contiguous(), self._out))
        else:
            buffer[self._header_bytes :].view(self._dtype).view(hidden_states.shape).copy_(hidden_states)
        self._next.send(parts)

    def _buffer(self, header: Sequence[int], hidden_bytes: int) -> torch.Tensor:
        """uint8: a message with this header, and with room for hidden states, not filled."""
        buffer = torch.empty(self._header_bytes + hidden_bytes, dtype=torch.uint8)
        fields = buffer[: self._header_bytes].view(torch.int64)
        fields.copy_(torch.tensor((*header, *[0] * (len(fields) - len(header))), dtype=torch.int64))
        return buffer

    def expect(self, count: int) -> None:
        """At the first stage: be ready for `count` values of the message just sent. They come back in order."""
        if self._last > 0:
            values = torch.empty(count + 1, dtype=torch.int64)
            self._awaited.append((dist.irecv(values, self._last, tag=_BACK), values))

    def return_tokens(self, values: torch.Tensor) -> None:
        """At the last stage: return int64 values to the first."""
        if self._back is None:
            self._awaited.append((None, values))
        else:
            sent_ns = torch.tensor([time.monotonic_ns()])
            self._back.send([(_BACK, torch.cat((values, sent_ns)), None)])

    def receive_tokens(self) -> torch.Tensor:
        """At the first stage: wait for the oldest values expected."""
        work, values = self._awaited.popleft()
        awaited_ns = time.monotonic_ns()
        if work is None:
            self.arrived_ns = awaited_ns
            return values
        work.wait()
        self.arrived_ns = time.monotonic_ns()
        values, sent_ns = values[:-1], int(values[-1])
        self.arrived_ns = self._way_back.hold(sent_ns, values.nbytes, self.arrived_ns, awaited_ns)
        self.passage = self._way_back.passage if self._one_clock else None
        return values

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for sender in (self._next, self._back):
            if sender is not None:
                sender.flush()
