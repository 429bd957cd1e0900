"""Plans for the lengths that occur: their micro-batches, their memory, and the closed form against the simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, geometric_mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from llmpq.spec import Cluster, InfeasibleError, InvalidField, LayerKind, Solved, Workload
from llmpq.spec.schedule_state import Limits
from planner import memory
from planner.cost_arrays import Costs
from planner.lengths import decode_steps, prefill_steps
from tests.support.planner_checks import check, equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import Instance, instance, model, random_instance

lengths = st.lists(st.tuples(st.integers(1, 99), st.integers(1, 30)), min_size=1, max_size=12)
PLAN = planner.solve(instance(2)).plan


def _mixed(seed: int, **constraints: bool) -> Instance:
    """A random instance with room for it, for lengths as they are in chats: most short, a few long."""
    rng = np.random.default_rng(seed)
    drawn = random_instance(rng, max_layers=8, max_devices=3).constrained(gap=0.01, **constraints)
    batch_size, spread = int(rng.choice([4, 8, 16])), float(rng.choice([0.3, 0.8]))
    count = batch_size * int(rng.choice([1, 2]))
    prompts, outputs = np.clip(np.exp(rng.normal(3, spread, (2, count))), 1, 400).astype(int).tolist()
    devices = tuple(replace(d, memory_bytes=d.memory_bytes and 6 * d.memory_bytes) for d in drawn.cluster.devices)
    workload = Workload.of_lengths(batch_size, zip(prompts, outputs, strict=True))
    return replace(drawn, cluster=replace(drawn.cluster, devices=devices), workload=workload)


def _seconds(solved: Solved, given: Instance, sequences: Sequence[tuple[int, int]]) -> float:
    seconds = planner.predict(solved.plan, given.spec, given.profile, *zip(*sequences, strict=True))
    return seconds.prefill_s + seconds.decode_s


def _simulated_s(solved: Solved, given: Instance) -> float:
    """Of all batches, each for itself."""
    return sum(_seconds(solved, given, batch) for batch in given.workload.batches)


def _planned_s(solved: Solved, given: Instance) -> float:
    """Of all batches, by the closed form."""
    return len(given.workload.batches) * (solved.prediction.prefill_s + solved.prediction.decode_s)


# ---- workloads ----


def test_sequences_that_are_all_alike_are_no_distribution() -> None:
    assert Workload.of_lengths(4, [(16, 8)] * 10) == Workload(4, 16, 8)


def test_of_lengths_has_means_and_longest() -> None:
    work = Workload.of_lengths(2, [(10, 5), (20, 1), (33, 2)])
    assert (work.prompt_len, work.longest_prompt, work.output_len) == (21, 33, 5)
    assert work.max_length == 35
    assert work.batches == [[(10, 5), (20, 1)], [(33, 2), (10, 5)]]
    assert work.output_tokens == (6 + 7) / 2
    assert work.rounds == 4
    assert [work.prefill_tokens(size) for size in (1, 2)] == [33, 43]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_len": 22}, "prompt_len: is 22, but the mean of the sequences is 21"),
        ({"output_len": 4}, "output_len: is 4, but the longest of the sequences is 5"),
        ({"max_prompt_len": 34}, "max_prompt_len: is 34, but the longest of the sequences is 33"),
        ({"output_lens": (5, 1)}, "output_lens: has 2 entries for 3 prompts"),
        ({"output_lens": (5, 0, 2)}, r"output_lens\[1\]: is 0, expected 1 to 1000000000"),
    ],
)
def test_a_distribution_that_contradicts_its_numbers_is_refused(change: dict[str, object], message: str) -> None:
    fields = Workload.of_lengths(2, [(10, 5), (20, 1), (33, 2)]).to_dict()
    with pytest.raises(InvalidField, match=message):
        Workload.from_dict({**fields, **{k: list(v) if isinstance(v, tuple) else v for k, v in change.items()}})


@given(lengths, st.integers(1, 8), st.data())
def test_memory_is_for_the_largest_microbatch_of_lengths_that_occur(
    sequences: list[tuple[int, int]], batch_size: int, data: st.DataObject
) -> None:
    work, size = Workload.of_lengths(batch_size, sequences), data.draw(st.integers(1, batch_size))
    plan = replace(PLAN, workload=work, slots=batch_size, max_length=1, kv_blocks=10**6)
    plan = replace(plan, prefill_microbatch=size, decode_microbatch=1)
    tokens = []
    for batch in work.batches:
        prompts = [prompt for prompt, _ in batch]
        packed = plan.prefill_microbatches(prompts)
        assert len(packed) == math.ceil(batch_size / size), "a micro-batch was cut short"
        tokens += [sum(prompts[i] for i in sequences) for sequences in packed]
    assert max(tokens) == work.prefill_tokens(size) <= size * work.longest_prompt


def test_a_batch_of_lengths_has_blocks_for_any_sequences_in_a_row() -> None:
    """Of 64 tokens each: 1, 3, 2, 2 and 6 are needed; three in a row need 10 at most, as the sample starts anew."""
    work = Workload.of_lengths(3, [(10, 54), (100, 30), (60, 5), (120, 8), (300, 40)])
    assert work.cache_blocks == 6 + 1 + 3
    assert [replace(work, batch_size=size).cache_blocks for size in (1, 5, 7)] == [6, 14, 14 + 6 + 2]
    assert [replace(work, batch_size=size).recomputes for size in (1, 3)] == [False, True]
    assert Workload(3, 100, 29).cache_blocks == 3 * 3 and Workload(3, 100, 28, 200).cache_blocks == 3 * 4
    assert not Workload(3, 100, 29).recomputes and not Workload(3, 100, 28, 200).recomputes


def test_memory_is_for_the_largest_step_that_recomputation_makes() -> None:
    """A queue of random lengths, many of which are computed anew; and plans that cannot run out of blocks."""
    rng = np.random.default_rng(0)
    queue = [(int(rng.integers(50, 200)), 500 if rng.random() < 0.2 else 16) for _ in range(80)]
    work = Workload.of_lengths(8, queue)
    one = instance(2, workload=work, prefill_microbatch=2)
    solved = planner.solve(one)
    check(solved, one)
    found = planner.simulate(solved.plan, one.spec, one.profile, work.prompt_lens, work.output_lens)
    largest = max(span.tokens for span in found.spans if span.phase == "prefill")
    planned = work.prefill_tokens(2)
    assert planned < 0.9 * largest  # a prompt and its answer take clearly more than prompts alone
    assert largest <= solved.plan.planned_step[0] == work.max_length
    assert [costs.largest for costs in Costs.of(one).prefill] == [work.max_length]
    enough = replace(solved.plan, kv_blocks=8 * solved.plan.slot_blocks)
    few = replace(enough, kv_blocks=enough.kv_blocks - 1)
    assert enough.planned_step[0] == planned and few.planned_step[0] == work.max_length
    assert memory.stage_bytes(few, one.spec, one.profile) > memory.stage_bytes(enough, one.spec, one.profile)
    alike = replace(enough, workload=Workload(8, 30, 600), max_length=630, kv_blocks=0)
    assert alike.planned_step == (60, max(2, alike.decode_microbatch)) and alike.step_tokens == 630


@pytest.mark.parametrize("windows", [(None, 16), (16,)])
def test_plans_where_layers_keep_the_latest_tokens_have_as_many_blocks(windows: tuple[int | None, ...]) -> None:
    """Also if every layer does: requests then wait for blocks as in other models, and memory is as predicted."""
    work = Workload.of_lengths(2, [(10, 5), (300, 200), (10, 5), (20, 7)])
    one = instance(2, workload=work, spec=model(len(windows), layer_kinds=tuple(map(LayerKind, windows))))
    solved = planner.solve(one)
    check(solved, one)
    assert solved.plan.kv_blocks == Limits.of(solved.plan, one.spec).blocks == 8 + 1


# ---- steps ----


def test_steps_of_mixed_lengths_are_those_worked_out_by_hand() -> None:
    work = Workload.of_lengths(4, [(10, 5), (30, 1), (20, 2), (20, 3)])
    prefill = prefill_steps(work, 2)
    assert (prefill.count, prefill.tokens, prefill.largest, prefill.longest) == (2, 40, 40, 1)
    assert prefill.context.keys() == (55 + 465 + 210 + 210) / 80
    assert prefill_steps(work, 1).longest == 30 / 20
    decode = decode_steps(work, 2)
    assert sorted(decode.rounds) == [(2, 1), (2, 2)]  # the pairs have 4 and 2 rounds
    assert decode.rows == 2 * (4 + 0 + 1 + 2) / (2 * 4 + 2 * 2)
    assert decode.context.keys() == ((11 + 12 + 13 + 14) + 21 + (21 + 22)) / 7
    assert sorted(decode_steps(work, 1).rounds) == [(1, 2), (1, 3), (2, 1)]


@given(st.integers(1, 9), st.integers(1, 99), st.integers(1, 30), st.data())
def test_steps_of_equal_lengths_are_exact(batch: int, prompt: int, output: int, data: st.DataObject) -> None:
    work, size = Workload(batch, prompt, output), data.draw(st.integers(1, batch))
    prefill, decode = prefill_steps(work, size), decode_steps(work, size)
    assert (prefill.count, prefill.tokens, prefill.rows) == (math.ceil(batch / size), size * prompt, size)
    assert (prefill.context.keys(), prefill.largest, prefill.longest) == ((prompt + 1) / 2, size * prompt, 1)
    assert (decode.count, decode.tokens, decode.rows) == (math.ceil(batch / size), size, size)
    assert decode.rounds == ((output - 1, decode.count),)
    assert decode.context.keys() == pytest.approx(prompt + output / 2)


# ---- plans ----


@pytest.mark.parametrize("block", range(2))
def test_search_for_mixed_lengths_equals_brute_force(block: int) -> None:
    feasible = 0
    for seed in range(9000 + 10 * block, 9010 + 10 * block):
        rng = np.random.default_rng(seed)
        drawn = random_instance(rng, max_layers=2, max_devices=2 + seed % 2)
        sequences = rng.integers(1, 30, (int(rng.integers(1, 7)), 2)).tolist()
        work = Workload.of_lengths(drawn.workload.batch_size, map(tuple, sequences))
        feasible += equals_brute_force(replace(drawn, workload=work), f"seed {seed}")
    assert feasible >= 3


def test_closed_form_is_the_simulation_for_one_device_whose_costs_are_linear() -> None:
    """Batches of any lengths, as long as one micro-batch of decode holds a whole batch."""
    for seed in range(10):
        mixed = _mixed(seed)
        (device, *_), batch_size = mixed.cluster.devices, mixed.workload.batch_size
        alone = replace(mixed, cluster=Cluster((replace(device, memory_bytes=None),)))
        plan = planner.solve(alone.constrained(decode_microbatch=batch_size))
        assert _planned_s(plan, alone) == pytest.approx(_simulated_s(plan, alone), rel=1e-3), f"seed {seed}"


def test_closed_form_agrees_with_the_simulation_of_pipelines_of_mixed_lengths() -> None:
    errors = []
    for seed in range(300, 340):
        mixed = _mixed(seed, all_devices=True)
        try:
            plan = planner.solve(mixed)
        except InfeasibleError:
            continue
        check(plan, mixed)
        if len(plan.plan.stages) > 1:
            errors.append(abs(_planned_s(plan, mixed) / _simulated_s(plan, mixed) - 1))
    assert len(errors) >= 15
    assert fmean(errors) <= 0.03 and max(errors) <= 0.1


def test_a_queue_takes_less_time_than_its_batches_one_after_the_other() -> None:
    """Requests join as others end, so long answers no longer hold up whole batches."""
    gains = []
    for seed in range(300, 312):
        mixed = _mixed(seed, all_devices=True)
        try:
            plan = planner.solve(mixed)
        except InfeasibleError:
            continue
        queue = [sequence for batch in mixed.workload.batches * 4 for sequence in batch]
        one_by_one = sum(_seconds(plan, mixed, batch) for batch in mixed.workload.batches * 4)
        gains.append(one_by_one / _seconds(plan, mixed, queue))
    assert len(gains) >= 10
    # Prompts that come one by one take a step each.
    assert min(gains) > 0.9 and geometric_mean(gains) > 1.1


@pytest.mark.slow
def test_a_plan_for_the_lengths_is_on_average_faster_than_one_for_their_means() -> None:
    gains = []
    for seed in range(400, 430):
        mixed = _mixed(seed)
        work = mixed.workload
        means = Workload(work.batch_size, work.prompt_len, round(fmean(work.output_lens)), work.longest_prompt)
        try:
            plan, other = planner.solve(mixed), planner.solve(replace(mixed, workload=means))
        except InfeasibleError:
            continue
        gains.append(_simulated_s(other, mixed) / _simulated_s(plan, mixed))
    assert len(gains) >= 20
    assert geometric_mean(gains) > 1.002 and sum(gain > 1.003 for gain in gains) >= 5


def test_mixed_lengths_need_less_memory_than_all_as_long_as_the_longest() -> None:
    """Eight prompts, one of which is long: a cap that holds their own largest micro-batches."""
    work = Workload.of_lengths(8, [(200, 4), *[(8, 4)] * 7])
    longest = Workload(8, 32, 4, 200)
    one = instance(2, slowness=(1.0,), memory=(None,), workload=work, prefill_microbatch=8)
    plan = planner.solve(one)
    worst = planner.solve(replace(one, workload=longest))
    assert plan.plan.step_tokens == 256 and worst.plan.step_tokens == 1600
    assert plan.prediction.memory_bytes < worst.prediction.memory_bytes
    capped = instance(2, slowness=(1.0,), memory=plan.prediction.memory_bytes, workload=work, prefill_microbatch=8)
    check(planner.solve(capped), capped)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_plan_for_mixed_lengths_is_never_worse_than_a_feasible_baseline(seed: int) -> None:
    no_baseline_is_better(_mixed(seed).constrained(gap=0.2))
