"""Plans for quality budgets: the devices, what is kept between runs, the table and the plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.plans import analytic
from bench.quality.budgets import CLUSTERS, SCALE, KeptQuality, Ledger, mean_bits, world
from bench.quality.budgets_plot import plot
from bench.tables.budgets import budgets
from llmpq.checkpoint.model_files import load_model
from llmpq.measure.served_quality import TextQuality
from llmpq.spec import Device, Plan, Precision
from tests.support.pipelines import tiny_model

HEAD: dict[str, Any] = {"texts": {"test": "0"}, "constraints": {}, "clusters": {}}


def row(**fields: object) -> dict[str, Any]:
    found = {"model": "m", "quantizer": "rtn", "cluster": "c", "budget": 0.01, "predicted": 0.009, "validation": 0.009}
    found |= {"test": 0.008, "test_standard_error": 0.001, "rounds": 1, "mean_bits": 5.0, "tokens_per_s": 100.0}
    return {**found, "again_s": 1.0, **fields}


def test_devices_have_their_share_of_memory_and_quicker_calls() -> None:
    for devices in CLUSTERS:
        cluster = devices.cluster(10**9)
        assert [device.memory_bytes for device in cluster.devices] == [int(share * 10**9) for share in devices.shares]
        count = len(devices.shares)
        assert len({(link.source, link.target) for link in cluster.links}) == count * (count - 1)
    slow, quick = (kernels.linear("T4", 16).call_s for kernels in (analytic.MODERN, world()))
    assert quick == pytest.approx(slow / SCALE)


def test_a_plan_is_measured_once_and_from_the_file_after_that(tmp_path: Path) -> None:
    model, path = load_model(tiny_model(tmp_path / "model", "llama-gqa")), tmp_path / "found.json"
    text = "Some words to be measured on, as many as a window has. " * 8
    plan = Plan.single(model.spec, Device("cpu0", "cpu"), Precision(4, 32), slots=1, max_length=8)

    first = Ledger(path, HEAD)
    found = KeptQuality(model, {"model": "m"}, text, 10**9, first)
    expected = TextQuality(model, text, 10**9)
    truth = expected.of(plan)
    assert found.of(plan) == found.of(plan) == truth
    assert found.tokens == expected.tokens
    assert len(first.results["plans"]) == 1

    second = Ledger(path, HEAD)
    again = KeptQuality(model, {"model": "m"}, text, 10**9, second)
    assert again.of(plan) == truth and again.tokens == expected.tokens
    assert second.results["plans"] == first.results["plans"]
    again.of(plan.with_precisions([Precision(3, 32)] * len(model.spec.units)))
    eight = replace(plan, stages=tuple(replace(stage, kv_bits=8) for stage in plan.stages))
    assert again.of(eight) != truth
    KeptQuality(model, {"model": "other"}, text, 10**9, second).of(plan)
    assert len(second.results["plans"]) == 4
    with_all = json.loads(path.read_text())
    older = with_all | {"plans": [{k: v for k, v in with_all["plans"][0].items() if k != "kv_bits"}]}
    path.write_text(json.dumps(older))
    assert Ledger(path, HEAD).results["plans"] == with_all["plans"][:1]
    with pytest.raises(SystemExit, match="is of other texts or clusters"):
        Ledger(path, HEAD | {"texts": {"test": "1"}})


def test_mean_bits_are_those_of_a_weight(tmp_path: Path) -> None:
    spec = load_model(tiny_model(tmp_path, "llama-gqa")).spec
    plan = Plan.single(spec, Device("cpu0", "cpu"), Precision(4, 32), slots=1, max_length=8)
    assert mean_bits(spec, plan) == 4
    sizes = {unit: sum(linear.n * linear.k for linear in spec.linears(unit).values()) for unit in spec.units}
    mixed = plan.with_precisions([Precision(8, 32), *[Precision(4, 32)] * (len(spec.units) - 1)])
    assert mean_bits(spec, mixed) == pytest.approx(4 + 4 * sizes["embedding"] / sum(sizes.values()))


def test_the_table_counts_plans_beyond_their_budgets() -> None:
    infeasible = {key: value for key, value in row(budget=0.005).items() if key in ("model", "quantizer", "cluster")}
    rows = [row() for _ in range(18)] + [row(test=0.0126), infeasible | {"budget": 0.005, "infeasible": "no plan"}]
    lines = budgets({"rows": rows})
    assert (
        lines[0].startswith("**18 of 19** plans, which have 2 different weights, are within")
        and "**1.26** of its budget" in lines[0]
    )
    assert "In 1 cases no plan" in lines[0]
    assert "| **1.26 %** (± 0.10) |" in lines[-1] and "| 0.5 % | none |" in lines[-19 - 1]
    assert budgets({"rows": [*rows[:18], row(test=0.0124), row()]})[0].startswith(
        "19 of 20 plans, which have 2 different"
    )


def test_the_plot_has_a_point_for_every_plan_where_its_figures_say() -> None:
    rows = [row(), row(budget=0.02, test=0.016, tokens_per_s=200.0), row(cluster="d", test=-0.001), row(model="n")]
    rows.append({"model": "m", "quantizer": "rtn", "cluster": "d", "budget": 0.02, "infeasible": "no plan"})
    tree = ElementTree.fromstring(plot(rows))
    space = {"svg": "http://www.w3.org/2000/svg"}
    panels = tree.findall("svg:g", space)
    assert [len(panel.findall("svg:circle", space)) for panel in panels] == [3, 1]
    (x0, y0), (x1, y1), (x2, _) = (
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in panels[0].findall("svg:circle", space)
    )
    bottom = 280.0
    assert x2 == 0 < x0 < x1 and bottom - y1 == pytest.approx(2 * (bottom - y0), abs=0.2)
    ticks = {text.text: float(text.attrib["x"]) for text in panels[0].findall("svg:text[@x]", space)}
    assert ticks["0.5"] < x0 < ticks["1"] < x1 < ticks["2"]
