"""Rows on their way to a device: none is lost or moved, and reading goes on while they are worked on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq.checkpoint.weights import Rows, floating
from llmpq.kernels.backends import gpu_layout
from llmpq.models import loading, portions
from llmpq.models.decoder_stage import build_stage
from llmpq.models.linear import QuantLinear
from llmpq.models.portions import ahead, gathered
from llmpq.quant import QuantTensor, quantize
from llmpq.spec import W16, Precision
from tests.support.decoding import open_model, single_plan
from tests.support.reference import random_weight
from tests.support.tiny_models import save_model

CPU = torch.device("cpu")
K = 40
KINDS = ("float32", "bfloat16", Precision(4, 32, "asym"), Precision(8, 32), Precision(4, 32, "offset"))


def rows_of(kind: str | Precision, count: int) -> Rows:
    if isinstance(kind, Precision):
        return quantize(torch.randn(count, K), kind)
    return torch.randn(count, K).to(getattr(torch, kind))


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 9)), max_size=12), st.integers(1, 20))
def test_gathered_rows_are_those_that_came_in_their_order_and_kind(
    wanted: list[tuple[str | Precision, int]], most: int
) -> None:
    came = [rows_of(*each) for each in wanted]
    found = list(gathered(came, CPU, most * K))
    kinds = [rows.precision if isinstance(rows, QuantTensor) else str(rows.dtype)[6:] for rows in found]
    assert sorted(map(str, set(kinds))) == sorted({str(kind) for kind, _ in wanted})
    assert torch.equal(
        torch.cat([floating(rows).float() for rows in found] or [torch.empty(0)]),
        torch.cat([floating(rows).float() for rows in came] or [torch.empty(0)]),
    )
    largest = max([count for _, count in wanted], default=0)
    assert all(rows.shape[0] <= max(most, largest) for rows in found)
    if len({kind for kind, _ in wanted}) == 1:  # as few as may be, but for one that would not fit any more
        assert len(found) <= 1 + 2 * sum(count for _, count in wanted) // most


def test_packed_rows_stay_packed_when_they_are_put_together() -> None:
    for precision in (kind for kind in KINDS if isinstance(kind, Precision)):
        whole = quantize(torch.randn(30, K), precision)
        (found,) = gathered([whole.rows(0, 7), whole.rows(7, 8), whole.rows(8, 30)], CPU, 10**6)
        assert isinstance(found, QuantTensor)
        assert torch.equal(found.qweight, whole.qweight) and torch.equal(found.scales, whole.scales)
        assert found.zeros is None if whole.zeros is None else torch.equal(found.zeros, whole.zeros)


def test_one_item_is_made_while_the_one_before_is_in_use() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    taken = ahead(items())
    assert next(taken) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    assert list(taken) == [1, 2]


def test_what_reading_raises_is_raised_after_what_was_read() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    taken = ahead(items())
    assert next(taken) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(taken)


@pytest.mark.parametrize("precision", [Precision(3, None), Precision(4, 32, "asym"), Precision(8, 64), W16], ids=str)
def test_a_stage_that_is_loaded_as_on_a_gpu_is_the_same(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpq.checkpoint.weights.CHUNK", 500)  # about ten rows
    save_model(tmp_path, "llama-biases", torch.bfloat16)
    spec, source = open_model(tmp_path)
    expected = build_stage(spec, source, single_plan(spec, precision), 0, CPU)
    monkeypatch.setattr(portions, "GPU_CHUNK", 1700)
    monkeypatch.setattr(loading, "brought", lambda rows, device: ahead(gathered(rows, device, portions.GPU_CHUNK)))
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))  # else what is there already is taken
    found = build_stage(spec, source, single_plan(spec, precision), 0, CPU)
    linears = [[m.weight for m in stage.modules() if isinstance(m, QuantLinear)] for stage in (expected, found)]
    assert len(linears[0]) == 4 * spec.num_layers + 1
    for one, other in zip(*linears, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.data, other.data, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "precision", [Precision(3, 128), Precision(4, 32, "asym"), Precision(8, None, "offset")], ids=str
)
def test_a_gpu_lays_out_the_bits_of_a_cpu(precision: Precision) -> None:
    weight, n, k = random_weight(333, 500, precision), 333, 500
    assert isinstance(weight, QuantTensor)
    here, there = (
        gpu_layout.allocate(n, k, precision, weight.scales.dtype, torch.device(device)) for device in ("cpu", "cuda")
    )
    gpu_layout.fill(here, 0, weight, n=n, k=k, precision=precision)
    for start, stop in ((0, 100), (100, 333)):
        gpu_layout.fill(there, start, weight.rows(start, stop), n=n, k=k, precision=precision)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision(3, 128), Precision(4, 32, "asym"), W16], ids=str)
def test_a_model_loaded_on_a_gpu_has_the_weights_of_one_quantized_on_a_cpu(
    precision: Precision, tmp_path: Path
) -> None:
    save_model(tmp_path, "llama-biases", torch.bfloat16)
    spec, source = open_model(tmp_path)
    device = torch.device("cuda", torch.cuda.current_device())
    stage = build_stage(spec, source, single_plan(spec, precision), 0, device)
    weight = torch.cat([floating(rows) for rows in source.rows("layer.1", "qkv.weight")])
    expected: torch.Tensor | QuantTensor = weight.to(getattr(torch, spec.dtype))
    if precision.quantized:
        expected = quantize(weight, precision, scale_dtype=getattr(torch, spec.dtype))
    found = stage.layers[1].attention.qkv.weight
    prepared = loading.kernels.prepare(expected, device, backend=found.backend)
    assert all(torch.equal(a, b) for a, b in zip(found.data, prepared.data, strict=True))
