"""The server's answer to one request, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.runtime.completion import Completion
from llmpq.serve.answer_forms import Form, reason_beside, said, usage
from llmpq.serve.ask import Ask
from llmpq.serve.tool_calls import Call, CallReader


class Reply:
    """What one request gets. A choice's `index` counts all answers: those to the first prompt, then the next one's."""

    def __init__(self, form: Form, ask: Ask, model: str, tokenizer: Tokenizer) -> None:
        self._form, self._ask, self._tokenizer = form, ask, tokenizer
        self._readers = [CallReader(ask.tools) for _ in ask.prompts * ask.sampling.n] if ask.tools else []
        self._head = form.head(model)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """All answers."""
        choices = [self._choice(index, each) for index, each in enumerate(completions)]
        return self._head | {"object": self._form.whole, "choices": choices, "usage": self._usage(completions)}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        opening = self._form.opening
        return [] if opening is None else [self._more(opening, index) for index in range(self._ask.sampling.n)]

    def pieces(self, index: int, text: str) -> list[dict[str, Any]]:
        """What an answer's text goes on with."""
        found = self._readers[index].add(text) if self._readers else [text]
        return self._deltas(index, found)

    def end(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """An answer has ended. Its log-probabilities, which are known now, all come with its last piece."""
        left = self._deltas(index, self._readers[index].end()) if self._readers else []
        calls = self._readers[index].found if self._readers else 0
        ending = {"finish_reason": reason_beside(completion.generated.finish_reason, calls)}
        told = {**self._form.delta(""), "logprobs": self._log_probs(index, completion), **ending, "index": index}
        return [*left, self._piece(told)]

    def last(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self._ask.include_usage:
            return []
        return [self._head | {"object": self._form.piece, "choices": [], "usage": self._usage(completions)}]

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        answer = said(self._form, completion.text, completion.generated.finish_reason, self._ask.tools)
        return {**answer, "logprobs": self._log_probs(index, completion), "index": index}

    def _deltas(self, index: int, found: Sequence[str | Call]) -> list[dict[str, Any]]:
        """Of what a reader has read last."""
        return [
            self._more(
                self._form.delta(each)
                if isinstance(each, str)
                else {"delta": {"tool_calls": [{"index": each.index, **each.to_dict()}]}},
                index,
            )
            for each in found
        ]

    def _more(self, text: dict[str, Any], index: int) -> dict[str, Any]:
        return self._piece({**text, "logprobs": None, "index": index, "finish_reason": None})

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        later = {"usage": None} if self._ask.include_usage else {}
        return self._head | {"object": self._form.piece, "choices": [choice], **later}

    def _log_probs(self, index: int, completion: Completion) -> dict[str, Any] | None:
        found, after = completion.generated, self._ask.completions.after(index // self._ask.sampling.n)
        return self._form.log_probs(found.token_ids, found.log_probs, self._tokenizer, after)

    def _usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        made = sum(len(each.generated.token_ids) for each in completions)
        return usage(sum(map(len, self._ask.prompts)), made)
