"""Comparing a file's pipeline with transformers: what is alike is found alike, and a fault is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.models.dequantized import gguf_in_transformers
from bench.models.real_files import TIE, Difference, computed, differences, judged, types_of
from bench.tables.real_files import real_files
from llmpq.checkpoint.model_files import open_model
from tests.support.gguf_files import write_gguf

TYPES = {"q_proj": "Q5_0", "k_proj": "Q5_0", "v_proj": "Q8_0", "up_proj": "Q5_0", "gate_proj": "Q5_0"}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
WINDOWS = [list(range(2, 34)), list(range(100, 132))]


def test_a_file_is_right_and_one_wrong_bias_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen2", types=TYPES, hidden_size=64, intermediate_size=96)
    assert types_of(path)["Q5_0"] == 12 and types_of(path)["Q8_0"] == 3
    ours = computed(open_model(str(path)), PROMPTS, 8, WINDOWS)
    assert [len(answer) for answer in ours.answers] == [8, 8]
    network = gguf_in_transformers(path)
    found = judged(ours, network)
    assert found["not_ties"] == 0 and found["logit_difference"] < TIE / 2
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-4)
    assert (found["tokens"], found["predictions"]) == (16, 62)
    with torch.no_grad():
        network.lm_head.weight[ours.answers[0][0]] *= -1
        network.model.layers[0].self_attn.q_proj.bias += 1
    wrong = judged(ours, network)
    assert wrong["not_ties"] > 0 and wrong["logit_difference"] > TIE
    assert wrong["perplexity"] != pytest.approx(wrong["reference_perplexity"], rel=1e-3)


def test_a_difference_is_a_tie_if_ours_is_nearly_the_best() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) / 10
    logits[0, 7], logits[1, 8], logits[1, 9], logits[2, 5], logits[2, 6] = 4.0, 4.0, 3.9, 4.0, 3.9999
    first, second = differences(2, [7, 9, 6], logits)
    assert (first.prompt, first.position, first.ours, first.theirs) == (2, 1, 9, 8) and not first.is_tie
    assert first.margin == pytest.approx(0.1 / logits[1].std().item(), rel=1e-4)
    assert (second.position, second.ours, second.theirs) == (2, 6, 5) and second.is_tie


def test_what_is_wrong_is_bold() -> None:
    differing = [Difference(0, 3, 5, 6, 0.5), Difference(0, 9, 5, 6, 0.001), Difference(4, 2, 5, 6, 0.001)]
    row = {
        "model": "qwen",
        "types": {"Q5_0": 2, "F32": 1},
        "prompts_alike": 7,
        "tokens": 512,
        "differences": [vars(difference) for difference in differing],
        "not_ties": 1,
        "logit_difference": 0.01,
        "perplexity": 10.02,
        "reference_perplexity": 10.0,
        "predictions": 62,
    }
    lines = real_files({"prompts": ["?"] * 8, "tie": TIE, "versions": {"gguf": "1"}, "rows": [row]})
    assert lines[2] == (
        "| qwen | 2 Q5_0, 1 F32 | **7 of 8** | **509 of 512** | 2 | 0.010 | 10.0200 | 10.0000 | **+0.2000 %** |"
    )
    text = "\n".join(lines)
    assert "prompt 1: the first other token is that after 3, no tie" in text
    assert "prompt 5: the first other token is that after 2, a tie" in text
