"""Calls of tools: in texts as models write them, cut anywhere; and by the client of OpenAI."""

from __future__ import annotations

import json
import random
from math import nan
from typing import Any

import pytest

from llmpq.serve.ask import Limits, Reader
from llmpq.serve.tool_calls import Call, CallReader, read_calls
from llmpq.spec import UsageError
from tests.support.served import USER, Served

NAMES = ("clock", "sum")
CLOCK, SUM = ("clock", {"zone": "Écosse"}), ("sum", {"of": [1, 2]})
A, B = ({"name": name, "arguments": arguments} for name, arguments in (CLOCK, SUM))
HALF = "a \ud800 é"  # of a surrogate pair, which no text that is sent can have
LLAMA = {"name": "clock", "parameters": CLOCK[1]}


def hermes(*calls: Any) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (hermes(A), "", [CLOCK]),
        (f"Let me see.\n\n{hermes(A, B)}\n", "Let me see.", [CLOCK, SUM]),
        (f"{hermes(A)} and {hermes(B)}. Done.", " and. Done.", [CLOCK, SUM]),
        (hermes(B).removesuffix("</tool_call>"), "", [SUM]),  # ended by a token that is no text
        (hermes(B)[:-20], hermes(B)[:-20], []),
        (hermes({"name": "other", "arguments": {}}), hermes({"name": "other", "arguments": {}}), []),
        ("1 <tool_call> 2 </tool_call> 3", "1 <tool_call> 2 </tool_call> 3", []),
        ("a <tool", "a <tool", []),
        (json.dumps(LLAMA), "", [CLOCK]),
        (f"<|python_tag|>{json.dumps(LLAMA)}; {json.dumps(B)}", "", [CLOCK, SUM]),
        (f" {json.dumps([A, B])}", "", [CLOCK, SUM]),
        (f"[TOOL_CALLS] {json.dumps([A | {'id': 'x'}])}", "", [CLOCK]),
        (f"[TOOL_CALLS]{json.dumps([A | {'arguments': json.dumps(CLOCK[1])}])}", "", [CLOCK]),
        ('{"name": "sum"}', "", [("sum", {})]),
        ('{"name": "sum", "arguments": 3}', '{"name": "sum", "arguments": 3}', []),
        ('{"zone": 1} ', '{"zone": 1} ', []),
        (hermes({"name": "sum", "arguments": {"of": HALF}}), "", [("sum", {"of": HALF})]),
        (hermes({"name": "sum", "arguments": {"of": nan}}), hermes({"name": "sum", "arguments": {"of": nan}}), []),
        ('{"name": "sum", "arguments": "{\\"of\\": NaN}"}', '{"name": "sum", "arguments": "{\\"of\\": NaN}"}', []),
        ('{"name": "sum", "arguments": {"of": -1e999}}', '{"name": "sum", "arguments": {"of": -1e999}}', []),
        ("[1] is a list", "[1] is a list", []),
        ("{" * 5000, "{" * 5000, []),
        (f"The form is {json.dumps(LLAMA)}", f"The form is {json.dumps(LLAMA)}", []),
        (" \n text  \n\n", " \n text  \n\n", []),
        ("", "", []),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_calls_are_taken_out_of_a_text_wherever_it_is_cut(text: str, said: str, calls: list[Any]) -> None:
    found, read = read_calls(text, NAMES)
    assert (found, [(call.name, json.loads(call.arguments)) for call in read]) == (said, calls)
    assert len({call.id for call in read}) == len(calls) and all(call.arguments.encode() for call in read)
    generator = random.Random(5)
    for size in (1, 2, 7, 30):
        reader, pieces, left = CallReader(NAMES), list[str | Call](), text
        while left:
            length = generator.randint(1, size)
            pieces += reader.add(left[:length])
            left = left[length:]
        pieces += reader.end()
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == said
        assert [(p.name, json.loads(p.arguments)) for p in pieces if isinstance(p, Call)] == calls
        assert reader.found == len(calls)


