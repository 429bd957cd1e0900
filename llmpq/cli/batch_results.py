"""What became of a prompt, as lines of --output: for a line of an OpenAI batch in OpenAI's form, else as Outputs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.cli.prompts import Prompt
from llmpq.serve import log_prob_forms
from llmpq.spec import Output

_CHAT = "/v1/chat/completions"


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
    told = log_prob_forms.of_chat if chat else log_prob_forms.of_text
    choice["logprobs"] = told(output.token_ids, output.log_probs, tokenizer)
    if output.seed is not None:
        choice["seed"] = output.seed
    if output.prompt_log_probs is not None:
        choice["prompt_log_probs"] = [each.to_dict() for each in output.prompt_log_probs]
    return choice
