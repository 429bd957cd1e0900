"""The measured win, as far as nothing is run: its clusters, the plans it compares, and what it makes of results."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

import planner
from bench.machine import write_results
from bench.plans import hetero as runs
from bench.plans.hetero import busy_share, described, measured
from bench.plans.hetero_clusters import CLUSTERS, CORES, needed_bytes
from bench.plans.hetero_plans import (
    ONE_PHASE,
    ONE_SIZE,
    ONE_WIDTH,
    OURS,
    ablations,
    contenders,
    omega,
    same_as,
)
from bench.plans.hetero_summary import by_cell, compared, summary
from bench.tables.hetero import hetero
from llmpq.checkpoint.model_files import Model, load_spec
from llmpq.runtime.engine import Generated, RunResult
from llmpq.spec import Precision, Prediction, Solved, Span, Workload
from llmpq.tuning.trial_runs import CLOSE
from tests.support.pipelines import make_plan, tiny_model
from tests.support.planner_instances import Instance, instance, model

W4 = Precision(4, 32)


def test_there_are_six_clusters_that_keep_to_the_stated_rules() -> None:
    assert len({emulated.name for emulated in CLUSTERS}) == len(CLUSTERS) >= 6
    speed = {"avx512": 1, "avxvnni": 2, "avx2": 4}
    for emulated in CLUSTERS:
        seconds = [speed[str(device.isa)] * device.slowdown for device in emulated.devices]
        assert max(seconds) <= 10 * min(seconds), emulated.name
        assert emulated.cores <= CORES, emulated.name
        assert 1.5 - 1e-9 <= sum(emulated.shares) <= 1.7 + 1e-9, emulated.name
        assert len({(device.isa, device.slowdown) for device in emulated.devices}) > 1, emulated.name


def test_a_network_lies_between_all_devices_of_different_hosts_both_ways() -> None:
    for emulated in CLUSTERS:
        links = {(link.source, link.target): link for link in emulated.cluster(10**8).links}
        assert all(link.emulated for link in links.values())
        assert all((target, source) in links for source, target in links)
    four = next(emulated for emulated in CLUSTERS if len(emulated.devices) == 4)
    hosts = {"a0": 0, "a1": 0, "b": 1, "c": 1}
    expected = {pair for pair in permutations(hosts, 2) if hosts[pair[0]] != hosts[pair[1]]}
    assert {(link.source, link.target) for link in four.links} == expected


def test_a_model_needs_its_weights_and_its_largest_cache() -> None:
    # A layer: (128 + 64 + 256 + 64 * 2) rows of 64 weights at 4 bits, with scales of 2 bytes for every 32.
    spec = model(num_layers=2)
    rows = 64 + 2 * 32 + 64 + 256 + 2 * 64  # qkv, out, up; down has 64 rows of 128
    layer = rows * 64 * (4 / 8 + 2 / 32) + 4 * 2 * 64
    tables = 2 * 512 * 64 * (4 / 8 + 2 / 32) + 4 * 64
    cache = 2 * 2 * 32 * 2 * (3 * 30)  # keys and values of two layers, in float16
    found = needed_bytes(spec, [Workload(3, 20, 10), Workload(8, 4, 4)], W4)
    assert found == 2 * layer + tables + cache


def _unequal(**changes: Any) -> Instance:
    workload = Workload(batch_size=8, prompt_len=16, output_len=8)
    return instance(6, slowness=(1.0, 3.0), memory=(None, None), workload=workload, **changes)


def test_all_contenders_keep_to_the_sensitivity_of_four_bit_where_an_even_split_fits() -> None:
    given = _unequal()
    limited, bits, plans = contenders(given)
    everywhere = sum(given.sensitivity.of(unit, W4) for unit in given.spec.units)
    assert bits == 4 and {OURS, "uniform"} <= set(plans)
    assert all(omega(limited, plan.plan) <= everywhere * (1 + 1e-9) for plan in plans.values())


def test_the_budget_is_that_of_three_bit_where_an_even_split_only_fits_so() -> None:
    given = _unequal()
    four, three = (
        planner.baseline_plans(given.constrained(bits=(b,), omega_budget=math.inf))["uniform"] for b in (4, 3)
    )
    caps = {}
    for a, b in zip(four.plan.stages, three.plan.stages, strict=True):
        assert a.device == b.device
    for i, stage in enumerate(four.plan.stages):
        caps[stage.device] = (four.prediction.memory_bytes[i] + three.prediction.memory_bytes[i]) // 2
    tight = tuple(replace(device, memory_bytes=caps[device.name]) for device in given.cluster.devices)
    smallest = given.constrained(
        prefill_microbatch=four.plan.prefill_microbatch, decode_microbatch=four.plan.decode_microbatch
    )
    tight_given = replace(smallest, cluster=replace(given.cluster, devices=tight))
    limited, bits, plans = contenders(tight_given)
    assert bits == 3 and "uniform" in plans
    everywhere = sum(given.sensitivity.of(unit, Precision(3, 32)) for unit in given.spec.units)
    assert limited.constraints.omega_budget == pytest.approx(everywhere)


def test_each_ablation_lacks_its_idea_and_is_no_better_than_the_full_plan() -> None:
    limited, _, plans = contenders(_unequal())
    full = plans[OURS]
    without = ablations(limited, full.plan)
    assert set(without) == {ONE_PHASE, ONE_WIDTH, ONE_SIZE}
    units = limited.spec.units
    assert len({without[ONE_WIDTH].precision(unit).bits for unit in units}) == 1
    one_phase, one_size = without[ONE_PHASE], without[ONE_SIZE]
    assert one_phase.prefill_microbatch == one_phase.decode_microbatch
    assert one_phase.workload == limited.workload and one_phase.max_length == limited.workload.max_length
    assert one_size.prefill_microbatch == one_size.decode_microbatch == -(-8 // len(full.plan.stages))
    # Both by the simulator, which is not what was minimised.
    ours, *others = (
        described(limited, plan)["predicted"] for plan in (full.plan, without[ONE_WIDTH], without[ONE_SIZE])
    )
    for other in others:
        assert other["prefill_s"] + other["decode_s"] >= 0.95 * (ours["prefill_s"] + ours["decode_s"])
    for plan in without.values():
        assert omega(limited, plan) <= (limited.constraints.omega_budget or 0.0) * (1 + 1e-9)


def test_planned_for_prefill_alone_is_at_least_as_fast_there() -> None:
    limited, _, plans = contenders(_unequal())
    one_phase = described(limited, ablations(limited, plans[OURS].plan)[ONE_PHASE])["predicted"]
    assert one_phase["prefill_s"] <= described(limited, plans[OURS].plan)["predicted"]["prefill_s"] * (1 + 1e-6)


def test_plans_that_are_the_same_run_once() -> None:
    _, _, plans = contenders(_unequal())
    ours = plans[OURS].plan
    others = {"again": replace(ours), "other": replace(ours, decode_microbatch=3)}
    assert ours.decode_microbatch != 3
    assert same_as({OURS: ours, **others}) == {OURS: OURS, "again": OURS, "other": "other"}


def _result(seconds: float, spans: tuple[Span, ...] = ()) -> RunResult:
    prediction = Prediction(seconds / 4, 3 * seconds / 4, 120 / seconds, (100, int(200 * seconds)))
    return RunResult((Generated((1,), "length"),), prediction, spans)


def test_our_plan_is_the_fastest_near_tie_in_trial_runs() -> None:
    limited, _, plans = contenders(_unequal())
    ours = plans[OURS]

    def plan(size: int, times: float) -> Solved:
        solution = replace(ours.solution, objective=times * ours.solution.objective)
        return replace(ours, plan=replace(ours.plan, decode_microbatch=size), solution=solution)

    given = {OURS: plan(1, 1.0), "near": plan(2, 1 + 0.9 * CLOSE), "far": plan(3, 1 + 1.1 * CLOSE)}
    slow = [_result(seconds) for seconds in (1.0, 1.1, 1.2)]

    def of(near: list[float], far: list[float]) -> dict[str, list[RunResult]]:
        return {OURS: slow, "near": [*map(_result, near)], "far": [*map(_result, far)]}

    assert runs.REPETITIONS == 3
    assert runs.rehearsed(given, of([2.0, 1.5, 0.9], [0.1, 0.1, 0.1]), limited.constraints) == "near"
    # Later runs are those that count: they choose nothing.
    assert runs.rehearsed(given, of([2.0, 1.5, 1.2, 0.1], [0.1, 0.1, 0.1]), limited.constraints) == OURS
    assert runs.rehearsed(given, {"near": slow}, limited.constraints) == OURS


def test_finalists_are_ours_and_the_baselines_that_may_be_the_best() -> None:
    def of(seconds: float) -> list[RunResult]:
        return [*[_result(0.01)] * runs.REPETITIONS, *map(_result, (seconds, 9.0, seconds))]  # rehearsals do not count

    ran = {OURS: of(2.0), "a": of(1.0), "b": of(1.1), "c": of(1.2), "idea": of(1.0)}
    assert runs.finalists(OURS, {"a", "b", "c"}, ran) == {OURS, "a", "b"}
    assert runs.finalists("a", {"a", "b", "c"}, ran) == {"a", "b"}
    assert runs.finalists("a", {"a", "c"}, ran) == set()  # who is the best is known
    assert runs.finalists(OURS, {"a", "b", "d"}, {name: ran[name] for name in ("a", "b")}) == {"a", "b"}  # who failed


@pytest.mark.slow
def test_a_plan_that_cannot_run_is_out_and_the_others_take_turns(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa")
    spec = load_spec(checkpoint)
    plans = {
        "one device": make_plan(spec, [3], 2, 2),
        "too small": make_plan(spec, [3], 2, 2, memory_bytes=2**20),
        "two devices": make_plan(spec, [2, 1], 1, 1),
    }
    with runs.Contest(Model(checkpoint, spec), Workload(3, 8, 4), plans) as contest:
        contest.run(2, plans)
        contest.run(1, {"two devices", "too small"})
    assert set(contest.failed) == {"too small"} and "cpu0" in contest.failed["too small"]
    assert {name: len(found) for name, found in contest.results.items()} == {"one device": 2, "two devices": 3}
    generated = [result.sequences for found in contest.results.values() for result in found]
    assert all(sequences == generated[0] for sequences in generated)


def test_medians_spread_and_errors_are_those_of_the_repetitions() -> None:
    given = _unequal()
    plan = planner.baseline_plans(given)["uniform"]
    spans = (
        Span("stage", 0, "prefill", 1, 4, 0.0, 1.0),
        Span("stage", 1, "prefill", 1, 4, 1.0, 3.0),
        Span("stage", 1, "prefill", 1, 4, 4.0, 5.0),
        Span("stage", 0, "decode", 1, 1, 5.0, 6.0),
        Span("stage", 0, "decode", 1, 1, 8.0, 9.0),
        Span("stage", 1, "decode", 1, 1, 6.0, 6.5),
    )
    runs = [_result(seconds, spans) for seconds in (1.0, 1.2, 1.5)]
    # Stage 1 has 3 of 4 seconds to do in prefill, stage 0 2 of 4 in decode.
    assert busy_share(runs[0], 2, "prefill") == 0.75 and busy_share(runs[0], 2, "decode") == 0.5
    found = measured(plan.plan, Prediction(0.25, 0.75, 110.0, (110, 300)), runs)
    assert found["tokens_per_s"] == 100.0 and found["spread"] == pytest.approx(0.4)
    assert found["each"] == pytest.approx([120.0, 100.0, 80.0])
    assert found["throughput_error"] == pytest.approx(0.1)
    assert found["memory_bytes"] == [100, 300] and found["memory_errors"] == pytest.approx([0.1, 0.0])
    assert found["busy"] == {"prefill": 0.75, "decode": 0.5}


def test_cells_are_kept_for_the_same_code_and_repetitions_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"device": "this", "commit": "one"}
    monkeypatch.setattr(runs, "describe", lambda: dict(head))
    path = tmp_path / "results.json"
    write_results(path, runs.start(None, 3, resume=False) | {"rows": [{"a": 1}], "summary": {"b": 2}})
    assert runs.start(path, 3, resume=True)["rows"] == [{"a": 1}]
    assert runs.start(path, 3, resume=True)["summary"] == {"b": 2}
    assert runs.start(path, 3, resume=False)["rows"] == []
    assert runs.start(path, 0, resume=True)["rows"] == []  # a dry run is no measurement
    head["commit"] = "two"
    assert runs.start(path, 3, resume=True)["rows"] == []


def _row(cluster: str, contender: str, speed: float | None, predicted: float, *, ablation: bool = False) -> Any:
    row = {"cluster": cluster, "model": "m", "workload": "w", "contender": contender, "ablation": ablation}
    row |= {"budget_bits": 4, "predicted": {"tokens_per_s": predicted}}
    if speed is not None:
        row["measured"] = {"tokens_per_s": speed, "each": [speed] * 3, "spread": 0.02}
        row["measured"] |= {"busy": {"prefill": 0.9, "decode": 0.8}}
    return row


ROWS = [
    _row("one", OURS, 200.0, 210.0),
    _row("one", "uniform", 100.0, 105.0),
    _row("one", "single", 250.0, 150.0),
    _row("one", ONE_WIDTH, 300.0, 105.0, ablation=True),
    _row("two", OURS, 80.0, 90.0),
    _row("two", "uniform", 10.0, 45.0),
    _row("two", "balanced", 40.0, 50.0),
    _row("two", ONE_WIDTH, None, 90.0, ablation=True),
    _row("three", OURS, None, 10.0) | {"failed": "out of memory"},
    _row("three", "balanced", 5.0, 5.0),
]


def test_ratios_are_to_the_even_split_and_to_the_best_baseline_and_never_to_an_ablation() -> None:
    cells = by_cell(ROWS)
    assert compared(cells["one", "m", "w"], "measured") == {"over_even": 2.0, "best": "single", "over_best": 0.8}
    assert compared(cells["two", "m", "w"], "measured") == {"over_even": 8.0, "best": "balanced", "over_best": 2.0}
    assert compared(cells["three", "m", "w"], "measured") is None
    assert compared(cells["three", "m", "w"], "predicted") == {"over_even": None, "best": "balanced", "over_best": 2.0}


def test_ratios_are_medians_within_rounds_and_the_best_baseline_is_the_one_that_is_hardest_to_beat() -> None:
    # The machine is slower in each round; a finalist has rounds that others have not.
    contenders = {row["contender"]: row for row in ROWS[:3]}
    rounds = {OURS: [90.0, 50.0, 10.0, 1.0], "uniform": [100.0, 40.0, 8.0], "single": [45.0, 50.0, 20.0]}
    for name, each in rounds.items():
        contenders[name] = contenders[name] | {"measured": {"each": each}}
    # Of 0.9, 1.25 and 1.25, and of 2, 1 and 0.5.
    assert compared(contenders, "measured") == {"over_even": 1.25, "best": "single", "over_best": 1.0}


def test_the_summary_has_geometric_means_over_cells_and_counts_what_failed() -> None:
    found = summary(ROWS)
    assert found["failed"] == 1
    over_even, over_best = (found["measured"][key] for key in ("over_even", "over_best"))
    assert over_even["cells"] == 2 and over_even["mean"] == pytest.approx(4.0)  # of 2 and 8
    assert over_best["mean"] == pytest.approx(math.sqrt(0.8 * 2.0))
    assert over_best["least"] == 0.8 and over_best["reached"] == 1
    assert found["measured"]["without"][ONE_WIDTH] == {"cells": 1, "mean": 1.5, "least": 1.5}
    predicted = found["predicted"]["without"][ONE_WIDTH]
    assert predicted["cells"] == 2 and predicted["mean"] == pytest.approx(math.sqrt(0.5))
    assert found["measured"]["without"][ONE_PHASE] == {"cells": 0, "mean": None, "least": None}


def test_the_table_shows_every_cell_and_marks_missed_goals() -> None:
    results = {
        "rows": ROWS,
        "summary": summary(ROWS),
        "infeasible": [{"cluster": "four", "model": "m", "workload": "w", "why": "too small"}],
        "sensitivities": {"m": "synthetic"},
        "repetitions": 3,
    }
    lines = hetero(results)
    assert lines[0].startswith("Emulated devices. Over uniform bits with an even split: 4.00 (wanted: ≥ 1.3)")
    cells = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.endswith("|")}
    assert "| single 250 (± 1 %) | 2.00 | **0.80** |" in cells["one"]
    assert "| balanced 40 (± 1 %) | 8.00 | 2.00 |" in cells["two"]
    assert "failed: out of memory" in cells["three"]
    assert any("four, m, w: too small" in line for line in lines)
    assert "synthetic" in lines[-1]
