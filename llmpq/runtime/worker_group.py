"""Worker processes that live and die together, watched until they are closed; or outlive the loss of one of them.

No torch here.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any

from llmpq.progress import OnStep
from llmpq.runtime.launch import EXIT_S, Program, Worker
from llmpq.runtime.party import LISTEN_S, Listener, Party
from llmpq.spec import DeviceMemoryError, LlmpqError, WorkerLostError
from llmpq.temporary import TemporaryFolder, working_folder

LEAVE_S = 5.0  # for a worker to leave its pipeline
GRACE_S = 1.0  # see Listener
_RETRY_S = 0.01  # while a pipe is full


def _end_all(workers: Sequence[Worker], folder: TemporaryFolder, owner: int, patience_s: float) -> None:
    """End workers, killing those that take longer than `patience_s`; remove their folder. Not in a forked process."""
    if os.getpid() != owner:
        return
    try:
        for worker in workers:
            worker.hang_up()
    finally:
        until = time.monotonic() + patience_s
        for worker in workers:
            worker.end(max(0.0, until - time.monotonic()))
        folder.close()


class WorkerGroup(Listener[Worker]):
    """Workers that live and die together. A context manager; after `close`, any error, or `del`, none is left.

    If they are to outlive losses (`outlives_losses`), those that are left after one leave their pipeline, and wait for
    `renew` or `close`.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        first_rank: int = 0,
        *,
        others: Sequence[Party] = (),
        grace_s: float = GRACE_S,
        on_loss: Callable[[int, LlmpqError], None] = lambda certainty, loss: None,
    ) -> None:
        """The workers live and die with the `others`, too; see Listener."""
        super().__init__(grace_s, on_loss)
        self.outlives_losses = False
        self.has_parted = False  # they wait for `renew`
        self.reused = set[int]()  # ranks that run in processes of before
        self._parted_s = 0.0
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self.workers: list[Worker] = []
        self._begun = count()
        self.knows_vocabulary = False  # whether the stages have been told of it; see Session
        self._folder = working_folder()
        self._end = weakref.finalize(self, _end_all, self.workers, self._folder, os.getpid(), 0.0)
        try:
            for party in others:
                self.listen_to(party)
            for rank, program in enumerate(programs, first_rank):
                self._begin(program, rank)
        except BaseException:
            self.close()
            raise

    def _begin(self, program: Program, rank: int) -> None:
        worker = Worker(program, rank, self._folder.path / f"worker{next(self._begun)}.log")
        self.workers.append(worker)
        self.listen_to(worker)

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def renew(self, programs: Sequence[Program]) -> None:
        """Run other programs, from rank 0 on, once workers have parted: in processes that have left, or new ones."""
        until = max(self._parted_s + LEAVE_S, time.monotonic() + LISTEN_S)
        devices = [program.device for program in programs]
        wanted = [worker for worker in self.workers if worker.program.device in devices]
        while time.monotonic() < until and not all(worker.left or worker.ended for worker in wanted):
            self._listen(LISTEN_S / 5)
        self._arrived.clear()  # it is of what was before
        found = {
            rank: worker for rank, program in enumerate(programs) for worker in self.workers if worker.can_run(program)
        }
        for worker in [worker for worker in self.workers if worker not in found.values()]:
            self._dismiss(worker)
        for rank, program in enumerate(programs):
            if rank in found:
                found[rank].begin_again(program, rank)
            else:
                self._begin(program, rank)
        # At once: while a list is sorted, it looks empty to other threads.
        self.workers[:] = sorted(self.workers, key=lambda worker: worker.rank)
        self.reused, self.has_parted = set(found), False

    def part(self) -> None:
        """Have all leave their pipeline that may go on elsewhere, and wait for `renew`. The others are ended."""
        self.has_parted, self._parted_s = True, time.monotonic()
        for worker in list(self.workers):
            if worker.failure() <= 1 and worker.program.device is not None:
                worker.send("leave")
            else:
                self._dismiss(worker)

    def _dismiss(self, worker: Worker) -> None:
        worker.hang_up()
        worker.end(0.0)
        self.drop(worker)
        self.workers.remove(worker)

    def await_start(self, on_step: OnStep) -> None:
        """Wait until all workers have imported what they need; `on_step` is called for each. Raises as `receive`."""
        for worker in self.workers:
            self.listen_until(partial(getattr, worker, "started"))
            on_step()

    def receive(self) -> tuple[Worker, dict[str, Any]]:
        """The next event of any worker, by its name under "event". Raises as `listen_until`."""
        self.listen_until(lambda: self._arrived)
        return self._arrived.popleft()

    def receive_unless(self, condition: Callable[[], object]) -> tuple[Worker, dict[str, Any]] | None:
        """As `receive`, but None if a condition holds before anything has arrived. It is looked at after `wake`."""
        self.listen_until(lambda: self._arrived or condition())
        return self._arrived.popleft() if self._arrived else None

    def wake(self) -> None:
        """Have whoever listens look at the condition, from any thread."""
        with suppress(OSError):  # it has much to read already, or is closed
            self._waker.send(b"\0")

    def listen_until(self, condition: Callable[[], object]) -> None:
        """As Listener.listen_until. All workers are closed then, unless they outlive what is raised."""
        try:
            super().listen_until(condition)
        except BaseException as error:
            if self.outlives_losses and isinstance(error, (DeviceMemoryError, WorkerLostError)):
                self.part()
            else:
                self.close(patience_s=0)
            raise

    def collect(self, name: str) -> Iterator[tuple[Worker, dict[str, Any]]]:
        """The first event of this name of each worker, as they come; others are dropped. Raises as `receive`."""
        waiting = set(self.workers)
        while waiting:
            worker, event = self.receive()
            if event["event"] == name and worker in waiting:
                waiting.remove(worker)
                yield worker, event

    def _listen(self, seconds: float) -> None:
        unsent = sum(not worker.flush() for worker in self.workers)
        super()._listen(_RETRY_S if unsent else seconds)

    def _heard(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._woken:
            self._woken.recv(2**12)
        else:
            super()._heard(key)

    def close(self, patience_s: float = EXIT_S) -> None:
        """End all workers, killing those that take longer than `patience_s`; remove their logs."""
        if self._end.detach() is not None:
            _end_all(self.workers, self._folder, os.getpid(), patience_s)
            self._selector.close()
            self._waker.close()
            self._woken.close()

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
