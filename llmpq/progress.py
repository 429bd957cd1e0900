"""How long work tells what it is doing: it calls a Notify."""

from __future__ import annotations

import functools
import logging
from itertools import count
from typing import Protocol


class Notify(Protocol):
    def __call__(self, text: str, share: float | None = None, /) -> None:
        """Show what is being done, and the share of it that is done, from 0 to 1, where that is known."""


class OnStep(Protocol):
    def __call__(self, step: object = None, /) -> None:
        """One more step is done."""


def silent(text: str, share: float | None = None, /) -> None:
    """A Notify that shows nothing."""


def counted(notify: Notify, text: str, total: int) -> OnStep:
    """Begin work of `total` steps; call the value once for each that is done."""
    notify(text, 0.0)
    done = count(1)
    return lambda step=None, /: notify(text, next(done) / total)


@functools.cache
def warn_once(text: str) -> None:
    """Tell the user something that does not end the work, by Python's logging; the same text only once."""
    logging.getLogger("llmpq").warning(text)
