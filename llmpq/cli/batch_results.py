"""What became of a prompt, as lines of --output: for a line of an OpenAI batch in OpenAI's form, else as Outputs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.cli.prompts import Prompt
from llmpq.spec import LogProb, Output

_CHAT = "/v1/chat/completions"
_INCOMPLETE = "\ufffd"  # of a token that is a part of a character


def results(
    prompt: Prompt, outputs: Sequence[Output], model: str, tokenizer: Tokenizer, prompt_tokens: int
) -> list[dict[str, Any]]:
    """The lines of a prompt with its answers, or its error; `model` is the name of what answered."""
    if prompt.url is None:
        return [output.to_dict() for output in outputs]
    index, error = outputs[0].index, outputs[0].error
    if error is not None:
        refused = {"code": "invalid_request", "message": error}
        return [{"id": str(index), "custom_id": prompt.custom_id, "response": None, "error": refused}]
    made = sum(len(output.token_ids) for output in outputs)
    chat = prompt.url == _CHAT
    number = secrets.token_hex(12)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(output, chat, tokenizer) for output in outputs],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": made,
            "total_tokens": prompt_tokens + made,
        },
    }
    response = {"status_code": 200, "request_id": f"req-{number}", "body": body}
    return [{"id": str(index), "custom_id": prompt.custom_id, "response": response, "error": None}]


def _choice(output: Output, chat: bool, tokenizer: Tokenizer) -> dict[str, Any]:
    """An answer. Beside what OpenAI has, what repeats a sample and what was asked of the prompt's tokens."""
    choice: dict[str, Any] = {"index": output.choice, "finish_reason": output.finish_reason}
    if chat:
        choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
    else:
        choice["text"] = output.text
    choice["logprobs"] = (_of_chat if chat else _of_text)(output, tokenizer)
    if output.seed is not None:
        choice["seed"] = output.seed
    if output.prompt_log_probs is not None:
        choice["prompt_log_probs"] = [each.to_dict() for each in output.prompt_log_probs]
    return choice


def _of_chat(output: Output, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The log-probabilities of an answer of a conversation, if they were asked for."""

    def told(token: int, log_prob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        # Of a part of a character, the text does not tell the bytes.
        return {"token": text, "logprob": log_prob, "bytes": None if _INCOMPLETE in text else list(text.encode())}

    if output.log_probs is None:
        return None
    content = [
        {**told(token, each.log_prob), "top_logprobs": [told(*pair) for pair in _likeliest(each)]}
        for token, each in zip(output.token_ids, output.log_probs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_text(output: Output, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The log-probabilities of a text that was continued, if they were asked for."""
    if output.log_probs is None:
        return None
    tokens = [tokenizer.decode([token]) for token in output.token_ids]
    return {
        "tokens": tokens,
        "token_logprobs": [each.log_prob for each in output.log_probs],
        "top_logprobs": [{tokenizer.decode([token]): p for token, p in _likeliest(each)} for each in output.log_probs],
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }


def _likeliest(found: LogProb) -> list[tuple[int, float]]:
    return list(zip(found.top_ids, found.top_log_probs, strict=True))
