"""Every family on the command line: sensitivities, a plan for two devices, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmpq.checkpoint.model_files import load_tokenizer, resolve
from llmpq.cli.main import main
from llmpq.spec import Sensitivity, Solved
from tests.support.commands import WORKLOAD, write
from tests.support.decoding import transformers_logits
from tests.support.tiny_models import FORMS, KINDS, save_model

PROMPTS = ["one two three", "four five six"]
NEW_TOKENS = 6
TIE = 0.02  # of logits with a standard deviation of 1: they differ by what keys and values lose in 16 bits
FAMILIES = ["llama-gqa", "mistral", "opt", *(kind for kind in FORMS if "-" not in kind)]
OFTEN = ("gemma3",)  # in `make test`, too


@pytest.mark.slow
@pytest.mark.family("sensitivity", "plan", "run")
@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.full) for kind in FAMILIES]
)
def test_a_family_is_measured_planned_and_run_by_two_devices(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert kind in {**KINDS, **FORMS}
    model = save_model(tmp_path / "model", kind, torch.float16).float()
    common = ["--model", str(tmp_path / "model")]
    files = {name: str(tmp_path / f"{name}.json") for name in ("omega", "plan", "report")}
    assert main(["sensitivity", *common, "--out", files["omega"]]) == 0
    omega = Sensitivity.load(files["omega"]).omega
    widths = [name for name in omega["layer.0"] if not name.startswith("w16")]
    assert widths and all(omega[f"layer.{i}"][name] > 0 for i in range(3) for name in widths)
    devices = ["--devices", "cpu:memory=64MiB,isa=avx2;cpu:memory=64MiB,isa=avx2,name=other", "--all-devices"]
    options = ["--sensitivity", files["omega"], "--activations", "a16", "--bits", "16"]
    assert main(["plan", *common, *devices, *options, *WORKLOAD, "--out", files["plan"]]) == 0
    assert len(Solved.load(files["plan"]).plan.stages) == 2
    prompts = write(tmp_path, "prompts.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    limit = ["--max-new-tokens", str(NEW_TOKENS), "--output", files["report"], "--quiet"]
    assert main(["run", *common, "--plan", files["plan"], "--prompts", prompts, *limit]) == 0
    tokenizer = load_tokenizer(resolve(str(tmp_path / "model")))
    for text, line in zip(PROMPTS, Path(files["report"]).read_text().splitlines(), strict=True):
        tokens = tokenizer.encode(text)
        for token in json.loads(line)["token_ids"]:
            logits = transformers_logits(model, tokens)[-1]
            assert logits[token] >= logits.max() - TIE * logits.std()
            tokens.append(token)