def test_what_is_no_call_comes_at_once() -> None:
    reader = CallReader(NAMES)
    assert reader.add("a plain ") == ["a plain"] and reader.add("text <") == [" text"]
    assert reader.add("b>") == [" <b>"] and reader.end() == []


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ZONE = {"type": "string", "enum": ["UTC", "CET"]}
SOME = {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2}
TOOLS = [tool("clock", zone=ZONE), tool("sum", of=SOME)]


def called(served: Served, stream: bool, **body: Any) -> tuple[str, list[tuple[str, Any]], str]:
    """What is said, the calls and why the answer has ended."""
    how = {"model": served.name, "messages": [USER], "tools": TOOLS, "max_tokens": 300, "temperature": 1.0, **body}
    if not stream:
        (choice,) = served.client.chat.completions.create(**how).choices
        calls = [(each.function.name, each.function.arguments) for each in choice.message.tool_calls or []]
        said, reason = choice.message.content or "", choice.finish_reason
    else:
        with served.client.chat.completions.stream(**how) as events:
            for _ in events:
                pass
            (choice,) = events.get_final_completion().choices
        calls = [(each.function.name, each.function.arguments) for each in choice.message.tool_calls or []]
        said, reason = choice.message.content or "", choice.finish_reason
    return said, [(name, json.loads(arguments)) for name, arguments in calls], reason


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_client_gets_calls(served: Served, stream: bool) -> None:
    """The model is made to write them as a Hermes does, by a regular expression."""
    written = r'On it\.\n<tool_call>\n\{"name": "clock", "arguments": \{"zone": "[a-z]{4}"\}\}\n</tool_call>'
    said, calls, reason = called(served, stream, extra_body={"regex": written}, seed=3)
    ((name, arguments),) = calls
    assert (said, name, [*arguments], reason) == ("On it.", "clock", ["zone"], "tool_calls")
    halved = hermes({"name": "clock", "arguments": {"zone": HALF}})
    assert called(served, stream, extra_body={"choices": [halved]}) == ("", [("clock", {"zone": HALF})], "tool_calls")
    said, calls, reason = called(served, stream, extra_body={"choices": ["No need."]})
    assert (said, calls, reason) == ("No need.", [], "stop")
    said, calls, reason = called(served, stream, tool_choice="none", extra_body={"regex": written}, seed=3)
    assert calls == [] and said.startswith("On it.\n<tool_call>") and reason == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_that_is_demanded_comes(served: Served, stream: bool) -> None:
    for seed in range(3):
        said, ((name, arguments),), reason = called(served, stream, tool_choice="required", seed=seed)
        assert said == "" and reason == "tool_calls" and name in ("clock", "sum")
        assert arguments.get("zone") in ("UTC", "CET") or all(n <= 9 for n in arguments["of"])
    one = {"type": "function", "function": {"name": "clock"}}
    _, ((name, arguments),), _ = called(served, stream, tool_choice=one, parallel_tool_calls=False, seed=4)
    assert name == "clock" and arguments["zone"] in ("UTC", "CET")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tool_choice": "any"}, "tool_choice is auto, none, required or a function's name, not 'any'"),
        ({"tool_choice": "required", "tools": []}, "tool_choice is 'required', and tools has none"),
        ({"tool_choice": "required", "tools": [{}]}, "tool_choice is 'required', and tools has none"),
        ({"tool_choice": "required", "tools": [tool(HALF)]}, "tool_choice is 'required', and tools has none"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x', and tools has none of that name"),
        ({"tool_choice": "required", "regex": "a"}, "tool_choice demands a call, and regex another form"),
        ({"tool_choice": "required", "tools": [tool("a", b={"not": {}})]}, "json_schema: Unimplemented keys"),
        ({"tools": 3}, "tools is no list of objects"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls is false, and nothing here keeps"),
    ],
)
def test_what_is_no_choice_of_a_tool_is_refused(served: Served, body: dict[str, Any], message: str) -> None:
    reader = Reader(served.model, Limits(300, None, 8))
    with pytest.raises(UsageError, match=message):
        reader.chat({"messages": [USER], "tools": TOOLS, **body})
