"""Rehearsal: which plans are run before one is chosen, and that the one that is best then is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import planner
from llmpq.runtime.engine import Generated, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import ModelSpec, Plan, Prediction, Solved, Workload
from llmpq.tuning import trial_runs
from llmpq.tuning.trial_runs import CLOSE, fastest_measured, near_ties
from tests.support.planner_instances import instance, priced

GIVEN = instance(6, workload=Workload.of_lengths(3, [(10, 8), (20, 8), (30, 8)]))
BEST = planner.solve(GIVEN)


def changed(solved: Solved, **changes: Any) -> Solved:
    return replace(solved, plan=replace(solved.plan, **changes))


def rated(objective: float, **changes: Any) -> Solved:
    return replace(changed(BEST, **changes), solution=replace(BEST.solution, objective=objective))


def test_only_plans_that_are_nearly_as_good_are_run_the_best_first_and_each_once() -> None:
    least = BEST.solution.objective
    same = rated(least * 1.01)
    near = rated(least * (1 + 0.9 * CLOSE), prefill_microbatch=3, decode_microbatch=1)
    nearer = rated(least * (1 + 0.5 * CLOSE), prefill_microbatch=1, decode_microbatch=3)
    far = rated(least * (1 + 1.1 * CLOSE), prefill_microbatch=3, decode_microbatch=3)
    assert len({(s.plan.prefill_microbatch, s.plan.decode_microbatch) for s in (BEST, near, nearer)}) == 3
    found = near_ties(BEST, [near, far, same, nearer])
    assert found == [
        BEST,
        *(replace(p, solution=replace(p.solution, bound=BEST.solution.bound)) for p in (nearer, near)),
    ]


class Pipeline:
    """In place of an Engine: each plan takes the seconds that are written down for its decode micro-batches."""

    seconds: dict[int, list[float]]

    def __init__(self, plan: Plan, checkpoint: object, spec: ModelSpec) -> None:
        self.plan = plan

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> RunResult:
        assert [len(prompt) for prompt in prompts] == [10, 20, 30] and params.ignore_eos
        assert all(0 <= token < GIVEN.spec.vocab_size for prompt in prompts for token in prompt)
        # The first run is there to warm up, and slow.
        took = 100.0 if params.max_tokens == 2 else self.seconds[self.plan.decode_microbatch].pop(0)
        assert params.max_tokens in (2, 8)
        return RunResult((Generated((0,), "length"),) * 3, Prediction(0.25 * took, 0.75 * took, 1 / took, (0, 0)))


def chosen(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]], plans: list[Solved], **constraints: Any
) -> Solved:
    monkeypatch.setattr(Pipeline, "seconds", seconds, raising=False)
    monkeypatch.setattr(trial_runs, "Engine", Pipeline)
    checkpoint: Any = None  # the engine's alone
    limits = replace(GIVEN.constraints, **constraints)
    return fastest_measured(plans, checkpoint, GIVEN.spec, limits)


def test_the_plan_with_the_better_run_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [changed(BEST, decode_microbatch=size) for size in (1, 2, 3)]
    assert chosen(monkeypatch, {1: [3.0, 5.0, 5.0], 2: [9.0, 2.0, 9.0], 3: [4.0, 4.0, 4.0]}, plans) == plans[1]
    assert chosen(monkeypatch, {1: [3.0, 5.0, 5.0], 2: [9.0, 4.0, 4.0], 3: [4.0, 4.0, 4.0]}, plans) == plans[0]


def test_quality_and_prices_count_as_in_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [changed(BEST, decode_microbatch=1), rated(1.0, decode_microbatch=2)]
    worse = replace(plans[1], solution=replace(BEST.solution, omega=BEST.solution.omega + 2.0))
    times = {1: [3.0] * 3, 2: [2.0] * 3}
    assert chosen(monkeypatch, {k: [*v] for k, v in times.items()}, [plans[0], worse], theta=0.4) == worse
    assert chosen(monkeypatch, {k: [*v] for k, v in times.items()}, [plans[0], worse], theta=0.6) == plans[0]
    cheap = priced(GIVEN, [1.0, 2.0])
    alone = planner.solve(cheap.constrained(excluded=("d1",)))
    both = planner.solve(cheap.constrained(all_devices=True))
    plans = [changed(alone, decode_microbatch=1), changed(both, decode_microbatch=2)]
    slow, fast = {1: [3.1] * 3, 2: [1.0] * 3}, {1: [2.9] * 3, 2: [1.0] * 3}
    assert chosen(monkeypatch, slow, plans, objective="cost") == plans[1]  # 3.1 * 1 against 1 * (1 + 2)
    assert chosen(monkeypatch, fast, plans, objective="cost") == plans[0]
