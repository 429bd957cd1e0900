"""Answers in a form that is asked for, by the client of OpenAI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llmpq.cli.main import main
from tests.support.served import CHAT, TEXT, USER, Served, plan_of

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "near": {"enum": ["Rome", "Bern"]}},
    "required": ["ok"],
    "additionalProperties": False,
}


NOTHING = {"type": "object", "additionalProperties": False}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}


class Place(BaseModel):
    """As the client makes a schema of it, with strict: true."""

    near: str
    high: bool


def said(served: Served, stream: bool, **body: Any) -> list[tuple[str, str]]:
    """Texts and reasons, of an answer that is sampled."""
    how = {"model": served.name, "messages": [USER], "max_tokens": 300, "temperature": 1.0, **body}
    if not stream:
        answer = served.client.chat.completions.create(**how)
        return [(choice.message.content or "", choice.finish_reason) for choice in answer.choices]
    texts, reasons = [""] * how.get("n", 1), [""] * how.get("n", 1)
    for chunk in served.client.chat.completions.create(stream=True, **how):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or ""
    return list(zip(texts, reasons, strict=True))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_has_the_form_that_is_asked_for(served: Served, stream: bool) -> None:
    described = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    for text, reason in said(served, stream, response_format=described, n=3, seed=5):
        value = json.loads(text)
        assert reason == "stop" and type(value["ok"]) is bool and value.get("near") in (None, "Rome", "Bern")
        assert set(value) <= {"ok", "near"}
    ((text, reason),) = said(served, stream, extra_body={"regex": "[a-z]{3}[0-9]+;"}, seed=6)
    assert reason == "stop" and re.fullmatch("[a-z]{3}[0-9]+;", text)
    ((text, reason),) = said(served, stream, extra_body={"choices": ["left", "right"]}, temperature=0)
    assert (text, reason) in (("left", "stop"), ("right", "stop"))
    ((text, reason),) = said(served, stream, response_format={"type": "json_object"}, seed=7, max_tokens=60)
    assert text.startswith("{") and (reason == "length" or type(json.loads(text)) is dict)


def test_the_client_reads_what_it_has_described(served: Served) -> None:
    """Its own classes, whose texts may be of any length."""
    biased = {"logit_bias": {str(served.model.tokenizer.encode('"')[-1]): 30.0}, "max_tokens": 300}
    answer = served.client.chat.completions.parse(
        model=served.name, messages=[USER], response_format=Place, temperature=1.0, seed=3, **biased
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


@pytest.mark.slow
def test_a_run_has_the_same_forms_by_options_and_by_lines(served: Served, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    described = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    bodies = [
        CHAT | {"response_format": described, "max_tokens": 300},
        TEXT | {"regex": "[0-9]{4}"},
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        CHAT | {"tools": [CLOCK], "tool_choice": "required", "max_tokens": 300},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"custom_id": "a", "body": body}) + "\n" for body in bodies))
    plan_of(served.model).save(tmp_path / "plan.json")
    run = [
        "run",
        "--model",
        str(served.model.checkpoint.path),
        "--plan",
        str(tmp_path / "plan.json"),
        "--quiet",
        "--no-log",
    ]
    run += ["--prompts", str(tmp_path / "in.jsonl"), "--prompt", "hi", "--json-schema", str(tmp_path / "schema.json")]
    assert main([*run, "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "300"]) == 6
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = {each["index"] if "index" in each else int(each["id"]): each for each in found}
    assert set(json.loads(texts[0]["text"])) <= {"ok", "near"}
    choice = texts[1]["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "stop" and "ok" in json.loads(choice["message"]["content"])
    assert re.fullmatch("[0-9]{4}", texts[2]["response"]["body"]["choices"][0]["text"])
    assert "json_schema: Unimplemented keys" in texts[3]["error"]["message"]
    choice = texts[4]["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
