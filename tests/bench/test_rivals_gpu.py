"""The comparison on a GPU, all of it but the GPU: what is left to measure, what a file holds, how a run ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import machine
from bench.kernels import rivals, rivals_gpu
from bench.kernels.rivals import Problem
from bench.kernels.rivals.goals_gpu import GOALS, selected
from bench.kernels.rivals.journal import ENDED, Journal, is_same_run
from bench.kernels.rivals.measure_gpu import Cell
from bench.kernels.rivals.pairing_gpu import rows_of
from llmpq.kernels import available_backends
from tests.support.gpu_cells import CEILINGS, CPU, HEAD, PLACE, FakeClock, example_cell, timing


@pytest.fixture
def cell() -> Cell:
    return example_cell()


def test_a_printed_row_shows_times_ratio_and_goal(cell: Cell) -> None:
    lines = {(row["backend"], row["against"]): rivals_gpu.line(row) for row in rows_of(cell, GOALS, CEILINGS)}
    assert lines["cuda", "cuBLAS"].endswith("150.0 us  3.00x  >= 3.30 MISSED")
    assert lines["cuda", "Marlin int4"].endswith("60.0 us  1.20x  >= 1.15 met not in a graph")
    assert lines["triton", "cuBLAS"].endswith("150.0 us  2.50x          met")  # its error, that is
    assert lines["cuda", "cuBLAS"].startswith("28672x8192 bf16 m=1    cuda   int4     50.0 us  80 %  cuBLAS ")


def test_a_cell_is_measured_once(tmp_path: Path, cell: Cell) -> None:
    path = tmp_path / "results.json"
    journal = Journal(path, HEAD)
    place = {"n": 28672, "k": 8192, "m": 1, "dtype": "bf16"}
    names = [*cell.timings, *cell.missing]
    assert journal.remaining(place, names) == tuple(names)
    journal.add(cell, rows_of(cell, GOALS, CEILINGS))
    later = Journal(path, HEAD | {"date": "tomorrow"})
    assert later.results["date"] == "tomorrow"
    assert later.results["rows"] == journal.results["rows"]
    assert later.remaining(place, names) == ()
    assert later.remaining(place, names[:2]) == ()
    assert later.remaining(place | {"m": 2}, names[:2]) == tuple(names[:2])
    # Whoever comes later is timed together with all who were there: only in one run are times comparable.
    assert later.remaining(place, ["gemlite int4"]) == (*names, "gemlite int4")
    later.add(cell, rows_of(cell, GOALS, CEILINGS))
    assert later.results["rows"] == journal.results["rows"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ({}, {}, True),
        ({}, {"device": "other"}, False),
        ({}, {"commit": "def"}, False),
        ({}, {"kernels": "456"}, True),  # built anew, of the same commit
    ],
)
def test_only_results_of_the_same_commit_and_device_are_kept(
    tmp_path: Path, cell: Cell, old: dict[str, str], new: dict[str, str], same: bool
) -> None:
    assert is_same_run(HEAD | old, HEAD | new) is same
    Journal(tmp_path / "results.json", HEAD | old).add(cell, [])
    assert bool(Journal(tmp_path / "results.json", HEAD | new).results["cells"]) is same


def test_a_contender_that_ended_the_process_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Journal(path, HEAD).at_work(PLACE, "Humming int4")
    journal = Journal(path, HEAD)
    assert journal.remaining(PLACE, ["cuBLAS", "Humming int4"]) == ("cuBLAS",)
    assert journal.results["missing"] == {"Humming int4": ENDED}
    assert not journal.is_at_work
    assert Journal(path, HEAD).results["ended"] == {"Humming int4": ENDED}


def test_a_contender_at_work_during_an_orderly_stop_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    journal = Journal(path, HEAD)
    journal.at_work(PLACE, "Humming int4")
    journal.rest()
    assert Journal(path, HEAD).results["ended"] == {}


def test_a_cell_whose_rounds_ended_the_process_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Journal(path, HEAD).at_work(PLACE, None)
    journal = Journal(path, HEAD)
    assert journal.remaining(PLACE, ["cuBLAS"]) == ()
    assert journal.remaining(PLACE | {"m": 2}, ["cuBLAS"]) == ("cuBLAS",)
    assert journal.results["missing"] == {"all in turn": f"{ENDED} (at 64x128, m = 1, bf16)"}


def test_the_best_of_all_ceilings_counts(tmp_path: Path) -> None:
    journal = Journal(None, HEAD)
    journal.reach({"read_bytes_per_s": 2.0, "bf16_flop_per_s": 5.0})
    journal.reach({"read_bytes_per_s": 3.0, "bf16_flop_per_s": 4.0})
    assert journal.results["ceilings"] == {"read_bytes_per_s": 3.0, "bf16_flop_per_s": 5.0}


def test_tasks_are_the_chosen_rows_that_are_left(tmp_path: Path, cell: Cell) -> None:
    arguments = rivals_gpu.parse(["--shapes", "28672x8192,4096x4096", "--rows", "1,16", "--bits", "4"])
    journal, missing = Journal(None, HEAD), {"Machete int4": "ImportError: no"}
    goals = selected(arguments.bits, arguments.rivals)
    todo = list(rivals_gpu.tasks(arguments, goals, missing, journal, 50 * 2**20))
    assert [(task.dtype, task.n, list(task.contenders)) for task in todo] == [
        (dtype, n, [1, 16]) for dtype in ("bf16", "fp16") for n in (28672, 4096)
    ]
    assert todo[0].rotated_bytes == 200 * 2**20
    assert not any("Machete int4" in names for task in todo for names in task.contenders.values())
    done = Cell(28672, 8192, 1, "bf16", dict.fromkeys(todo[0].contenders[1], timing(1.0)))
    journal.add(done, [])
    left = list(rivals_gpu.tasks(arguments, goals, missing, journal, 50 * 2**20))
    assert list(left[0].contenders) == [16]
    assert left[1:] == todo[1:]


@pytest.mark.parametrize("option", [["--bits", "5"], ["--dtypes", "fp32"], ["--rivals", "nobody"]])
def test_a_bad_option_is_refused_by_name(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        rivals_gpu.parse(option)
    assert exit_.value.code == 2
    assert f"{option[1]} is not one of" in capsys.readouterr().err


def test_a_budget_leaves_room_for_the_longest_piece() -> None:
    times = iter((0.0, 30.0, 40.0, 69.0, 71.0))
    budget = rivals_gpu.Budget(100.0, lambda: next(times))
    assert [budget.allows_more() for _ in range(4)] == [True, True, True, False]  # 30 s are needed


def test_sources_outside_of_git_are_named_by_their_contents(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "kernel.cu"
    kernel.write_text("a")
    before = machine.commit(tmp_path)
    assert before.startswith("unknown, contents ")
    assert machine.commit(tmp_path) == before
    kernel.write_text("b")
    assert machine.commit(tmp_path) != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert rivals_gpu.main([]) == 2
    assert capsys.readouterr().err == "error: bench.kernels.rivals_gpu needs a CUDA device, and torch sees none\n"


def test_calls_with_little_time_finish_the_work_together(tmp_path: Path) -> None:
    """Triton's interpreter multiplies; the CUDA backend is missing, as is one rival."""
    if reason := available_backends()["triton"]:
        pytest.skip(reason)
    path = tmp_path / "results.json"
    chosen = ["--json-out", str(path), "--shapes", "16x32", "--rows", "1,2", "--bits", "4", "--dtypes", "fp16"]
    chosen += ["--rivals", "cuBLAS,gptq_gemm int4", "--budget-seconds", "0", "--rounds", "1"]
    left, seen = [], []
    for _ in range(3):
        journal = Journal(path, HEAD)
        with torch.inference_mode():
            arguments = rivals_gpu.parse(chosen)
            left.append(rivals_gpu.run(arguments, journal, CPU, FakeClock(), 100, lambda *_: CEILINGS))
        seen.append(journal.results)
    assert left == [1, 0, 0]
    assert [len(results["cells"]) for results in seen] == [1, 2, 2]
    assert seen[2] == seen[1]
    rows = seen[2]["rows"]
    assert [(row["m"], row["backend"], row["rival"]) for row in rows] == [
        (1, "triton", "cuBLAS"),
        (2, "triton", "cuBLAS"),
    ]
    assert set(seen[2]["missing"]) == {"gptq_gemm int4", "llmpq cuda int4"}
    assert seen[2]["ceilings"] == CEILINGS
    assert not journal.is_at_work


@pytest.mark.parametrize("name", [name for name in rivals.GPU_RIVALS if name.split()[0] in ("Marlin", "Machete")])
def test_a_missing_path_of_the_library_is_an_import_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rivals.VLLM_LIBRARY, raising=False)
    with pytest.raises(ImportError, match=rivals.VLLM_LIBRARY):
        rivals.build(name, Problem(torch.ones(64, 128), 128, 0, 0, torch.float16))


def test_a_file_that_is_not_a_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_text("no library")
    monkeypatch.setenv(rivals.VLLM_LIBRARY, str(library))
    journal = Journal(tmp_path / "results.json", HEAD)
    missing = rivals_gpu.load(["Marlin int4"], journal)
    assert "library.so" in missing["Marlin int4"]
    assert "library.so" in rivals_gpu.installed()
    assert not journal.is_at_work
