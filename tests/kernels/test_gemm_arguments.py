"""What is refused when a weight is prepared and multiplied, and that the message says what is wrong."""

from __future__ import annotations

import pytest
import torch

from llmpq.kernels import BACKENDS, WeightBuilder, available_backends, embedding, gemm, prepare
from llmpq.kernels.registry import load
from llmpq.quant import quantize
from llmpq.spec import W16, Precision
from tests.support.target import Target

GOOD = {"x": torch.zeros(2, 40)}
W4 = Precision(4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 41)}, r"x has shape \[2, 41\], expected \[\.\.\., 40\]"),
        ({"x": torch.zeros(())}, "x has shape"),
        ({"x": torch.zeros(2, 40, dtype=torch.float64)}, "x has dtype torch.float64"),
        ({"x": torch.zeros(2, 40, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"x": torch.zeros(2, 40, device="meta")}, "x is on meta"),
        ({"bias": torch.zeros(32)}, r"bias is .* expected floating-point \[33\]"),
        ({"bias": torch.zeros(1, 33)}, "bias is"),
        ({"bias": torch.zeros(33, dtype=torch.int64)}, "bias is torch.int64"),
        ({"bias": torch.zeros(33, device="meta")}, "bias is on meta"),
        ({"out": torch.zeros(2, 32)}, r"out is .* expected torch.float32 \[2, 33\]"),
        ({"out": torch.zeros(66)}, "out is"),
        ({"out": torch.zeros(2, 33, dtype=torch.float16)}, "out is torch.float16"),
        ({"out": torch.zeros(2, 33, device="meta")}, "out is on meta"),
        ({"activations": "a4"}, "activations is 'a4', expected one of a16, a8x2, a8"),
    ],
)
def test_gemm_refuses(change: dict[str, object], message: str) -> None:
    w = prepare(quantize(torch.randn(33, 40), Precision(4, 32)), backend="reference")
    with pytest.raises(ValueError, match=message):
        gemm(w=w, **{**GOOD, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("activations", ["a8", "a8x2"])
def test_16_bit_weights_are_multiplied_in_a16_alone(target: Target, activations: str) -> None:
    w = prepare(torch.zeros(4, 40, dtype=torch.float16), target.device, backend=target.backend)
    with pytest.raises(ValueError, match=f"activations is '{activations}', but 16-bit weights are always multiplied"):
        gemm(GOOD["x"].to(target.device), w, activations=activations)


@pytest.mark.parametrize("activations", ["a8", "a8x2"])
def test_a_mode_that_a_backend_lacks_is_refused(
    target: Target, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load(target.backend), "ACTIVATIONS", ("a16",))
    message = f"activations is '{activations}', but backend '{target.backend}' has only a16"
    w = prepare(quantize(torch.randn(4, 40), W4), target.device, backend=target.backend)
    with pytest.raises(ValueError, match=message):
        gemm(GOOD["x"].to(target.device), w, activations=activations)


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        (torch.tensor([0, 33]), torch.float32, "ids reach from 0 to 33, but the table has 33 rows"),
        (torch.tensor([-1]), torch.float32, "ids reach from -1"),
        (torch.tensor([0], dtype=torch.int32), torch.float32, "ids is torch.int32"),
        (torch.tensor([[0]]), torch.float32, r"expected int64 \[t\]"),
        (torch.tensor([0], device="meta"), torch.float32, "ids is on meta"),
        (torch.tensor([0]), torch.int8, "dtype is torch.int8"),
    ],
)
def test_embedding_refuses(ids: torch.Tensor, dtype: torch.dtype, message: str) -> None:
    w = prepare(quantize(torch.randn(33, 40), Precision(4, 32)), backend="reference")
    with pytest.raises(ValueError, match=message):
        embedding(ids, w, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 40, W4, torch.float16), "n = 0 and k = 40 has no elements"),
        ((33, 0, W4, torch.float16), "n = 33 and k = 0 has no elements"),
        ((33, 40, W4, torch.float32), "dtype is torch.float32, expected one of .* for w4-g32"),
        ((33, 40, W16, torch.float64), "dtype is torch.float64, expected one of .* for w16"),
        ((33, 40, W4, torch.float16, "cpu", "gpu"), "backend is 'gpu', expected one of reference, cpu, cuda, triton"),
    ],
)
def test_weight_builder_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightBuilder(*arguments, *("cpu", "reference")[len(arguments) - 4 :])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (torch.zeros(3, 40), "part is a Tensor, expected a QuantTensor for w4-g32"),
        (quantize(torch.randn(3, 40), Precision(4, 64)), "part is w4-g64-sym-rtn, expected w4-g32"),
        (quantize(torch.randn(3, 40), W4, scale_dtype=torch.bfloat16), "part has dtype torch.bfloat16"),
        (quantize(torch.randn(3, 41), W4), r"part has shape \[3, 41\], expected \[rows, 40\]"),
        (quantize(torch.randn(34, 40), W4), "part has 34 rows, but only 33 of 33 are missing"),
    ],
)
def test_weight_builder_refuses_a_part(part: object, message: str) -> None:
    builder = WeightBuilder(33, 40, W4, torch.float16, "cpu", "reference")
    with pytest.raises(ValueError, match=message):
        builder.add(part)  # type: ignore[arg-type]


def test_weight_builder_refuses_to_finish_early() -> None:
    builder = WeightBuilder(33, 40, W4, torch.float16, "cpu", "reference")
    builder.add(quantize(torch.randn(32, 40), W4))
    with pytest.raises(ValueError, match="only 32 of 33 rows were added"):
        builder.finish()


def test_prepare_refuses_other_shapes_than_n_k() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[4\], expected \[n, k\]"):
        prepare(torch.zeros(4, dtype=torch.float16))


def test_float32_weights_are_refused_by_any_other_backend_than_the_reference(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the reference takes them")
    with pytest.raises(ValueError, match="only the reference backend multiplies"):
        prepare(torch.zeros(4, 4), target.device, backend=target.backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_preparing_for_an_unavailable_backend_gives_its_reason(backend: str) -> None:
    reason = available_backends()[backend]
    if reason is None:
        pytest.skip("it can run")
    with pytest.raises(ValueError, match=f"backend '{backend}' is not available: ."):
        prepare(torch.zeros(4, 4, dtype=torch.float16), backend=backend)
