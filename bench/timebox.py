"""Steps that are carried out one after the other within a given time, each in processes of its own.

Each step has a share of the seconds, and a limit. It gets what earlier ones have left, but never the shares of later
ones. One that fails or runs out of time does not keep others from running.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASSED, FAILED, TIMEOUT, NOT_RUN = "passed", "failed", "out of time", "not run"
LOG, SUMMARY = "gpu_all.log", "gpu_all.json"
LOG_BYTES = 15 * 2**20
_LEAST_SECONDS = 3.0  # nothing is begun with less
_COLLECT_SECONDS = 10.0


@dataclass(frozen=True)
class Command:
    """One process of a step. "{seconds}" in an argument is replaced by the seconds it should be content with."""

    argv: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()  # what stands for it where there is no GPU; empty: nothing
    env: tuple[tuple[str, str], ...] = ()
    output: str = ""  # a file in the state folder that gets what it prints, too

    @property
    def label(self) -> str:
        """Its beginning, in one line."""
        argv = self.argv[1:] if self.argv[0] == sys.executable else self.argv
        return " ".join(" ".join(argv).split())[:80]


@dataclass(frozen=True)
class Step:
    """What is run, and for how many seconds: the share that others leave it, and the most it may take.

    One in the background takes no time from others, and so may take its limit.
    """

    name: str
    share: float
    limit: float
    commands: Callable[[], Sequence[Command]]
    needs: tuple[str, ...] = ()  # steps without which it means nothing
    after: tuple[str, ...] = ()  # steps to wait for, however they end
    background: bool = False  # the next ones go on meanwhile


@dataclass
class Outcome:
    step: str
    state: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Log:
    """One file for the output of all processes, each line after the name of its step, of at most LOG_BYTES."""

    def __init__(self, path: Path) -> None:
        self._file, self._left, self._lock = path.open("w", buffering=1), LOG_BYTES, threading.Lock()

    def write(self, step: str, line: str) -> None:
        """To the file, and to standard output."""
        line = f"[{step}] {line}"
        with self._lock:
            print(line, flush=True)
            if self._left > 0:
                self._left -= len(line.encode()) + 1
                self._file.write(line + "\n" if self._left > 0 else "the rest is left out\n")


class TimeBox:
    """One call: how much time there is, what became of each step, and where results go.

    `state` is the folder in which steps keep what they find; the files of it that `kept` names are copied to `results`
    as they grow, together with the log and the outcomes. `sources` names the state of what the steps test: those that
    passed before with the same are known.
    """

    def __init__(
        self, seconds: float, state: Path, results: Path, kept: Sequence[str], sources: str, *, rehearse: bool = False
    ) -> None:
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._state, self._results, self._kept, self._rehearse = state, results, kept, rehearse
        self.outcomes: dict[str, Outcome] = {}
        self._threads: dict[str, threading.Thread] = {}
        for folder in (state, results):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(results / LOG)
        self._sources = sources
        known = state / "passed.json"
        record = json.loads(known.read_text()) if known.exists() else {}
        self.passed: list[str] = record["steps"] if record.get("sources") == sources else []

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def run(self, steps: Sequence[Step], *, skip: Sequence[str] = ()) -> None:
        """Carry them out in this order, without those of `skip` that passed before."""
        before = set(skip) & set(self.passed)

        def known(step: Step) -> bool:
            return step.name in before

        for i, step in enumerate(steps):
            for name in (*step.needs, *step.after):
                if name in self._threads:
                    self._threads[name].join(max(0.0, self.left()))
            later = sum(other.share for other in steps[i + 1 :] if not (other.background or known(other)))
            kept = 0.0 if step.background else later
            seconds = min(step.limit, max(step.share, self.left() - kept), self.left())
            if known(step):
                self._note(Outcome(step.name, PASSED, notes=["before"]))
            elif broken := [name for name in step.needs if self._is_broken(name)]:
                self._note(Outcome(step.name, NOT_RUN, notes=[f"{', '.join(broken)} did not pass"]))
            elif self.left() < _LEAST_SECONDS:
                self._note(Outcome(step.name, NOT_RUN, notes=["no time was left"]))
            elif step.background:
                self._threads[step.name] = threading.Thread(target=self._carry_out, args=(step, seconds))
                self._threads[step.name].start()
            else:
                self._carry_out(step, seconds)
        for thread in self._threads.values():
            thread.join()

    def _is_broken(self, name: str) -> bool:
        """Whether it was tried, or is being tried, without success so far."""
        if name not in self.outcomes:
            return name in self._threads
        return self.outcomes[name].state != PASSED

    def _carry_out(self, step: Step, seconds: float) -> None:
        began = time.monotonic()
        outcome = Outcome(step.name, PASSED)
        self.log.write(step.name, f"-- begins at {began - self._began:.0f} s, has {seconds:.0f} s")
        try:
            for command in step.commands():
                state = self.call(step.name, command, seconds - (time.monotonic() - began))
                if state != PASSED:
                    outcome.state = FAILED if FAILED in (state, outcome.state) else state
                    outcome.notes.append(f"{state}: {command.label}")
        except Exception as error:  # a step that cannot be set up keeps no other from running
            outcome.state = FAILED
            outcome.notes.append(f"{type(error).__name__}: {error}")
        outcome.seconds = time.monotonic() - began
        self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step] = outcome
        notes = f" ({'; '.join(outcome.notes)})" if outcome.notes else ""
        self.log.write(outcome.step, f"-- {outcome.state} after {outcome.seconds:.0f} s{notes}")
        if outcome.state == PASSED:
            self.passed = list(dict.fromkeys([*self.passed, outcome.step]))
            _write(self._state / "passed.json", {"sources": self._sources, "steps": self.passed})
        self.collect()

    def call(self, step: str, command: Command, seconds: float) -> str:
        """Run it for at most so long, with all that it starts; what it prints goes to the log line by line."""
        argv = command.rehearsal if self._rehearse else command.argv
        if not argv:
            return PASSED
        if seconds <= 0:
            return TIMEOUT
        if shutil.which(argv[0]) is None:
            self.log.write(step, f"{argv[0]} is not on PATH")
            return FAILED
        # A tenth of it, or 15 s, to finish what is being measured.
        content = int(max(1, seconds - min(15, seconds / 10)))
        argv = tuple(part.replace("{seconds}", str(content)) for part in argv)
        self.log.write(step, f"$ {' '.join(argv)}"[:600])
        process = subprocess.Popen(
            argv,
            env=os.environ | dict(command.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(step, process, command.output), daemon=True)
        reader.start()
        deadline = time.monotonic() + seconds
        while process.poll() is None and (left := deadline - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(left, _COLLECT_SECONDS))
            self.collect()
        was_stopped = process.poll() is None
        _end(process)
        reader.join(2)
        if was_stopped:
            return TIMEOUT
        if process.returncode:
            self.log.write(step, f"exit code {process.returncode}")
        return FAILED if process.returncode else PASSED

    def _read(self, step: str, process: subprocess.Popen[bytes], output: str) -> None:
        assert process.stdout is not None
        with (self._state / output).open("a") if output else open(os.devnull, "a") as copy:
            for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                self.log.write(step, line)
                print(line, file=copy, flush=True)

    def collect(self) -> None:
        """Copy what there is so far to where it is fetched from."""
        for name in self._kept:
            found, copy = self._state / name, self._results / name
            with suppress(OSError):
                if not copy.exists() or found.stat().st_mtime > copy.stat().st_mtime:
                    shutil.copy2(found, copy)
        outcomes = [asdict(outcome) for outcome in list(self.outcomes.values())]
        _write(self._results / SUMMARY, {"sources": self._sources, "steps": outcomes})

    def summary(self, steps: Sequence[Step]) -> tuple[list[str], int]:
        """A line for each step, and the exit code: 0 if all passed."""
        found = [self.outcomes.get(step.name, Outcome(step.name, NOT_RUN)) for step in steps]
        lines = [f"{o.step:<13}{o.state:<12}{o.seconds:4.0f} s  {'; '.join(o.notes)[:100]}".rstrip() for o in found]
        return lines, int(any(outcome.state != PASSED for outcome in found))


def _write(path: Path, value: object) -> None:
    partial = Path(f"{path}.{threading.get_ident()}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it started: politely, then not."""
    for number, patience in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
