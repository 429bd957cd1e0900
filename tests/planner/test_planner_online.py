"""Plans for requests that come at random, against all plans of small instances, each tried at every rate."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import planner
from llmpq.spec import (
    Attained,
    Demand,
    InfeasibleError,
    InvalidField,
    Latency,
    ModelSpec,
    Placement,
    Plan,
    RequestTimes,
    Solved,
    UsageError,
    Workload,
)
from planner import memory, online
from planner.chunks import fits
from tests.support.planner_instances import Instance, instance, model, priced

LENGTHS = [(40, 8), (10, 20), (100, 4), (25, 12)]
MORE = 1.03  # times the rate that was found: what no plan is to attain


LAYERS = 3
_WIDE = model(LAYERS, intermediate_size=1024, vocab_size=128)  # layers cost more than the head


def _small(
    demand: Demand,
    slowness: tuple[float, float],
    memory: tuple[int | None, int | None] = (None, None),
    spec: ModelSpec = _WIDE,
) -> tuple[Instance, Demand]:
    given = instance(
        spec=spec,
        slowness=slowness,
        memory=memory,
        workload=Workload.of_lengths(3, LENGTHS),
        step=2e-6,
        latency=2e-6,
        attention=2e-9,
        fixed_bits=4,
    )
    return given, demand


def _plans(given: Instance, like: Plan) -> Iterator[Plan]:
    """All that fit in memory: all orders of devices and splits, numbers of slots and micro-batches, chunks or none."""
    names, width = [device.name for device in given.cluster.devices], like.head.precision
    for count in range(1, len(names) + 1):
        for order, ends in itertools.product(
            itertools.permutations(names, count), itertools.combinations(range(1, LAYERS), count - 1)
        ):
            borders = list(itertools.pairwise((0, *ends, LAYERS)))
            stages = tuple(
                replace(like.stages[0], device=name, layers=(a, b), precisions=(width,) * (b - a))
                for name, (a, b) in zip(order, borders, strict=True)
            )
            for slots in (1, 2, 3):
                for prefill, decode, chunk in itertools.product(range(1, slots + 1), range(1, slots + 1), (0, 32)):
                    work = replace(given.workload, batch_size=slots)
                    plan = replace(
                        like,
                        stages=stages,
                        head=Placement(count - 1, width),
                        workload=work,
                        slots=slots,
                        kv_blocks=work.cache_blocks,
                        prefill_microbatch=prefill,
                        decode_microbatch=decode,
                        chunk_tokens=chunk,
                    )
                    caps = [given.constraints.room(given.cluster.device(stage.device)) for stage in stages]
                    if all(size <= cap for size, cap in zip(memory.stage_bytes(plan, given.spec, given.profile), caps)):
                        yield plan


def _keeps(given: Instance, plan: Plan, demand: Demand, rate: float | None) -> tuple[bool, float]:
    """Whether requests at a rate, or all at once, keep to the limits; and how many are answered a second."""
    prompts, outputs = zip(*itertools.islice(itertools.cycle(LENGTHS), demand.requests), strict=True)
    arrivals = None if rate is None else demand.arrivals_s(rate)
    times = planner.simulate(plan, given.spec, given.profile, prompts, outputs, arrivals).times
    late = sum(time.ttft_s > demand.max_ttft_s for time in times if time.ttft_s is not None)
    slow = sum(time.tpot_s > (demand.max_tpot_s or math.inf) for time in times if time.tpot_s is not None)
    allowed = (demand.requests - 1) // 20  # the 95th percentile is then the one of a request
    return max(late, slow) <= allowed, len(times) / max(time.ended_s for time in times)


EQUAL, TPOT, TIGHT = (
    _small(Demand(0.02, requests=21), (1.0, 1.0)),
    _small(Demand(0.03, max_tpot_s=0.0005, requests=21), (1.0, 1.3)),
    _small(Demand(0.03, requests=21), (1.0, 1.3), (1_386_000, 1_100_000)),
)


@pytest.mark.parametrize(
    ("given", "demand", "stages", "slots"),
    [
        pytest.param(*EQUAL, 2, 3, id="two equal devices are worth a pipeline"),
        pytest.param(*TPOT, 1, 1, id="who decodes waits least alone"),
        pytest.param(*TIGHT, 1, 2, id="there is no room for three slots"),
    ],
)
def test_no_plan_of_all_attains_much_more(given: Instance, demand: Demand, stages: int, slots: int) -> None:
    solved = planner.solve_online(given, demand)
    assert (len(solved.plan.stages), solved.plan.slots) == (stages, slots)
    assert solved.online is not None
    most = solved.online.requests_per_s
    at_once = _keeps(given, solved.plan, demand, None)[1]
    assert _keeps(given, solved.plan, demand, most)[0] and most <= at_once * (1 + 1e-9)
    more = most * MORE
    better = [
        plan
        for plan in _plans(given, solved.plan)
        if _keeps(given, plan, demand, more)[0] and more <= _keeps(given, plan, demand, None)[1]
    ]
    assert better == []


@pytest.mark.parametrize("capped", [False, True])
def test_small_changes_find_a_better_plan_that_fits(capped: bool) -> None:
    layers, (_, demand) = 5, EQUAL
    spec = replace(_WIDE, num_layers=layers)
    given, _ = _small(demand, (1.0, 1.0), spec=spec)
    found = planner.solve_online(given, demand)
    first, second = found.plan.stages
    precisions = (found.plan.head.precision,) * layers
    stages = (
        replace(first, layers=(0, 1), precisions=precisions[:1]),
        replace(second, layers=(1, layers), precisions=precisions[1:]),
    )
    size = 1 if capped else 3  # the least, or else smaller ones would make room
    worse = replace(found.plan, stages=stages, prefill_microbatch=size, decode_microbatch=size)
    cap = memory.stage_bytes(worse, given.spec, given.profile)[0] if capped else None
    judge = online._Judge(_small(demand, (1.0, 1.0), (cap, None), spec)[0], demand)
    plan, most = online._improved(judge, worse, judge.most(worse), planner.Clock.of(60))
    assert found.online is not None and most == judge.most(plan)
    if capped:
        assert fits(plan, judge.problem) and plan.stages[0].layers == (0, 1)
    else:
        assert plan.stages[0].layers != (0, 1) and most > 1.05 * judge.most(worse)
        assert most > 0.97 * found.online.requests_per_s


def test_a_plan_has_a_json_form_and_is_bound_to_what_is_asked() -> None:
    given, demand = TIGHT
    solved = planner.solve_online(given.constrained(decode_microbatch=1), replace(demand, rate=20.0))
    assert Solved.from_dict(json.loads(json.dumps(solved.to_dict()))) == solved
    assert solved.online is not None and solved.online.requests_per_s > 20
    assert solved.online.latency.requests_per_s == pytest.approx(20, rel=0.3)  # of 21 that come at random
    assert solved.plan.decode_microbatch == 1
    given, demand = EQUAL
    pinned = planner.solve_online(given.constrained(pinned={"layer.0": "d1", "layer.2": "d0"}), demand).plan
    assert [stage.device for stage in pinned.stages] == ["d1", "d0"]


def test_what_is_not_attainable_is_said() -> None:
    given, demand = EQUAL
    with pytest.raises(InfeasibleError, match=r"answers 1000 requests/s within the limits; 3\d\d are attainable"):
        planner.solve_online(given, replace(demand, rate=1000.0))
    with pytest.raises(InfeasibleError, match=r"however few requests come: 95 % of them take a TTFT of 0.0\d+ s"):
        planner.solve_online(given, replace(demand, max_ttft_s=1e-4))
    nothing = _small(demand, (1.0, 1.0), (100_000, 100_000))[0]
    with pytest.raises(InfeasibleError, match="does not fit"):
        planner.solve_online(nothing.constrained(time_limit_s=1.0), demand)


def test_contradictions_are_refused() -> None:
    given, demand = TIGHT
    with pytest.raises(UsageError, match="give them once"):
        planner.solve_online(given.constrained(max_ttft_s=1.0), demand)
    with pytest.raises(UsageError, match="choose 1 to 3"):
        planner.solve_online(given.constrained(prefill_microbatch=4), demand)
    with pytest.raises(UsageError, match="not for least cost"):
        planner.solve_online(priced(given, [1.0, 1.0]), demand)
    for changes, field in (
        ({"rate": 0.0}, "rate"),
        ({"max_ttft_s": -1.0}, "max_ttft_s"),
        ({"requests": 0}, "requests"),
    ):
        with pytest.raises(InvalidField, match=field):
            replace(demand, **changes)
    with pytest.raises(InvalidField, match="breaks the limits"):
        Attained(demand, 1.0, Latency(1, 1.0, 1.0, (1.0,) * 4, None))


def test_requests_come_at_their_rate_and_most_of_them_count() -> None:
    demand = Demand(1.0, max_tpot_s=0.1, requests=2001)
    slow, fast = demand.arrivals_s(2.0), demand.arrivals_s(4.0)
    assert slow[0] == 0.0 and slow == sorted(slow) and slow == pytest.approx([2 * at for at in fast])
    gaps = np.diff(slow)
    assert gaps.mean() == pytest.approx(0.5, rel=0.05) and gaps.std() == pytest.approx(0.5, rel=0.1)
    assert demand.arrivals_s(2.0) == slow != replace(demand, seed=1).arrivals_s(2.0)

    def latency(ttft_s: float, tpot_s: float | None) -> Latency:
        """Of 100 requests, of which the last four take much longer."""
        long = [RequestTimes(0.0, 50.0, 90.0, 2 if tpot_s else 1)] * 4
        end_s = ttft_s + (tpot_s or 0.0)
        return Latency.of([RequestTimes(0.0, ttft_s, end_s, 2 if tpot_s else 1)] * 96 + long)

    assert demand.kept_by(latency(1.0, 0.09)) and demand.kept_by(latency(1.0, None))
    assert not demand.kept_by(latency(1.1, 0.09)) and not demand.kept_by(latency(0.9, 0.11))
    assert replace(demand, max_tpot_s=None).kept_by(latency(0.9, 0.11))
