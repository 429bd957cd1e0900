"""The side of bench.end_to_end that starts contenders and asks them: what one says, or why it is missing."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any

from bench import process_tree
from bench.end_to_end.child import Job
from bench.machine import ROOT

PATIENCE = 1800.0  # seconds for one answer
_EXIT_S = 10.0


class ContenderError(RuntimeError):
    """A contender cannot go on; the message says why in one line."""


class Child:
    """A contender's process, ready once its model is loaded. A context manager, which ends it.

    Between two questions it is stopped, with all that it has started.

    Raises ContenderError, as all its methods do, if it is missing, dies or says that it failed.
    """

    def __init__(self, module: str, job: Job, python: str = sys.executable, environment: dict[str, str] | None = None):
        count = str(job.threads)
        threads = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 `close` closes it
        try:
            self._process = subprocess.Popen(
                [python, "-m", "bench.end_to_end.child", module, json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=ROOT,
                start_new_session=True,  # what an engine starts can be ended with it
                env=os.environ | threads | {"PYTHONPATH": path} | (environment or {}),
            )
        except OSError as error:
            self._log.close()
            raise ContenderError(f"{python}: {error.strerror}") from None
        self._unread = b""
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        process_tree.stop(self._process.pid)

    def ask(self, do: str, **arguments: Any) -> Any:
        """What its Runner's method `do` returns."""
        assert self._process.stdin is not None
        with process_tree.awake(self._process.pid):
            try:
                self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise ContenderError(self._death()) from None
            return self._answer()

    def _answer(self) -> Any:
        line = self._line(time.monotonic() + PATIENCE)
        try:
            answer = json.loads(line)
        except ValueError:
            raise ContenderError(f"answered {line[:80]!r}") from None
        if isinstance(answer, dict) and "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContenderError(f"gave no answer for {PATIENCE:.0f} s")
            some = os.read(descriptor, 2**16)
            if not some:
                raise ContenderError(self._death())
            self._unread += some
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> str:
        """Its exit status, and the last line it left."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["no message"]
        return f"ended with {self._process.returncode}: {lines[-1][:200]}"

    def close(self) -> None:
        """End the commands, and so the process; what does not end, or is left behind, is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        process_tree.go_on(self._process.pid)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
