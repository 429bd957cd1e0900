"""Prompts, and lengths of prompts and answers, from a JSONL file or standard input."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from llmpq.spec import UsageError

_LENGTHS = (
    'expected a JSON object such as {"prompt": "some text", "completion": "some text"}, '
    '{"prompt_len": 80, "output_len": 20}, or {"conversations": [{"from": "human", "value": "some text"}, '
    '{"from": "gpt", "value": "some text"}]}'
)


def read_prompts(source: str) -> list[str]:
    """The prompts of a JSONL file, one object with a "prompt" to a line; "-" is standard input. Raises UsageError."""
    where, prompts = _name(source), []
    for number, value in _objects(source, "prompts"):
        prompt = value.get("prompt")
        if not prompt or not is_text(prompt):
            raise UsageError(f'{where}, line {number}: expected a JSON object such as {{"prompt": "some text"}}')
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f'{where} holds no prompts; write one JSON object such as {{"prompt": "some text"}} to a line')
    return prompts


def read_lengths(source: str, tokens: Callable[[str, str], tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the answer of each line of a JSONL file; "-" is standard input.

    A line has both lengths, or both texts, or as in ShareGPT a conversation, of which the first question with an answer
    counts; `tokens` counts both texts' tokens. Raises UsageError, also if both together are more than `longest` tokens.
    """
    where, lengths = _name(source), []
    for number, value in _objects(source, "lengths"):
        found = _lengths(value, tokens)
        if found is None:
            raise UsageError(f"{where}, line {number}: {_LENGTHS}")
        if sum(found) > longest:
            raise UsageError(
                f"{where}, line {number}: {found[0]} tokens and {found[1]} more do not fit the model's context of "
                f"{longest}; leave the line out or shorten it"
            )
        lengths.append(found)
    if not lengths:
        raise UsageError(f"{where} holds no lengths; {_LENGTHS} to a line")
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


def _objects(source: str, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not empty; an empty object where there is another value or none."""
    where = _name(source)
    try:
        text = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"cannot read the {what} file {where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the {what} file {where} is not UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line ends
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # numbers of thousands of digits, brackets of thousands of levels
            value = None
        yield number, value if isinstance(value, dict) else {}
