"""Starts worker processes, each in its device's environment, and watches them until they are closed.

Works for any module that talks through runtime/control.py. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from llmpq.progress import OnStep
from llmpq.runtime.party import LISTEN_S, Listener, Party
from llmpq.spec import Device, DeviceMemoryError, LlmpqError, WorkerLostError
from llmpq.spec.formatting import printable
from llmpq.temporary import TemporaryFolder, working_folder

SILENCE_S = 10.0  # without a heartbeat for this long, a worker counts as lost
GRACE_S = 1.0  # see Listener
LEAVE_S = 5.0  # for a worker to leave its pipeline
_RETRY_S = 0.01  # while a pipe is full
_EXIT_S = 2.0  # for a worker to notice that its commands have ended
_ISA_LIMITS = {
    # What torch's own kernels and their libraries call an instruction set. There is none above amx to leave out.
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avxvnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # The widest without AMX; newer versions of oneDNN call theirs AVX10_1_512, too.
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3"},
    "amx": {},
}


def host_threads(device: Device, devices: Sequence[Device], cores: int) -> int:
    """Threads on a CPU for the process of a device that runs beside the others of `devices`, itself among them.

    A CPU's are what it is described with. GPUs share those of the `cores` of their host that its CPUs leave: they load
    with them, and hardly need them later.
    """
    if device.kind == "cpu":
        return device.threads
    here = [other for other in devices if other.host == device.host]
    left = cores - sum(other.threads for other in here if other.kind == "cpu")
    return max(device.threads, left // sum(other.kind == "cuda" for other in here))


def device_environment(device: Device, threads: int | None = None) -> dict[str, str]:
    """Variables that a process on this device needs before it imports torch. `threads`: see host_threads."""
    environment = {
        "OMP_NUM_THREADS": str(threads or device.threads),
        "MKL_NUM_THREADS": str(threads or device.threads),
        # torch's threads would spin after each of its operations, on the cores that the kernels' threads need.
        "OMP_WAIT_POLICY": "PASSIVE",
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


@dataclass(frozen=True)
class Program:
    """What a worker runs: `python -m module arguments --control ...`, in this process's environment changed so."""

    name: str  # for messages: "stage 1 on cpu1"
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    device: str | None = None  # another program may go on in this one's process if both have this and environment alike


def import_path() -> str:
    """What this process imports from, as PYTHONPATH; but not the current folder, unless llmpq itself is there.

    Whoever starts a program in a folder does not mean to run the files of that folder.
    """
    own = str(Path(__file__).resolve().parents[2])
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""
    kept = [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) != here]
    return os.pathsep.join(kept if own in kept else [own, *kept])


def end_with_us(lifeline: int, pid: int) -> None:
    """Have the kernel kill a process when the other end of its pipe `lifeline` is closed, as it is when this one ends.

    The process may be held up in an import then, and hear nothing. (Linux; elsewhere it ends when its commands do.)
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, pid)
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def signal_name(number: int) -> str:
    """SIGTERM for 15. Not all that Linux has are named."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process (Linux; elsewhere that is not known)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


class Worker(Party):
    """A running worker: its process and its pipes."""

    def __init__(self, program: Program, rank: int, log: Path) -> None:
        self.program, self.log = program, log
        self._unsent, self._stopped_s = b"", 0.0
        commands, self._commands = os.pipe()
        os.set_blocking(self._commands, False)
        events, sent_events = os.pipe()
        lifeline, ours = os.pipe()  # see end_with_us
        self._commands_open, self._others_open = [self._commands], [events, ours]
        super().__init__(rank, events, SILENCE_S)
        environment = {**os.environ, **program.environment, "PYTHONPATH": import_path()}
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    # Python puts the current folder into the path of `-m` and of `-c`; here it is taken out at once.
                    [
                        *(sys.executable, "-c"),
                        "import sys; sys.path.remove('') if '' in sys.path else None; "
                        "from llmpq.runtime import control; control.main()",
                        *("--control", f"{commands},{sent_events}", program.module, *program.arguments),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(commands, sent_events, lifeline),
                    start_new_session=True,  # Ctrl-C is for this process, which then ends its workers
                )
            end_with_us(lifeline, self.process.pid)
        except BaseException:
            for descriptor in (*self._commands_open, *self._others_open):
                os.close(descriptor)
            raise
        finally:
            for theirs in (commands, sent_events, lifeline):
                os.close(theirs)

    def can_run(self, program: Program) -> bool:
        """Whether its process has left its pipeline, and is as another program needs it."""
        ours = (self.program.device, self.program.environment)
        return self.left and not self.ended and ours == (program.device, program.environment)

    def begin_again(self, program: Program, rank: int) -> None:
        """Run another program in its process."""
        self.program, self.rank, self.left, self.doing = program, rank, False, "starting"
        self.send("join", arguments=program.arguments)

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

    def listened(self, seconds: float) -> None:
        super().listened(seconds)
        if not self.started:  # it may be silent for long, but not because it was stopped
            self._stopped_s = self._stopped_s + seconds if _is_stopped(self.process.pid) else 0.0

    @property
    def silent(self) -> bool:
        return super().silent or self._stopped_s > SILENCE_S

    def _end_certainty(self) -> int:
        # A library may abort when its peer is gone.
        return 2 if self._status() == -signal.SIGABRT else 4

    def _status(self) -> int | None:
        """Exit status; minus the signal's number, if one ended it."""
        try:
            return self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return None

    def describe_loss(self) -> str:
        who = f"{self.program.name} (rank {self.rank}, pid {self.process.pid})"
        if self.defect is not None:
            return f"{who} failed while {self.doing}: {self.defect}"
        if self._stopped_s > SILENCE_S:
            return f"{who} has been stopped for {SILENCE_S:.0f} s; it was {self.doing}"
        if not self.ended:
            how = "answered for" if self.started else "started within"
            return f"{who} has not {how} {self.limit_s:.0f} s; it was {self.doing}"
        status = self._status()
        if status is None:
            return f"{who} closed its pipe while {self.doing}"
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal_name(-status)}"
        why = ", often for want of memory" if status == -signal.SIGKILL else ""
        return f"{who} {how} while {self.doing}{why}"

    def show_log(self) -> None:
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            with suppress(OSError):  # of a standard error that is closed
                print(printable(f"--- output of {self.program.name}\n{text}\n---"), file=sys.stderr)

    def hang_up(self) -> None:
        """End its commands, upon which it ends itself."""
        while self._commands_open:
            os.close(self._commands_open.pop())

    def end(self, patience_s: float) -> None:
        """Wait for it to end, then end it."""
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        while self._others_open:
            os.close(self._others_open.pop())


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
    """Workers that live and die together. A context manager; after `close`, any error, or `del`, none is left."""

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
        self.outlives_losses = False  # after the loss of one worker, others wait for `renew`
        self.has_parted = False  # and do so now
        self.reused = set[int]()  # ranks whose workers are processes of before
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
        """Run other programs, from rank 0 on, after the loss of a worker: in processes that have left, or new ones."""
        until = max(self._parted_s + LEAVE_S, time.monotonic() + LISTEN_S)
        while time.monotonic() < until and not all(worker.left or worker.ended for worker in self.workers):
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
        self.workers.sort(key=lambda worker: worker.rank)
        self.reused, self.has_parted, self.knows_vocabulary = set(found), False, False

    def _part(self) -> None:
        """Have all leave their pipeline that may go on elsewhere. The others are ended."""
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
                self._part()
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

    def close(self, patience_s: float = _EXIT_S) -> None:
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
