"""A worker's side of its pipes: commands in, events out, both one JSON object a line, and a heartbeat in between.

Any module can be a worker: its function `main` takes a Control and the worker's arguments. This module's own `main`
imports it, and is heard of before: that may take long. The other side is runtime/launch.py. A worker ends when its
commands end: the process that started it has closed it, or is gone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from llmpq.spec import LlmpqError

HEARTBEAT_S = 0.5
_DEFECT = 1  # exit status for an error that is no LlmpqError


class Left(Exception):
    """This process has been told to leave its pipeline."""


@dataclass
class Status:
    """What a worker is doing, as words for messages about it: "computing step 5"; and what it has done so far."""

    doing: str = "starting"
    busy_s: float = 0.0  # in steps of generation
    memory_bytes: int = 0  # the peak above the idle worker


class Control:
    """Talks to the process that started this one; starts its heartbeat at once. `status` goes with each beat."""

    def __init__(self, descriptors: str) -> None:
        commands, self._events = map(int, descriptors.split(","))
        self.status = Status()
        self._lock = threading.Lock()
        logging.getLogger("llmpq").addHandler(_Sent(self))
        # Commands, and what else a worker waits for. Told to leave, it gets another one.
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.leaving = threading.Event()  # it has been told to leave its pipeline, and has not yet
        threading.Thread(target=self._read, args=(commands,), name="commands", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def check_leaving(self) -> None:
        """Raise Left if this process has been told to leave its pipeline."""
        if self.leaving.is_set():
            raise Left

    def left(self) -> None:
        """Tell that this process has left; commands that come from now on are for what it does next."""
        self.leaving.clear()
        self.send("left")

    def send(self, event: str, **fields: Any) -> None:
        """Send an event with JSON fields."""
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._events, line) :]

    def started(self) -> None:
        """Tell that all is imported, and all are met, that this process needs."""
        self.send("started")

    def receive(self) -> dict[str, Any]:
        """Wait for the next command: its name under "command", and its fields. While nothing else is waited for.

        Raises Left if that is to leave, as all do that wait for the inbox.
        """
        inbox = self.inbox
        self.check_leaving()
        command: dict[str, Any] = inbox.get()
        if isinstance(command, BaseException):
            raise command
        return command

    def fail(self, error: LlmpqError) -> NoReturn:
        """Report an error and end this process at once, from any thread."""
        self.send("error", kind=type(error).__name__, message=str(error))
        _exit(error.exit_code)

    def report(self, error: BaseException) -> None:
        """Tell of an error that is no LlmpqError; this process's log has where it was raised."""
        traceback.print_exception(error)
        self.send("defect", message=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    @contextmanager
    def reporting(self, explain: Callable[[BaseException], LlmpqError | None] = lambda _: None) -> Iterator[None]:
        """Report an error of the block, then end the process; without one, end it with status 0.

        `explain` says of an error what the user is to read instead, or returns None.
        """
        try:
            yield
        except BaseException as error:
            if (explained := explain(error)) is not None:
                self.fail(explained)
            if isinstance(error, LlmpqError):
                self.fail(error)
            self.report(error)
            _exit(_DEFECT)
        _exit(0)

    def _read(self, commands: int) -> None:
        with os.fdopen(commands) as lines:
            for command in map(json.loads, lines):
                if command["command"] == "leave":
                    self._leave()
                else:
                    self.inbox.put(command)
        _exit(0)

    def _leave(self) -> None:
        self.leaving.set()
        before, self.inbox = self.inbox, queue.SimpleQueue()
        before.put(Left())

    def _beat(self) -> None:
        while True:
            # A parent that is busy elsewhere must not block this process: no beat while the pipe is full.
            if select.select([], [self._events], [], 0)[1]:
                self.send("heartbeat", **asdict(self.status))
            time.sleep(HEARTBEAT_S)


class _Sent(logging.Handler):
    """Has what the user is to be told said by the process that started this one."""

    def __init__(self, control: Control) -> None:
        super().__init__()
        self._control = control

    def emit(self, record: logging.LogRecord) -> None:
        self._control.send("warning", message=record.getMessage())


def main() -> None:
    """Run a worker module: `--control READ,WRITE MODULE ARGUMENTS...`, with the descriptors of its pipes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", required=True)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it ends this process and is named, as others are
    control = Control(arguments.control)
    with control.reporting():
        control.status.doing = "importing"
        module = importlib.import_module(arguments.module)
        control.status.doing = "starting"
        module.main(control, arguments.arguments)


def _exit(status: int) -> NoReturn:
    """End without running destructors, which may wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
