"""Prompts, and lengths of prompts and answers, from a JSONL file or standard input."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, BinaryIO

from llmpq.serve.answer_forms import CHAT, TEXT
from llmpq.serve.body_sampling import openai_temperature, sampling_fields
from llmpq.serve.messages import FORMS, Message, is_text, not_blank, read_messages, refuse_unknown
from llmpq.serve.tool_calls import Tools, read_tools
from llmpq.spec import UsageError
from llmpq.spec.json_file import opened
from llmpq.spec.ranges import shown

_LENGTHS = (
    'expected a JSON object such as {"prompt": "some text", "completion": "some text"}, '
    '{"prompt_len": 80, "output_len": 20}, or {"conversations": [{"from": "human", "value": "some text"}, '
    '{"from": "gpt", "value": "some text"}]}'
)
_MOST_BYTES = 2**28  # of a line
_PROMPTS = f"{FORMS}, one of those as the `body` of a line of an OpenAI batch, or a JSON string"
_PROMPT_FIELDS = ("messages", "prompt", "text", "token_ids")
_TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_URLS = CHAT.url, TEXT.url


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given. With an `error`, which says why it is none, the rest is empty."""

    where: str  # for messages: "prompt 1", or file and line
    messages: tuple[Message, ...] = ()  # of a conversation; or of the user alone
    token_ids: tuple[int, ...] = ()  # in place of messages
    continued: bool = False  # the model goes on with it, rather than answer it
    custom_id: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of SamplingParams, unchecked
    default_temperature: float = 0.0  # where these give none and the command line leaves it at 0
    error: str | None = None
    tools: Tools = field(default_factory=Tools)  # that a line of an OpenAI batch offers
    url: str | None = None  # that a line of an OpenAI batch asks; its result has OpenAI's form

    @property
    def text(self) -> str:
        """What it is called by: its last message, or its token ids."""
        return self.messages[-1]["content"] if self.messages else " ".join(map(str, self.token_ids))


