"""What counts as a worker's, with figures of the test's: on a GPU, and from one pipeline to the next."""

from __future__ import annotations

import threading
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


def test_what_is_seen_before_a_worker_begins_anew_does_not_count_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, go_on = threading.Event(), threading.Event()

    def resident_bytes() -> int:
        if threading.current_thread().name != "looks":
            return 0
        looking.set()
        assert go_on.wait(60)
        return 8 * GIB

    monkeypatch.setattr(memory_watch, "resident_bytes", resident_bytes)
    monkeypatch.setattr(memory_watch, "_PERIOD_S", 3600.0)
    device = Device("cpu0", "cpu")
    watch = MemoryWatch(device, "stage 0", Status(), lambda _: None)
    looks = threading.Thread(target=watch.sample, name="looks")
    begins = threading.Thread(target=watch.renew, args=(device, "stage 1", 0))
    looks.start()
    assert looking.wait(60)
    begins.start()
    begins.join(0.2)  # it must wait; else it would be done by now
    go_on.set()
    looks.join()
    begins.join()
    assert watch.sample() == 0


def test_between_two_pipelines_no_cap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, looks, failed = [0], threading.Semaphore(0), threading.Event()

    def resident_bytes() -> int:
        looks.release()
        return resident[0]

    monkeypatch.setattr(memory_watch, "resident_bytes", resident_bytes)
    monkeypatch.setattr(memory_watch, "_PERIOD_S", 0.001)
    monkeypatch.setattr(memory_watch, "sys", SimpleNamespace(platform="darwin"))  # where caps are sampled only
    device = Device("cpu0", "cpu", memory_bytes=GIB)
    watch = MemoryWatch(device, "stage 0", Status(), lambda _: failed.set())
    watch.lift()
    resident[0] = 2 * GIB
    for _ in range(looks._value + 2):  # those that were before, one that may be under way, and one after
        assert looks.acquire(timeout=60)
    assert not failed.is_set()
    watch.renew(device, "stage 1", 0)
    assert failed.wait(60)
