"""Prompts, and lengths of prompts and answers, from a JSONL file or standard input."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeGuard

from llmpq.spec import UsageError
from llmpq.spec.json_file import read_file

_LENGTHS = (
    'expected a JSON object such as {"prompt": "some text", "completion": "some text"}, '
    '{"prompt_len": 80, "output_len": 20}, or {"conversations": [{"from": "human", "value": "some text"}, '
    '{"from": "gpt", "value": "some text"}]}'
)
_MOST_BYTES = 2**30  # of a file
_PROMPTS = (
    'expected a JSON object such as {"prompt": "some text"}, {"messages": [{"role": "user", "content": "some text"}]}, '
    "or one of those as the `body` of a line of an OpenAI batch"
)
# Fields that say how a prompt is continued, as fields of SamplingParams.
_SAMPLING = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "seed": "seed",
}
_WITHOUT_EFFECT = ("model", "messages", "prompt", "user", "metadata", "store", "stream")  # on what is generated


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given. With an `error`, which says why it is none, the rest is empty."""

    where: str  # for messages: "prompt 1", or file and line
    messages: tuple[dict[str, str], ...] = ()  # of a conversation, each with its role and content; or of the user alone
    continued: bool = False  # its only message is a text that the model goes on with, rather than answer it
    custom_id: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of SamplingParams, unchecked
    error: str | None = None

    @property
    def text(self) -> str:
        """What it is called by: its last message."""
        return self.messages[-1]["content"] if self.messages else ""


def given_prompt(text: str, where: str) -> Prompt:
    """A user's message."""
    error = "is not UTF-8 text" if not is_text(text) else None if text.strip() else "is empty"
    if error is not None:
        return Prompt(where, error=f"{where} {error}")
    return Prompt(where, ({"role": "user", "content": text},))


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a JSONL file, one to a line; "-" is standard input. A line that is none has its error.

    A line has a "prompt" or "messages", and may say how it is continued; in a line of an OpenAI batch its "body" does.
    Raises UsageError if the file cannot be read, or has no lines.
    """
    prompts = [_prompt(line, where) for where, line in _lines(source)]
    if not prompts:
        raise UsageError(f"{_name(source)} holds no prompts; {_PROMPTS} to a line")
    return prompts


def _prompt(line: bytes, where: str) -> Prompt:
    custom_id = None
    try:
        value = _object(line)
        custom_id = _custom_id(value)
        body = value.get("body", value)
        if not isinstance(body, dict):
            raise UsageError(_PROMPTS)
        if "body" in value:
            _check_body(body)
        continued = "body" in value and "messages" not in body
        messages = _messages(body)
        sampling = {_SAMPLING[key]: body[key] for key in body if key in _SAMPLING and body[key] is not None}
        return Prompt(where, messages, continued, custom_id, sampling)
    except UsageError as error:
        return Prompt(where, custom_id=custom_id, error=f"{where}: {error}")


def _custom_id(value: dict[str, Any]) -> str | None:
    custom_id = value.get("custom_id")
    if custom_id is not None and not is_text(custom_id):
        raise UsageError("its custom_id is no text")
    return custom_id


def _check_body(body: dict[str, Any]) -> None:
    """Raise UsageError if it asks for what is not done."""
    for key, value in body.items():
        nothing = value is None or value is False or value in (0, "", [], {}) or (key == "n" and value == 1)
        if key not in _SAMPLING and key not in _WITHOUT_EFFECT and not nothing:
            raise UsageError(f"{key} is not supported; leave it out")


def _messages(body: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The messages of a line; of a plain prompt one of the user."""
    given = body.get("messages")
    if given is None:
        given = [{"role": "user", "content": body.get("prompt")}]
    if not isinstance(given, list) or not given:
        raise UsageError(_PROMPTS)
    messages = []
    for message in given:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list):  # of parts, each a text
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(filter(is_text, parts)) if all(map(is_text, parts)) else None
        if not role or not is_text(role) or content is None or not is_text(content):
            raise UsageError(_PROMPTS)
        messages.append({"role": role, "content": content})
    if not messages[-1]["content"].strip():
        raise UsageError("its text is empty")
    return tuple(messages)


def read_lengths(source: str, tokens: Callable[[str, str], tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the answer of each line of a JSONL file; "-" is standard input.

    A line has both lengths, or both texts, or as in ShareGPT a conversation, of which the first question with an answer
    counts; `tokens` counts both texts' tokens. Raises UsageError, also if both together are more than `longest` tokens.
    """
    lengths = []
    for where, line in _lines(source):
        try:
            found = _lengths(_object(line), tokens)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        if found is None:
            raise UsageError(f"{where}: {_LENGTHS}")
        if sum(found) > longest:
            raise UsageError(
                f"{where}: {found[0]} tokens and {found[1]} more do not fit the model's context of "
                f"{longest}; leave the line out or shorten it"
            )
        lengths.append(found)
    if not lengths:
        raise UsageError(f"{_name(source)} holds no lengths; {_LENGTHS} to a line")
    return lengths


def _lengths(value: dict[str, Any], tokens: Callable[[str, str], tuple[int, int]]) -> tuple[int, int] | None:
    """Tokens of prompt and answer in one line; None if it has neither lengths nor texts."""
    given = value.get("prompt_len"), value.get("output_len")
    if any(length is not None for length in given):
        prompt_len, output_len = given
        if type(prompt_len) is int and type(output_len) is int and prompt_len > 0 and output_len > 0:
            return prompt_len, output_len
        return None
    prompt, answer = _first_pair(value.get("conversations")) or (value.get("prompt"), value.get("completion"))
    if prompt and answer and is_text(prompt) and is_text(answer):
        return tokens(prompt, answer)
    return None


def _first_pair(turns: Any) -> tuple[Any, Any] | None:
    """The first question of a conversation with the answer that follows it."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    pairs = ((a, b) for a, b in pairwise(turns) if (a.get("from"), b.get("from")) == ("human", "gpt"))
    return next(((a.get("value"), b.get("value")) for a, b in pairs), None)


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a string that can be encoded: no lone half of a surrogate pair, as JSON's escapes can make."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _name(source: str) -> str:
    return "standard input" if source == "-" else source


def _lines(source: str) -> Iterator[tuple[str, bytes]]:
    """Each line that is not empty, with its place for messages. Raises UsageError if there is no such file."""
    where = _name(source)
    data = sys.stdin.buffer.read() if source == "-" else read_file(source, _MOST_BYTES)
    # Not splitlines: JSON strings may hold other line ends. Editors on Windows begin a file with a byte order mark.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield f"{where}, line {number}", line


def _object(line: bytes) -> dict[str, Any]:
    """The object of a line; an empty one where there is another value or none. UsageError if it is not UTF-8."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        raise UsageError("it is not UTF-8 text") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, brackets of thousands of levels
        value = None
    return value if isinstance(value, dict) else {}
