"""Asks a process of its own, which may hang, crash or never come back: that is an answer, too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from llmpq.runtime.launch import import_path, signal_name
from llmpq.spec import one_line

_ENDING_S = 0.5  # for a process that was killed; one that waits for its hardware stays, and is left behind
_READING_S = 1.0  # what a process printed that has ended
# As launch.py starts workers: without the current folder in the path.
_MAIN = (
    "import sys; sys.path.remove('') if '' in sys.path else None; from llmpq.doctor import questions; questions.main()"
)


@dataclass(frozen=True)
class Answer:
    """What came back: the fields of a JSON object; or why nothing did."""

    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    late: bool = False  # nothing came in time, so what was asked about may work


class Probe:
    """A process that has been asked something. A context manager; its end is the process's."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """`environment`: variables to change."""
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": import_path(), **(environment or {})},
            start_new_session=True,  # so that what it has started ends with it
        )

    def text(self, until: float) -> Answer:
        """What it printed, under "text". `until` is one of time.monotonic().

        An answer that was there in time is read after it, too: others may have been waited for meanwhile.
        """
        left = until - time.monotonic()
        if self._process.poll() is not None:
            left = max(left, _READING_S)
        try:
            out, err = self._process.communicate(timeout=max(0.0, left))
        except subprocess.TimeoutExpired:
            self.end()
            return Answer(problem=f"no answer within {time.monotonic() - self._started:.0f} s", late=True)
        status = self._process.returncode
        if status < 0:
            return Answer(problem=f"the process that was to find out was ended by {signal_name(-status)}")
        if status > 0:
            lines = (err or out).decode(errors="replace").strip().splitlines()
            return Answer(problem=one_line(lines[-1] if lines else f"ended with status {status}"))
        return Answer({"text": out.decode(errors="replace")})

    def answer(self, until: float) -> Answer:
        """The JSON object in the last line that it printed; libraries may print before."""
        printed = self.text(until)
        if printed.problem:
            return printed
        try:
            values = json.loads(printed.values["text"].strip().splitlines()[-1])
        except (ValueError, IndexError):
            return Answer(problem="the process that was to find out has ended without an answer")
        return Answer(problem=values["problem"]) if "problem" in values else Answer(values)

    def end(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=_ENDING_S)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def asking(question: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Probe:
    """Ask one of questions.py."""
    return Probe([sys.executable, "-c", _MAIN, question, *arguments], environment)
