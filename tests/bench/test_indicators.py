"""The comparison of sensitivity methods: rank correlation and the best plan against brute force."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.quality.indicators import Bench, best_plan, spearman
from bench.tables.indicators import indicators
from llmpq.checkpoint.model_files import load_spec, open_model, resolve
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.spec import Precision
from tests.support.tiny_models import save_model


def test_rank_correlation_is_spearmans() -> None:
    # 1 - 6 * sum of d^2 / (n * (n^2 - 1)), where d is the difference of ranks: here 0, 1, -1, 0.
    assert spearman([1.0, 20.0, 3.0, 400.0], [-2.0, 5.0, 7.0, 9.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1.0, 2.0, 3.0], [9.0, 5.0, 4.0]) == pytest.approx(-1)


@pytest.mark.parametrize("average_bits", [3.2, 4.0, 5.5])
def test_the_best_plan_is_that_of_brute_force(average_bits: float, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, draw = load_spec(resolve(str(tmp_path))), random.Random(1)
    precisions = [Precision(bits, 32) for bits in (3, 4, 8)]
    omega = {unit: {str(p): draw.random() * 2.0**-p.bits for p in precisions} for unit in spec.units}
    sizes = [sum(linear.n * linear.k for linear in spec.linears(unit).values()) for unit in spec.units]

    def total(plan: tuple[Precision, ...]) -> float:
        return sum(omega[unit][str(p)] for unit, p in zip(spec.units, plan, strict=True))

    feasible = [
        plan
        for plan in itertools.product(precisions, repeat=len(sizes))
        if sum(size * p.bits for size, p in zip(sizes, plan, strict=True)) <= average_bits * sum(sizes)
    ]
    found = best_plan(spec, precisions, omega, average_bits)
    assert tuple(found[unit] for unit in spec.units) in feasible
    assert total(tuple(found[unit] for unit in spec.units)) == pytest.approx(min(map(total, feasible)), rel=1e-6)


def test_the_table_says_where_the_default_is_not_the_best() -> None:
    def method(name: str, rank: float, *kls: float) -> dict[str, object]:
        plans = [{"average_bits": 3.5 + i, "kl": kl, "perplexity": 10 + kl} for i, kl in enumerate(kls)]
        ranks = {"w3": {"kl": rank, "loss": 0.1}}
        return {"method": name, "spearman": ranks, "plans": plans, "cpu_seconds": 1.0}

    methods = [method("fisher", 0.8, 0.5, 0.11), method("kl", 0.91, 0.5, 0.1), method("random", 0, 0.9, 0.9)]
    measured = {"form": "B", "tokens": 768, "perplexity": 9.876, "methods": methods}
    lines = indicators({**measured, "precisions": ["w3-g64-asym-rtn"]})
    assert lines[0].endswith("perplexity 9.88.")
    assert "| fisher | 0.80 | 0.10 | 10.50 (0.500) | 10.11 (0.110) | 1 |" in lines
    assert [line.split(" | ")[-1] for line in lines[-2:]] == ["0.91 |", "1.00x, **1.10x** |"]
    by_kl = indicators({**measured, "precisions": ["w3-g64-asym-gptq"]})
    assert by_kl[-1].endswith("| 1.00x, 1.00x |")


def test_a_judgement_goes_on_where_it_was_left(tmp_path: Path) -> None:
    """Also against transformers: the perplexity of the network as it is."""
    model = save_model(tmp_path, "llama-gqa")
    found = open_model(str(tmp_path))
    spec, source = found.spec, open_weights(found.checkpoint, found.spec)
    ids = torch.randint(272, (600,), generator=torch.Generator().manual_seed(3)).tolist()
    text = CalibrationPass(spec, source, ids, 2, 64)
    precisions = [Precision(bits, 32, "asym") for bits in (3, 4, 8)]
    results: dict[str, Any] = {}
    bench = Bench(source, spec, precisions, ids, text)
    bench.know(results)
    bench.judge("random", results["methods"])
    windows = text.step.tokens.view(2, 64)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    expected = float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())
    assert results["perplexity"] == pytest.approx(expected, rel=1e-4)
    row = results["methods"][0]
    before = json.dumps(results)
    plans, row["plans"] = row["plans"], row["plans"][:2]
    again = Bench(source, spec, precisions, ids, text)
    again.know(results)
    again.judge("random", results["methods"])
    assert json.dumps(results) == before and [plan["average_bits"] for plan in plans] == [3.5, 4.0, 5.0, 6.0]
    assert plans[0]["perplexity"] == pytest.approx(expected * math.exp(plans[0]["loss"]), rel=1e-4)
