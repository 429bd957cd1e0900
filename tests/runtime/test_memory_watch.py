"""What counts as a worker's on a GPU, with a CUDA whose figures are the test's; and what a lack of memory is called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmpq.runtime import memory_watch
from llmpq.runtime.control import Status
from llmpq.runtime.memory_watch import MemoryWatch
from llmpq.spec import Device, DeviceMemoryError

GIB = 2**30


class FakeCuda:
    """80 GiB, of which this process's allocator and everything else have taken some."""

    def __init__(self) -> None:
        self.reserved = self.peak = 0
        self.others = GIB
        self.fraction = 0.0

    def take(self, reserved: int) -> None:
        self.reserved, self.peak = reserved, max(self.peak, reserved)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 80 * GIB - self.reserved - self.others, 80 * GIB

    def memory_reserved(self, index: int) -> int:
        return self.reserved

    def max_memory_reserved(self, index: int) -> int:
        return self.peak

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=80 * GIB)

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        self.fraction = fraction


@pytest.mark.parametrize("alone", [True, False])
def test_what_others_than_the_allocator_take_counts_if_it_can_only_be_the_worker_s(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, errors = FakeCuda(), list[DeviceMemoryError]()
    monkeypatch.setattr(memory_watch, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(memory_watch, "_PERIOD_S", 3600.0)  # its thread is not wanted here
    device = Device("cuda0", "cuda", memory_bytes=40 * GIB)
    watch = MemoryWatch(device, "stage 0", Status(), errors.append, alone=alone)
    assert cuda.fraction == 0.5
    assert watch.sample() == 0
    cuda.take(8 * GIB)
    cuda.others += 3 * GIB
    assert watch.sample() == (11 if alone else 8) * GIB
    cuda.take(2 * GIB)
    assert watch.sample() == (11 if alone else 8) * GIB  # the peak of the allocator
    cuda.others -= 4 * GIB  # another process has ended
    assert watch.sample() == 8 * GIB
    assert not errors


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes")]
)
def test_what_is_needed_and_what_is_available_is_said_without_a_cap(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch, "free_bytes", lambda: 7 * GIB)
    monkeypatch.setattr(memory_watch, "_PERIOD_S", 3600.0)
    watch = MemoryWatch(Device("cpu0", "cpu"), "stage 1 on cpu0 of here", Status("computing step 5"), lambda _: None)
    explained = watch.explain(error)
    assert explained is not None and explained.exit_code == 4
    assert "stage 1 on cpu0 of here ran out of memory while computing step 5: it needs at least" in str(explained)
    assert "7.00 GiB are available" in str(explained)
