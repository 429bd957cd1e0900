"""How messages travel between stages: torch.distributed point to point, from each stage to the next and from the last
back to the first.

A message is a header of fixed size and, behind it, hidden states: one buffer, because each that is sent has to wait for
its turn on a core at the other end. Receive buffers are allocated once, for the largest step, and twice: while a stage
computes on one, the next message arrives in the other. Sends do not wait either; what is being sent is kept until it
has left.

The transport of hidden states is a property of a link: NCCL if both ends are different GPUs, else gloo through host
memory, which is page-locked at the ends that are GPUs. Headers, token ids and requests are small and always
go through gloo. NCCL's hidden states are not received while the stage computes: their size is not known before the
header is read. No transport has a timeout: launch.py watches the workers, and ends those that wait for a lost one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import pairwise
from queue import SimpleQueue
from typing import Literal

import torch
import torch.distributed as dist

from llmpq.models.step import Step
from llmpq.runtime.meeting import FOREVER
from llmpq.runtime.message import Admission, Close, Finish, Message, Received, StepMessage
from llmpq.spec import Device, ModelSpec, Plan

Transport = Literal["nccl", "gloo"]

_LARGEST_IN_FLIGHT = 2  # of the largest messages; as many small ones as have their bytes

_MESSAGE, _EXTRA, _BACK = range(3)  # tags; _EXTRA: the token ids of a scored step, the JSON of an admission
_FIELDS = 4  # of a header: kind, sequences, size, when it was sent; its body follows


class _Kind(IntEnum):
    ADMISSION = 0
    STEP = 1
    SCORED_STEP = 2
    PREFIX_STEP = 3
    FINISH = 4
    CLOSE = 5


def transport(source: Device, target: Device) -> Transport:
    """How hidden states get from one device to another."""
    different_gpus = source.kind == target.kind == "cuda" and (source.host, source.index) != (target.host, target.index)
    return "nccl" if different_gpus and dist.is_nccl_available() else "gloo"


def place(device: Device) -> torch.device:
    """Where a stage's hidden states are: its GPU is this process's current one."""
    return torch.device(device.kind)


Part = tuple[int, torch.Tensor, dist.ProcessGroup | None]  # tag, tensor, group (None: gloo)


class _Sender:
    """Sends to one rank without waiting, unless more bytes than two of the largest messages have are on their way."""

    def __init__(self, target: int, largest_bytes: int) -> None:
        self._target = target
        self._room = _LARGEST_IN_FLIGHT * largest_bytes
        self._in_flight: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()

    def send(self, parts: Sequence[Part]) -> None:
        """Send tensors, which must not change until they have left."""
        self._room -= sum(tensor.nbytes for _, tensor, _ in parts)
        while self._in_flight and self._room < 0:
            self._wait()
        self._in_flight.append([(_started(dist.isend, self._target, part), part[1]) for part in parts])

    def flush(self) -> None:
        while self._in_flight:
            self._wait()

    def _wait(self) -> None:
        """Until the oldest message has left."""
        for work, tensor in self._in_flight.popleft():
            work.wait()
            self._room += tensor.nbytes


def _started(call: Callable[..., dist.Work | None], other: int, part: Part) -> dist.Work:
    """An isend to or irecv from another rank."""
    tag, tensor, group = part
    work = call(tensor, other, group=group, tag=tag)
    if work is None:
        raise ValueError(f"this process has not joined rank {other}")
    return work


class _Receiver:
    """Receives from one rank into two sets of buffers in turn; one is always waiting for the next message."""

    def __init__(
        self,
        source: int,
        header_bytes: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        one_clock: bool,
        device: torch.device,
    ) -> None:
        self._source, self._group, self._one_clock, self._device = source, group, one_clock, device
        on_gpu = None if group is None else torch.empty(shape, dtype=dtype, device=device)
        # Each with its header [int64] and its hidden states [t, hidden_size].
        self._buffers: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque()
        for _ in range(2):
            size = header_bytes + (shape[0] * shape[1] * dtype.itemsize if on_gpu is None else 0)
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu is None and device.type == "cuda")
            hidden_states = buffer[header_bytes:].view(dtype).view(shape) if on_gpu is None else on_gpu
            self._buffers.append((buffer, buffer[:header_bytes].view(torch.int64), hidden_states))
        self._tokens = torch.empty(shape[0], dtype=torch.int64)
        self._post()

    def _post(self) -> None:
        """Be ready for the next message. gloo takes one that is shorter than the buffer."""
        self._work = _started(dist.irecv, self._source, (_MESSAGE, self._buffers[0][0], None))

    def receive(self) -> Received[Message]:
        awaited_ns = time.monotonic_ns()
        self._work.wait()
        arrived_ns = time.monotonic_ns()
        _, header, hidden_states = self._buffers[0]
        self._buffers.rotate()
        number, sequences, size, sent_ns, *body = header.tolist()
        if _Kind(number) is not _Kind.CLOSE:  # nothing comes after that: the sender may be gone
            self._post()
        message, nbytes = self._message(_Kind(number), sequences, size, body, hidden_states)
        return Received(message, nbytes, sent_ns, arrived_ns, passage(self._one_clock, sent_ns, awaited_ns, arrived_ns))

    def _message(
        self, kind: _Kind, sequences: int, size: int, body: list[int], hidden_states: torch.Tensor
    ) -> tuple[Message, int]:
        """The message of a header, and the bytes of its hidden states."""
        if kind is _Kind.CLOSE:
            return Close(), 0
        if kind is _Kind.FINISH:
            return Finish(tuple(body[:size])), 0
        if kind is _Kind.ADMISSION:
            text = torch.empty(size, dtype=torch.uint8)
            dist.recv(text, self._source, tag=_EXTRA)
            return Admission(bytes(text.tolist()).decode()), 0
        if kind is _Kind.SCORED_STEP:
            dist.recv(self._tokens[:size], self._source, tag=_EXTRA)
        hidden_states = hidden_states[:size]
        if self._group is not None:
            dist.recv(hidden_states, self._source, group=self._group)  # NCCL wants the exact size
        else:
            # It has arrived long before the buffer's next turn: a stage waits for its GPU in every step.
            hidden_states = hidden_states.to(self._device, non_blocking=True)
        slots, query_lens, starts = torch.tensor(body[: 3 * sequences], dtype=torch.int32).view(3, sequences)
        step = Step(slots, query_lens, starts, self._tokens[:size])
        scored, prefix = kind is _Kind.SCORED_STEP, kind is _Kind.PREFIX_STEP
        return StepMessage(step, hidden_states, scored, prefix), hidden_states.nbytes


def passage(one_clock: bool, sent_ns: int, awaited_ns: int, arrived_ns: int) -> tuple[int, int] | None:
    """See Received."""
    return (sent_ns, arrived_ns) if one_clock and awaited_ns <= sent_ns <= arrived_ns else None


class StageComm:
    """StageLinks among processes that have joined. A stage alone returns to itself."""

    def __init__(self, plan: Plan, spec: ModelSpec, rank: int) -> None:
        self._last = len(plan.stages) - 1
        self._dtype: torch.dtype = getattr(torch, plan.wire_dtype)
        self._header_bytes = 8 * (_FIELDS + max(3 * plan.step_sequences, len(plan.stages)))
        self._expected: SimpleQueue[tuple[dist.Work, torch.Tensor]] = SimpleQueue()
        self._own: deque[torch.Tensor] = deque()  # values of a stage alone
        shape = (plan.step_tokens, spec.hidden_size)
        largest = self._header_bytes + shape[0] * shape[1] * self._dtype.itemsize
        self._next = _Sender(rank + 1, largest) if rank < self._last else None
        self._back = _Sender(0, self._header_bytes) if rank == self._last > 0 else None
        devices = [plan.cluster.device(stage.device) for stage in plan.stages]
        self._one_clock = devices[rank - 1].host == devices[rank].host  # the first stage receives from the last
        self._device = place(devices[rank])
        self._hidden_size = spec.hidden_size
        # Every process takes part in making every group.
        groups = [
            dist.new_group([i, i + 1], timeout=FOREVER, backend="nccl") if transport(*ends) == "nccl" else None
            for i, ends in enumerate(pairwise(devices))
        ]
        self._out = groups[rank] if rank < self._last else None
        self._previous = None
        if rank > 0:
            self._previous = _Receiver(
                rank - 1, self._header_bytes, shape, self._dtype, groups[rank - 1], self._one_clock, self._device
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
            text = torch.tensor(list(message.requests.encode()), dtype=torch.uint8)
            self._next.send([self._header(_Kind.ADMISSION, 0, len(text)), (_EXTRA, text, None)])
        elif isinstance(message, Finish):
            self._next.send([self._header(_Kind.FINISH, 0, len(message.peaks), message.peaks)])
        else:
            self._next.send([self._header(_Kind.CLOSE, 0, 0)])

    def _step_parts(self, message: StepMessage) -> list[Part]:
        step, hidden_states = message.step, message.hidden_states
        if hidden_states is None:
            raise ValueError("hidden_states is missing; no stage but the first embeds tokens")
        if hidden_states.is_cuda:
            torch.cuda.current_stream().synchronize()  # sending begins when they have been computed
        described = torch.cat((step.slots, step.query_lens, step.starts)).tolist()
        size = hidden_states.numel() * self._dtype.itemsize if self._out is None else 0
        kind = _Kind.SCORED_STEP if message.scored else _Kind.PREFIX_STEP if message.prefix else _Kind.STEP
        parts = [self._header(kind, step.num_sequences, step.num_tokens, described, size)]
        if message.scored:
            # The receiver's buffer, which step.tokens may be, is overwritten by the next message.
            parts.append((_EXTRA, step.tokens.clone(), None))
        if self._out is not None:
            # The next step may write to the stage's own buffer while this one is still being sent.
            parts.append((0, hidden_states.to(self._dtype, copy=True), self._out))
        else:
            buffer = parts[0][1]
            buffer[self._header_bytes :].view(self._dtype).view(hidden_states.shape).copy_(hidden_states)
        return parts

    def _header(self, kind: _Kind, sequences: int, size: int, body: Sequence[int] = (), hidden_bytes: int = 0) -> Part:
        """A header, in uint8, with room for hidden states behind it."""
        locked = self._device.type == "cuda" and hidden_bytes > 0
        buffer = torch.empty(self._header_bytes + hidden_bytes, dtype=torch.uint8, pin_memory=locked)
        fields = buffer[: self._header_bytes].view(torch.int64)
        written = (kind, sequences, size, time.monotonic_ns(), *body)
        fields.copy_(torch.tensor((*written, *[0] * (len(fields) - len(written))), dtype=torch.int64))
        return _MESSAGE, buffer, None

    def expect(self, count: int) -> None:
        if self._last > 0:
            values = torch.empty(count + 1, dtype=torch.int64)
            self._expected.put((_started(dist.irecv, self._last, (_BACK, values, None)), values))

    def return_tokens(self, values: torch.Tensor) -> None:
        if self._back is None:
            self._own.append(values)
        else:
            sent_ns = torch.tensor([time.monotonic_ns()])
            self._back.send([(_BACK, torch.cat((values, sent_ns)), None)])

    def receive_tokens(self) -> Received[torch.Tensor]:
        awaited_ns = time.monotonic_ns()
        if self._last == 0:
            return Received(self._own.popleft(), 0, awaited_ns, awaited_ns, None)
        work, received = self._expected.get()
        work.wait()
        arrived_ns = time.monotonic_ns()
        values, sent_ns = received[:-1], int(received[-1])
        known = passage(self._one_clock, sent_ns, awaited_ns, arrived_ns)
        return Received(values, values.nbytes, sent_ns, arrived_ns, known)

    def hold(self, received: Received[torch.Tensor]) -> Received[torch.Tensor]:
        return received

    def flush(self) -> None:
        for sender in (self._next, self._back):
            if sender is not None:
                sender.flush()
