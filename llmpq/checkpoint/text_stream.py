"""The text of tokens as they come, in pieces that never split a character."""

from __future__ import annotations

from collections.abc import Sequence

from llmpq.checkpoint.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet


class TextStream:
    """Joined, its pieces are the text of all tokens (see Tokenizer.decode).

    A token is decoded beside the few before it that gave the last piece, so each costs the same however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, after: Sequence[int] = ()) -> None:
        """`after`: the tokens that those of the stream continue, if any."""
        self._tokenizer = tokenizer
        self._before, self._waiting = list(after), list[int]()

    def add(self, token: int) -> str:
        """What the next token adds to the text; nothing while a character is incomplete."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting, after=self._before)
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """What is left: incomplete characters, each as one replacement character."""
        return self._tokenizer.decode(self._waiting, after=self._before)
