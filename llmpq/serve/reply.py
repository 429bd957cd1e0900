"""The server's answer to one request, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.runtime.completion import Completion
from llmpq.serve.answer_forms import Form, usage
from llmpq.serve.ask import Ask


class Reply:
    """What one request gets. A choice's `index` counts all answers: those to the first prompt, then the next one's."""

    def __init__(self, form: Form, ask: Ask, model: str, tokenizer: Tokenizer) -> None:
        self._form, self._ask, self._tokenizer = form, ask, tokenizer
        self._head = form.head(model)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """All answers."""
        choices = [
            {**self._form.text(each.text), **self._ending(index, each), "index": index}
            for index, each in enumerate(completions)
        ]
        return self._head | {"object": self._form.whole, "choices": choices, "usage": self._usage(completions)}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        opening = self._form.opening
        return [] if opening is None else [self._more(opening, index) for index in range(self._ask.sampling.n)]

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """What an answer's text goes on with."""
        return self._more(self._form.delta(text), index)

    def end(self, index: int, completion: Completion) -> dict[str, Any]:
        """An answer has ended. Its log-probabilities, which are known now, all come with its last piece."""
        return self._piece({**self._form.delta(""), **self._ending(index, completion), "index": index})

    def last(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self._ask.include_usage:
            return []
        return [self._head | {"object": self._form.piece, "choices": [], "usage": self._usage(completions)}]

    def _more(self, text: dict[str, Any], index: int) -> dict[str, Any]:
        return self._piece({**text, "logprobs": None, "index": index, "finish_reason": None})

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        later = {"usage": None} if self._ask.include_usage else {}
        return self._head | {"object": self._form.piece, "choices": [choice], **later}

    def _ending(self, index: int, completion: Completion) -> dict[str, Any]:
        found, after = completion.generated, self._ask.completions.after(index // self._ask.sampling.n)
        log_probs = self._form.log_probs(found.token_ids, found.log_probs, self._tokenizer, after)
        return {"logprobs": log_probs, "finish_reason": found.finish_reason}

    def _usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        made = sum(len(each.generated.token_ids) for each in completions)
        return usage(sum(map(len, self._ask.prompts)), made)
