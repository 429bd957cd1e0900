"""Hidden states that come by NCCL while a stage computes: a thread waits for headers, which say how many there are.

NCCL wants the exact size of a message. So its receipt cannot begin before the header has come by gloo, and the thread
that computes is at work then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from queue import SimpleQueue

import torch
import torch.distributed as dist


class Arriving:
    """Receives hidden states one after the other, each as soon as its header is there."""

    def __init__(self, begin: Callable[[torch.Tensor], dist.Work], device: torch.device) -> None:
        """`begin` is an irecv. On a GPU it is on a stream of its own, or it would wait for what is computed."""
        self._begin = begin
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asked: SimpleQueue[tuple[dist.Work, Callable[[], torch.Tensor | None]]] = SimpleQueue()
        self._begun: SimpleQueue[dist.Work | BaseException | None] = SimpleQueue()
        threading.Thread(target=self._run, name="hidden states", daemon=True).start()

    def follow(self, header: dist.Work, expected: Callable[[], torch.Tensor | None]) -> None:
        """When a header has come, receive into what `expected` then returns; None: nothing follows it."""
        self._asked.put((header, expected))

    def next(self) -> dist.Work | None:
        """Wait for the oldest header: what receives the hidden states behind it. Raises what went wrong there."""
        begun = self._begun.get()
        if isinstance(begun, BaseException):
            raise begun
        return begun

    def _run(self) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                while True:
                    header, expected = self._asked.get()
                    header.wait()
                    tensor = expected()
                    self._begun.put(None if tensor is None else self._begin(tensor))
        except BaseException as error:
            self._begun.put(error)
