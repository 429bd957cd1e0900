"""The usual ways beside a plan: their plans keep to the constraints, and the reasons why there is none are true."""

from __future__ import annotations

import math
import re

import planner
from planner.advice.usual_ways import USUAL
from tests.support.planner_checks import check
from tests.support.planner_instances import instance

MIB = 2**20


def test_ways_that_fit_are_the_baselines_and_keep_to_the_constraints() -> None:
    given = instance(6, memory=(10**8, 10**8), slowness=(1.0, 1.5))
    baselines = planner.baseline_plans(given)
    for kind, way in zip(USUAL, planner.find_usual_ways(given), strict=True):
        assert way.name == USUAL[kind] and way.reason == "" and way.solved is not None
        assert way.solved.solution.objective == baselines[kind].solution.objective
        check(way.solved, given)


def test_a_way_without_a_plan_names_a_device_and_as_much_memory_as_makes_one_possible() -> None:
    given = instance(6, memory=(300_000, 400_000), slowness=(1.0, 1.5), omega_budget=0.0)  # 16 bits or nothing
    seen = 0
    for kind, way in zip(USUAL, planner.find_usual_ways(given), strict=True):
        if way.solved is not None:
            continue
        found = re.fullmatch(r"(d\d) would need ([\d.]+) MiB, and has ([\d.]+) MiB", way.reason)
        assert found is not None, way.reason
        seen += 1
        index, needed = int(found[1][1:]), float(found[2]) * MIB
        caps = [300_000, 400_000]
        assert needed > caps[index]
        # With that share more on every device, and what rounding to 0.1 MiB hides, the way fits.
        factor = (needed + 0.06 * MIB) / caps[index]
        roomier = instance(
            6, memory=tuple(math.ceil(factor * cap) for cap in caps), slowness=(1.0, 1.5), omega_budget=0.0
        )
        assert kind in planner.baseline_plans(roomier)
    assert seen >= 2


def test_a_budget_that_no_width_keeps_to_is_the_reason() -> None:
    given = instance(4, memory=(10**8, 10**8), bits=(3, 4), omega_budget=0.0)
    for way in planner.find_usual_ways(given):
        assert way.solved is None and "no width keeps to the quality budget" in way.reason
