"""The benchmark of predictions: what its list promises, how its goals are computed, and that one failure stays one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import planner
from bench.predictions import runs
from bench.predictions.cases import PATH, Case, Listed
from bench.predictions.runs import Row, goals, mixed
from bench.tables import predictions
from llmpq.checkpoint.model_files import Model
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.runtime.engine import RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import (
    Cluster,
    CostRow,
    CostTable,
    InvalidField,
    Link,
    ModelSpec,
    Op,
    Plan,
    Precision,
    Prediction,
    Profile,
    UsageError,
    WorkerLostError,
)

LISTED = Listed.load(PATH)


@pytest.fixture(scope="module")
def opt() -> Model:
    return LISTED.models["opt"].open()


def costs_of(spec: ModelSpec, case: Case) -> Profile:
    """Made-up costs of what `llmpq profile` measures for the case's cluster: seconds from the sizes, so all differ."""
    place = LISTED.clusters[case.cluster]
    ranges = Ranges.of(place.reach)
    listed = [other for other in LISTED.runs if other.key == case.key]
    widths = sorted(set().union(*(other.bits for other in listed)))
    precisions = [Precision(b) if b == 16 else Precision(b, 32) for b in widths]
    ops = [*plain_ops(spec, ranges, precisions, "a8x2"), *attention_ops(spec, ranges)]

    def seconds(op: Op) -> float:
        return 1e-5 + 1e-12 * op.m * op.n * max(op.k, 1) + 1e-9 * op.m * op.context

    rows = tuple(CostRow(op, seconds(op), "cpu", "float32", 0) for op in ops)
    tables = {
        device.name: CostTable(device.name, "k", device.threads, device.isa, 10**7, rows) for device in place.devices
    }
    names = [device.name for device in place.devices]
    links = tuple(Link(a, b, 1e-4, 1e9) for a in names for b in names if a != b)
    return Profile(tables, links)


def test_the_list_has_30_different_runs_of_all_kinds() -> None:
    runs = LISTED.runs
    assert len(runs) == len({run.name for run in runs}) == 30
    assert {run.model for run in runs} == set(LISTED.models) and {run.cluster for run in runs} == set(LISTED.clusters)
    assert (min(run.batch for run in runs), max(run.batch for run in runs)) == (1, 16)
    assert min(run.prompt for run in runs) < 10 and max(run.prompt for run in runs) == 256
    assert min(run.output for run in runs) < 20 and max(run.output for run in runs) == 64
    assert set().union(*(run.bits for run in runs)) == {3, 4, 8, 16}
    assert {len(run.stages) for run in runs} == {1, 2, 3}
    assert sum(len(run.bits) == 1 for run in runs) >= 2  # uniform; the others are mixed
    devices = [device for place in LISTED.clusters.values() for device in place.devices]
    assert any(device.slowdown > 1 for device in devices)
    assert any(link.emulated for place in LISTED.clusters.values() for link in place.links)
    for place in LISTED.clusters.values():  # cores that are at work at the same time, of the two there are
        assert sum(device.threads / device.slowdown for device in place.devices) <= 2


@pytest.mark.parametrize("case", LISTED.runs, ids=lambda case: case.name)
def test_a_listed_plan_can_be_predicted_from_what_is_measured_for_its_cluster(case: Case, opt: Model) -> None:
    spec = opt.spec if case.model == "opt" else LISTED.models["demo"].open().spec
    plan = case.plan(spec, LISTED.clusters[case.cluster].cluster)
    assert plan.slots == case.batch and plan.max_length == case.prompt + case.output
    lens = [case.prompt] * case.batch, [case.output] * case.batch
    assert planner.simulate(plan, spec, costs_of(spec, case), *lens).prediction.tokens_per_s > 0


def test_widths_are_read_as_they_are_printed(opt: Model) -> None:
    case = next(run for run in LISTED.runs if run.stages.get("wide") == "8x4 4x4")
    plan = case.plan(opt.spec, LISTED.clusters[case.cluster].cluster)
    assert [stage.widths for stage in plan.stages] == [(8, 8, 8, 8, 4, 4, 4, 4), (4, 4, 4, 4)]
    assert (plan.precision("embedding").bits, plan.precision("head").bits) == (case.embedding, case.head)
    with pytest.raises(UsageError, match="another model"):
        replace(case, stages={"wide": "8x4", "narrow": "4x7"}).plan(opt.spec, LISTED.clusters[case.cluster].cluster)
    with pytest.raises(InvalidField, match="narrower"):
        replace(case, stages={"narrower": "8x12"}).plan(opt.spec, LISTED.clusters[case.cluster].cluster)


def row(**differences: Any) -> Row:
    names = ("uncorrected_error", "prefill_error", "decode_error", "simulator_error", "replay_error")
    errors = {"throughput_error": 0.01} | dict.fromkeys(names, 0.0)
    values = {
        "name": "n",
        "split": "wide: 4x2",
        "prefill_microbatch": 1,
        "decode_microbatch": 1,
        "tokens_per_s": 100.0,
        "predicted_tokens_per_s": 101.0,
        "spread": 0.02,
        **errors,
        "stage_errors": [0.0],
        "memory_errors": [0.0],
        "waits_error": None,
    }
    return Row(**(values | differences))


