"""Answers and how well they are foretold, against transformers' own greedy search and by hand."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from bench.quality.answers import agreement, answers
from llmpq.checkpoint.model_files import load_model
from llmpq.runtime.engine import Engine
from llmpq.spec import W16, Device, Plan
from tests.support.pipelines import tiny_model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def test_answers_are_greedy_and_agree_with_themselves_alone(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, "llama-gqa"))
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    greedy = [
        network.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    plan = Plan.single(model.spec, Device("cpu0", "cpu", threads=1), W16, slots=2, max_length=16)
    with Engine(plan, model.checkpoint, model.spec, logits=True) as engine:
        found = answers(engine, PROMPTS, 6)
        assert found == greedy
        assert agreement(engine, PROMPTS, found) == [[True] * len(answer) for answer in found]
        other = [[*found[0][:2], (found[0][2] + 1) % model.spec.vocab_size], found[1]]
        assert agreement(engine, PROMPTS, other) == [[True, True, False], [True] * len(found[1])]
