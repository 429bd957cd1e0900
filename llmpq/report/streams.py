"""Standard output and error, where no reader, disk or terminal can do harm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from llmpq.spec.formatting import printable


class Stream(Console):
    """A console that ends no work: when its reader is gone or its disk is full, it goes silent.

    Control characters of what is printed, which may be a model's or a file's, are shown and not obeyed.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        self.problem: OSError | None = None  # why it went silent
        self.push_render_hook(_Shown())

    def flush(self) -> None:
        """Write what waits in the stream's buffer."""
        try:
            self.file.flush()
        except OSError as error:
            self._go_silent(error)

    def __exit__(self, *details: Any) -> None:
        try:
            super().__exit__(*details)  # all that is printed is written here
        except OSError as error:
            self._go_silent(error)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def _go_silent(self, error: OSError) -> None:
        self.problem = self.problem or error
        self.quiet = True
        with suppress(OSError, ValueError):  # without a file descriptor, nothing waits for one
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class _Shown(RenderHook):
    """Makes the text of everything that is printed printable."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(renderable) for renderable in renderables]


class _Printable:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


OUT = Stream()
ERR = Stream(stderr=True)
