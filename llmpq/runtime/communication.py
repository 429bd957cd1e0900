"""How messages travel between stages: torch.distributed point to point, from each stage to the next and from the last
back to the first.

A message is a header of fixed size and, behind it, the sequences' tables of cache blocks and hidden states: one buffer,
because each that is sent has to wait for its turn on a core at the other end. Receive buffers are allocated once, for
the largest step, and twice: while a stage computes on one, the next message arrives in the other. Sends do not wait
either; what is being sent is kept until it has left.

The transport of hidden states is a property of a link: NCCL if both ends are different GPUs, else gloo through host
memory, which is page-locked at the ends that are GPUs. Headers, tables, token ids and requests are small and always
go through gloo. No transport has a timeout: launch.py watches the workers, and ends those that wait for a lost one.
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
from llmpq.runtime.arriving import Arriving
from llmpq.runtime.meeting import FOREVER
from llmpq.runtime.message import Admission, Close, Finish, Message, Received, StepMessage, Values
from llmpq.spec import Device, ModelSpec, Plan
from llmpq.spec.layers import blocks_for

Transport = Literal["nccl", "gloo"]

_LARGEST_IN_FLIGHT = 2  # of the largest messages; as many small ones as have their bytes

_MESSAGE, _EXTRA, _BACK = range(3)  # tags; _EXTRA: the token ids of a scored step, the JSON of an admission
_FIELDS = 5  # of a header: kind, sequences, size, columns of tables, when it was sent; its body follows
_ALIGNED = 64  # bytes: where hidden states begin behind tables


class _Kind(IntEnum):
    ADMISSION = 0
    STEP = 1
    SCORED_STEP = 2
    PREFIX_STEP = 3
    FINISH = 4
    CLOSE = 5


_STEPS = (_Kind.STEP, _Kind.SCORED_STEP, _Kind.PREFIX_STEP)


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
        tables_bytes: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        one_clock: bool,
        device: torch.device,
    ) -> None:
        self._source, self._one_clock, self._device = source, one_clock, device
        self._header_bytes, self._hidden_size, self._dtype = header_bytes, shape[1], dtype
        self._arriving = None
        if group is not None:
            self._arriving = Arriving(lambda tensor: _started(dist.irecv, source, (0, tensor, group)), device)
        # Each with what comes by gloo, and by NCCL: hidden states [t, hidden_size].
        self._buffers: deque[tuple[torch.Tensor, torch.Tensor | None]] = deque()
        for _ in range(2):
            on_gpu = None if group is None else torch.empty(shape, dtype=dtype, device=device)
            size = header_bytes + tables_bytes + (shape[0] * shape[1] * dtype.itemsize if on_gpu is None else 0)
            locked = on_gpu is None and device.type == "cuda"
            self._buffers.append((torch.empty(size, dtype=torch.uint8, pin_memory=locked), on_gpu))
        self._tokens = torch.empty(shape[0], dtype=torch.int64)
        self._post()

    def _post(self) -> None:
        """Be ready for the next message. gloo takes one that is shorter than the buffer."""
        buffer, on_gpu = self._buffers[0]
        self._work = _started(dist.irecv, self._source, (_MESSAGE, buffer, None))
        if self._arriving is not None and on_gpu is not None:

            def expected() -> torch.Tensor | None:
                number, _, size, *_ = self._header(buffer)
                return on_gpu[:size] if _Kind(number) in _STEPS else None

            self._arriving.follow(self._work, expected)

    def _header(self, buffer: torch.Tensor) -> list[int]:
        numbers: list[int] = buffer[: self._header_bytes].view(torch.int64).tolist()
        return numbers

    def receive(self) -> Received[Message]:
        if self._device.type == "cuda":
            # What was computed of the message before may not have read its buffer yet, which is the next one's.
            torch.cuda.current_stream().synchronize()
        awaited_ns = time.monotonic_ns()
        hidden_work = None
        if self._arriving is None:
            self._work.wait()
        else:
            hidden_work = self._arriving.next()
        arrived_ns = time.monotonic_ns()
        buffer, on_gpu = self._buffers[0]
        self._buffers.rotate()
        number, sequences, size, columns, sent_ns, *body = self._header(buffer)
        if _Kind(number) is not _Kind.CLOSE:  # nothing comes after that: the sender may be gone
            self._post()
        if hidden_work is not None:
            hidden_work.wait()  # NCCL's: what is computed from now on waits for it
        behind = buffer[self._header_bytes :]
        message, nbytes = self._message(_Kind(number), sequences, size, columns, body, behind, on_gpu)
        return Received(message, nbytes, sent_ns, arrived_ns, passage(self._one_clock, sent_ns, awaited_ns, arrived_ns))

    def _message(
        self,
        kind: _Kind,
        sequences: int,
        size: int,
        columns: int,
        body: list[int],
        behind: torch.Tensor,
        on_gpu: torch.Tensor | None,
    ) -> tuple[Message, int]:
        """The message of a header and what is behind it, and the bytes of its hidden states, NCCL's or behind, too."""
        if kind is _Kind.CLOSE:
            return Close(), 0
        if kind is _Kind.FINISH:
            return Finish(tuple(body[:size])), 0
        if kind is _Kind.ADMISSION:
            text = torch.empty(size, dtype=torch.uint8)
            dist.recv(text, self._source, tag=_EXTRA)
            return Admission(text.numpy().tobytes().decode()), 0
        if kind is _Kind.SCORED_STEP:
            dist.recv(self._tokens[:size], self._source, tag=_EXTRA)
        if on_gpu is not None:
            hidden_states = on_gpu[:size]
        else:
            start, nbytes = _tables_bytes(sequences, columns), size * self._hidden_size * self._dtype.itemsize
            hidden_states = behind[start : start + nbytes].view(self._dtype).view(size, self._hidden_size)
            hidden_states = hidden_states.to(self._device, non_blocking=True)
        slots, query_lens, starts = torch.tensor(body[: 3 * sequences], dtype=torch.int32).view(3, sequences)
        tables = None
        if columns:
            tables = behind[: 4 * sequences * columns].view(torch.int32).view(sequences, columns).clone()
        step = Step(slots, query_lens, starts, self._tokens[:size], tables)
        scored, prefix = kind is _Kind.SCORED_STEP, kind is _Kind.PREFIX_STEP
        return StepMessage(step, hidden_states, scored, prefix), hidden_states.nbytes


