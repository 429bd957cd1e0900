"""What KV caches of fewer bits lose: what is asked and written, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.quality import kv_cache
from bench.tables.kv_cache import kv_cache as table
from llmpq.checkpoint.model_files import Model
from llmpq.measure.divergence import Divergence
from llmpq.spec import W16, Plan
from tests.support.pipelines import tiny_model


class Found:
    """In place of TextQuality: fewer bits lose more."""

    def __init__(self, model: Model, text: str, max_tokens: int) -> None:
        self.tokens = max_tokens - 1

    def of(self, plan: Plan) -> Divergence:
        assert {plan.precision(unit) for unit in ("embedding", "layer.0", "head")} == {W16}
        loss = 0.0 if plan.kv_bits == 16 else 0.25
        return Divergence(20.0, loss, 0.01, loss, 0.02, 0.5, 1 - loss)


def test_both_caches_are_measured_with_weights_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "TextQuality", Found)
    read = ["--model", str(tiny_model(tmp_path / "model", "llama-gqa").path), "--max-tokens", "76"]
    kv_cache.main([*read, "--json-out", str(tmp_path / "found.json")])
    results = json.loads((tmp_path / "found.json").read_text())
    rows = [[row[field] for field in ("kv_bits", "perplexity", "kl")] for row in results["rows"]]
    assert rows == [[16, 20.0, 0.0], [8, 25.0, 0.25]]
    assert [row["top1_agreement_error"] for row in results["rows"]] == [0.0, pytest.approx(0.05)]  # of 75 tokens


def test_the_table_shows_means_with_their_errors() -> None:
    row = {"kv_bits": 8, "perplexity": 20.0, "perplexity_increase": 0.0005, "perplexity_increase_error": 0.0009}
    row |= {"reference_perplexity": 19.99, "kl": 9.3e-4, "kl_error": 2.1e-5, "kl_999": 0.02}
    row |= {"top1_agreement": 0.985, "top1_agreement_error": 0.0019}
    lines = table({"model": "m", "tokens": 4096, "rows": [row]})
    assert lines[0] == "m, 4096 predictions, reference perplexity 19.990."
    assert lines[-1] == "| 8 | 20.000 | +0.050 % ± 0.090 | 9.3e-04 ± 2e-05 | 2.0e-02 | 98.50 % ± 0.19 |"
