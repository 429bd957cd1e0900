"""A worker process: how one is started in its device's environment, talked to, and ended.

Works for any module that talks through runtime/control.py. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpq.runtime.party import Party
from llmpq.spec import Device
from llmpq.spec.formatting import printable

SILENCE_S = 10.0  # without a heartbeat for this long, a worker counts as lost
EXIT_S = 2.0  # for a worker to notice that its commands have ended
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
        self.busy_s, self.memory_bytes = 0.0, 0
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
            return self.process.wait(EXIT_S)
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
