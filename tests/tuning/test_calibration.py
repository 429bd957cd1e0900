"""Calibrating runs: which plans they are of, and that costs corrected by them are those of the devices as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import planner
from llmpq.checkpoint.model_files import Model
from llmpq.runtime.engine import Generated, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import CostTable, ModelSpec, Op, Plan, Profile, Solved, Workload
from llmpq.tuning import trial_runs
from llmpq.tuning.calibration import MOST_TOKENS, calibration_plans, calibration_runs
from llmpq.tuning.refitting import refit
from llmpq.tuning.trial_runs import REPETITIONS
from tests.support.planner_instances import Instance, instance

REACH = Workload(8, 30, 40)
TRUTHS = {"d0": (1.3, 3e-4), "d1": (0.7, 2e-5)}  # a factor of all operations, and seconds of each step


def named(costs: Profile) -> Profile:
    """Tables say what their device is; these are of different devices."""
    return replace(costs, tables={name: replace(table, device=name) for name, table in costs.tables.items()})


def true(costs: Profile) -> Profile:
    def table(name: str, measured: CostTable) -> CostTable:
        factor, step_s = TRUTHS[name]
        seconds = [step_s if row.op == Op("step") else factor * row.seconds for row in measured.rows]
        return replace(
            measured, rows=tuple(replace(row, seconds=s) for row, s in zip(measured.rows, seconds, strict=True))
        )

    return replace(costs, tables={name: table(name, measured) for name, measured in costs.tables.items()})


def plans_of(given: Instance, reach: Workload = REACH) -> list[Solved]:
    return list(calibration_plans(given.spec, given.cluster, given.profile, reach, given.constraints))


def test_there_is_an_even_split_for_each_width_with_less_and_less_to_do() -> None:
    given = instance(6, memory=(10**8, 10**8))
    plans = plans_of(given)
    assert [{b for stage in plan.plan.stages for b in stage.widths} for plan in plans] == [{3}, {4}, {8}, {16}]
    assert [plan.plan.workload.batch_size for plan in plans] == [8, 4, 2, 1]
    assert [plan.plan.workload.prompt_len for plan in plans] == [30, 15, 7, 3]
    assert [plan.plan.stages[0].device for plan in plans] == ["d0", "d1", "d0", "d1"]
    for plan in plans:
        assert [len(stage.widths) for stage in plan.plan.stages] == [3, 3]
        assert plan.plan.workload.output_len == MOST_TOKENS
        assert plan.plan.cluster == given.cluster  # with the caps that are enforced
        assert plan.plan.embedding.precision.bits == plan.plan.head.precision.bits == plan.plan.stages[0].widths[0]


def test_widths_that_do_not_fit_are_left_out() -> None:
    short = Workload(2, 4, 4)  # so that weights are most of what has to fit
    roomy = plans_of(instance(6, memory=(10**8, 10**8)), short)
    largest = [max(plan.prediction.memory_bytes) for plan in roomy]
    cap = (largest[1] + largest[2]) // 2  # between 4 bit and 8
    assert largest[1] < 0.9 * cap and cap < 0.9 * largest[2]
    plans = plans_of(instance(6, memory=(cap, cap)), short)
    assert [plan.plan.stages[0].widths[0] for plan in plans] == [3, 4]
    assert not plans_of(instance(6, memory=(5000, 5000)), short)


def test_where_no_even_split_fits_another_split_does() -> None:
    given = instance(6, memory=(10**8, 60_000))
    for plan in plans_of(given):
        for stage, used in zip(plan.plan.stages, plan.prediction.memory_bytes, strict=True):
            assert used <= (given.cluster.device(stage.device).memory_bytes or 0)
        assert [len(stage.widths) for stage in plan.plan.stages] != [3, 3]
    assert plans_of(given)


def test_a_device_alone_runs_everything() -> None:
    plans = plans_of(instance(4, slowness=(1.0,), memory=(10**8,)))
    assert [len(plan.plan.stages) for plan in plans] == [1, 1, 1, 1]


class Pipeline:
    """In place of an Engine: takes what the true costs say."""

    costs: Profile
    started: list[Plan]

    def __init__(self, plan: Plan, checkpoint: object, spec: ModelSpec) -> None:
        self.plan, self.spec = plan, spec
        self.started.append(plan)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> RunResult:
        assert params.ignore_eos
        assert all(0 <= token < self.spec.vocab_size for prompt in prompts for token in prompt)
        lens = [len(prompt) for prompt in prompts], [params.max_tokens] * len(prompts)
        found = planner.simulate(self.plan, self.spec, self.costs, *lens)
        generated = tuple(Generated((0,) * params.max_tokens, "length") for _ in prompts)
        return RunResult(generated, found.prediction, tuple(span for span in found.spans if span.kind == "stage"))


def test_costs_corrected_by_the_runs_are_those_that_the_devices_really_have(monkeypatch: pytest.MonkeyPatch) -> None:
    given = instance(6, memory=(10**8, 10**8))
    measured = named(given.profile)
    truth = true(measured)
    monkeypatch.setattr(Pipeline, "costs", truth, raising=False)
    monkeypatch.setattr(Pipeline, "started", [], raising=False)
    monkeypatch.setattr(trial_runs, "Engine", Pipeline)
    unopened: Any = None  # the checkpoint is the engine's alone
    records = calibration_runs(Model(unopened, given.spec), given.cluster, measured, REACH, given.constraints)
    assert [plan.stages for plan in Pipeline.started] == [plan.plan.stages for plan in plans_of(given)]
    asked = ((30,) * 8, (15,) * 4, (7,) * 2, (3,))
    assert [record.prompt_lens for record in records] == [lens for lens in asked for _ in range(REPETITIONS)]
    assert {record.output_lens[0] for record in records} == {MOST_TOKENS}
    plan = planner.solve(given.constrained(all_devices=True))  # of other widths and sizes than what was run
    lens = [25] * 8, [33] * 8

    def tokens_per_s(costs: Profile) -> float:
        return planner.simulate(plan.plan, given.spec, costs, *lens).prediction.tokens_per_s

    assert abs(tokens_per_s(measured) / tokens_per_s(truth) - 1) > 0.1
    assert tokens_per_s(refit(measured, records)) == pytest.approx(tokens_per_s(truth), rel=1e-3)
