"""The chunks of prompts that plans have: against simulations of all sizes, and what they are worth in a pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

import planner
from llmpq.spec import Workload
from planner.chunks import LEAST, NEARLY, chunk_sizes, near_chunks
from tests.support.planner_checks import check
from tests.support.planner_instances import Instance, instance, model

FOREVER = planner.Clock.of(1e6)
LENGTHS = [(16 + 37 * i % 180, 4 + 23 * i % 50) for i in range(40)]  # as unlike as those of chats


def given(slowness: tuple[float, ...], slots: int = 8) -> Instance:
    return instance(
        spec=model(6, intermediate_size=1024),
        slowness=slowness,
        memory=(None,) * len(slowness),
        workload=Workload.of_lengths(slots, LENGTHS),
        step=2e-5,
        latency=2e-6,
        fixed_bits=4,
    )


@pytest.mark.parametrize("slowness", [(1.0,), (1.0, 1.3)], ids=["one device", "a pipeline"])
def test_chosen_chunks_are_the_smallest_that_are_nearly_the_best(slowness: tuple[float, ...]) -> None:
    """A queue of all lengths, answered with any chunks, or none."""
    one = given(slowness)
    solved = planner.solve(one)
    plan, found = solved.plan, planner.with_chunks(solved, one, FOREVER)
    chosen = found.plan
    assert plan.chunk_tokens == 0 and chosen == replace(plan, chunk_tokens=chosen.chunk_tokens)
    check(found, one)
    prompts, outputs = zip(*LENGTHS[: 3 * plan.slots], strict=True)

    def rate(tokens: int) -> float:
        chunked = replace(plan, chunk_tokens=tokens)
        times = planner.simulate(chunked, one.spec, one.profile, prompts, outputs).times
        return sum(outputs) / max(time.ended_s for time in times)

    rates = {tokens: rate(tokens) for tokens in (0, plan.max_length, 16, 32, 64, 128)}
    enough = NEARLY * max(rates.values())
    assert rates[chosen.chunk_tokens] >= enough
    assert all(rates[tokens] < enough for tokens in rates if 0 < tokens < chosen.chunk_tokens)
    if len(slowness) > 1:
        assert rates[chosen.chunk_tokens] > 1.15 * max(rates[0], rates[plan.max_length])


def test_who_is_alone_needs_no_chunks_unless_stages_share_the_work() -> None:
    one, two = given((1.0,), slots=1), given((1.0, 1.0), slots=1)
    alone = planner.solve(one)
    assert planner.with_chunks(alone, one, FOREVER) == alone
    required = replace(two, constraints=replace(two.constraints, all_devices=True))
    whole = planner.solve(required)
    chunked = planner.with_chunks(whole, required, FOREVER)
    before, after = (planner.predict(each.plan, two.spec, two.profile, [190], [2]) for each in (whole, chunked))
    assert after.prefill_s < 0.75 * before.prefill_s  # half, but for what is at both ends
    prompts, outputs = zip(*chunked.plan.workload.batches[0], strict=True)
    assert chunked.prediction == planner.predict(chunked.plan, two.spec, two.profile, prompts, outputs)
    sizes = [replace(whole.plan, chunk_tokens=tokens) for tokens in (0, 16, 32, 64, 128)]
    rates = [planner.predict(each, two.spec, two.profile, *zip(*LENGTHS[:3])).tokens_per_s for each in sizes]
    assert chunked.plan == sizes[rates.index(max(rates))]


def test_of_chunks_without_memory_for_their_steps_none_are_chosen() -> None:
    """Prompts of a token, beside which as many decode as there are slots: a step of both is larger than any other."""
    one = given((1.0,))
    one = replace(one, workload=Workload.of_lengths(8, [(2, 40), (1, 9)] * 8))
    solved = planner.solve(one)
    chunked = planner.with_chunks(solved, one, FOREVER)
    assert chunked.plan.chunk_tokens and chunked.prediction.memory_bytes > solved.prediction.memory_bytes
    (device,) = one.cluster.devices
    capped = replace(one.cluster, devices=(replace(device, memory_bytes=solved.prediction.memory_bytes[0]),))
    assert planner.with_chunks(solved, replace(one, cluster=capped), FOREVER).plan.chunk_tokens == 0


def test_no_step_is_larger_than_memory_is_for() -> None:
    one = given((1.0, 1.3))
    solved = planner.solve(one)
    for tokens in (16, 64, solved.plan.max_length):
        plan = replace(solved.plan, kv_blocks=0, chunk_tokens=tokens)
        found = planner.simulate(plan, one.spec, one.profile, *zip(*LENGTHS, strict=True))
        assert max(span.tokens for span in found.spans) <= plan.planned_step[0]
        assert max(span.sequences for span in found.spans) <= plan.planned_step[1]


def test_sizes_of_chunks() -> None:
    plan = replace(planner.solve(given((1.0,))).plan, max_length=128, kv_blocks=0)
    assert chunk_sizes(plan) == [0, 128, 64, 32, LEAST]
    assert [near_chunks(replace(plan, chunk_tokens=tokens)) for tokens in (0, 32, LEAST, 7)] == [
        [128],
        [LEAST, 64],
        [32],
        [128],
    ]
