"""A tiny GGUF file of every architecture, as llama.cpp's converter writes it, against transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.models.decoder_stage import build_stage
from tests.support.decoding import (
    CPU,
    EXACT,
    all_logits,
    open_model,
    random_sequences,
    single_plan,
    transformers_logits,
)
from tests.support.gguf_files import write_gguf

TOKENS = random_sequences()[3]
PLAIN = {"types": {}}
SCALAR = {"query_pre_attn_scalar": 16}  # as llama.cpp has it, which does not write it
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama-rope-llama3", PLAIN),
    ("mistral", PLAIN),
    ("mistral", {**PLAIN, "architecture": "mistral3"}),
    ("smollm3", PLAIN),
    ("qwen2", PLAIN),
    ("qwen2-yarn", PLAIN),
    ("qwen3", PLAIN),
    ("gemma", PLAIN),
    ("gemma2", {**PLAIN, **SCALAR}),
    ("gemma3", {**PLAIN, **SCALAR, "metadata": {"gemma3.attention.sliding_window_pattern": 3}}),
    ("gemma3-scaled", {**PLAIN, **SCALAR, "metadata": {"gemma3.attention.sliding_window_pattern": 2}}),
    ("phi", PLAIN),
    ("phi3", PLAIN),
    ("phi3-longrope", PLAIN),
    ("granite", PLAIN),
    ("olmo2", PLAIN),
    ("starcoder2", {**PLAIN, "sliding_window": None}),
    ("gpt2", PLAIN),
    ("gpt_neox", PLAIN),
    ("gpt_neox-sequential", PLAIN),
    ("bloom", PLAIN),
    ("falcon", PLAIN),
    ("falcon-new", PLAIN),
]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_architecture_equals_transformers(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")
    model = write_gguf(tmp_path / "m.gguf", kind, **options)
    torch.testing.assert_close(logits_of(tmp_path / "m.gguf"), transformers_logits(model, TOKENS), atol=2e-5, rtol=0)


def logits_of(path: Path) -> torch.Tensor:
    spec, source = open_model(path)
    stage = build_stage(spec, source, single_plan(spec), 0, CPU, **EXACT)
    return all_logits([stage], {0: TOKENS}, portions=[7, 6])[0]
