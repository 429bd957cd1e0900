"""The model of lm-eval against lm-eval's own for transformers, on tasks of JSON lines."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's model for transformers needs accelerate: pip install accelerate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from llmpq.checkpoint.model_files import resolve  # noqa: E402
from llmpq.cli.main import carry_out  # noqa: E402
from llmpq.harness import HarnessModel  # noqa: E402
from llmpq.lm_eval import main  # noqa: E402
from llmpq.spec import UsageError  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.pipelines import UNIFORM, load_spec, make_plan  # noqa: E402

MAX_LENGTH = 40  # so that some of the texts are cut
QUESTIONS = [
    {"text": "Water is wet.", "answers": [" Yes", " No, it is not"], "right": 0},
    {"text": "", "answers": ["Fire", "Ice"], "right": 1},
    {"text": "A text that is longer than the model's context, from the left.", "answers": [" a", " bb"], "right": 1},
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: '{{text}}'
doc_to_choice: answers
target_delimiter: ''
doc_to_target: right
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}} and more of it, so that it is two windows.'
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "answers": """
output_type: generate_until
doc_to_text: 'On {{text}}'
doc_to_target: right
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: [UNTIL], max_gen_toks: 36, do_sample: false}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, and questions."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "model").mkdir()
    model = tiny_models.save_model(folder / "model", "llama-gqa", torch.bfloat16)
    questions = [*QUESTIONS, likeliest_answer(model.float(), folder / "model")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


def likeliest_answer(model: transformers.PreTrainedModel, folder: Path) -> dict[str, Any]:
    """A question of one letter, whose first answer is the likeliest continuation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for letter in string.ascii_letters:
        answer = tokenizer.decode(int(model(**tokenizer(letter, return_tensors="pt")).logits[0, -1].argmax()))
        if answer in string.ascii_letters:
            return {"text": letter, "answers": [answer, "?!"], "right": 0}
    raise AssertionError("this model never continues a letter with a letter")


def write_tasks(folder: Path, until: str) -> Path:
    """The folder of TASKS on the questions."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    for name, rest in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {folder / 'questions.jsonl'}\n"
        head += "test_split: train\n"
        (tasks / f"{name}.yaml").write_text(head + rest.replace("UNTIL", json.dumps(until)))
    return tasks


def evaluate(model: Any, folder: Path, until: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the model answered to each request of each task."""
    monkeypatch.setenv("HF_HOME", str(folder / "datasets"))
    manager = TaskManager(include_path=str(write_tasks(folder, until)), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return {name: [sample["resps"] for sample in samples] for name, samples in results["samples"].items()}


@pytest.mark.slow
def test_it_answers_as_the_model_of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(resolve(str(folder / "model")))
    plan = make_plan(spec, [2, 1], 2, 2, precisions=UNIFORM)
    plan.save(folder / "plan.json")
    theirs = HFLM(str(folder / "model"), dtype="float32", max_length=MAX_LENGTH, batch_size=1, device="cpu")
    ours = HarnessModel(str(folder / "model"), batch_size=2, max_length=MAX_LENGTH, plan=folder / "plan.json")
    expected = evaluate(theirs, folder, "\u0000", monkeypatch)
    until = expected["answers"][0][0][0][4:6]  # comes in the middle of the first answer
    expected, found = (evaluate(model, folder, until, monkeypatch) for model in (theirs, ours))
    assert found["answers"] == expected["answers"] and len(expected["answers"][0][0][0]) < 36
    # Keys and values are kept in 16 bits.
    assert flat(found["rolling"]) == pytest.approx(flat(expected["rolling"]), rel=1e-4)
    values, greedy = zip(*flat(found["choices"]), strict=True)
    expected_values, expected_greedy = zip(*flat(expected["choices"]), strict=True)
    assert values == pytest.approx(expected_values, rel=1e-3) and greedy == expected_greedy
    assert True in greedy and False in greedy


def flat(responses: list[Any]) -> list[Any]:
    """Of all samples; each has a list for each of its requests."""
    return [response for sample in responses for request in sample for response in request]


@pytest.mark.slow
def test_the_command_knows_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(folder / "datasets"))
    tasks = ["--tasks", "choices", "--include_path", str(write_tasks(folder, "x"))]
    options = f"pretrained={folder / 'model'},bits=4,max_length={MAX_LENGTH}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *tasks, "--model", "llmpq", "--model_args", options])
    assert carry_out(main) == 0
    assert "|choices|" in capfd.readouterr().out


def test_what_it_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="argument --bits: '5' is not one of"):
        HarnessModel(str(folder / "model"), bits=5)
    with pytest.raises(UsageError, match="unrecognized arguments: --peft=x"):
        HarnessModel(str(folder / "model"), peft="x")
    model = HarnessModel(str(folder / "model"), max_length=8)

    def ask(context: str, **options: Any) -> list[str]:
        return model.generate_until([Instance("generate_until", {}, (context, options), 0)])

    assert len(ask("", max_gen_toks=4)) == 1
    with pytest.raises(UsageError, match="lower max_gen_toks"):
        ask("one", max_gen_toks=8)
    with pytest.raises(UsageError, match="'num_beams' is no option"):
        ask("one", max_gen_toks=4, num_beams=2)
    with pytest.raises(UsageError, match="an answer has 9 tokens"):
        model.loglikelihood([Instance("loglikelihood", {}, ("one", "nine more"), 0)])