def given_prompt(text: str, where: str) -> Prompt:
    """A user's message."""
    error = "is not UTF-8 text" if not is_text(text) else None if text.strip() else "is empty"
    if error is not None:
        return Prompt(where, error=f"{where} {error}")
    return Prompt(where, ({"role": "user", "content": text},))


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a JSONL file, one to a line; "-" is standard input. A line that is none has its error.

    A line is a text, or has a text as "prompt" or "text", or "messages", or "token_ids", and may say how it is
    continued; in a line of an OpenAI batch its "body" does. Raises UsageError if the file cannot be read, or has no
    lines.
    """
    prompts = [read_prompt(line, where) for where, line in read_lines(source)]
    if not prompts:
        raise UsageError(no_prompts(source))
    return prompts


def no_prompts(source: str) -> str:
    """What to say of a file without any."""
    return f"{source_name(source)} holds no prompts; {_PROMPTS} to a line"


def read_prompt(line: bytes, where: str) -> Prompt:
    """The prompt of a line, which may be none; see `read_prompts`."""
    custom_id = url = None
    try:
        value = _value(line)
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise UsageError(_PROMPTS)
        url = _url(value)
        custom_id = _custom_id(value)
        body = _body(value)
        sampling = sampling_fields(body)
        temperature = openai_temperature(sampling) if "body" in value else 0.0
        given = _given(body)
        if isinstance(given, list):
            return Prompt(where, (), _token_ids(given), True, custom_id, sampling, temperature, url=url)
        if isinstance(given, str):
            continued = "body" in value
            user = ({"role": "user", "content": not_blank(given)},)
            return Prompt(where, user, (), continued, custom_id, sampling, temperature, url=url)
        tools = read_tools(body) if "body" in value else Tools()
        return Prompt(
            where, read_messages(body["messages"]), (), False, custom_id, sampling, temperature, tools=tools, url=url
        )
    except UsageError as error:
        return Prompt(where, custom_id=custom_id, error=f"{where}: {error}", url=url)


def _url(value: dict[str, Any]) -> str | None:
    """What a line of an OpenAI batch asks, which may be left out; None of another line."""
    if "body" not in value:
        return None
    body, given = value["body"], value.get("url")
    if is_text(given):
        return given
    return (CHAT if isinstance(body, dict) and body.get("messages") is not None else TEXT).url


def _custom_id(value: dict[str, Any]) -> str | None:
    custom_id = value.get("custom_id")
    if custom_id is not None and not is_text(custom_id):
        raise UsageError("its custom_id is no text")
    return custom_id


def _body(value: dict[str, Any]) -> dict[str, Any]:
    """What a line asks for: of one of an OpenAI batch its body. Raises UsageError if that asks for what is not done."""
    if "body" not in value:
        return value
    body, url = value["body"], value.get("url")
    if not isinstance(body, dict):
        raise UsageError(_PROMPTS)
    if url is not None and url not in _URLS:
        raise UsageError(f"its url is {shown(url)}, and only {' and '.join(_URLS)} are answered")
    has_messages = body.get("messages") is not None
    if url is not None and has_messages != (url == CHAT.url):
        asked = ("messages", "a prompt") if url == CHAT.url else ("a prompt", "messages")
        raise UsageError(f"its url is {url}, which takes {asked[0]}, and its body has {asked[1]}")
    refuse_unknown(body, (*_PROMPT_FIELDS, *_TOOL_FIELDS) if has_messages else _PROMPT_FIELDS)
    return body


def _given(body: dict[str, Any]) -> Any:
    """A prompt's text or token ids; None if it has messages in their place.

    The first of its fields counts, so that lines of --output are prompts again: text and ids are the answer there.
    """
    if body.get("messages") is not None:
        return None
    given = next((body[key] for key in ("prompt", "text", "token_ids") if body.get(key) is not None), None)
    if not is_text(given) and not isinstance(given, list):
        raise UsageError(_PROMPTS)
    return given


def _token_ids(given: list[Any]) -> tuple[int, ...]:
    if not given or not all(type(token) is int for token in given):
        raise UsageError(_PROMPTS)
    return tuple(given)


def read_lengths(source: str, tokens: Callable[[str, str], tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the answer of each line of a JSONL file; "-" is standard input.

    A line has both lengths, or both texts, or as in ShareGPT a conversation, of which the first question with an answer
    counts; `tokens` counts both texts' tokens. Raises UsageError, also if both together are more than `longest` tokens.
    """
    lengths = []
    for where, line in read_lines(source):
        try:
            value = _value(line)
            found = _lengths(value, tokens) if isinstance(value, dict) else None
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
        raise UsageError(f"{source_name(source)} holds no lengths; {_LENGTHS} to a line")
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


def source_name(source: str) -> str:
    return "standard input" if source == "-" else source


def read_lines(source: str) -> Iterator[tuple[str, bytes]]:
    """Each line that is not empty, with its place for messages, as it is asked for; "-" is standard input.

    Raises UsageError if there is no such file, and for a line of more than _MOST_BYTES.
    """
    where = source_name(source)
    with _standard_input() if source == "-" else opened(source) as file:
        # Not splitlines: JSON strings may hold other line ends. Editors on Windows begin a file with a byte order mark.
        for number, line in enumerate(iter(partial(file.readline, _MOST_BYTES + 1), b""), 1):
            if len(line) > _MOST_BYTES:
                raise UsageError(f"cannot read {where}: line {number} is larger than {_MOST_BYTES} bytes")
            line = line.removesuffix(b"\n").removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
            if line.strip():
                yield f"{where}, line {number}", line


@contextmanager
def _standard_input() -> Iterator[BinaryIO]:
    """Standard input, opened anew if it is a file: Python's end would wait for a thread that reads `sys.stdin`."""
    try:
        descriptor = os.dup(sys.stdin.fileno())
    except io.UnsupportedOperation:
        yield sys.stdin.buffer
        return
    try:
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot read standard input: {error.strerror}") from None


def _value(line: bytes) -> Any:
    """The JSON value of a line; None where there is none. UsageError if it is not UTF-8."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise UsageError("it is not UTF-8 text") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, brackets of thousands of levels
        return None
