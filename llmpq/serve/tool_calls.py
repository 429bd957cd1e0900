"""Tools: what a body offers, and the calls that a model's text holds.

Models write calls in the ways that their templates show them: Hermes and Qwen as JSON between <tool_call> and
</tool_call>, anywhere in a text; Llama 3 as a text that is JSON and nothing else, Mistral as a list of such, behind
marks that are special tokens, which a text does not have, or text as [TOOL_CALLS] is in some vocabularies.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from llmpq.runtime.sampling import GRAMMARS
from llmpq.serve.messages import is_text
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKS = ("[TOOL_CALLS]", "<|python_tag|>")
_ARGUMENTS = ("arguments", "parameters")  # as models call them


@dataclass(frozen=True)
class Call:
    """Of a tool; `arguments` is JSON of an object, `index` is its place among the calls of an answer."""

    name: str
    arguments: str
    index: int = 0
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_dict(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Tools:
    """What a body offers: `described` is for the template. `demanded`: the schema of a call that has to come."""

    described: tuple[dict[str, Any], ...] = ()
    demanded: dict[str, Any] | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name in map(_name, self.described) if name is not None)


def read_tools(body: dict[str, Any]) -> Tools:
    """Raises UsageError for what is none."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError("tools is no list of objects")
    one = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    named = one.get("name") if isinstance(one, dict) else None
    if choice not in (None, "auto", "none", "required") and not isinstance(named, str):
        raise UsageError(f"tool_choice is auto, none, required or a function's name, not {shown(choice)}")
    if choice in (None, "auto") and tools and body.get("parallel_tool_calls") is False:
        raise UsageError("parallel_tool_calls is false, and nothing here keeps a model from several; leave it out")
    if choice == "none":
        return Tools()
    if choice in (None, "auto"):
        return Tools(tuple(tools))
    asked = [tool for tool in tools if _name(tool) is not None and named in (None, _name(tool))]
    if not asked:
        raise UsageError(
            f"tool_choice is {shown(named or choice)}, and tools has none {'of that name' if named else ''}"
        )
    schemas = [_call_schema(tool["function"], number) for number, tool in enumerate(asked)]
    return Tools(tuple(tools), {"anyOf": schemas} if schemas[1:] else schemas[0])


def with_demanded(fields: dict[str, Any], tools: Tools) -> dict[str, Any]:
    """Fields of sampling, with the form of a call that is demanded. Raises UsageError if they ask for another."""
    if tools.demanded is None:
        return fields
    grammar = next((name for name in sorted(GRAMMARS) if fields.get(name)), None)
    if grammar is not None:
        raise UsageError(f"tool_choice demands a call, and {grammar} another form; leave out one of them")
    return fields | {"json_schema": json.dumps(tools.demanded)}


def _name(tool: dict[str, Any]) -> str | None:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if is_text(name) else None


def _call_schema(function: dict[str, Any], number: int) -> dict[str, Any]:
    """Of a call of one tool. Its parameters are a schema of their own, whose references stay within it."""
    parameters = function.get("parameters") or {"type": "object"}
    if not isinstance(parameters, dict):
        raise UsageError(f"the parameters of {shown(function['name'])} are no JSON schema")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": {**parameters, "$id": f"urn:tool:{number}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class CallReader:
    """Takes calls of the tools with these names out of a text as it comes; what is no call stays text.

    A text that may be a call is held until it is known. Space around calls goes.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._waiting = ""
        self._began = False  # whether anything but space has come
        self.found = 0  # calls so far

    def add(self, piece: str) -> list[str | Call]:
        """What the next piece of the text brings."""
        self._waiting += piece
        return list(self._read())

    def end(self) -> list[str | Call]:
        """What is left."""
        rest, self._waiting = self._waiting, ""
        inside = rest.lstrip().removeprefix(_OPEN)
        calls = self._calls(inside) if not self._began or inside != rest.lstrip() else []
        if calls:
            return [*self._counted(calls)]
        return [rest] if rest and not (self.found and rest.isspace()) else []

    def _read(self) -> Iterator[str | Call]:
        while self._waiting:
            text = self._waiting.lstrip()
            if not self._began and (text[:1] in ("", "{", "[") or _begins(text, *_MARKS)):
                return
            self._began = True
            start = self._waiting.find(_OPEN)
            if start < 0:
                yield from self._cut(self._kept())
                return
            yield from self._cut(len(self._waiting[:start].rstrip()))
            text = self._waiting.lstrip()
            end = text.find(_CLOSE)
            if end < 0:
                return
            calls = self._calls(text[len(_OPEN) : end])
            if calls:
                self._waiting = text[end + len(_CLOSE) :]
                yield from self._counted(calls)
            else:
                yield from self._cut(len(self._waiting) - len(text) + end + len(_CLOSE))

    def _kept(self) -> int:
        """Where what is to be kept begins: space, or what may be the beginning of a call."""
        text = self._waiting
        starts = (i for i in range(max(0, len(text) - len(_OPEN) + 1), len(text)) if _OPEN.startswith(text[i:]))
        return len(text[: next(starts, len(text))].rstrip())

    def _cut(self, length: int) -> Iterator[str]:
        if length:
            yield self._waiting[:length]
            self._waiting = self._waiting[length:]

    def _counted(self, calls: list[Call]) -> Iterator[Call]:
        for call in calls:
            yield replace(call, index=self.found)
            self.found += 1

    def _calls(self, text: str) -> list[Call]:
        """The calls that a text is; none if it is anything else."""
        for mark in _MARKS:
            text = text.strip().removeprefix(mark)
        calls: list[Call] = []
        with suppress(ValueError, RecursionError):
            while text := text.lstrip(" \t\r\n;,"):
                value, end = json.JSONDecoder().raw_decode(text)
                calls += [self._call(each) for each in (value if isinstance(value, list) else [value])]
                text = text[end:]
            return calls
        return []

    def _call(self, value: Any) -> Call:
        """Raises ValueError if it is none."""
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            raise ValueError
        given: Any = next((value[key] for key in _ARGUMENTS if key in value), {})
        arguments = json.loads(given) if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            raise ValueError
        # Python reads and writes NaN and infinities, which JSON has not; halves of surrogate pairs it has, as escapes.
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        return Call(name, written if is_text(written) else json.dumps(arguments))


def _begins(text: str, *marks: str) -> bool:
    """Whether it begins with one of some marks, or may when more has come."""
    return any(text.startswith(mark) or mark.startswith(text) for mark in marks)


def read_calls(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """What a whole text says beside the calls that it holds, and these."""
    reader = CallReader(names)
    found = [*reader.add(text), *reader.end()]
    said = "".join(each for each in found if isinstance(each, str))
    return said, [each for each in found if isinstance(each, Call)]
