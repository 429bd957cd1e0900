"""How a body in OpenAI's form, or a line, is to be continued: fields of SamplingParams by their names and OpenAI's."""

from __future__ import annotations

import json
from typing import Any

from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

_OWN = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "ignore_eos", "min_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "bad_words_ids"),
    *("stop", "stop_token_ids", "n", "best_of", "logprobs", "prompt_logprobs"),
    *("json_schema", "regex", "choices"),
)
_TEXTS = ("stop", "bad_words", "choices")  # a list of them, or one
OPENAI_TEMPERATURE = 1.0  # where a request gives none
SAMPLING_FIELDS = (*_OWN, "max_completion_tokens", "top_logprobs", "response_format")
_ANY_OBJECT = {"type": "object"}  # of response_format's json_object
_RESPONSE_FORMAT = (
    'response_format is one of {"type": "text"}, {"type": "json_object"} and '
    '{"type": "json_schema", "json_schema": {"name": "a_name", "schema": {}}}'
)


def sampling_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that a body has, unchecked. Raises UsageError for log-probabilities in no form.

    null asks for nothing, and leaves what the command line says; "logprobs": false takes that back.
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
    if top is not None and (type(top) is not int or top < 0):
        raise UsageError(f"top_logprobs is {shown(top)}, expected a number of tokens")
    if top and told is not True:
        raise UsageError("top_logprobs takes logprobs; set it to true, or leave both out")
    if isinstance(told, bool):
        fields["logprobs"] = (top or 0) if told else None
    schema = _response_schema(body.get("response_format"))
    if schema is not None:
        if fields.get("json_schema") is not None:
            raise UsageError("there are both response_format and json_schema; leave out one of them")
        fields["json_schema"] = schema
    if isinstance(fields.get("json_schema"), (dict, bool)):
        fields["json_schema"] = json.dumps(fields["json_schema"])
    return fields


def _response_schema(given: Any) -> Any:
    """The schema that a response_format asks for; None for text. Raises UsageError.

    "strict" is whether an answer must keep to it, and here all do.
    """
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    described = given.get("json_schema") if isinstance(given, dict) else None
    if kind != "json_schema" or not isinstance(described, dict):
        raise UsageError(f"{_RESPONSE_FORMAT}; it is {shown(given)}")
    schema = described.get("schema")
    return _ANY_OBJECT if schema is None else schema


def openai_temperature(fields: dict[str, Any]) -> float:
    """Of a line of an OpenAI batch with these fields, if nothing gives one: OpenAI's for several answers, else 0."""
    several = any(fields.get(name) not in (None, 1) for name in ("n", "best_of"))
    return OPENAI_TEMPERATURE if several else 0.0
