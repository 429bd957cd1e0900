"""Prompts and lengths from files: every form they come in, and errors that name the file and the line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmpq.cli.prompts import Prompt, given_prompt, read_lengths, read_prompts
from llmpq.runtime.sampling import SamplingParams
from llmpq.serve.body_sampling import SAMPLING_FIELDS
from llmpq.spec import UsageError

LONGEST = 50
BROKEN = ("[" * 100_000, '{"prompt": ' + "9" * 5000 + "}")  # beyond what json reads: not its own errors, but others'


def _words(prompt: str, answer: str) -> tuple[int, int]:
    return len(prompt.split()), len(answer.split())


def _file(folder: Path, *lines: Any) -> str:
    path = folder / "lengths.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def _turns(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_lengths_are_read_in_each_form_and_in_order(tmp_path: Path) -> None:
    source = _file(
        tmp_path,
        {"prompt_len": 7, "output_len": 3, "note": "more is ignored"},
        "",
        {"prompt": "one two three", "completion": "four five"},
        _turns(
            ("gpt", "hello"), ("human", "one two"), ("gpt", "three four five six"), ("human", "seven"), ("gpt", "8")
        ),
    )
    assert read_lengths(source, _words, LONGEST) == [(7, 3), (3, 2), (2, 4)]


def test_lengths_are_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"prompt_len": 1, "output_len": 2}\r\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    assert read_lengths("-", _words, LONGEST) == [(1, 2)]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        {"prompt": "no answer"},
        {"prompt": "a", "completion": ""},
        {"prompt": 1, "completion": "b"},
        {"prompt_len": 7},
        {"prompt_len": 7, "output_len": 0},
        {"prompt_len": 7.5, "output_len": 1},
        {"prompt_len": True, "output_len": 1},
        _turns(("human", "nobody answers")),
        _turns(("gpt", "nobody asks"), ("gpt", "again")),
        {"conversations": ["a", "b"]},
        *BROKEN,
        '{"prompt": "half a \\ud83d pair", "completion": "b"}',
        '{"prompt": "a", "completion": "half a \\ud83d pair"}',
    ],
)
def test_a_line_without_lengths_is_named(tmp_path: Path, line: Any) -> None:
    source = _file(tmp_path, {"prompt_len": 7, "output_len": 3}, line)
    with pytest.raises(UsageError, match=r"lengths.jsonl, line 2: expected a JSON object such as") as caught:
        read_lengths(source, _words, LONGEST)
    assert "\n" not in str(caught.value)


USER = {"role": "user", "content": "hé"}
SYSTEM = {"role": "system", "content": "be brief"}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_CALL_READ = {**_CALL, "function": {"name": "f", "arguments": {"x": 1}}}
ANSWER = {"role": "tool", "tool_call_id": "c", "content": "2"}
WITH_TOOL = ({"role": "assistant", "content": None, "tool_calls": [_CALL]}, ANSWER)
WITH_TOOL_READ = ({"role": "assistant", "content": "", "tool_calls": [_CALL_READ]}, ANSWER)
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "é"}]


def _batch_line(**body: Any) -> dict[str, Any]:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": "r1", "method": "POST", "url": url, "body": {"model": "m", **body}}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "hé", "id": 3, "echo": True}, {"messages": (USER,)}),  # other fields are the user's own
        ('\ufeff{"prompt": "hé"}\r', {"messages": (USER,)}),
        ({"messages": [SYSTEM, USER]}, {"messages": (SYSTEM, USER)}),
        ({"messages": [{"role": "user", "content": PARTS}], "seed": 3}, {"messages": (USER,), "sampling": {"seed": 3}}),
        (
            _batch_line(messages=[SYSTEM, USER], max_completion_tokens=10, temperature=0.5, top_p=None, n=1, stop=None),
            {
                "messages": (SYSTEM, USER),
                "custom_id": "r1",
                "sampling": {"max_tokens": 10, "temperature": 0.5, "n": 1},
            },
        ),
        (
            _batch_line(
                messages=[USER],
                stop="x",
                n=2,
                logprobs=True,
                top_logprobs=3,
                presence_penalty=0.5,
                frequency_penalty=-1,
                logit_bias={"5": -100},
                seed=7,
            ),
            {
                "messages": (USER,),
                "custom_id": "r1",
                "sampling": {
                    "stop": ["x"],
                    "n": 2,
                    "logprobs": 3,
                    "presence_penalty": 0.5,
                    "frequency_penalty": -1,
                    "logit_bias": {"5": -100},
                    "seed": 7,
                },
                "default_temperature": 1.0,
            },
        ),
        (
            _batch_line(messages=[USER], stop=["x", "y"], logprobs=True, top_logprobs=0),
            {"messages": (USER,), "custom_id": "r1", "sampling": {"stop": ["x", "y"], "logprobs": 0}},
        ),
        (
            {"prompt": "hé", "logprobs": 2, "prompt_logprobs": 0, "min_p": 0.1, "bad_words": "b", "best_of": 3},
            {
                "messages": (USER,),
                "sampling": {"logprobs": 2, "prompt_logprobs": 0, "min_p": 0.1, "bad_words": ["b"], "best_of": 3},
            },
        ),
        (_batch_line(prompt="hé"), {"messages": (USER,), "continued": True, "custom_id": "r1"}),
        (
            _batch_line(prompt=[5, 6], stream_options={"x": 1}, response_format={"type": "text"}, logprobs=False),
            {"token_ids": (5, 6), "continued": True, "custom_id": "r1", "sampling": {"logprobs": None}},
        ),
        (
            _batch_line(messages=[USER], best_of=2, n=None),
            {"messages": (USER,), "custom_id": "r1", "sampling": {"best_of": 2}, "default_temperature": 1.0},
        ),
        ({"prompt": "hé", "n": 2}, {"messages": (USER,), "sampling": {"n": 2}}),
        (
            {"token_ids": [5, 6], "temperature": 1},
            {"token_ids": (5, 6), "continued": True, "sampling": {"temperature": 1}},
        ),
        ({"text": "hé"}, {"messages": (USER,)}),
        ('"hé"', {"messages": (USER,)}),
        ({"prompt": "hé", "text": "its answer", "token_ids": [7]}, {"messages": (USER,)}),  # a line of --output
        ({"messages": [SYSTEM, *WITH_TOOL, USER]}, {"messages": (SYSTEM, *WITH_TOOL_READ, USER)}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_prompts_are_read_in_each_form(tmp_path: Path, line: Any, expected: dict[str, Any]) -> None:
    source = _file(tmp_path, line)
    (prompt,) = read_prompts(source)
    assert replace(prompt, url=None) == Prompt(f"{source}, line 1", **expected)
    body = line.get("body") if isinstance(line, dict) else None
    assert prompt.url == (body and line.get("url", f"/v1/{'chat/' if 'messages' in body else ''}completions"))
    assert prompt.text == ("5 6" if "token_ids" in expected else "hé")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        *((line, "expected a JSON object such as") for line in BROKEN),
        *(
            (line, "expected a JSON object such as")
            for line in (
                '{"prompt": "half a \\ud83d pair"}',
                "[1]",
                {"text": 5},
                {"prompt": ["a", "b"]},
                {"token_ids": [1, 2.0]},
                {"token_ids": []},
                "3",
                {"prompt": 3},
                {"messages": []},
                {"messages": "hi"},
                {"messages": ["hi"]},
                {"messages": [{"role": "user"}]},
                {"messages": [{"content": "a"}]},
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                _batch_line(),
                {"custom_id": "r1", "body": "x"},
            )
        ),
        ({"prompt": " "}, "its text is empty"),
        ({"messages": [USER, {"role": "user", "content": ""}]}, "the last message is empty"),
        (_batch_line(messages=[USER], suffix="x"), "suffix is not supported; leave it out"),
        (
            _batch_line(messages=[USER], top_logprobs=2),
            "top_logprobs takes logprobs; set it to true, or leave both out",
        ),
        ({"prompt": "a", "custom_id": 3}, "its custom_id is no text"),
        (
            {"messages": [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]}]},
            "a part of its content is of type 'image_url', and only text is read",
        ),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "there is no role 'bot'; it is one of system, ",
        ),
        ({"messages": [{**WITH_TOOL[0], "tool_calls": [3]}, USER]}, "its tool_calls are no list of objects"),
        (
            {**_batch_line(prompt="a"), "url": "/v1/chat/completions"},
            "its url is /v1/chat/completions, which takes messages, and its body has a prompt",
        ),
        (
            {**_batch_line(messages=[USER]), "url": "/v1/completions"},
            "its url is /v1/completions, which takes a prompt, and its body has messages",
        ),
        ({**_batch_line(input="a"), "url": "/v1/embeddings"}, "its url is '/v1/embeddings', and only /v1/chat/"),
        (_batch_line(messages=[USER], logprobs=True, top_logprobs=True), "top_logprobs is True, expected a number of"),
        (_batch_line(messages=[USER], tools=[3]), "tools is no list of objects"),
        (_batch_line(prompt="a", tools=[{}]), "tools is not supported; leave it out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_is_no_prompt_has_its_error_and_the_others_are_read(tmp_path: Path, line: Any, error: str) -> None:
    source = _file(tmp_path, {"prompt": "both \U0001f600 halves"}, line, "", {"prompt": "hé"})
    first, bad, last = read_prompts(source)
    assert (first.text, last.text, first.error, last.error) == ("both \U0001f600 halves", "hé", None, None)
    assert bad.error is not None and bad.error.startswith(f"{source}, line 2: {error}")
    assert bad.messages == () and last.where == f"{source}, line 4"


def test_fields_of_lines_are_those_of_sampling_params() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SAMPLING_FIELDS) - fields == {"max_completion_tokens", "top_logprobs", "response_format"}
    assert fields <= set(SAMPLING_FIELDS)


def test_a_prompt_of_the_command_line_that_is_none_has_its_error() -> None:
    assert given_prompt("hé", "prompt 1") == Prompt("prompt 1", (USER,))
    assert given_prompt(" \n", "prompt 2").error == "prompt 2 is empty"
    assert given_prompt("a\udcff", "prompt 3").error == "prompt 3 is not UTF-8 text"


def test_files_are_utf_8_wherever_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "größer"}'.encode())
    code = f"from llmpq.cli.prompts import read_prompts; print(ascii(read_prompts({str(path)!r})[0].text))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "'gr\\xf6\\xdfer'\n"
    path.write_bytes(b'{"prompt": "gr\xf6\xdfer"}\n{"prompt": "a"}')
    assert [prompt.error for prompt in read_prompts(str(path))] == [f"{path}, line 1: it is not UTF-8 text", None]
    with pytest.raises(UsageError, match=r"prompts.jsonl, line 1: it is not UTF-8 text"):
        read_lengths(str(path), _words, LONGEST)


def test_a_line_that_does_not_fit_the_context_is_named(tmp_path: Path) -> None:
    fits, too_long = {"prompt_len": 40, "output_len": 10}, {"prompt_len": 40, "output_len": 11}
    assert read_lengths(_file(tmp_path, fits), _words, LONGEST) == [(40, 10)]
    with pytest.raises(UsageError, match="line 2: 40 tokens and 11 more do not fit the model's context of 50"):
        read_lengths(_file(tmp_path, fits, too_long), _words, LONGEST)


def test_a_file_without_lengths_or_none_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lengths.jsonl holds no lengths"):
        read_lengths(_file(tmp_path, "", " "), _words, LONGEST)
    with pytest.raises(UsageError, match=r"cannot read .*missing.jsonl: No such file"):
        read_lengths(str(tmp_path / "missing.jsonl"), _words, LONGEST)


def test_a_device_in_place_of_a_file_is_refused() -> None:
    for read in (read_prompts, lambda source: read_lengths(source, _words, LONGEST)):
        with pytest.raises(UsageError, match="cannot read /dev/zero: it is a device, no file"):
            read("/dev/zero")
