"""The two ends of a link between stages: what is sent from one rank to another, and how it is received.

A message is a header of fixed size and, behind it, the sequences' tables of cache blocks and hidden states: one buffer,
because each that is sent has to wait for its turn on a core at the other end. Receive buffers are allocated once, for
the largest step, and twice: while a stage computes on one, the next message arrives in the other. Sends do not wait
either; what is being sent is kept until it has left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
import torch.distributed as dist

from llmpq.models.step import Step
from llmpq.runtime.arriving import Arriving
from llmpq.runtime.meeting import links_may_end
from llmpq.runtime.message import Admission, Close, Finish, Message, Received, StepMessage
from llmpq.spec.trace import Phase

_LARGEST_IN_FLIGHT = 2  # of the largest messages; as many small ones as have their bytes

MESSAGE, EXTRA, BACK = range(3)  # tags; EXTRA: the token ids of a scored step, the JSON of an admission
_FIELDS = 5  # of a header: kind, sequences, size, columns of tables, when it was sent; its body follows
_ALIGNED = 64  # bytes: where hidden states begin behind tables


class Kind(IntEnum):
    ADMISSION = 0
    SCORED_STEP = 1
    PREFIX_STEP = 2
    PREFILL_STEP = 3
    DECODE_STEP = 4
    FINISH = 5
    CLOSE = 6

    @classmethod
    def of(cls, message: StepMessage) -> Kind:
        if message.scored:
            return cls.SCORED_STEP
        if message.prefix:
            return cls.PREFIX_STEP
        return cls.DECODE_STEP if message.phase == "decode" else cls.PREFILL_STEP


STEPS = (Kind.SCORED_STEP, Kind.PREFIX_STEP, Kind.PREFILL_STEP, Kind.DECODE_STEP)


Part = tuple[int, torch.Tensor, dist.ProcessGroup | None]  # tag, tensor, group (None: gloo)


class Sender:
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
        self._in_flight.append([(started(dist.isend, self._target, part), part[1]) for part in parts])

    def flush(self) -> None:
        while self._in_flight:
            self._wait()

    def _wait(self) -> None:
        """Until the oldest message has left."""
        for work, tensor in self._in_flight.popleft():
            wait(work)
            self._room += tensor.nbytes


def started(call: Callable[..., dist.Work | None], other: int, part: Part) -> dist.Work:
    """An isend to or irecv from another rank. Raises LinkLostError."""
    tag, tensor, group = part
    with links_may_end():
        work = call(tensor, other, group=group, tag=tag)
    if work is None:
        raise ValueError(f"this process has not joined rank {other}")
    return work


def wait(work: dist.Work) -> None:
    """Until a message has left, or come. Raises LinkLostError."""
    with links_may_end():
        work.wait()


class Receiver:
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
            self._arriving = Arriving(lambda tensor: started(dist.irecv, source, (0, tensor, group)), device)
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
        self._work = started(dist.irecv, self._source, (MESSAGE, buffer, None))
        if self._arriving is not None and on_gpu is not None:

            def expected() -> torch.Tensor | None:
                number, _, size, *_ = self._header(buffer)
                return on_gpu[:size] if Kind(number) in STEPS else None

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
            wait(self._work)
        else:
            hidden_work = self._arriving.next()
        arrived_ns = time.monotonic_ns()
        buffer, on_gpu = self._buffers[0]
        self._buffers.rotate()
        number, sequences, size, columns, sent_ns, *body = self._header(buffer)
        if Kind(number) is not Kind.CLOSE:  # nothing comes after that: the sender may be gone
            self._post()
        if hidden_work is not None:
            hidden_work.wait()  # NCCL's: what is computed from now on waits for it
        behind = buffer[self._header_bytes :]
        message, nbytes = self._message(Kind(number), sequences, size, columns, body, behind, on_gpu)
        return Received(message, nbytes, sent_ns, arrived_ns, passage(self._one_clock, sent_ns, awaited_ns, arrived_ns))

    def _message(
        self,
        kind: Kind,
        sequences: int,
        size: int,
        columns: int,
        body: list[int],
        behind: torch.Tensor,
        on_gpu: torch.Tensor | None,
    ) -> tuple[Message, int]:
        """The message of a header and what is behind it, and the bytes of its hidden states, NCCL's or behind, too."""
        if kind is Kind.CLOSE:
            return Close(), 0
        if kind is Kind.FINISH:
            return Finish(tuple(body[:size])), 0
        if kind is Kind.ADMISSION:
            text = torch.empty(size, dtype=torch.uint8)
            wait(started(dist.irecv, self._source, (EXTRA, text, None)))
            return Admission(text.numpy().tobytes().decode()), 0
        if kind is Kind.SCORED_STEP:
            wait(started(dist.irecv, self._source, (EXTRA, self._tokens[:size], None)))
        if on_gpu is not None:
            hidden_states = on_gpu[:size]
        else:
            start, nbytes = bytes_of_tables(sequences, columns), size * self._hidden_size * self._dtype.itemsize
            hidden_states = behind[start : start + nbytes].view(self._dtype).view(size, self._hidden_size)
            hidden_states = hidden_states.to(self._device, non_blocking=True)
        slots, query_lens, starts = torch.tensor(body[: 3 * sequences], dtype=torch.int32).view(3, sequences)
        tables = None
        if columns:
            tables = behind[: 4 * sequences * columns].view(torch.int32).view(sequences, columns).clone()
        step = Step(slots, query_lens, starts, self._tokens[:size], tables)
        scored, prefix = kind is Kind.SCORED_STEP, kind is Kind.PREFIX_STEP
        phase: Phase = "decode" if kind is Kind.DECODE_STEP else "prefill"
        return StepMessage(step, hidden_states, scored, prefix, phase=phase), hidden_states.nbytes


def bytes_of_header(body: int) -> int:
    """Of a header with so many numbers behind its fields."""
    return 8 * (_FIELDS + body)


def bytes_of_tables(sequences: int, columns: int) -> int:
    """Of a message, up to where hidden states begin."""
    return -(-4 * sequences * columns // _ALIGNED) * _ALIGNED


def passage(one_clock: bool, sent_ns: int, awaited_ns: int, arrived_ns: int) -> tuple[int, int] | None:
    """See Received."""
    return (sent_ns, arrived_ns) if one_clock and awaited_ns <= sent_ns <= arrived_ns else None
