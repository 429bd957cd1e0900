"""What a body in OpenAI's form says: messages of a conversation, and fields that have no effect or are not known."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

from llmpq.serve.body_sampling import SAMPLING_FIELDS
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

if TYPE_CHECKING:
    from llmpq.checkpoint.model_files import Model

Message = dict[str, Any]  # with its "role" and its "content", a text; the rest is for the chat template

FORMS = (
    'expected a JSON object such as {"prompt": "some text"}, {"messages": [{"role": "user", "content": "some text"}]} '
    'or {"token_ids": [1, 2]}'
)
MESSAGES = 'expected {"messages": [{"role": "user", "content": "some text"}]}'
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that have no effect on what is generated.
_WITHOUT_EFFECT = (
    *("model", "user", "metadata", "store", "stream", "stream_options"),
    *("safety_identifier", "prompt_cache_key"),
)


def refuse_unknown(body: dict[str, Any], known: Collection[str]) -> None:
    """Raise UsageError if a body asks for something by a field that is neither `known` nor one of sampling."""
    for key, asked in body.items():
        nothing = asked is None or asked is False or asked in (0, "", [], {})
        if key not in known and key not in SAMPLING_FIELDS and key not in _WITHOUT_EFFECT and not nothing:
            raise UsageError(f"{key[:100]} is not supported; leave it out")


def read_messages(given: Any, forms: str = FORMS) -> tuple[Message, ...]:
    """A conversation. Raises UsageError, for what is none with the `forms` that are read."""
    if not isinstance(given, list) or not given:
        raise UsageError(forms)
    messages = tuple(_message(each, forms) for each in given)
    if messages[-1]["role"] != "tool":  # whose result may be nothing
        not_blank(messages[-1]["content"], "the last message")
    return messages


def not_blank(text: str, name: str = "its text") -> str:
    """The same text. Raises UsageError."""
    if not text.strip():
        raise UsageError(f"{name} is empty")
    return text


def _message(given: Any, forms: str) -> Message:
    """A message as a chat template takes it: the parts of its content are one text, calls of tools have objects."""
    if not isinstance(given, dict):
        raise UsageError(forms)
    role, content, calls = given.get("role"), given.get("content"), given.get("tool_calls")
    if is_text(role) and role not in _ROLES:
        raise UsageError(f"there is no role {shown(role)}; it is one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part, forms) for part in content)
    elif content is None and calls:
        content = ""
    if not is_text(role) or not is_text(content):
        raise UsageError(forms)
    message = {**given, "content": content}
    if calls is not None:
        message["tool_calls"] = _with_objects(calls)
    return message


def _part(part: Any, forms: str) -> str:
    """The text of a part of a message's content."""
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if is_text(kind) and kind != "text":
        raise UsageError(f"a part of its content is of type {shown(kind)}, and only text is read")
    text = part.get("text") if isinstance(part, dict) else None
    if not is_text(text):
        raise UsageError(forms)
    return text


def _with_objects(calls: Any) -> list[Any]:
    """The same calls of tools. Arguments are JSON as OpenAI sends them; templates take what it stands for."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UsageError("its tool_calls are no list of objects")
    read = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
            except (ValueError, RecursionError):
                raise UsageError("the arguments of a call of a tool are no JSON") from None
        read.append(call)
    return read


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a string that can be encoded: no lone half of a surrogate pair, as JSON's escapes can make."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def check_size(texts: Iterable[str], where: str, model: Model) -> None:
    """Raise UsageError if the beginning of a text alone has twice the tokens that the model's context has room for.

    A long text takes its tokenizer minutes. `where` is what the message calls it.
    """
    room = model.spec.max_positions
    for text in texts:
        beginning = text[: 16 * room]
        if len(text) > len(beginning) and len(model.tokenizer.encode(beginning)) > 2 * room:
            raise UsageError(
                f"{where} has {len(text)} characters, far more than the context of {model.spec.name} of {room} tokens "
                "has room for; shorten it"
            )
