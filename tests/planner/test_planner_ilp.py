"""The integer program against a brute force over every assignment."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mip
import numpy as np
import pytest

from planner import DeviceLimit
from planner.clock import NEVER
from planner.cost_arrays import Configuration, Costs
from planner.objective import evaluate
from planner.solver import ilp, solving, unordered_program
from planner.solver.pool import Pool
from tests.support.planner_instances import brute_force, instance, random_program


def _solved_like_brute_force(seed: int, *, caches: bool = False) -> bool:
    """Compares one random program; tells whether it was feasible."""
    program = random_program(np.random.default_rng(seed), caches=caches)
    best = brute_force(program)
    result = ilp.solve(program, NEVER, gap=0.0)
    if math.isinf(best):
        assert result.assignment is None, f"seed {seed}: found a plan where there is none"
        return False
    assert result.assignment is not None, f"seed {seed}: found no plan, the best is {best}"
    value = evaluate(program, result.assignment)
    assert value.feasible, f"seed {seed}"
    assert value.objective == pytest.approx(best, rel=1e-6), f"seed {seed}"
    assert result.bound <= best * (1 + 1e-6), f"seed {seed}"
    assert ilp.bound(program, NEVER) <= best * (1 + 1e-6), f"seed {seed}"
    return True


@pytest.mark.parametrize("block", range(4))
def test_integer_program_equals_brute_force(block: int) -> None:
    feasible = sum(_solved_like_brute_force(seed) for seed in range(20 * block, 20 * (block + 1)))
    assert 5 <= feasible < 20, "the instances should be of both kinds"


def test_integer_program_equals_brute_force_over_the_caches_of_positions() -> None:
    feasible = sum(_solved_like_brute_force(seed, caches=True) for seed in range(100, 120))
    assert 5 <= feasible < 20, "the instances should be of both kinds"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_integer_program_equals_brute_force_on_a_thousand_instances() -> None:
    feasible = sum(_solved_like_brute_force(seed, caches=seed % 4 == 0) for seed in range(1000, 2000))
    assert 400 < feasible < 1000


@pytest.mark.parametrize("seed", range(10))
def test_the_least_shortage_makes_a_program_feasible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = replace(random_program(rng), omega_budget=math.inf)
    tight = program.memory.min() + program.memory_fixed
    program = replace(program, capacity=tight)
    assert math.isinf(brute_force(program))
    shortage = ilp.least_shortage(program, NEVER)
    assert shortage is not None and shortage.sum() > 0
    assert not math.isinf(brute_force(replace(program, capacity=tight + shortage)))


@pytest.mark.parametrize("module", [ilp, unordered_program], ids=["ilp", "pool"])
def test_every_constraint_and_variable_is_named_at_the_top(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()

    def record(method: str, at: int) -> None:
        original = getattr(mip.Model, method)

        def recorded(model: mip.Model, *arguments: Any, **keywords: Any) -> Any:
            name = arguments[at].split("(")[0]
            names.add(name)
            return original(model, *arguments, **keywords)

        monkeypatch.setattr(mip.Model, method, recorded)

    record("add_constr", 1)
    record("add_var", 0)
    wishes: dict[str, Any] = {
        "pinned": {"layer.1": "d1"},
        "required": ("d1",),
        "max_ttft_s": 100.0,
        "max_tpot_s": 100.0,
        "at_most": (DeviceLimit({"d0": 1.0, "d2": 1.0}, 1.0),),
    }
    given = instance(4, slowness=(1.0, 1.5, 1.0), memory=(10**8,) * 3, **wishes)
    costs = Costs.of(replace(given, spec=replace(given.spec, tied_embeddings=True)))
    prefill, decode = costs.prefill[0], costs.decode[0]
    for devices in ((1,), (0, 1, 2)):
        if module is unordered_program:
            pool = Pool(costs, prefill, decode, devices, alone=len(devices) == 1)
            unordered_program.bound(pool, NEVER)
            unordered_program.shortage(pool, NEVER, relaxed=True)
        else:
            program = costs.program(Configuration(devices, prefill, decode))
            ilp.bound(program, NEVER)
            ilp.least_shortage(program, NEVER)
    assert len(names) > 20
    assert not {name for name in names if not re.search(rf"\b{name}\b", module.__doc__ or "")}


def test_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    program = random_program(np.random.default_rng(3))
    ilp.solve(program, NEVER, gap=0.0)
    ilp.bound(program, NEVER)
    ilp.least_shortage(program, NEVER)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(8))
def test_fallback_solver_agrees(seed: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    program = random_program(np.random.default_rng(seed))
    monkeypatch.setattr(solving, "SOLVER", "CBC")
    result = ilp.solve(program, NEVER, gap=0.0)
    best = brute_force(program)
    assert (result.assignment is None) == math.isinf(best)
    if result.assignment is not None:
        assert evaluate(program, result.assignment).objective == pytest.approx(best, rel=1e-6)
    assert capfd.readouterr() == ("", "")


def test_planning_goes_on_where_highs_cannot_be_loaded() -> None:
    program = (
        "import sys, planner; from planner.solver import solving; from tests.support import planner_instances;"
        "plan = planner.solve(planner_instances.instance(6));"
        "sys.exit(f'planned with {solving.SOLVER}: {plan.solution.objective / plan.solution.bound}')"
    )
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PMIP_HIGHS_LIBRARY": "absent.so", "PYTHONPATH": root}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    what, _, share = ran.stderr.splitlines()[-1].partition(": ")
    assert what == "planned with CBC"
    assert 1 - 1e-6 <= float(share) <= 1 + instance(6).constraints.gap + 1e-6
