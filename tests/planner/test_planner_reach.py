"""Costs as `llmpq profile` measures them reach what prefix reuse and recomputation make; others are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

import planner
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.spec import W16, CostRow, Demand, NotMeasuredError, Op, Plan, Profile, Workload
from planner.online import _Judge
from tests.support.planner_instances import Instance, instance, model

SPEC = model(2)
ALIKE = Workload(4, 256, 9)  # prompts of four full blocks
NAMES = [(1, 2, 3, 10 + i) for i in range(8)]  # of which three are the same
MIXED = Workload.of_lengths(8, [(12 + 2 * i, 400 if i % 4 == 1 else 6) for i in range(9)])


def _measured(workload: Workload) -> Instance:
    """One device, with costs of just what is measured for the workload: seconds from the sizes."""
    given = instance(spec=SPEC, slowness=(1.0,), memory=(None,), workload=workload, fixed_bits=16)
    ranges, (name, table) = Ranges.of(workload), *given.profile.tables.items()
    ops = [*plain_ops(SPEC, ranges, [W16], "a16"), *attention_ops(SPEC, ranges)]
    rows = tuple(CostRow(op, 1e-6 + 1e-9 * op.m * (1 + op.context), "cpu", "float32", 0) for op in ops)
    return replace(given, profile=Profile({name: replace(table, rows=rows)}, ()))


def _plan(given: Instance) -> Plan:
    return replace(planner.solve(given).plan, prefill_microbatch=2)


def _without(given: Instance, m: int = 0, context: float = 0.0) -> Profile:
    """As an older file may be: without rows of attention beyond so many tokens, or such contexts of prefill."""

    def kept(op: Op) -> bool:
        beyond = op.m > given.workload.batch_size and op.context > context
        return op.kind != "attention" or not ((m and op.m > m) or (context and beyond))

    ((name, table),) = given.profile.tables.items()
    return Profile({name: replace(table, rows=tuple(row for row in table.rows if kept(row.op)))}, ())


def test_what_is_left_of_prompts_that_begin_alike_is_measured() -> None:
    given = _measured(ALIKE)
    plan, lens = _plan(given), [256] * 8
    planner.check_measured(plan, SPEC, given.profile, lens, 9, NAMES)
    found = planner.simulate(plan, SPEC, given.profile, lens, [9] * 8, names=NAMES)
    assert [times.reused for times in found.times] == [0] + [192] * 7
    old = _without(given, context=128.5)
    planner.check_measured(plan, SPEC, old, lens, 9)  # which need not begin alike
    assert planner.simulate(plan, SPEC, old, lens, [9] * 8).prediction.tokens_per_s > 0
    # Whoever begins like another is in a step with it, or comes later, alone.
    for names in (NAMES, [(i,) for i in range(7)] + [(0, 7)]):
        with pytest.raises(NotMeasuredError, match="run `llmpq profile`"):
            planner.check_measured(plan, SPEC, old, lens, 9, names)


def test_what_is_computed_anew_is_measured() -> None:
    given = _measured(MIXED)
    plan = _plan(given)
    prompts, outputs = [*MIXED.prompt_lens] * 4, [*MIXED.output_lens] * 4
    assert plan.recomputes and MIXED.prefill_tokens(8) < MIXED.max_length
    planner.check_measured(plan, SPEC, given.profile, prompts, 400)
    found = planner.simulate(plan, SPEC, given.profile, prompts, outputs)
    assert max(span.tokens for span in found.spans if span.phase == "prefill") > MIXED.prefill_tokens(8)
    # And an older file that lacks it is refused, unless blocks cannot run out.
    old = _without(given, m=256)  # as many as a batch of prompts has, rounded up
    with pytest.raises(NotMeasuredError, match="run `llmpq profile`"):
        planner.check_measured(plan, SPEC, old, prompts, 400)
    planner.check_measured(plan, SPEC, old, prompts[:2], 400)
    planner.check_measured(replace(plan, kv_blocks=0), SPEC, old, prompts, 400)


def test_a_plan_with_few_blocks_attains_something() -> None:
    given = _measured(MIXED)
    judge, plan = _Judge(given, Demand(max_ttft_s=1e3)), _plan(given)
    few, all_blocks = judge.most(plan), judge.most(replace(plan, kv_blocks=0))
    assert 0.5 * all_blocks < few <= 1.02 * all_blocks
