"""The goals of the GPU kernels, and how times become rows and tables."""

from __future__ import annotations

import json

import pytest

from bench.kernels import rivals
from bench.kernels.rivals import ours
from bench.kernels.rivals.goals import label_of
from bench.kernels.rivals.goals_gpu import GOALS, READ, GpuGoal, contenders_at, selected
from bench.kernels.rivals.journal import Journal
from bench.kernels.rivals.measure_gpu import Cell
from bench.kernels.rivals.pairing import met
from bench.kernels.rivals.pairing_gpu import rows_of
from bench.machine import as_json
from bench.tables.gpu import rivals_gpu as rivals_gpu_table
from tests.support.gpu_cells import CEILINGS, HEAD, example_cell, timing


@pytest.fixture
def cell() -> Cell:
    return example_cell()


def test_goals_of_one_backend_time_no_other() -> None:
    goals = selected(ours.BITS, ["cuBLAS"], ["cuda"])
    assert goals
    for m in (1, 16, 64):
        names = contenders_at(goals, 8192, 8192, m, "bf16")
        assert "llmpq cuda int4" in names and "cuBLAS" in names
        assert not any("triton" in name for name in names)


def test_every_goal_names_contenders_that_exist() -> None:
    mine = {ours.gpu_name(bits, backend) for bits in ours.BITS for backend in ours.GPU_BACKENDS}
    for goal in GOALS:
        assert goal.ours in mine
        assert set(goal.rivals) <= mine | set(rivals.GPU_RIVALS)
    compared = {name for goal in GOALS for name in goal.rivals}
    assert set(rivals.GPU_RIVALS) <= compared  # nobody is wrapped in vain


def test_only_goals_against_named_rivals_or_ours_are_kept() -> None:
    goals = selected([4], ["Marlin int4"])
    assert {goal.rivals for goal in goals} == {("Marlin int4",), ("llmpq cuda int4",)}
    assert {goal.bits for goal in goals} == {4}
    (best,) = (goal for goal in goals if goal.only_goals)
    assert (label_of(best.rivals), best.ratio(28672, 8192, 64)) == ("Marlin int4", 1.1)
    assert selected([3, 4, 8]) == GOALS


def test_contenders_depend_on_rows_shape_and_dtype() -> None:
    def timed(m: int, dtype: str = "bf16", n: int = 8192) -> set[str]:
        names = contenders_at(GOALS, n, 8192, m, dtype)
        assert len(set(names)) == len(names)
        return set(names)

    assert {"torch _weight_int4pack_mm", "gemlite int4"} <= timed(1) - timed(4096)
    assert {"Machete int4", "dequantize + cuBLAS int3"} <= timed(4096) - timed(1)
    assert timed(1) - timed(1, "fp16") == {"torch _weight_int4pack_mm"}
    assert timed(1, "fp16") - timed(1) == {"gptq_gemm int3", "gptq_gemm int4", "gptq_gemm int8"}
    assert timed(1, n=28672) - timed(1) == {READ}  # only for large weights is it a goal


def test_rows_compare_with_rivals_and_goals(cell: Cell) -> None:
    rows = {(row["backend"], row["against"]): row for row in rows_of(cell, GOALS, CEILINGS)}
    cublas = rows["cuda", "cuBLAS"]
    assert (cublas["ratio"], cublas["goal"], met(cublas)) == (3.0, 3.3, False)
    assert cublas["error_limit"] == pytest.approx(2.2e-3)
    assert cublas["percent_of_ceiling"] == pytest.approx(80)
    marlin = rows["cuda", "Marlin int4"]
    assert (marlin["ratio"], marlin["rival_graphed"], marlin["error_limit"]) == (1.2, False, None)
    assert rows["cuda", READ]["ratio"] == 1.0  # 240 MB in 100 us, 120 MB in 50 us
    assert rows["triton", "llmpq cuda int4"]["ratio"] == pytest.approx(50 / 60, rel=1e-4)
    assert ("cuda", "Machete int4") not in rows
    assert not any(row["bits"] == 3 for row in rows.values())


def test_the_table_shows_ratios_by_shape_class_times_and_what_is_missing(cell: Cell) -> None:
    journal = Journal(None, HEAD | {"versions": {"gemlite": "0.6"}})
    journal.results["missing"] = {"Humming int4": "ImportError: no"}
    journal.reach(CEILINGS)
    journal.add(cell, rows_of(cell, GOALS, CEILINGS))
    other = Cell(8192, 28672, 1, "bf16", cell.timings | {"cuBLAS": timing(200e-6, 200e-6, 200e-6)}, {})
    journal.add(other, rows_of(other, GOALS, CEILINGS))
    lines = rivals_gpu_table(json.loads(as_json(journal.results)))
    assert "The device reads 3.00 TB/s, copies 2.80 TB/s, and does 800 TFLOP/s in bf16 at most." in lines
    assert "| bf16 | against | n x k | m=1 |" in lines
    assert "| cuda int4 | cuBLAS | large | **3.00–4.00** (≥ 3.3) |" in lines
    assert "| cuda int4 | 50 µs (80 %) | 1.0e-03 |" in lines
    assert "| cuBLAS | 150 µs | 2.0e-03 |" in lines
    assert "Rivals: gemlite 0.6." in lines
    assert "Missing: Humming int4 (ImportError: no)." in lines
    assert "Missing: Machete int4 (ImportError: no (at 28672x8192, m = 1, bf16))." in lines


def test_an_error_beyond_that_of_cublas_misses_the_goal(cell: Cell) -> None:
    goal = GpuGoal("cuda", 4, ("cuBLAS",), {"large": {1: 1.0}})
    (row,) = rows_of(cell, [goal], CEILINGS)
    assert met(row)
    cell.timings["llmpq cuda int4"] = timing(50e-6, error=2.3e-3)
    (row,) = rows_of(cell, [goal], CEILINGS)
    assert met(row) is False
