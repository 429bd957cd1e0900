"""The comparison with other libraries: how times become ratios, goals and tables. None of them is needed for that."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.kernels import rivals
from bench.kernels.rivals import rounds
from bench.kernels.rivals.goals import GOALS, SMALL_GOALS, Goal, small_limit
from bench.kernels.rivals.measure import Measured, Task
from bench.kernels.rivals.ours import name
from bench.kernels.rivals.pairing import fraction_of_ceiling, met, pair, paired_ratio, results_of, spread
from bench.kernels.rivals.timing import Timing, relative_error
from bench.tables.render import rivals_cpu
from llmpq.spec.precision import ACTIVATION_MODES

MIB = 2**20
CEILINGS = {"read_bytes_per_s": 1e9, "fp32_flop_per_s": 1e11, "int8_op_per_s": 4e11}


def timing(*seconds: float, nbytes: int = MIB, error: float | None = 1e-3) -> Timing:
    return Timing(list(seconds), error, nbytes)


def test_a_ratio_pairs_the_times_of_each_round() -> None:
    """A slow spell of the machine hits both of a round: the ratio of the medians would be 2 / 3 here."""
    assert paired_ratio(timing(2, 20, 2), timing(1, 10, 3)) == 2.0


def test_reading_memory_counts_for_the_bytes_of_our_weight() -> None:
    row = pair(
        Goal(4, "a8", ("memory read",), {1: 0.85}),
        1,
        1,
        {"llmpq int4 a8": timing(1e-3), "memory read": timing(9e-3, nbytes=10 * MIB, error=None)},
    )
    assert row is not None
    assert row["ratio"] == pytest.approx(0.9)
    assert row["rival_seconds"] == pytest.approx(0.9e-3)
    assert met(row)


def test_of_several_rivals_the_fastest_counts() -> None:
    goal = Goal(8, "a8", ("slow", "fast", "missing"), {1: 0.95})
    row = pair(goal, 1, 1, {"llmpq int8 a8": timing(1.0), "slow": timing(2.0), "fast": timing(0.9)})
    assert row is not None
    assert (row["rival"], row["ratio"], row["against"]) == ("fast", 0.9, "best of slow, fast, missing")
    assert met(row) is False


@pytest.mark.parametrize("timings", [{}, {"llmpq int4 a8": timing(1.0)}, {"a": timing(1.0)}])
def test_without_both_timings_there_is_no_row(timings: dict[str, Timing]) -> None:
    assert pair(Goal(4, "a8", ("a",), {1: 1.0}), 1, 1, timings) is None


def test_reading_memory_is_compared_only_where_that_is_a_goal() -> None:
    timings = {"llmpq int4 a8": timing(1.0), "memory read": timing(1.0, error=None)}
    goal = Goal(4, "a8", ("memory read",), {1: 0.85}, only_goals=True)
    assert pair(goal, 1, 1, timings) is not None
    assert pair(goal, 128, 1, timings) is None


def test_a_goal_may_differ_with_two_threads() -> None:
    goal = Goal(4, "a8", ("a",), {1: 1.2, 128: 1.7}, {1: 1.1})
    assert [goal.ratio(1, 1), goal.ratio(1, 2), goal.ratio(128, 2), goal.ratio(4, 1)] == [1.2, 1.1, 1.7, None]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"goal": None}, None),
        ({"goal": 2.0, "ratio": 2.0}, True),
        ({"goal": 2.0, "ratio": 1.99}, False),
        ({"goal": None, "seconds": 9e-6, "limit_seconds": 1e-5}, True),
        ({"goal": 2.0, "ratio": 3.0, "seconds": 11e-6, "limit_seconds": 1e-5}, False),
    ],
)
def test_a_row_meets_a_goal_misses_it_or_has_no_goal(row: dict[str, Any], expected: bool | None) -> None:
    assert met(row) is expected


def test_the_ceiling_is_reading_or_arithmetic_whichever_takes_longer() -> None:
    mine = timing(2e-3, nbytes=10**6)  # 1 ms to read
    assert fraction_of_ceiling(1000, 1000, 1, "a16", mine, CEILINGS) == pytest.approx(0.5)
    assert fraction_of_ceiling(1000, 1000, 100, "a16", mine, CEILINGS) == pytest.approx(1.0)  # 2e8 operations
    assert fraction_of_ceiling(1000, 1000, 300, "a8x2", mine, CEILINGS) == pytest.approx(1.5)  # two products
    assert fraction_of_ceiling(1000, 1000, 1, "a8", mine, CEILINGS | {"int8_op_per_s": 0.0}) is None
    assert fraction_of_ceiling(1000, 1000, 1, "a16", mine, {}) is None


def test_small_limits_are_those_of_the_goals() -> None:
    assert small_limit(576, 576, "cold", 10**5, 1e9) == 10e-6
    assert small_limit(576, 576, "warm", 10**5, 1e9) is None
    assert small_limit(1536, 576, "warm", 10**6, 1e9) == 10e-6
    assert small_limit(576, 1536, "cold", 10**6, 1e9) == pytest.approx(1003e-6)
    assert small_limit(576, 1536, "cold", 10**6, None) is None


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0
    assert spread([3.0]) == 0.0


def test_the_error_is_relative_to_the_exact_product() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0], dtype=torch.float64)) == 0.8


def test_every_goal_names_a_rival_and_a_mode_that_exist() -> None:
    ours = {f"llmpq int{bits} {mode}" for bits in (3, 4, 8) for mode in ACTIVATION_MODES}
    ours |= {f"llmpq int4 {zero} {mode}" for zero in ("asym", "offset") for mode in ACTIVATION_MODES}
    for goal in (*GOALS, *SMALL_GOALS):
        assert set(goal.rivals) <= ours | set(rivals.RIVALS)
        assert name(goal.bits, goal.activations, goal.zero) in ours


def test_rounds_that_others_disturb_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.0, 0.9, 0.0, 0.0])
    monkeypatch.setattr(rounds._Load, "foreign", lambda self: next(loads))
    monkeypatch.setattr(rounds, "await_quiet", lambda seconds, own: None)
    seconds = iter([1.0, 1.0, 99.0, 2.0, 3.0])  # the first to learn how long it takes
    monkeypatch.setattr(rounds, "_timed", lambda sweep, repeats, warm: next(seconds))
    assert rounds.time_rounds({"a": lambda: None}, 3, 1) == ({"a": [1.0, 2.0, 3.0]}, 0, 0.0)


def test_rounds_end_though_others_never_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds._Load, "foreign", lambda self: 1.0)
    monkeypatch.setattr(rounds, "await_quiet", lambda seconds, own: None)
    monkeypatch.setattr(rounds, "_timed", lambda sweep, repeats, warm: 1.0)
    assert rounds.time_rounds({"a": lambda: None}, 2, 2) == ({"a": [1.0, 1.0]}, 2, 0.0)


def test_rounds_in_which_the_processor_is_slower_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds._Load, "foreign", lambda self: 0.0)
    monkeypatch.setattr(rounds, "await_quiet", lambda seconds, own: None)
    seconds = iter([9.0, 1.0, 2.0, 3.0, 4.0])  # the first for the number of repeats
    monkeypatch.setattr(rounds, "_timed", lambda sweep, repeats, warm: next(seconds))
    paces = iter([1.0, 1.1, 4.0, 1.0, 4.6, 4.4, 4.5, 4.6])  # slow, slower in the end, fast, fast
    found = rounds.time_rounds({"a": lambda: None}, 2, 1, lambda: next(paces))
    assert found == ({"a": [3.0, 4.0]}, 0, 4.6)


@pytest.fixture
def results() -> dict[str, Any]:
    """Of two shapes, one rival of three, and one small linear."""
    shape = {"group_size": 128, "rows": (1,), "threads": 1, "rounds": 1, "rotated_bytes": MIB, "rivals": ("ggml Q3_K",)}
    missing = {"zentorch int8": "ImportError: No module named 'zentorch'"}
    found = {"llmpq int3 a8": timing(1e-3), "torch float32": timing(9e-3)}
    done = [
        (Task(n, 1024, **shape), Measured(CEILINGS, {1: found | {"ggml Q3_K": timing(rival)}}, missing, 0, 1))
        for n, rival in ((1024, 2.5e-3), (2048, 1.5e-3))
    ]
    small = {"llmpq int4 a16": timing(8e-6), "torch int4pack": timing(12e-6)}
    slower = CEILINGS | {"read_bytes_per_s": 7e8}
    done.append((Task(576, 576, **shape | {"group_size": 64}), Measured(slower, {1: small}, {}, 1, 1)))
    return {"versions": {"torch": "2.13"}} | results_of(done)


def test_results_hold_missing_rivals_and_the_best_ceilings(results: dict[str, Any]) -> None:
    assert results["missing"] == {"zentorch int8": "ImportError: No module named 'zentorch'"}
    assert results["ceilings"] == {"1": CEILINGS}
    assert (results["rounds"], results["disturbed_rounds"]) == (3, 1)
    assert len(results["rows"]) == 4
    (small,) = results["small"]
    assert (small["cache"], small["limit_seconds"], small["ratio"], met(small)) == ("cold", 10e-6, 1.5, False)


def test_the_table_shows_goals_times_and_what_is_missing(results: dict[str, Any]) -> None:
    lines = rivals_cpu(json.loads(json.dumps(results)))
    assert "| int3 a8 | ggml Q3_K | **1.50–2.50** (≥ 2) |" in lines  # bold: the worst shape misses the goal
    assert "| int3 a8 | 1000 µs (105 %) | 1e-03 |" in lines
    assert "| torch float32 | 9000 µs | 1e-03 |" in lines
    assert "| 576x576 | cold | int4 a16 | 8.0 µs (≤ 10.0) | torch int4pack | **1.50** (≥ 2) |" in lines
    assert "Missing: zentorch int8 (ImportError: No module named 'zentorch')." in lines


def test_a_rival_that_is_not_installed_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rivals.RIVALS, "nobody", ("no_such_rival", {}))
    with pytest.raises(ImportError):
        rivals.build("nobody", rivals.Problem(torch.ones(16, 32), 32, 1, 0))
