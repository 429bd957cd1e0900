"""A run loses nothing: not the answers to good prompts for a bad one, nor what is known for what fails later."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import planner
from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.cli.batch import Batch
from llmpq.cli.main import main
from llmpq.cli.prompts import given_prompt, read_prompts
from llmpq.runtime.engine import Engine, Generated, SamplingParams
from llmpq.spec import NotMeasuredError, Report, UsageError, WorkerLostError, block_pool
from tests.support import tiny_models
from tests.support.pipelines import UNIFORM, load_spec, make_plan, resolve

GOOD = {"prompt": "one two"}
LINES = [
    GOOD,
    {"prompt": "a<pad>b"},  # a token beyond the model's table
    {"prompt": "x" * 90},
    {"prompt": "  "},
    "not JSON",
    {"custom_id": "r6", "body": {"messages": [{"role": "user", "content": "three"}], "max_tokens": 3, "seed": 7}},
    {"prompt": "four", "top_p": 2},
    GOOD,
]
ANSWERED = (0, 5, 7)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run: a model whose tokenizer has a token too many, a plan, and costs for up to 24 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "llama-gqa", torch.bfloat16, vocab_size=258)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    plan, costs = str(folder / "plan.json"), str(folder / "costs.json")
    make_plan(load_spec(resolve(str(folder))), [3], 2, 2, slots=2, precisions=UNIFORM).save(plan)
    lengths = ["--prompt-len", "16", "--output-len", "8", "--batch-size", "2"]
    assert main(["profile", "--model", str(folder), "--devices", "cpu", *lengths, "--out", costs]) == 0
    return ["--model", str(folder), "--plan", plan, "--costs", costs, "--no-log", "--max-new-tokens", "6"]


def _write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Results by the places of their prompts; of one in OpenAI's form, its choice in its place."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        value = json.loads(line)
        place = value.pop("id", "").partition("-")[0]
        index = int(value.get("index", place))
        assert index not in found
        if value.get("response"):
            (value["response"],) = value["response"]["body"]["choices"]
        found[index] = value
    return found


def test_a_bad_prompt_is_its_own_error_and_the_others_are_answered(
    known: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, report, again = tmp_path / "out.jsonl", tmp_path / "report.json", tmp_path / "again.jsonl"
    prompts = ["--prompts", _write(tmp_path / "in.jsonl", LINES), "--temperature", "2"]
    assert main(["run", *known, *prompts, "--output", str(output), "--json-out", str(report)]) == 6
    captured = capfd.readouterr()
    found = _read(output)
    assert sorted(found) == list(range(len(LINES)))
    assert [i for i in found if found[i]["error"] is None] == [i for i in found if i in ANSWERED]
    for i, words in {
        1: "has the token 258, and the model's table has 258",
        2: "has 90 tokens",
        3: "its text is empty",
        4: "expected a JSON object",
        6: "top_p: is 2.0, expected more than 0, at most 1",
    }.items():
        assert f"in.jsonl, line {i + 1}" in found[i]["error"] and words in found[i]["error"]
        assert (found[i]["finish_reason"], found[i]["text"], found[i]["token_ids"]) == ("error", "", [])
    assert found[5]["custom_id"] == "r6" and found[5]["response"]["seed"] == 7
    assert found[0]["token_ids"] != found[7]["token_ids"] and found[7]["seed"] == (found[0]["seed"] + 7) % 2**63
    outputs = Report.load(report).outputs
    assert [found[i] for i in range(len(LINES)) if i != 5] == [each.to_dict() for each in outputs if each.index != 5]
    assert found[5]["response"]["message"]["content"] == outputs[5].text and len(outputs[5].token_ids) <= 3
    assert captured.err.splitlines()[-1].startswith("llmpq: 5 of 8 prompts were not answered; the first: ")
    assert captured.out.count("not answered: ") == 5

    # With the seed that was drawn, all is as before, whatever else the file holds.
    repaired = [line if i in ANSWERED else {"prompt": "y"} for i, line in enumerate(LINES)]
    prompts = ["--prompts", _write(tmp_path / "in.jsonl", repaired), "--temperature", "2"]
    seeded = ["--seed", str(found[0]["seed"]), "--output", str(again), "--quiet"]
    assert main(["run", *known, *prompts, *seeded]) == 0
    repeated = _read(again)
    assert [repeated[i] for i in ANSWERED] == [found[i] for i in ANSWERED]


def test_a_line_may_ask_for_several_answers_and_what_they_are_worth(known: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    several = {
        "messages": [{"role": "user", "content": "three"}],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "seed": 7,
    }
    lines = [
        {"custom_id": "two", "body": several},
        {"prompt": "a", "logit_bias": {"258": 1}},
        {"prompt": "b", "temperature": 0, "n": 2},
        {"prompt": "one two", "best_of": 3, "bad_words": ["</s>"], "prompt_logprobs": 1, "stop": ["never comes"]},
    ]
    options = ["--prompts", _write(tmp_path / "in.jsonl", lines), "--temperature", "2", "--stop", "\0", "--quiet"]
    assert main(["run", *known, *options, "--output", str(output)]) == 6
    found = sorted(map(json.loads, output.read_text().splitlines()), key=lambda line: int(line["id"].partition("-")[0]))
    two, wrong, greedy, best = found
    first, second = two["response"]["body"]["choices"]
    assert two["custom_id"] == "two" and (first["index"], second["index"]) == (0, 1)
    assert first["message"] != second["message"] and first["seed"] == 7 != second["seed"]
    for choice in (first, second):
        assert {len(told["top_logprobs"]) for told in choice["logprobs"]["content"]} == {2}
    assert "logit_bias has the token 258" in wrong["error"]
    assert "n: is 2, but at temperature 0 every answer is the same" in greedy["error"]
    assert best["choice"] == 0 and best["log_probs"] is None and len(best["prompt_log_probs"]) == len("one two") - 1


def test_what_a_line_of_openai_takes_where_it_gives_no_temperature_and_what_it_takes_back(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, "llama-gqa")
    model = open_model(str(tmp_path))
    bodies: list[dict[str, Any]] = [{"n": 2}, {"n": 2, "temperature": 0.5}, {"n": 1}, {"logprobs": False}]
    prompts = read_prompts(_write(tmp_path / "in.jsonl", [{"body": {"prompt": "a", **body}} for body in bodies]))
    for given, temperatures in ((0.0, [1.0, 0.5, 0.0, 0.0]), (2.0, [2.0, 0.5, 2.0, 2.0])):
        items = Batch(prompts, SamplingParams(temperature=given, logprobs=3), model)._items
        assert [item.sampling.temperature for item in items] == temperatures
        assert [item.sampling.logprobs for item in items] == [3, 3, 3, None]


def test_each_prompt_goes_through_the_template_or_is_continued(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, "llama-gqa")
    plain = open_model(str(tmp_path))
    assert Batch([given_prompt("a", "")], SamplingParams(), plain).template == (
        "the model has no chat template: plain continuation"
    )
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    model, own = open_model(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    question = {"role": "user", "content": "hé"}
    talk = [{"role": "system", "content": "be brief"}, question]
    lines = ["hé", {"messages": talk}, {"body": {"prompt": "hé"}}, {"token_ids": [5, 6]}]
    prompts = read_prompts(_write(tmp_path / "in.jsonl", list(map(json.dumps, lines))))
    chat = [own.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in ([question], talk)]
    batch = Batch(prompts, SamplingParams(), model)
    assert batch.completions.token_ids == [*chat, own.encode("hé"), [5, 6]]
    assert batch.template.startswith("2 of 4 prompts go through the model's chat template; the others are continued")
    assert Batch(prompts[:2], SamplingParams(), model).template == "prompts go through the model's chat template"
    no_chat = Batch([replace(prompt, continued=True) for prompt in prompts], SamplingParams(), model)
    assert no_chat.completions.token_ids == [own.encode("hé"), own.encode("hé"), [5, 6]]
    assert no_chat.template == "no chat template: plain continuation"
    for refused, why in ((no_chat, "--no-chat leaves out"), (Batch(prompts, SamplingParams(), plain), "does not have")):
        (error,) = [output.error for output in refused.in_order]
        assert error is not None and "it has 2 messages, which takes a chat template, and" in error and why in error


def test_prompts_that_are_all_bad_are_refused_before_anything_is_done(
    known: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    assert main(["run", *known, "--prompt", "<pad>", "--prompt", " ", "--output", str(output)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("llmpq: none of 2 prompts can be run; the first: prompt 1 has the token 258, ")
    assert output.read_text() == "old"


def test_a_huge_prompt_is_refused_without_counting_its_tokens(
    known: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode

    def counting(tokenizer: Tokenizer, text: str) -> list[int]:
        encoded.append(len(text))
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    prompts = _write(tmp_path / "in.jsonl", [{"prompt": "x" * 5_000_000}])
    assert main(["run", *known, "--prompts", prompts]) == 2
    assert "line 1 has 5000000 characters, far more than" in capfd.readouterr().err
    assert max(encoded) <= 16 * 64


def test_what_fails_after_a_run_loses_nothing_of_it(
    known: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def fail(*arguments: object, names: object) -> None:
        told.append(names)
        raise UsageError("no such costs")

    monkeypatch.setattr(planner, "simulate", fail)
    monkeypatch.setattr(block_pool, "KV_BLOCK", 4)
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    prompts = _write(tmp_path / "in.jsonl", [GOOD, GOOD | {"prompt_logprobs": 0}])
    files = ["--output", str(output), "--json-out", str(report), "--trace", "/dev/full"]
    assert main(["run", *known, "--prompts", prompts, *files]) == 2
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == "llmpq: no such costs; cannot write /dev/full: No space left on device"
    loaded = Report.load(report)
    assert loaded.predicted is None and loaded.measured.decode_s > 0
    found = _read(output)
    assert [output.to_dict() for output in loaded.outputs] == [found[0], found[1]]
    assert "> one two" in captured.out
    ((reused, computed),) = told
    assert reused and computed == ()  # all of a prompt whose log-probabilities are asked for


def test_a_run_without_a_prediction_says_why_and_has_answered(
    known: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **_: object) -> None:
        raise NotMeasuredError("no cost of attention m=9")

    monkeypatch.setattr(planner, "simulate", fail)
    report = tmp_path / "report.json"
    assert main(["run", *known, "--prompt", "one two", "--json-out", str(report)]) == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert [line for line in lines if "m=9" in line] == ["nothing to compare with: no cost of attention m=9"]
    assert "> one two" in captured.out and "no cost" not in captured.err
    assert Report.load(report).predicted is None and len(Report.load(report).outputs) == 1


def test_what_breaks_a_run_off_leaves_the_answers_there_are(
    known: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Engine.generate

    def lose(
        engine: Engine, ids: Any, sampling: Any, on_progress: Any, on_end: Callable[[int, Generated], None], *more: Any
    ) -> object:
        def end(request: int, generated: Generated) -> None:
            on_end(request, generated)
            if request == 1:
                raise WorkerLostError("it is gone")

        return generate(engine, ids, sampling, on_progress, end, *more)

    monkeypatch.setattr(Engine, "generate", lose)
    output = tmp_path / "out.jsonl"
    prompts = [option for text in ("one", "two", "three", "four") for option in ("--prompt", text)]
    assert main(["run", *known, *prompts, "--output", str(output), "--quiet"]) == 5
    captured = capfd.readouterr()
    assert captured.err == "llmpq: it is gone\n"
    assert sorted(_read(output)) == [0, 1]
    assert [line for line in captured.out.splitlines() if line.startswith("> ")][:2] == ["> one", "> two"]


def test_costs_that_do_not_reach_the_run_are_refused_before_it_loads(
    known: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("llmpq.runtime.engine.Engine.__init__")
    assert main(["run", *known, "--prompt", "x" * 33]) == 2
    error = capfd.readouterr().err
    assert "loading" not in error and "measured" in error.splitlines()[-1]
