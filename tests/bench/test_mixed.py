"""Mixed bits at equal size: draws and the best assignment against brute force, and what is measured of a tiny model."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import beds, mixed, small_opt
from bench.quality.mixed import BITS, Network, cheapest, draw, evenly, wanted
from bench.quality.rivals.ours import left_of
from bench.quality.small_opt import Training
from bench.tables.mixed import added, quality_mixed


def all_of(layers: int, total: int) -> set[tuple[int, ...]]:
    return {found for found in itertools.product(BITS, repeat=layers) if sum(found) == total}


@pytest.mark.parametrize("total", [21, 24, 30, 31])
def test_draws_are_different_and_of_exactly_that_size(total: int) -> None:
    there = all_of(6, total)
    assert set(draw(6, total, 1000, random.Random(0))) == there
    some = draw(6, total, 10, random.Random(0))
    assert len(some) == len(set(some)) == min(10, len(there)) and set(some) <= there


def test_every_assignment_is_drawn_equally_often() -> None:
    there = all_of(5, 22)
    counts = Counter(draw(5, 22, 1, random.Random(seed))[0] for seed in range(100 * len(there)))
    assert counts.keys() == there and len(there) > 20
    assert all(60 < count < 140 for count in counts.values())  # four standard deviations of 10


def test_many_layers_have_more_assignments_than_can_be_listed() -> None:
    some = draw(30, 150, 50, random.Random(0))
    assert len(set(some)) == 50 and {sum(found) for found in some} == {150} and {len(found) for found in some} == {30}


@pytest.mark.parametrize("total", [18, 21, 25, 40, 48])
def test_the_cheapest_assignment_is_that_of_brute_force(total: int) -> None:
    chance = random.Random(total)
    omega = [{bits: chance.random() * 4.0**-bits for bits in BITS} for _ in range(6)]

    def cost(found: tuple[int, ...]) -> float:
        return sum(layer[bits] for layer, bits in zip(omega, found, strict=True))

    expected = min((found for found in itertools.product(BITS, repeat=6) if sum(found) <= total), key=cost)
    assert cheapest(omega, total) == expected
    with pytest.raises(ValueError, match="6 layers take more than 17 bits"):
        cheapest(omega, 17)


def test_wide_layers_are_spread_evenly() -> None:
    assert evenly(4, 3.5) == (3, 4, 3, 4)
    assert evenly(8, 5.0) == (4, 4, 4, 8, 4, 4, 4, 8)
    assert evenly(6, 4.0) == (4,) * 6
    assert sum(evenly(30, 5.0)) == 152  # 8 of 30: 7 would be less than was asked for


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    text = " ".join(str(i) for i in range(2000))
    small_opt.train(text, work / "OPT", Training(300, hidden_size=64, layers=3, heads=2, length=64, batch=2, steps=5))
    return work


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_mix_has_the_weights_that_are_served(quantizer: str, opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "LENGTH", 64)
    quantized = Network(beds.open_bed("OPT", opt), quantizer)
    found, alone = quantized.measure((3, 8, 4)), quantized.measure((16, 3, 16))
    options = {f"layer.{i}": quantized.precision(bits) for i, bits in enumerate((3, 8, 4))}
    windows = quantized.text.token_ids
    network = beds.network(quantized.bed.folder)
    with torch.no_grad():
        before = network(windows).logits[:, :-1].log_softmax(-1)
        read = quantized.calibration.token_ids
        for name, weight in left_of(quantized.bed, read.flatten().tolist(), options, len(read)).weights.items():
            network.get_parameter(f"{name}.weight").copy_(weight)
        after = network(windows).logits[:, :-1].log_softmax(-1)
    assert found["kl"] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-2)
    loss = -after.gather(-1, windows[:, 1:, None]).mean()
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert quantized.measure((8, 8, 8))["kl"] < found["kl"] < quantized.measure((3, 3, 3))["kl"]
    assert 0 < alone["kl"] < quantized.measure((3, 3, 3))["kl"]


def test_what_is_measured_is_kept_and_the_rest_added(
    opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "LENGTH", 64)
    monkeypatch.setattr(mixed, "DRAWN", 3)
    path = tmp_path / "mixed.json"
    options = ["--models", "OPT/rtn", "--work", str(opt), "--json-out", str(path)]
    mixed.main([*options, "--seconds", "0"])
    assert not path.exists()
    mixed.main(options)
    before = path.read_text()
    results = json.loads(before)
    expected = [key for key, _ in wanted(Network(beds.open_bed("OPT", opt), "rtn"))]
    assert [
        {field: row[field] for field in key} for key, row in zip(expected, results["rows"], strict=True)
    ] == expected
    monkeypatch.setattr(Network, "measure", lambda *_: pytest.fail("measured again"))
    mixed.main(options)
    assert path.read_text() == before
    monkeypatch.setattr(Network, "measure", lambda self, assignment: self.as_it_is())
    del results["rows"][4:]
    path.write_text(json.dumps(results))
    mixed.main(options)
    rows = json.loads(path.read_text())["rows"]
    assert rows[:4] == results["rows"] and len(rows) == len(expected)


def test_the_table_says_where_ours_loses() -> None:
    of = {"model": "OPT, 8 layers", "bed": "OPT", "quantizer": "rtn"}
    model = {**of, "predictions": 7, "perplexity": 50.0, "counting_perplexity": 600.0}

    def row(method: str, kl: float, omega: float, size: float = 5.0, bits: str = "") -> dict[str, Any]:
        more = {"method": method, "bits": bits, "exact_bits": size, "omega": {"fisher": omega}, "perplexity": 100 * kl}
        return {**of, "average_bits": 5.0, "kl": kl, **more}

    rows = [row("fisher", 0.3, 0.1), row("kl", 0.2, 0.1), row("uniform", 0.25, 0.2, size=5.25)]
    drawn = (("34", 0.5, 1.0), ("43", 0.4, 2.0), ("44", 0.6, 3.0))
    rows += [row("random", kl, omega, bits=bits) for bits, kl, omega in drawn]
    alone = {"3-": 0.3, "-3": 0.1, "4-": 0.01, "-4": 0.02}  # sums: 0.32, 0.11, 0.03
    rows += [row("alone", kl, 0.0, bits=bits) for bits, kl in alone.items()]
    *_, line, _, missing = quality_mixed({"models": [model], "rows": rows})
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["OPT, 8 layers, rtn", "5", "0.3000", "0.2000", "0.2500 (5.25 bits)", "3"]
    assert cells[6:] == [
        "0.4000",
        "0.4000, 0.5000, 0.6000",
        "**1.20x**",
        "0.60x",
        "0.50",
        "-0.50",
        "30.00",
        "25.00",
        "50.00",
    ]
    assert missing == "Not yet measured: OPT/gptq, B/rtn, A/rtn."
    assert added("34", alone) == pytest.approx(0.32)
