"""The comparison of options for each linear: what is chosen is the best that fits, by trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.quality.per_linear import OPTIONS, choices, choose
from bench.tables.per_linear import per_linear
from llmpq.spec import Precision, Sensitivity
from tests.support.planner_instances import model

PRECISIONS = [Precision(bits, group) for bits, group in ((3, 64), (4, 32), (4, 64), (8, 64))]


def sensitivity() -> Sensitivity:
    rng, spec = np.random.default_rng(3), model(2)
    scale = dict(zip(map(str, PRECISIONS), (4.0, 0.9, 1.0, 0.02)))
    parts = [f"{unit}{name}" for unit in spec.units[1:-1] for name in ("", *(f".{n}" for n in spec.linears("layer.0")))]
    omega = {part: {p: float(s * rng.uniform(0.2, 2.0)) for p, s in scale.items()} for part in parts}
    return Sensitivity(spec.name, spec.content_hash, "synthetic", "", omega)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_choice_is_the_best_that_fits(options: str) -> None:
    spec, shapes = model(2), model(2).linears("layer.0")
    decisions = choices(spec, sensitivity(), PRECISIONS, options)
    weights = spec.num_layers * sum(shape.n * shape.k for shape in shapes.values())
    if options.startswith("linear"):  # fewer, so that everything can be tried
        decisions = decisions[:6]
        weights = sum(shapes[name].n * shapes[name].k for of in decisions for name in of[0].linears)
        room = weights / sum(s.n * s.k for s in shapes.values()) / spec.num_layers * 4.3
    else:
        room = 4.3
    assigned, loss = choose(spec, decisions, room)

    def bits(linears: dict[str, Precision]) -> int:
        return sum(8 * p.weight_bytes(shapes[name].n, shapes[name].k) for name, p in linears.items())

    fitting = [
        sum(choice.loss for choice in of)
        for of in itertools.product(*decisions)
        if sum(bits(dict(choice.linears)) for choice in of) <= 4.3 * weights
    ]
    assert loss == pytest.approx(min(fitting), rel=2e-3)
    assert sum(map(bits, assigned.values())) <= 4.3 * weights
    with pytest.raises(ValueError, match="nothing fits into 1 bits"):
        choose(spec, decisions, 1)


def test_the_table_shows_shares_of_what_layers_lose() -> None:
    row = {"bed": "A", "quantizer": "rtn", "size": 4.0}
    rows = [{**row, "options": "layer", "kl": 0.5}, {**row, "options": "steps", "kl": 0.2}]
    lines = per_linear({"predictions": 10, "group_size": 64, "rows": rows})
    assert lines[-1] == "| A | rtn | 4.0 | 0.500 | 0.200 (0.40x) |"
