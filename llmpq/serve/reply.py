"""Answers in OpenAI's form, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.runtime.completion import Completion
from llmpq.serve import log_prob_forms
from llmpq.serve.ask import Ask


class Reply(ABC):
    """What one request gets. A choice's `index` counts all answers: those to the first prompt, then the next one's."""

    prefix: str  # of ids
    whole_kind: str  # OpenAI's names of the objects
    piece_kind: str

    def __init__(self, ask: Ask, model: str, tokenizer: Tokenizer) -> None:
        self._ask, self._tokenizer = ask, tokenizer
        name = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """All answers."""
        choices = [
            {
                **self.answer(each.text),
                "logprobs": self.log_probs(each),
                "index": index,
                "finish_reason": each.generated.finish_reason,
            }
            for index, each in enumerate(completions)
        ]
        return self._head | {"object": self.whole_kind, "choices": choices, "usage": self._usage(completions)}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """What an answer's text goes on with."""
        return self._piece({**self.delta(text), "logprobs": None, "index": index, "finish_reason": None})

    def end(self, index: int, completion: Completion) -> dict[str, Any]:
        """An answer has ended. Its log-probabilities, which are known now, all come with its last piece."""
        ending = {"logprobs": self.log_probs(completion), "finish_reason": completion.generated.finish_reason}
        return self._piece({**self.delta(""), **ending, "index": index})

    def last(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self._ask.include_usage:
            return []
        return [self._head | {"object": self.piece_kind, "choices": [], "usage": self._usage(completions)}]

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._ask.include_usage else {}
        return self._head | {"object": self.piece_kind, "choices": [choice], **usage}

    def _usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        given = sum(map(len, self._ask.prompts))
        made = sum(len(each.generated.token_ids) for each in completions)
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}

    @abstractmethod
    def answer(self, text: str) -> dict[str, Any]:
        """The text of a choice."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """The text of a piece of it."""

    @abstractmethod
    def log_probs(self, completion: Completion) -> dict[str, Any] | None:
        """Those of an answer, if they are asked for."""


class ChatReply(Reply):
    """To /v1/chat/completions."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[dict[str, Any]]:
        opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._piece({**opening, "index": index}) for index in range(self._ask.sampling.n)]

    def answer(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def log_probs(self, completion: Completion) -> dict[str, Any] | None:
        found = completion.generated
        return log_prob_forms.of_chat(found.token_ids, found.log_probs, self._tokenizer)


class TextReply(Reply):
    """To /v1/completions."""

    prefix, whole_kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def answer(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def log_probs(self, completion: Completion) -> dict[str, Any] | None:
        found = completion.generated
        return log_prob_forms.of_text(found.token_ids, found.log_probs, self._tokenizer)