def _tables_bytes(sequences: int, columns: int) -> int:
    """Of a message, up to where hidden states begin."""
    return -(-4 * sequences * columns // _ALIGNED) * _ALIGNED


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
        self._own: deque[Values] = deque()  # values of a stage alone
        shape = (plan.step_tokens, spec.hidden_size)
        tables_bytes = _tables_bytes(plan.step_sequences, blocks_for(plan.max_length))
        largest = self._header_bytes + tables_bytes + shape[0] * shape[1] * self._dtype.itemsize
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
            self._next.send([(_MESSAGE, self._header(_Kind.ADMISSION, 0, len(text)), None), (_EXTRA, text, None)])
        elif isinstance(message, Finish):
            header = self._header(_Kind.FINISH, 0, len(message.peaks), body=message.peaks)
            self._next.send([(_MESSAGE, header, None)])
        else:
            self._next.send([(_MESSAGE, self._header(_Kind.CLOSE, 0, 0), None)])

    def _step_parts(self, message: StepMessage) -> list[Part]:
        step, hidden_states = message.step, message.hidden_states
        if hidden_states is None:
            raise ValueError("hidden_states is missing; no stage but the first embeds tokens")
        if hidden_states.is_cuda:
            torch.cuda.current_stream().synchronize()  # sending begins when they have been computed
        described = torch.cat((step.slots, step.query_lens, step.starts)).tolist()
        kind = _Kind.SCORED_STEP if message.scored else _Kind.PREFIX_STEP if message.prefix else _Kind.STEP
        columns = 0 if step.tables is None else step.tables.shape[1]
        tables_bytes = _tables_bytes(step.num_sequences, columns)
        size = tables_bytes + (hidden_states.numel() * self._dtype.itemsize if self._out is None else 0)
        buffer = self._header(kind, step.num_sequences, step.num_tokens, columns, described, size)
        behind = buffer[self._header_bytes :]
        if step.tables is not None:
            behind[: step.tables.nbytes].view(torch.int32).copy_(step.tables.flatten())
        parts: list[Part] = [(_MESSAGE, buffer, None)]
        if message.scored:
            # The receiver's buffer, which step.tokens may be, is overwritten by the next message.
            parts.append((_EXTRA, step.tokens.clone(), None))
        if self._out is not None:
            # The next step may write to the stage's own buffer while this one is still being sent.
            parts.append((0, hidden_states.to(self._dtype, copy=True), self._out))
        else:
            behind[tables_bytes:].view(self._dtype).view(hidden_states.shape).copy_(hidden_states)
        return parts

    def _header(
        self, kind: _Kind, sequences: int, size: int, columns: int = 0, body: Sequence[int] = (), behind: int = 0
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
            self._expected.put((_started(dist.irecv, self._last, (_BACK, values, None)), values))

    def return_tokens(self, values: Values) -> None:
        if self._back is None:
            self._own.append(values)
        else:
            assert isinstance(values, torch.Tensor)
            sent_ns = torch.tensor([time.monotonic_ns()])
            self._back.send([(_BACK, torch.cat((values, sent_ns)), None)])

    def receive_tokens(self) -> Received[Values]:
        awaited_ns = time.monotonic_ns()
        if self._last == 0:
            return Received(self._own.popleft(), 0, awaited_ns, awaited_ns, None)
        work, received = self._expected.get()
        work.wait()
        arrived_ns = time.monotonic_ns()
        values, sent_ns = received[:-1], int(received[-1])
        known = passage(self._one_clock, sent_ns, awaited_ns, arrived_ns)
        return Received(values, values.nbytes, sent_ns, arrived_ns, known)

    def hold(self, received: Received[Values]) -> Received[Values]:
        return received

    def flush(self) -> None:
        for sender in (self._next, self._back):
            if sender is not None:
                sender.flush()
