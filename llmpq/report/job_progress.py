"""Progress of a job on stderr: a moving line on a terminal, elsewhere a line of text now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmpq.report.streams import ERR
from llmpq.spec.formatting import format_duration

_INTERVAL_S = 30.0


class JobProgress:
    """Counts prompts that are done, of `total` if that is known, and their tokens. A context manager.

    `add` may be called from any thread. `done` of them were done before.
    """

    def __init__(
        self,
        done: int,
        total: int | None,
        quiet: bool = False,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._before = self._done = done
        self._total, self._quiet, self._interval_s, self._clock = total, quiet, interval_s, clock
        self._began_s = self._told_s = clock()
        self.tokens = 0
        self._lock = threading.Lock()
        self._shown = ExitStack()
        self._bar: Progress | None = None
        if not quiet and ERR.is_terminal and not ERR.is_dumb_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24))
            # Drawing takes time from the cores that stages run on, so it is done seldom.
            self._bar = Progress(*columns, TimeElapsedColumn(), console=ERR, refresh_per_second=4, transient=True)
            self._task = self._bar.add_task(self.text, total=total, completed=done)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._began_s

    @property
    def text(self) -> str:
        """As "12 of 1,000 prompts, 31.4 tokens/s, 5 min left"."""
        of_all = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._done:,}{of_all} prompts"]
        new, seconds = self._done - self._before, self.seconds
        if new and seconds > 0:
            parts.append(f"{self.tokens / seconds:,.1f} tokens/s")
            if self._total is not None:
                parts.append(f"{format_duration(max(0, self._total - self._done) * seconds / new)} left")
        return ", ".join(parts)

    def add(self, tokens: int) -> None:
        """One more prompt is done, with so many new tokens."""
        with self._lock:
            self._done += 1
            self.tokens += tokens
            if self._bar is not None:
                self._bar.update(self._task, description=self.text, completed=self._done)
            elif not self._quiet and self._clock() - self._told_s >= self._interval_s:
                self._told_s = self._clock()
                ERR.print(self.text, soft_wrap=True)

    def __enter__(self) -> JobProgress:
        if self._bar is not None:
            self._shown.enter_context(self._bar)
        return self

    def __exit__(self, *details: object) -> None:
        self._shown.close()
