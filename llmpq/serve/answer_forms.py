"""Answers in OpenAI's two forms, of a conversation and of a text: the server's, and those of lines of a batch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llmpq.spec import LogProb

if TYPE_CHECKING:
    from llmpq.checkpoint.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # of a token that is a part of a character

LogProbs = Callable[[Sequence[int], Sequence[LogProb], "Tokenizer"], dict[str, Any]]


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
        self, token_ids: Sequence[int], found: Sequence[LogProb] | None, tokenizer: Tokenizer
    ) -> dict[str, Any] | None:
        """Those of a choice's tokens; None if they were not asked for."""
        return None if found is None else self._log_probs(token_ids, found, tokenizer)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _of_chat(token_ids: Sequence[int], found: Sequence[LogProb], tokenizer: Tokenizer) -> dict[str, Any]:
    def told(token: int, log_prob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        # Of a part of a character, the text does not tell the bytes.
        return {"token": text, "logprob": log_prob, "bytes": None if _INCOMPLETE in text else list(text.encode())}

    content = [
        {**told(token, each.log_prob), "top_logprobs": [told(*pair) for pair in _likeliest(each)]}
        for token, each in zip(token_ids, found, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_text(token_ids: Sequence[int], found: Sequence[LogProb], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [tokenizer.decode([token]) for token in token_ids]
    return {
        "tokens": tokens,
        "token_logprobs": [each.log_prob for each in found],
        "top_logprobs": [{tokenizer.decode([token]): p for token, p in _likeliest(each)} for each in found],
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
