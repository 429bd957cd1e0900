"""Stages whose KV cache has 8 bits: as transformers' own models compute with keys and values that are rounded so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmpq.models.decoder_stage import build_stage
from llmpq.spec import W16, Plan
from tests.support.decoding import (
    CPU,
    WIDE_CACHE,
    all_logits,
    open_model,
    random_sequences,
    single_plan,
    split_plan,
    transformers_logits,
)
from tests.support.target import require_backend
from tests.support.tiny_models import save_model


def with_cache_8(plan: Plan, *stages: int) -> Plan:
    changed = (replace(stage, kv_bits=8 if i in stages else 16) for i, stage in enumerate(plan.stages))
    return replace(plan, stages=tuple(changed))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "opt"])
def test_each_stage_has_the_cache_that_the_plan_says(
    kind: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two; prompts in chunks, then token by token."""
    require_backend(backend)
    monkeypatch.setenv("LLMPQ_BACKEND", backend)
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    plan = with_cache_8(split_plan(spec, (2, 1), W16), 0)
    stages = [
        build_stage(spec, source, plan, i, CPU, weight_dtype=torch.float32, **more)
        for i, more in enumerate(({}, WIDE_CACHE))
    ]
    sequences = random_sequences()
    for slot, logits in all_logits(stages, sequences, portions=[4, 3]).items():
        expected, exact = (transformers_logits(model, sequences[slot], layers) for layers in ((0, 1), ()))
        rounding = (expected - exact).abs().max()
        assert rounding > 1e-3 * exact.std()
        # A number halfway between two codes may become either.
        assert (logits - expected).abs().max() < rounding / 10


def test_it_takes_the_memory_that_is_planned(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-head-dim")  # heads of 16
    spec, source = open_model(tmp_path)
    plan = with_cache_8(single_plan(spec), 0)
    stage = build_stage(spec, source, plan, 0, CPU)
    # 3 layers, of 5 slots a block of 64 positions each: 2 kv heads of 16 codes and a scale, of keys and of values.
    assert stage.kv_cache.nbytes == 3 * 5 * 64 * 2 * 2 * (16 + 4) == 3 * spec.kv_bytes(5 * 64, plan.stages[0].kv_dtype)
