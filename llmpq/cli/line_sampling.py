"""What a line of prompts says of how it is continued: fields of SamplingParams by their names, and by OpenAI's."""

from __future__ import annotations

from typing import Any

from llmpq.spec import UsageError

_OWN = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "ignore_eos", "min_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "bad_words_ids"),
    *("stop", "stop_token_ids", "n", "best_of", "logprobs", "prompt_logprobs"),
)
_TEXTS = ("stop", "bad_words")  # a list of them, or one
SAMPLING_FIELDS = (*_OWN, "max_completion_tokens", "top_logprobs")


def sampling_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that a line has, unchecked. Raises UsageError for log-probabilities in no form.

    null asks for nothing.
    """
    fields = {name: body[name] for name in _OWN if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        fields["max_tokens"] = body["max_completion_tokens"]
    for name in _TEXTS:
        if isinstance(fields.get(name), str):
            fields[name] = [fields[name]]
    # A conversation has whether they are told, and of how many tokens beside; a text only that number.
    top = body.get("top_logprobs")
    told = fields.get("logprobs")
    if top and told is not True:
        raise UsageError("top_logprobs takes logprobs; set it to true, or leave both out")
    if told is True:
        fields["logprobs"] = top or 0
    elif told is False:
        del fields["logprobs"]
    return fields