def test_the_goals_are_those_of_absolute_errors_with_a_limit_that_grows_with_the_spread() -> None:
    found = goals(
        [row(throughput_error=-0.09, replay_error=-0.06), row(throughput_error=0.03, memory_errors=[0.05, -0.03])]
    )
    throughput, worst, memory, missing, simulator, replayed = found  # no waits were measured
    assert (throughput.reached, throughput.limit) == (pytest.approx(0.06), 0.05) and not throughput.met
    assert (worst.reached, worst.limit) == (pytest.approx(0.09), pytest.approx(0.15)) and worst.met
    assert memory.reached == pytest.approx(0.08 / 3) and memory.met
    assert (missing.reached, missing.limit, missing.met) == (pytest.approx(0.03), 0.02, False)
    assert simulator.reached == 0.0
    assert (replayed.reached, replayed.met) == (pytest.approx(0.06), False)
    loose = goals([row(throughput_error=-0.09, spread=0.1), row(spread=0.1, waits_error=-0.03)])
    assert loose[0].limit == pytest.approx(0.15) and loose[0].met
    assert loose[1].limit == pytest.approx(0.45)
    assert (loose[-1].reached, loose[-1].met) == (pytest.approx(0.03), False)


def test_groups_have_all_trials_and_each_is_from_all_over_the_list() -> None:
    trials: Any = list(range(12))
    groups = [list(group) for group in mixed(trials, 5)]
    assert sorted(trial for group in groups for trial in group) == trials
    assert max(map(len, groups)) <= 5
    assert all(max(group) - min(group) >= 6 for group in groups)
    assert list(mixed([], 5)) == []


class Pipeline:
    """In place of an Engine: all takes as long as predicted where stages wait, else twice as long."""

    def __init__(self, plan: Plan, checkpoint: object, spec: ModelSpec, *, waits: Profile | None) -> None:
        self.plan, self.spec, self.slower = plan, spec, 1.0 if waits else 2.0
        self.case = next(c for c in LISTED.runs if c.name.startswith("opt-pair") and c.batch == plan.slots)
        if plan.slots == 2:
            raise UsageError("it does not start")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> RunResult:
        if self.plan.slots == 6:
            raise UsageError("it breaks")
        case, factor = self.case, self.slower
        assert [len(prompt) for prompt in prompts] == [case.prompt] * case.batch
        assert params.max_tokens == case.output and params.ignore_eos
        lens = [case.prompt] * case.batch, [case.output] * case.batch
        found = planner.simulate(self.plan, self.spec, costs_of(self.spec, case), *lens)
        p = found.prediction
        measured = Prediction(
            factor * p.prefill_s,
            factor * p.decode_s,
            p.tokens_per_s / factor,
            tuple(2 * size for size in p.memory_bytes),
        )
        spans = (span for span in found.spans if span.kind == "stage")
        slowed = (replace(span, start_s=factor * span.start_s, end_s=factor * span.end_s) for span in spans)
        return RunResult((), measured, tuple(slowed))


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    opt: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [run for run in LISTED.runs if run.name.startswith("opt-pair")]
    monkeypatch.setattr(runs, "Engine", Pipeline)
    monkeypatch.setattr(runs, "calibration_runs", lambda *_: [])
    monkeypatch.setattr(runs, "profile", lambda spec, *_, **__: costs_of(spec, cases[0]))
    out = tmp_path / "predictions.json"
    assert runs.main(["--only", "opt-pair", "--repetitions", "3", "--json-out", str(out)]) == 1
    assert "it does not start" in capsys.readouterr().err
    results = json.loads(out.read_text())
    assert results["failures"] == {
        "opt-pair-b2-s60-n64": "UsageError: it does not start",
        "opt-pair-b6-s45-n40": "UsageError: it breaks",
    }
    assert [found["name"] for found in results["rows"]] == [c.name for c in cases if c.batch not in (2, 6)]
    for found in results["rows"]:
        assert found["throughput_error"] == pytest.approx(1.0)
        assert found["stage_errors"] == pytest.approx([-0.5, -0.5])
        assert found["memory_errors"] == pytest.approx([-0.5, -0.5])
        assert found["spread"] == 0.0
        # With stages as slow as they were, what is left is that links were twice as slow, too.
        assert 0 < found["simulator_error"] < 0.1
        assert 0 < found["replay_error"] < 0.1
    assert results["rows"][0]["waits_error"] == pytest.approx(0.0)
    text = "\n".join(predictions.predictions(results))
    assert "**50.0 %**" in text and "Failed: opt-pair-b2-s60-n64 (UsageError: it does not start)." in text


def test_costs_that_cannot_be_measured_fail_the_runs_on_that_cluster_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def profile(spec: ModelSpec, cluster: Cluster, *_: object, **__: object) -> Profile:
        if len(cluster.devices) == 1:
            raise WorkerLostError("it is gone")
        return costs_of(spec, next(run for run in LISTED.runs if run.name.startswith("opt-pair")))

    monkeypatch.setattr(runs, "Engine", Pipeline)
    monkeypatch.setattr(runs, "calibration_runs", lambda *_: [])
    monkeypatch.setattr(runs, "profile", profile)
    out = tmp_path / "predictions.json"
    assert runs.main(["--only", "opt-pair-b8", "opt-alone", "--repetitions", "1", "--json-out", str(out)]) == 1
    results = json.loads(out.read_text())
    assert [found["name"] for found in results["rows"]] == ["opt-pair-b8-s30-n32"]
    assert set(results["failures"]) == {run.name for run in LISTED.runs if run.name.startswith("opt-alone")}
    assert set(results["failures"].values()) == {"WorkerLostError: it is gone"}
