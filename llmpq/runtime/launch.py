"""Starts worker processes, each in its device's environment, and watches them until they are closed.

Works for any module that talks through runtime/control.py. No torch here.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmpq.spec import Device, LlmpqError, WorkerLostError, errors

SILENCE_S = 10.0  # without a heartbeat for this long, a worker counts as lost
_GRACE_S = 1.0  # after a first failure, for its cause to show: a worker that dies fails its neighbours, too
_RETRY_S = 0.01  # while a pipe is full
_EXIT_S = 2.0  # for a worker to notice that its commands have ended
_ISA_LIMITS = {
    # What torch's own kernels and their libraries call an instruction set. There is none above avx512 to leave out.
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avxvnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {},
}


def device_environment(device: Device) -> dict[str, str]:
    """Variables that a process on this device needs before it imports torch."""
    environment = {
        "OMP_NUM_THREADS": str(device.threads),
        "MKL_NUM_THREADS": str(device.threads),
        # glibc: one pool, and much of freed memory goes back at once, so that what is resident is what is in use.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**22),
        "MALLOC_TRIM_THRESHOLD_": str(2**22),
    }
    if device.kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if device.isa is not None:
        environment |= {"LLMPQ_ISA": device.isa, **_ISA_LIMITS[device.isa]}
    return environment


def loopback() -> str:
    """This system's loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Program:
    """What a worker runs: `python -m module arguments --control ...`, in this process's environment changed so."""

    name: str  # for messages: "stage 1 on cpu1"
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


class Worker:
    """A running worker: its process, its pipes, and what was last heard of it."""

    def __init__(self, program: Program, rank: int, log: Path) -> None:
        self.program, self.rank, self.log = program, rank, log
        self.doing = "starting"
        self.heard_at = time.monotonic()
        self.error: LlmpqError | None = None  # what it reported, before it ended
        self.defect: str | None = None
        self.ended = False
        self._unfinished, self._unsent = b"", b""
        commands, self._commands = os.pipe()
        os.set_blocking(self._commands, False)
        self.events, events = os.pipe()
        environment = {**os.environ, **program.environment}
        # The worker imports what this process imports, wherever it was started.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", program.module, *program.arguments, "--control", f"{commands},{events}"],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(commands, events),
                    start_new_session=True,  # Ctrl-C is for this process, which then ends its workers
                )
        except BaseException:
            os.close(self._commands)
            os.close(self.events)
            raise
        finally:
            os.close(commands)
            os.close(events)

    def send(self, command: str, **fields: Any) -> None:
        """Send what the pipe takes of a command now; the rest is sent while events are received."""
        self._unsent += json.dumps({"command": command, **fields}).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Send on; False if there is more. If the worker is gone, its end tells."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._commands, self._unsent) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._unsent = b""
        return True

    def read(self) -> list[dict[str, Any]]:
        """Events that have arrived, but heartbeats; call when there is something to read. Notes an end, and errors."""
        data = os.read(self.events, 2**16)
        self.ended = not data
        self.heard_at = time.monotonic()
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        events = []
        for event in map(json.loads, lines):
            if event["event"] == "heartbeat":
                self.doing = event["doing"]
            elif event["event"] == "error":
                self.error = getattr(errors, event["kind"])(event["message"])
            elif event["event"] == "defect":
                self.defect = event["message"]
            else:
                events.append(event)
        return events

    def failure(self) -> int:
        """0 if all is well; else the higher, the more surely it is a cause and not the effect of another's failure."""
        silent = time.monotonic() - self.heard_at > SILENCE_S
        if not self.ended:
            return 5 if self.error else 1 if self.defect else 3 if silent else 0
        if self.error or self.defect:
            return 5 if self.error else 1
        # A library may abort when its peer is gone.
        return 2 if self._status() == -signal.SIGABRT else 4

    def _status(self) -> int | None:
        """Exit status; minus the signal's number, if one ended it."""
        try:
            return self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return None

    def describe_loss(self) -> str:
        """One line on how this worker was lost."""
        who = f"{self.program.name} (rank {self.rank}, pid {self.process.pid})"
        if self.defect is not None:
            return f"{who} failed while {self.doing}: {self.defect}"
        if not self.ended:
            return f"{who} has not answered for {SILENCE_S:.0f} s; it was {self.doing}"
        status = self._status()
        if status is None:
            return f"{who} closed its pipe while {self.doing}"
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
        return f"{who} {how} while {self.doing}"

    def hang_up(self) -> None:
        """End its commands, upon which it ends itself."""
        os.close(self._commands)

    def end(self, patience_s: float) -> None:
        """Wait for it to end, then end it."""
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.events)


class WorkerGroup:
    """Workers that live and die together. A context manager; after `close`, or any error, none is left."""

    def __init__(self, programs: Sequence[Program], first_rank: int = 0) -> None:
        self.workers: list[Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="llmpq-")
        self._selector = selectors.DefaultSelector()
        self._arrived: deque[tuple[Worker, dict[str, Any]]] = deque()
        self.closed = False
        try:
            for rank, program in enumerate(programs, first_rank):
                worker = Worker(program, rank, Path(self._folder.name) / f"rank{rank}.log")
                self.workers.append(worker)
                self._selector.register(worker.events, selectors.EVENT_READ, worker)
        except BaseException:
            self.close()
            raise

    def receive(self) -> tuple[Worker, dict[str, Any]]:
        """The next event of any worker, by its name under "event".

        Raises the error that a worker reported, or WorkerLostError if one ended or fell silent; all are closed then.
        """
        try:
            while not self._arrived:
                self._listen(SILENCE_S / 20)
                self._check()
            return self._arrived.popleft()
        except BaseException:
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
        for key, _ in self._selector.select(_RETRY_S if unsent else seconds):
            worker: Worker = key.data
            self._arrived.extend((worker, event) for event in worker.read())
            if worker.ended:
                self._selector.unregister(worker.events)

    def _check(self) -> None:
        """If a worker has failed, raise for the one whose failure looks most like the cause of the others'."""
        if not any(worker.failure() for worker in self.workers):
            return
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and not any(worker.error for worker in self.workers):
            self._listen(_GRACE_S / 10)
        culprit = max(self.workers, key=lambda worker: worker.failure())
        if culprit.error is not None:
            raise culprit.error
        loss = culprit.describe_loss()
        self._show_log(culprit)
        raise WorkerLostError(loss)

    def _show_log(self, worker: Worker) -> None:
        text = worker.log.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            print(f"--- output of {worker.program.name}\n{text}\n---", file=sys.stderr)

    def close(self, patience_s: float = _EXIT_S) -> None:
        """End all workers, killing those that take longer than `patience_s`; remove their logs."""
        if self.closed:
            return
        self.closed = True
        try:
            for worker in self.workers:
                worker.hang_up()
        finally:
            until = time.monotonic() + patience_s
            for worker in self.workers:
                worker.end(max(0.0, until - time.monotonic()))
            self._selector.close()
            self._folder.cleanup()

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
