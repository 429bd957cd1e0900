"""The event simulation against cases that can be worked out by hand, and against the planner's closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planner_instances import Instance, instance, model, random_instance

import planner
from llmpq.spec import InfeasibleError, Plan, Prediction, Workload, unit_ops


def _predict(
    given: Instance, plan: Plan, prompts: list[int] | None = None, outputs: list[int] | None = None
) -> Prediction:
    w = given.workload
    prompts = prompts or [w.prompt_len] * w.batch_size
    return planner.predict(plan, given.spec, given.profile, prompts, outputs or [w.output_len] * len(prompts))


def _op_seconds(given: Instance, plan: Plan, stage: int, tokens: int, rows: int, context: float) -> float:
    """Of one step on a stage, added up op by op."""
    table = given.profile.table(plan.stages[stage].device)
    units = [f"layer.{i}" for i in range(*plan.stages[stage].layers)]
    units += ["embedding"] * (stage == 0) + ["head"] * (stage == len(plan.stages) - 1)
    ops = [op for unit in units for op in unit_ops(given.spec, unit, plan.precision(unit), tokens, rows, context)]
    step = next(row.seconds for row in table.rows if row.op.kind == "step")
    return step + sum(table.seconds(op) for op in ops)


def test_one_sequence_on_one_device_adds_up_its_steps() -> None:
    given = instance(3, slowness=(1.0,), memory=(None,), workload=Workload(1, 10, 4))
    plan = planner.solve(given)
    prediction = _predict(given, plan)
    assert prediction.prefill_s == pytest.approx(_op_seconds(given, plan, 0, 10, 1, 5.5))
    assert prediction.decode_s == pytest.approx(sum(_op_seconds(given, plan, 0, 1, 1, 10 + i) for i in (1, 2, 3)))
    assert prediction.tokens_per_s == pytest.approx(4 / (prediction.prefill_s + prediction.decode_s))
    assert plan.predicted is not None
    assert prediction.memory_bytes == plan.predicted.memory_bytes


def test_one_sequence_on_two_devices_pays_every_link() -> None:
    given = instance(4, workload=Workload(1, 10, 3), all_devices=True, latency=0.5, bytes_per_s=1e6)
    plan = planner.solve(given)
    wire = given.spec.hidden_size * 4 / 1e6
    back = 0.5 + 8 / 1e6
    prediction = _predict(given, plan)
    stages = sum(_op_seconds(given, plan, i, 10, 1, 5.5) for i in (0, 1))
    assert prediction.prefill_s == pytest.approx(stages + 0.5 + 10 * wire + back)
    rounds = sum(_op_seconds(given, plan, i, 1, 1, context) for i in (0, 1) for context in (11, 12))
    assert prediction.decode_s == pytest.approx(rounds + 2 * (0.5 + wire + back))


def test_sequences_that_ended_no_longer_count() -> None:
    given = instance(3, slowness=(1.0,), memory=(None,), workload=Workload(2, 10, 4), fixed_bits=4)
    plan = planner.solve(given)
    assert (plan.prefill_microbatch, plan.decode_microbatch) == (2, 2)
    prediction = _predict(given, plan, [10, 6], [2, 4])
    keys = (10 * 11 / 2 + 6 * 7 / 2) / 16
    assert prediction.prefill_s == pytest.approx(_op_seconds(given, plan, 0, 16, 2, keys))
    decode = [_op_seconds(given, plan, 0, 2, 2, (11 + 7) / 2), *(_op_seconds(given, plan, 0, 1, 1, c) for c in (8, 9))]
    assert prediction.decode_s == pytest.approx(sum(decode))
    assert prediction.tokens_per_s == pytest.approx(6 / (prediction.prefill_s + prediction.decode_s))


def test_single_token_outputs_need_no_decode() -> None:
    given = instance(4, workload=Workload(4, 10, 1))
    assert _predict(given, planner.solve(given)).decode_s == pytest.approx(0.0, abs=1e-12)


def test_longer_answers_never_take_less_time() -> None:
    given = instance(4, workload=Workload(4, 20, 30))
    plan = planner.solve(given.constrained(all_devices=True))
    seconds = []
    for outputs in ([1, 1, 1, 1], [4, 1, 9, 2], [4, 8, 9, 2], [30, 8, 9, 30], [30, 30, 30, 30]):
        prediction = _predict(given, plan, outputs=outputs)
        seconds.append(prediction.prefill_s + prediction.decode_s)
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("prompts, outputs", [([], []), ([3], [1, 2]), ([0], [1]), ([3], [0])])
def test_impossible_lengths_are_refused(prompts: list[int], outputs: list[int]) -> None:
    given = instance(2)
    plan = planner.solve(given)
    with pytest.raises(ValueError, match="at least 1 token"):
        planner.predict(plan, given.spec, given.profile, prompts, outputs)


def _whole_microbatches(given: Instance, plan: Plan) -> bool:
    batch = given.workload.batch_size
    return batch % plan.prefill_microbatch == 0 and batch % plan.decode_microbatch == 0


@pytest.mark.parametrize("output_len, limit", [(8, 0.05), (32, 0.02)])
def test_closed_form_agrees_with_the_simulation(output_len: int, limit: float) -> None:
    compared = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        given = random_instance(rng, max_layers=6)
        workload = Workload(int(rng.choice([2, 4, 8])), given.workload.prompt_len, output_len)
        given = replace(given, workload=workload).constrained(gap=0.01)
        try:
            plan = planner.solve(given)
        except InfeasibleError:
            continue
        if not _whole_microbatches(given, plan):
            continue
        assert plan.predicted is not None
        simulated = _predict(given, plan)
        assert plan.predicted.prefill_s == pytest.approx(simulated.prefill_s, rel=1e-9), f"seed {seed}"
        total = simulated.prefill_s + simulated.decode_s
        assert plan.predicted.prefill_s + plan.predicted.decode_s == pytest.approx(total, rel=limit), f"seed {seed}"
        compared += len(plan.stages) > 1
    assert compared >= 5


def test_closed_form_is_exact_for_equal_stages() -> None:
    given = instance(
        spec=model(4, vocab_size=1),  # embedding and head cost next to nothing
        slowness=(1.0, 1.0),
        all_devices=True,
        fixed_bits=4,
        latency=0.0,
        bytes_per_s=1e15,
        workload=Workload(4, 30, 16),
    )
    plan = planner.solve(given)
    assert [stage.layers for stage in plan.stages] == [(0, 2), (2, 4)]
    simulated = _predict(given, plan)
    assert plan.predicted is not None
    assert plan.predicted.prefill_s == pytest.approx(simulated.prefill_s, rel=1e-9)
    assert plan.predicted.decode_s == pytest.approx(simulated.decode_s, rel=2e-3)
