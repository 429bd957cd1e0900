"""A chat: what is kept of a conversation, and what is read and shown, at a terminal and without one."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmpq.checkpoint.model_files import open_model
from llmpq.cli.conversation import Conversation
from llmpq.cli.main import main
from llmpq.runtime.engine import Engine, SamplingParams
from llmpq.spec import Plan, UsageError
from llmpq.spec.formatting import printable
from tests.support import tiny_models
from tests.support.pipelines import UNIFORM, load_spec, make_plan, resolve

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, max_position_embeddings=4096, eos_token_id=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    """In two stages, for one sequence of up to 4000 tokens."""
    spec = load_spec(resolve(str(folder)))
    plan = make_plan(spec, [2, 1], 1, 1, slots=1, max_length=4000, precisions=UNIFORM)
    plan.save(folder / "plan.json")
    return plan


def _options(folder: Path, output: Path) -> list[str]:
    """Of a chat with that plan, whose answers are written to `output`."""
    files = ["--model", str(folder), "--plan", str(folder / "plan.json"), "--output", str(output)]
    return ["run", *files, "--interactive"]


def _read(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines()))


def test_a_conversation_keeps_the_latest_turns_that_fit(folder: Path) -> None:
    model = open_model(str(folder))
    own = transformers.AutoTokenizer.from_pretrained(folder)
    conversation = Conversation(model, room=120, reserved=20, remembers=True)
    messages: list[dict[str, str]] = []
    drops = 0
    for number in range(12):
        text = f"question {number}" + "?" * (7 * number % 30)
        messages.append({"role": "user", "content": text})
        ids, dropped = conversation.prompt(text)
        drops += dropped
        tails = [messages[first:] for first in range(0, len(messages), 2)]
        encoded = [own.apply_chat_template(tail, add_generation_prompt=True, return_dict=False) for tail in tails]
        assert ids == next((tail for tail in encoded if len(tail) <= 100), encoded[-1])
        messages.append({"role": "assistant", "content": f"answer {number}"})
        conversation.add(text, f"answer {number}")
    assert 0 < drops < 12
    kept = list(conversation.turns)
    for text, problem in (
        ("x" * 120, "leaves no room for 1 more in the plan's slots of 120"),
        ("a\udcff", "not UTF-8"),
    ):
        with pytest.raises(UsageError, match=f"^the message .*{problem}"):
            conversation.prompt(text)
    assert conversation.turns == kept


def test_messages_of_a_pipe_are_answered_one_by_one(
    folder: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = b"h\xc3\xa9\r\n \n/clear\nhello\n/what\n\xff\n" + b"x" * 5000 + b"\nwho?\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
    output = tmp_path / "out.jsonl"
    assert main([*_options(folder, output), "--max-new-tokens", "9"]) == 6
    captured, answers = capfd.readouterr(), _read(output)
    for words in (
        "messages go through the model's chat template; the latest 4000 tokens are kept",
        "there is no command /what",
        "the message is not UTF-8 text",
        "the message has 5018 tokens, which leaves no room",
        "2 of 5 messages were not answered",
    ):
        assert words in captured.err
    own = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": text} for text in ("hé", "hello", "who?")]
    said = {"role": "assistant", "content": answers[1]["text"]}
    prompts = [
        own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in (asked[:1], asked[1:2], [asked[1], said, asked[2]])
    ]
    checkpoint = resolve(str(folder))
    with Engine(plan, checkpoint, load_spec(checkpoint)) as engine:
        result = engine.generate(prompts, SamplingParams(max_tokens=9))
    assert [answer["prompt"] for answer in answers] == ["hé", "hello", "who?"]
    assert [tuple(answer["token_ids"]) for answer in answers] == [each.token_ids for each in result.sequences]
    shown = "".join(f"> {answer['prompt']}\n{printable(answer['text'])}\n\n" for answer in answers)
    assert captured.out.expandtabs().endswith(shown.expandtabs())


class _Terminal:
    """A pseudo terminal, from its user's side."""

    def __init__(self, command: list[str]) -> None:
        self.end, program = pty.openpty()
        self._text = ""
        self.process = subprocess.Popen(
            command,
            stdin=program,
            stdout=program,
            stderr=program,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(program)

    def read_until(self, words: str) -> str:
        """What the program writes up to some words, which come next."""
        while words not in self._text:
            assert self._hears(30), self._text
        before, _, self._text = self._text.partition(words)
        return before

    def _hears(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.end], [], [], seconds)
        if ready:
            self._text += os.read(self.end, 2**16).decode(errors="replace")
        return bool(ready)

    def interrupt_until(self, words: str) -> None:
        """Press Ctrl-C until some words come: where a key is just being shown, Python's readline misses a signal."""
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            while words not in self._text and self._hears(3):
                pass
            if words in self._text:
                break
        self.read_until(words)

    def type(self, text: bytes) -> None:
        os.write(self.end, text)


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(
    folder: Path, plan: Plan, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    sampling = ["--temperature", "2", "--seed", "3", "--no-chat"]
    terminal = _Terminal([sys.executable, "-m", "llmpq", *_options(folder, output), *sampling])
    try:
        terminal.read_until("no chat template: plain continuation of each message by itself")
        for _ in range(2):
            terminal.read_until("> ")
            terminal.type(b"hello\n")
            terminal.read_until("hello")
            time.sleep(0.1)
            terminal.process.send_signal(signal.SIGINT)
            terminal.read_until("stopped")
        terminal.read_until("> ")
        terminal.type(b"half a line")
        terminal.read_until("half a line")
        terminal.interrupt_until("> ")
        terminal.type(b"/help\n")
        terminal.read_until("/clear begins anew")
        terminal.read_until("> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)
    answers, checkpoint = _read(output), resolve(str(folder))
    own = transformers.AutoTokenizer.from_pretrained(folder)
    assert {answer["finish_reason"] for answer in answers} == {"cancelled"}
    with Engine(plan, checkpoint, load_spec(checkpoint)) as engine:
        for number, answer in enumerate(answers):
            sampled = SamplingParams(max_tokens=len(answer["token_ids"]), temperature=2.0, seed=3 + number)
            result = engine.generate([own.encode("hello")], [sampled])
            assert list(result.sequences[0].token_ids) == answer["token_ids"]
