"""The text of tokens as they come, in pieces that never split a character."""

from __future__ import annotations

from collections.abc import Sequence

from llmpq.checkpoint.stop_strings import StopStrings
from llmpq.checkpoint.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet


class TextStream:
    """Joined, its pieces are the text of all tokens (see Tokenizer.decode), or what of it comes before a stop string.

    A token is decoded beside the few before it that gave the last piece, so each costs the same however long the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, after: Sequence[int] = (), stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        """`after`: the tokens that those of the stream continue, if any.

        `stop`: the text ends before the first of these that a token completes, the first `min_tokens` tokens aside.
        """
        self._tokenizer = tokenizer
        self._before, self._waiting = list(after), list[int]()
        self._stop, self._min_tokens = StopStrings(stop), min_tokens
        self.num_tokens = 0  # until it was stopped

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: nothing follows."""
        return self._stop.found

    def add(self, token: int) -> str:
        """What the next token adds to the text; nothing while a character, or what may be a stop, is incomplete."""
        if self.stopped:
            return ""
        self.num_tokens += 1
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting, after=self._before)
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._before, self._waiting = self._waiting, []
        return self._stopping(text)

    def end(self) -> str:
        """What is left: incomplete characters, each as one replacement character."""
        if self.stopped:
            return ""
        text = self._stopping(self._tokenizer.decode(self._waiting, after=self._before))
        return text + self._stop.end()

    def _stopping(self, text: str) -> str:
        return self._stop.add(text, ends=self.num_tokens > self._min_tokens)
