"""Answers in OpenAI's two forms, of a conversation and of a text: the server's, and those of lines of a batch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llmpq.serve.tool_calls import read_calls
from llmpq.spec import LogProb

if TYPE_CHECKING:
    from llmpq.checkpoint.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # of a token that is a part of a character

Text = Callable[[int], str]  # of a token, as it comes in its place
LogProbs = Callable[[Sequence[int], Sequence[LogProb], Sequence[Text]], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """What OpenAI calls things in answers at `url`, and how a choice has its text, whole and in pieces of a stream."""

    url: str
    id_prefix: str
    whole: str  # names of the objects
    piece: str
    text: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None  # what the stream of a choice begins with
    _log_probs: LogProbs

    def head(self, model: str) -> dict[str, Any]:
        """What a new answer of a model begins with, and each piece of it."""
        name = f"{self.id_prefix}-{secrets.token_hex(12)}"
        return {"id": name, "created": int(time.time()), "model": model}

    def log_probs(
        self, token_ids: Sequence[int], found: Sequence[LogProb] | None, tokenizer: Tokenizer, after: Sequence[int]
    ) -> dict[str, Any] | None:
        """Those of a choice's tokens, whose text goes on from the tokens `after`; None if they were not asked for."""
        if found is None:
            return None
        before = [after[-1:], *([token] for token in token_ids[:-1])]
        texts = [partial(_text, tokenizer, tuple(last)) for last in before]
        return self._log_probs(token_ids, found, texts)


def said(form: Form, text: str, reason: str, tools: Collection[str]) -> dict[str, Any]:
    """A choice's text and why it has ended, with the calls of tools that the text holds, if tools may be called."""
    beside, calls = read_calls(text, tools) if tools else (text, [])
    if not calls:
        return {**form.text(text), "finish_reason": reason}
    message = {"role": "assistant", "content": beside or None, "refusal": None}
    told = {**message, "tool_calls": [call.to_dict() for call in calls]}
    return {"message": told, "finish_reason": reason_beside(reason, len(calls))}


def reason_beside(reason: str, calls: int) -> str:
    """Why an answer with so many calls of tools has ended."""
    return "tool_calls" if calls and reason == "stop" else reason


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _text(tokenizer: Tokenizer, after: Sequence[int], token: int) -> str:
    return tokenizer.decode([token], after=after)


def _of_chat(token_ids: Sequence[int], found: Sequence[LogProb], texts: Sequence[Text]) -> dict[str, Any]:
    def told(text: str, log_prob: float) -> dict[str, Any]:
        # Of a part of a character, the text does not tell the bytes.
        return {"token": text, "logprob": log_prob, "bytes": None if _INCOMPLETE in text else list(text.encode())}

    content = [
        {**told(text(token), each.log_prob), "top_logprobs": [told(text(of), p) for of, p in _likeliest(each)]}
        for token, each, text in zip(token_ids, found, texts, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_text(token_ids: Sequence[int], found: Sequence[LogProb], texts: Sequence[Text]) -> dict[str, Any]:
    tokens = [text(token) for token, text in zip(token_ids, texts, strict=True)]
    likeliest = [
        {text(token): log_prob for token, log_prob in reversed(_likeliest(each))}  # of equal texts the likeliest
        for each, text in zip(found, texts, strict=True)
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [each.log_prob for each in found],
        "top_logprobs": likeliest,
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }


def _likeliest(found: LogProb) -> list[tuple[int, float]]:
    return list(zip(found.top_ids, found.top_log_probs, strict=True))


CHAT = Form(
    url="/v1/chat/completions",
    id_prefix="chatcmpl",
    whole="chat.completion",
    piece="chat.completion.chunk",
    text=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text: {"delta": {"content": text} if text else {}},
    opening={"delta": {"role": "assistant", "content": ""}},
    _log_probs=_of_chat,
)
TEXT = Form(
    url="/v1/completions",
    id_prefix="cmpl",
    whole="text_completion",
    piece="text_completion",
    text=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    opening=None,
    _log_probs=_of_text,
)
