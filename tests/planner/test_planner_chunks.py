"""The chunks of prompts that plans have: against simulations of all sizes, and what they are worth in a pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

import planner
from llmpq.spec import Workload
from planner.chunks import LEAST, NEARLY, chunk_sizes, near_chunks
from tests.support.planner_instances import Instance, instance, model

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
    plan = planner.solve(one).plan
    chosen = planner.with_chunks(plan, one)
    assert plan.chunk_tokens == 0 and chosen == replace(plan, chunk_tokens=chosen.chunk_tokens)
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
    plan = planner.solve(one).plan
    assert planner.with_chunks(plan, one) == plan
    required = replace(two, constraints=replace(two.constraints, all_devices=True))
    whole = planner.solve(required).plan
    chunked = planner.with_chunks(whole, required)
    before, after = (planner.predict(each, two.spec, two.profile, [190], [2]) for each in (whole, chunked))
    assert after.prefill_s < 0.75 * before.prefill_s  # half, but for what is at both ends


def test_sizes_of_chunks() -> None:
    plan = replace(planner.solve(given((1.0,))).plan, max_length=128)
    assert chunk_sizes(plan) == [0, 128, 64, 32, LEAST]
    assert [near_chunks(replace(plan, chunk_tokens=tokens)) for tokens in (0, 32, LEAST, 7)] == [
        [128],
        [LEAST, 64],
        [32],
        [128],
    ]
