"""What became of a prompt, as lines of --output: for a line of an OpenAI batch in OpenAI's form, else as Outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.cli.prompts import Prompt
from llmpq.serve.answer_forms import CHAT, TEXT, Form, said, usage
from llmpq.serve.tool_calls import Tools
from llmpq.spec import Output


def results(
    prompt: Prompt,
    outputs: Sequence[Output],
    model: str,
    tokenizer: Tokenizer,
    prompt_tokens: int = 0,
    after: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """The lines of a prompt with its answers, or its error.

    `model` is the name of what answered, `after` the tokens that the text of answers goes on from.
    """
    if prompt.url is None:
        return [output.to_dict() for output in outputs]
    index, error = outputs[0].index, outputs[0].error
    if error is not None:
        refused = {"code": "invalid_request", "message": error}
        return [{"id": str(index), "custom_id": prompt.custom_id, "response": None, "error": refused}]
    form = CHAT if prompt.url == CHAT.url else TEXT
    body = form.head(model) | {
        "object": form.whole,
        "choices": [_choice(output, form, tokenizer, after, prompt.tools) for output in outputs],
        "usage": usage(prompt_tokens, sum(len(output.token_ids) for output in outputs)),
    }
    number = body["id"].removeprefix(form.id_prefix)
    response = {"status_code": 200, "request_id": f"req{number}", "body": body}
    return [{"id": str(index), "custom_id": prompt.custom_id, "response": response, "error": None}]


def _choice(output: Output, form: Form, tokenizer: Tokenizer, after: Sequence[int], tools: Tools) -> dict[str, Any]:
    """An answer. Beside what OpenAI has, what repeats a sample and what was asked of the prompt's tokens."""
    choice = said(form, output.text, output.finish_reason, tools.names) | {"index": output.choice}
    choice["logprobs"] = form.log_probs(output.token_ids, output.log_probs, tokenizer, after)
    if output.seed is not None:
        choice["seed"] = output.seed
    if output.prompt_log_probs is not None:
        choice["prompt_log_probs"] = [each.to_dict() for each in output.prompt_log_probs]
    return choice
