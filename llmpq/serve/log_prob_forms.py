"""Log-probabilities of an answer's tokens in OpenAI's forms, each None if they were not asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.spec import LogProb

_INCOMPLETE = "\ufffd"  # of a token that is a part of a character


def of_chat(token_ids: Sequence[int], found: Sequence[LogProb] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Those of an answer of a conversation."""

    def told(token: int, log_prob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        # Of a part of a character, the text does not tell the bytes.
        return {"token": text, "logprob": log_prob, "bytes": None if _INCOMPLETE in text else list(text.encode())}

    if found is None:
        return None
    content = [
        {**told(token, each.log_prob), "top_logprobs": [told(*pair) for pair in _likeliest(each)]}
        for token, each in zip(token_ids, found, strict=True)
    ]
    return {"content": content, "refusal": None}


def of_text(token_ids: Sequence[int], found: Sequence[LogProb] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Those of a text that was continued."""
    if found is None:
        return None
    tokens = [tokenizer.decode([token]) for token in token_ids]
    return {
        "tokens": tokens,
        "token_logprobs": [each.log_prob for each in found],
        "top_logprobs": [{tokenizer.decode([token]): p for token, p in _likeliest(each)} for each in found],
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }


def _likeliest(found: LogProb) -> list[tuple[int, float]]:
    return list(zip(found.top_ids, found.top_log_probs, strict=True))
