"""Progress on stderr: a moving line on a terminal, elsewhere one line of text for each piece of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from llmpq.progress import Notify, silent
from llmpq.report.streams import ERR
from llmpq.spec.formatting import printable


@contextmanager
def progress(quiet: bool = False) -> Iterator[Notify]:
    """Show what is being done, and its share where that is known; nothing if quiet."""
    if quiet:
        yield silent
    elif ERR.is_terminal and not ERR.is_dumb_terminal:
        with _moving_line() as notify:
            yield notify
    else:
        yield _lines()


@contextmanager
def _moving_line() -> Iterator[Notify]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    # Drawing takes time from the cores that stages run on, so it is done seldom.
    with Progress(*columns, console=ERR, refresh_per_second=4, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def notify(text: str, share: float | None = None, /) -> None:
            text = printable(text)
            if text != bar.tasks[0].description:
                bar.reset(task, description=text, total=None)
            if share is not None:
                bar.update(task, total=1.0, completed=share)

        yield notify


def _lines() -> Notify:
    last = ""

    def notify(text: str, share: float | None = None, /) -> None:
        nonlocal last
        if text != last:
            ERR.print(f"{text} ...", soft_wrap=True)
        last = text

    return notify
