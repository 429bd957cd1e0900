"""Timing on a GPU without one: what is recorded, checked and timed, and in which formats rivals want their weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from bench.kernels.rivals import Contender, Problem, in_turn
from bench.kernels.rivals.gptq_format import bit_stream, marlin_scales, scalar_type
from bench.kernels.rivals.graphs import CALLS, Take, latency, take, time_in_turn
from bench.kernels.rivals.measure_gpu import GpuTask, measure, rotated_bytes
from bench.kernels.rivals.timing import Checked, WrongProductError
from tests.support.gpu_cells import CPU, FakeClock


def linear_contender(weight: torch.Tensor, copies: int = 3, error: float = 0.0) -> tuple[Contender, list[int]]:
    """x @ weight.T * (1 + error), and which of its copies was called when."""
    called: list[int] = []

    def linear(x: torch.Tensor, copy: int) -> torch.Tensor:
        called.append(copy)
        return x @ weight.T * (1 + error)

    linears = [lambda x, copy=copy: linear(x, copy) for copy in range(copies)]
    return Contender(weight.nbytes, copies, lambda: weight, in_turn(linears)), called


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(8, 16)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 16)


def test_all_copies_together_are_four_times_the_cache(weight: torch.Tensor) -> None:
    l2_bytes = 50 * 2**20
    copies = Problem(weight, 128, 0, rotated_bytes(l2_bytes)).copies(33 * 2**20)
    assert (copies - 1) * 33 * 2**20 < 4 * l2_bytes <= copies * 33 * 2**20


def test_copies_are_equal_and_apart(weight: torch.Tensor) -> None:
    copies = Problem(weight, 128, 0, 3 * (weight.nbytes + 4)).rotated(weight, torch.ones(1))
    assert len(copies) == 3
    assert all(torch.equal(w, weight) and one == 1 for w, one in copies)
    assert len({w.data_ptr() for w, _ in copies}) == 3


def test_a_graph_holds_twenty_calls_or_more_and_every_copy_as_often(weight: torch.Tensor, x: torch.Tensor) -> None:
    contender, called = linear_contender(weight, copies=3)
    taken = take(Checked(contender, x), x, FakeClock())
    called.clear()
    taken.play()
    assert (taken.calls, taken.graphed) == (21, True)
    assert taken.calls >= CALLS
    assert called == [0, 1, 2] * 7


def test_what_a_graph_writes_to_lives_as_long_as_it_may_be_played(weight: torch.Tensor, x: torch.Tensor) -> None:
    """A graph holds addresses alone: played after its tensors were freed, it writes to whatever came there next."""

    def record(work: Callable[[], object]) -> Callable[[], object]:
        recorded = weakref.ref(work)

        def play() -> None:
            found = recorded()
            assert found is not None, "what was recorded is gone"
            found()

        return play

    contender, called = linear_contender(weight)
    taken = take(Checked(contender, x), x, FakeClock(record=record))
    gc.collect()
    called.clear()
    taken.play()
    assert len(called) == taken.calls


def test_a_graph_that_computes_nothing_is_not_timed_as_a_graph(weight: torch.Tensor, x: torch.Tensor) -> None:
    """As when a library does not work on the stream that is being recorded: it would seem to take no time."""
    contender, called = linear_contender(weight)
    taken = take(Checked(contender, x), x, FakeClock(record=lambda work: lambda: None))
    assert not taken.graphed
    called.clear()
    taken.play()
    assert len(called) == taken.calls


def test_work_that_cannot_be_recorded_is_timed_without_a_graph(weight: torch.Tensor, x: torch.Tensor) -> None:
    def refuse(work: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    contender, _ = linear_contender(weight)
    taken = take(Checked(contender, x), x, FakeClock(record=refuse))
    assert not taken.graphed
    assert taken.error is not None
    assert taken.error < 1e-5


def test_a_recording_that_breaks_the_device_is_not_passed_over(weight: torch.Tensor, x: torch.Tensor) -> None:
    clock = FakeClock()

    def destroy(work: Callable[[], object]) -> Callable[[], object]:
        clock.broken = True
        raise RuntimeError("an illegal memory access")

    clock._record = destroy
    contender, _ = linear_contender(weight)
    with pytest.raises(RuntimeError, match="the device is gone"):
        take(Checked(contender, x), x, clock)


@pytest.mark.parametrize("error", [0.06, float("nan")])
def test_a_wrong_product_is_never_timed(weight: torch.Tensor, x: torch.Tensor, error: float) -> None:
    contender, _ = linear_contender(weight, error=error)
    with pytest.raises(WrongProductError, match="4 rows has the relative error"):
        take(Checked(contender, x), x, FakeClock())


def test_every_round_times_everyone_once_and_one_before_does_not_count(weight: torch.Tensor, x: torch.Tensor) -> None:
    contender, _ = linear_contender(weight)
    checked, clock = Checked(contender, x), FakeClock()
    takes = {name: Take(checked, lambda name=name: name, 2, True, 0.0, None) for name in ("a", "b", "c")}
    seconds = time_in_turn(takes, 5, clock)
    plays = [play() for play in clock.played]
    assert plays[:3] == ["a", "b", "c"]
    rounds = [plays[i : i + 3] for i in range(3, len(plays), 3)]
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * 5
    assert len({tuple(one) for one in rounds}) > 1  # the order changes
    assert all(len(found) == 5 for found in seconds.values())
    position = 3 + rounds[0].index("b")
    assert seconds["b"][0] == (position + 1) / 2  # the clock's seconds of that play, for each of two calls


def test_latency_waits_for_each_call() -> None:
    events: list[str] = []
    clock = FakeClock()
    clock.wait = lambda: events.append("wait")  # type: ignore[method-assign]
    assert latency(lambda: events.append("call"), clock) > 0
    assert events[:6] == ["wait", "call", "wait"] * 2


def small_task(**contenders: tuple[str, ...]) -> GpuTask:
    by_rows = {int(m.removeprefix("m")): names for m, names in contenders.items()}
    return GpuTask(48, 256, "bf16", by_rows, rounds=3, rotated_bytes=20_000)


def test_measuring_times_ours_and_rivals_and_names_the_missing() -> None:
    """The reference multiplies here in the place of a GPU backend."""
    names = ("llmpq reference int4", "cuBLAS", "gptq_gemm int4", "llmpq cuda int3")
    noted: list[tuple[int, str | None]] = []
    task = small_task(m1=names, m17=names[:2])
    cells = list(measure(task, CPU, FakeClock(), lambda m, name: noted.append((m, name)), ["reference", "cuda"]))
    assert [cell.m for cell in cells] == [1, 17]
    for cell in cells:
        assert set(cell.timings) == set(names[:2])
        for found in cell.timings.values():
            assert len(found.seconds) == 3
            assert found.error is not None
            assert 0 < found.error < 1e-2
        assert cell.timings["cuBLAS"].latency_seconds is None
        assert (cell.timings[names[0]].latency_seconds or 0) > 0
    assert set(cells[0].missing) == set(names[2:])
    assert "ImportError" in cells[0].missing["gptq_gemm int4"]
    assert "not available" in cells[0].missing["llmpq cuda int3"]
    assert noted == [*((1, name) for name in names), (1, None), *((17, name) for name in names[:2]), (17, None)]


def test_measuring_stops_where_a_contender_breaks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    def build(name: str, problem: Problem) -> Contender:
        clock.broken = True
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("bench.kernels.rivals.measure_gpu.build", build)
    noted: list[str | None] = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(measure(small_task(m1=("a", "b")), CPU, clock, lambda m, name: noted.append(name)))
    assert noted == ["a"]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_stream_of_bits_has_code_i_at_bit_i_times_bits(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 96), dtype=torch.uint8)
    words = bit_stream(codes, bits)
    assert words.shape == (3, 3 * bits)
    for row, stored in zip(codes.tolist(), words.tolist()):
        number = sum(code << bits * i for i, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in stored] == [number >> 32 * i & 0xFFFFFFFF for i in range(3 * bits)]


def test_vllm_s_names_and_orders_are_its_own() -> None:
    """The numbers are what vLLM 0.25.0 gives uint4b8 and uint8b128."""
    assert [scalar_type(4), scalar_type(8)] == [1125899907892224, 1125899923621888]
    ordered = marlin_scales(torch.arange(256).view(2, 128))
    assert ordered.shape == (2, 128)
    assert ordered[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert ordered[1, 64:67].tolist() == [192, 200, 208]


def test_reading_memory_reads_every_word_once() -> None:
    pytest.importorskip("triton")
    from bench.kernels import gpu_ceilings

    words = gpu_ceilings.whole_blocks(70_000)
    assert 4 * words >= 70_000
    source = torch.randint(-100, 100, (words,), dtype=torch.int32, device="cuda" if torch.cuda.is_available() else CPU)
    sums = gpu_ceilings.reader(source, 3)()
    assert int(sums.long().sum()) == int(source.long().sum())
    assert len(sums) == 3
    with pytest.raises(ValueError, match="whole blocks"):
        gpu_ceilings.reader(source[:-1], 3)
