"""What bodies stand for, before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmpq.checkpoint.model_files import Model, open_model
from llmpq.serve.ask import Limits, Reader
from llmpq.serve.refusal import Refusal
from llmpq.spec import UsageError
from tests.support import tiny_models

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def test_what_a_body_leaves_out_is_as_openai_has_it(model: Model) -> None:
    reader = Reader(model, Limits(200, None, 8))
    chat, text = reader.chat({"messages": [USER]}), reader.completion({"prompt": "hi"})
    assert (chat.sampling.temperature, text.sampling.temperature) == (1, 1)
    assert chat.sampling.max_tokens == 200 - len(chat.prompts[0]) and text.sampling.max_tokens == 16
    assert not (chat.stream or text.stream or chat.include_usage)
    assert chat.prompts == [model.tokenizer.encode("[user]hi</s>[assistant]")]


def test_the_limit_of_an_answer_is_kept(model: Model) -> None:
    reader = Reader(model, Limits(200, 10, 8))
    assert reader.chat({"messages": [USER]}).sampling.max_tokens == 10
    assert reader.completion({"prompt": "hi"}).sampling.max_tokens == 10
    with pytest.raises(Refusal, match="max_tokens is 11, and an answer may have 10 tokens here"):
        reader.chat({"messages": [USER], "max_completion_tokens": 11})


def test_tools_go_through_the_template_that_has_a_place_for_them(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = {"messages": [USER], "tools": [TOOL]}
    reader = Reader(model, Limits(200, None, 8))
    shown = model.tokenizer.decode(reader.tokens(body))
    assert shown.startswith('[tools][{"type": "function"') and "clock" in shown
    assert reader.tokens(body | {"tool_choice": "none"}) == reader.tokens({"messages": [USER]})
    tiny_models.save_model(tmp_path, "llama-gqa")
    with pytest.raises(UsageError, match="no chat template, so it takes no tools"):
        Reader(open_model(str(tmp_path)), Limits(60, None, 8)).tokens(body)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(model.tokenizer._tokenizer, "chat_template", template)
    with pytest.raises(UsageError, match="has no place for tools"):
        reader.tokens(body)
