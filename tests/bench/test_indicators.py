"""The comparison of sensitivity methods: rank correlation and the best plan against brute force."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from bench.quality.indicators import best_plan, spearman
from llmpq.checkpoint.model_files import load_spec, resolve
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
