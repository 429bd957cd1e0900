"""The demo model against transformers' own of its file: logits in 16 bits, and what follows prompts at native."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models.dequantized import gguf_in_transformers
from llmpq.checkpoint.model_files import load_spec, load_tokenizer, resolve
from llmpq.checkpoint.weights import open_weights
from llmpq.demo import PROMPTS
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import NATIVE, Device, Plan
from tests.support.decoding import CPU, EXACT, all_logits, single_plan, step_of, transformers_logits

TIE = 1e-3  # logits: twice what the two implementations may differ by
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def network() -> Any:
    return gguf_in_transformers(resolve("demo").path)


@pytest.mark.slow
def test_logits_equal_those_of_transformers(network: Any) -> None:
    checkpoint = resolve("demo")
    spec = load_spec(checkpoint)
    source = open_weights(checkpoint, spec)
    stage = build_stage(spec, source, single_plan(spec, max_length=64), 0, CPU, **EXACT)
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer.encode("The capital of France is")
    logits = all_logits([stage], {2: tokens}, portions=[3])[2]
    expected = transformers_logits(network, tokens)
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=0)
    assert tokenizer.decode(logits[-1:].argmax(-1).tolist()) == " Paris"


def greedy(prompts: list[list[int]]) -> list[list[int]]:
    """NEW_TOKENS tokens after each prompt, by the demo model at native, all prompts together."""
    checkpoint = resolve("demo")
    spec = load_spec(checkpoint)
    length = max(map(len, prompts)) + NEW_TOKENS
    plan = Plan.single(spec, Device("cpu0", "cpu"), NATIVE, slots=len(prompts), max_length=length)
    stage = build_stage(spec, open_weights(checkpoint, spec), plan, 0, CPU)
    generated: list[list[int]] = [[] for _ in prompts]
    new, starts = dict(enumerate(prompts)), dict.fromkeys(range(len(prompts)), 0)
    for _ in range(NEW_TOKENS):
        step = step_of(new, starts)
        logits = stage.logits(stage(step)[step.last_rows])
        starts = {slot: starts[slot] + len(tokens) for slot, tokens in new.items()}
        new = {slot: [int(token)] for slot, token in zip(new, logits.argmax(-1), strict=True)}
        for slot, tokens in new.items():
            generated[slot] += tokens
    return generated


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, pytest.param(len(PROMPTS), marks=pytest.mark.full)])
def test_greedy_tokens_at_native_equal_those_of_transformers_but_for_ties(count: int, network: Any) -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    prompts = [tokenizer.encode_chat(text) for text in PROMPTS[:count]]
    compared = 0
    for prompt, tokens in zip(prompts, greedy(prompts), strict=True):
        # One pass over the whole answer: its greedy tokens are the same as long as each is the best after those before.
        logits = transformers_logits(network, prompt + tokens)[len(prompt) - 1 : -1]
        best = logits.topk(2)
        for token, expected, margin in zip(tokens, best.indices[:, 0].tolist(), -best.values.diff().squeeze(1)):
            if token != expected:
                assert margin < TIE
                break
            compared += 1
    assert compared > len(prompts) * NEW_TOKENS // 2
