"""What travels between stages, and how: torch.distributed point to point, from each stage to the next and from the last
back to the first.

A message is a header of fixed size and, behind it, hidden states: one buffer, because each that is sent has to wait for
its turn on a core at the other end. Receive buffers are allocated once, for the largest step, and twice: while a stage
computes on one, the next message arrives in the other. Sends do not wait either; what is being sent is kept until it
has left.

The transport of hidden states is a property of a link: NCCL if both ends are different GPUs, else gloo through host
memory. Headers and token ids are small and always go through gloo.
"""

from __future__ import annotations

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
from llmpq.spec import Device, ModelSpec, Plan

Transport = Literal["nccl", "gloo"]

# An idle pipeline waits for its next message as long as it takes; who watches the workers is runtime/launch.py.
_FOREVER = timedelta(days=365)
_SENDS_IN_FLIGHT = 2

_MESSAGE, _TOKENS, _BACK = range(3)  # tags


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


def step_sequences(plan: Plan) -> int:
    """Sequences of the largest step."""
    return min(plan.slots, max(plan.prefill_microbatch, plan.decode_microbatch))


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
    """Sends to one rank without waiting. At most `_SENDS_IN_FLIGHT` messages are on their way."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._in_flight: deque[list[tuple[Any, torch.Tensor]]] = deque()

    def send(self, parts: Sequence[tuple[int, torch.Tensor, dist.ProcessGroup | None]]) -> None:
        """Send tensors, each with its tag and group. They must not change until they have left."""
        while len(self._in_flight) >= _SENDS_IN_FLIGHT:
            for work, _ in self._in_flight.popleft():
                work.wait()
        self._in_flight.append(
            [(dist.isend(tensor, self._target, group=group, tag=tag), tensor) for tag, tensor, group in parts]
        )

    def flush(self) -> None:
        while self._in_flight:
            for work, _ in self._in_flight.popleft():
                work.wait()


class _Receiver:
    """Receives from one rank into two sets of buffers in turn; one is always waiting for the next message."""

    def __init__(
        self, source: int, header: int, shape: tuple[int, int], dtype: torch.dtype, group: dist.ProcessGroup | None
    ) -> None:
        self._source, self._group, self._dtype = source, group, dtype
        self._header_bytes = 8 * header
        hidden_bytes = 0 if group is not None else shape[0] * shape[1] * dtype.itemsize
        size = self._header_bytes + hidden_bytes
        self._buffers = deque(torch.empty(size, dtype=torch.uint8) for _ in range(2))
        self._on_gpu = [torch.empty(shape, dtype=dtype, device="cuda")] if group is not None else []
        self._tokens = torch.empty(shape[0], dtype=torch.int64)
        self._hidden_size = shape[1]
        self._post()

    def _post(self) -> None:
        """Be ready for the next message. gloo takes one that is shorter than the buffer."""
        self._work = dist.irecv(self._buffers[0], self._source, tag=_MESSAGE)

    def receive(self) -> Message:
        """The next message. Its hidden_states are valid until the next call."""
        self._work.wait()
        buffer = self._buffers[0]
        self._buffers.rotate()
        header = buffer[: self._header_bytes].view(torch.int64)
        kind, sequences, tokens = Kind(int(header[0])), int(header[1]), int(header[2])
        body = header[3:]
        if kind in (Kind.BEGIN, Kind.END):
            parameters = tuple(body.tolist())
            self._post()
            return Message(kind, parameters=parameters)
        if kind is Kind.SCORE:
            dist.recv(self._tokens[:tokens], self._source, tag=_TOKENS)
        if self._on_gpu:
            hidden_states = self._on_gpu[0][:tokens]  # NCCL wants the exact size
            dist.recv(hidden_states, self._source, group=self._group)
        else:
            end = self._header_bytes + tokens * self._hidden_size * self._dtype.itemsize
            hidden_states = buffer[self._header_bytes : end].view(self._dtype).view(tokens, self._hidden_size)
        slots, query_lens, starts = body[: 3 * sequences].view(3, sequences).int()
        self._post()
        return Message(kind, Step(slots, query_lens, starts, self._tokens[:tokens]), hidden_states=hidden_states)


class Links:
    """The links of one stage, among processes that have joined. A stage alone has none, and returns to itself."""

    def __init__(self, plan: Plan, spec: ModelSpec, rank: int) -> None:
        self._last = len(plan.stages) - 1
        self._rank = rank
        self._dtype: torch.dtype = getattr(torch, plan.wire_dtype)
        self._body = max(3 * step_sequences(plan), 8, len(plan.stages))
        self._awaited: deque[tuple[Any, torch.Tensor]] = deque()
        self._next = _Sender(rank + 1) if rank < self._last else None
        self._back = _Sender(0) if rank == self._last > 0 else None
        devices = [plan.cluster.device(stage.device) for stage in plan.stages]
        ways = [transport(*ends) for ends in pairwise(devices)]
        # Every process takes part in making every group.
        groups = [dist.new_group([i, i + 1], backend="nccl") if way == "nccl" else None for i, way in enumerate(ways)]
        self._out = groups[rank] if rank < self._last else None
        self._previous = None
        if rank > 0:
            shape = (plan.step_tokens, spec.hidden_size)
            self._previous = _Receiver(rank - 1, 3 + self._body, shape, self._dtype, groups[rank - 1])

    def receive(self) -> Message:
        """The previous stage's next message."""
        if self._previous is None:
            raise ValueError("the first stage receives no messages")
        return self._previous.receive()

    def send(self, message: Message) -> None:
        """Send to the next stage, without waiting for it."""
        if self._next is None:
            raise ValueError("the last stage has no next one")
        step, hidden_states = message.step, message.hidden_states
        if step is None or hidden_states is None:
            buffer = self._buffer(message.kind, 0)
            self._header(buffer)[3 : 3 + len(message.parameters)] = torch.tensor(message.parameters, dtype=torch.int64)
            self._next.send([(_MESSAGE, buffer, None)])
            return
        hidden_states = hidden_states.to(self._dtype).contiguous()
        buffer = self._buffer(message.kind, 0 if self._out is not None else hidden_states.nbytes)
        header = self._header(buffer)
        header[1], header[2] = step.num_sequences, step.num_tokens
        header[3 : 3 + 3 * step.num_sequences] = torch.cat((step.slots, step.query_lens, step.starts))
        parts: list[tuple[int, torch.Tensor, dist.ProcessGroup | None]] = [(_MESSAGE, buffer, None)]
        if message.kind is Kind.SCORE:
            # The receiver's buffer, which step.tokens may be, is overwritten by the next message.
            parts.append((_TOKENS, step.tokens.clone(), None))
        if self._out is not None:
            parts.append((0, hidden_states, self._out))
        else:
            buffer[len(buffer) - hidden_states.nbytes :].view(self._dtype).view(hidden_states.shape).copy_(
                hidden_states
            )
        self._next.send(parts)

    def _buffer(self, kind: Kind, hidden_bytes: int) -> torch.Tensor:
        """uint8: a message of this kind with room for hidden states, not filled."""
        buffer = torch.empty(8 * (3 + self._body) + hidden_bytes, dtype=torch.uint8)
        header = self._header(buffer)
        header.zero_()
        header[0] = int(kind)
        return buffer

    def _header(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[: 8 * (3 + self._body)].view(torch.int64)

    def expect(self, count: int) -> None:
        """At the first stage: be ready for `count` values of the message just sent. They come back in order."""
        if self._last > 0:
            values = torch.empty(count, dtype=torch.int64)
            self._awaited.append((dist.irecv(values, self._last, tag=_BACK), values))

    def give_back(self, values: torch.Tensor) -> None:
        """At the last stage: return int64 values to the first."""
        if self._back is None:
            self._awaited.append((None, values))
        else:
            self._back.send([(_BACK, values, None)])

    def take_back(self) -> torch.Tensor:
        """At the first stage: wait for the oldest values expected."""
        work, values = self._awaited.popleft()
        if work is not None:
            work.wait()
        return values

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for sender in (self._next, self._back):
            if sender is not None:
                sender.flush()
