"""Texts that end another, wherever in it they come, also across its pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Takes a text piece by piece, and gives what of it comes before the first of some texts.

    What may be the beginning of one is held back until it is known. `found`: whether one has come.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def add(self, piece: str, *, ends: bool = True) -> str:
        """What is certain by the next piece. Unless it `ends` the text, one that this piece completes is no end."""
        whole = self._held + piece
        if ends:
            # What is held back may have one within it that did not end the text when it came.
            starts = [whole.find(stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stop]
            first = min((start for start in starts if start >= 0), default=None)
            if first is not None:
                self.found, self._held = True, ""
                return whole[:first]
        kept = len(whole) - max((_begun(whole, stop) for stop in self._stop), default=0)
        self._held = whole[kept:]
        return whole[:kept]

    def end(self) -> str:
        """What is held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop`, but not all, stand at the end of a text."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
