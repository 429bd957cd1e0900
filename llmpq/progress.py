"""How long work says what it is at: a call with a text, and with the share that is done where that is known."""

from __future__ import annotations

from typing import Protocol


class Notify(Protocol):
    def __call__(self, text: str, share: float | None = None, /) -> None:
        """`share` is from 0 to 1."""


def silent(text: str, share: float | None = None, /) -> None:
    """A Notify that tells nobody."""
