"""Memory in large pages."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from llmpq import kernels
from llmpq.kernels.backends import large_pages
from llmpq.kernels.backends.large_pages import PAGE
from llmpq.runtime.memory_watch import resident_bytes

tells_what_is_resident = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell what is resident"
)


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (PAGE,), (3, PAGE // 2, 1), (PAGE + 33,)])
def test_tensors_are_zeros_of_their_own(shape: tuple[int, ...]) -> None:
    first, second = (large_pages.zeros(shape, torch.int16) for _ in range(2))
    first.fill_(7)
    for tensor in (first, second):
        assert tensor.shape == shape and tensor.dtype == torch.int16 and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.nbytes < PAGE or tensor.data_ptr() % PAGE == 0
    assert not second.any() and (first == 7).all()
    assert large_pages.empty(shape, torch.int16).shape == shape


@tells_what_is_resident
def test_pages_become_resident_when_written_and_go_with_their_tensor() -> None:
    before = resident_bytes()
    found = large_pages.zeros((64 * PAGE,), torch.uint8)
    assert resident_bytes() - before < 8 * PAGE
    found[: 32 * PAGE] = 1
    assert 24 * PAGE < resident_bytes() - before < 40 * PAGE
    del found
    gc.collect()
    assert resident_bytes() - before < 8 * PAGE


@tells_what_is_resident
def test_what_a_limit_on_the_data_segment_counts_is_what_was_asked_for() -> None:
    def counted() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))

    before = counted()
    found = [large_pages.zeros((PAGE + 4096 * i + 1,), torch.uint8) for i in range(1, 33)]
    asked = sum(-(-tensor.nbytes // 4096) * 4096 for tensor in found)
    assert counted() - before <= asked + PAGE
    del found
    gc.collect()
    assert counted() - before <= PAGE


@tells_what_is_resident
def test_a_cache_takes_memory_for_what_it_holds() -> None:
    before = resident_bytes()
    layers = kernels.allocate_cache("cpu", 2, 8, 4, 8192, 64, torch.float16, torch.device("cpu"))
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == 128 << 20
    assert resident_bytes() - before < 16 << 20
