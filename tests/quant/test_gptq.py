"""GPTQ with corrected targets: against exhaustive search, least squares in float64, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmpq.quant import InputStatistics, quantize
from llmpq.quant.gptq import CORRECTION, quantize_for_inputs
from llmpq.spec import Precision

KINDS = ("sym", "asym", "offset")


def inputs(tokens: int, k: int) -> torch.Tensor:
    """[tokens, k] float64, correlated as hidden states are."""
    common = torch.randn(tokens, k // 4 + 1, dtype=torch.float64) @ torch.randn(k // 4 + 1, k, dtype=torch.float64)
    return common + 0.5 * torch.randn(tokens, k, dtype=torch.float64)


def statistics(x: torch.Tensor, drift: torch.Tensor | int, n: int) -> InputStatistics:
    return InputStatistics(x.T @ x / len(x), torch.zeros(n, x.shape[1], dtype=torch.float64) + drift)


def output_error(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> float:
    return float((x @ (target.double() - weight.double()).T).square().sum())


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize(("bits", "group_size", "k"), [(3, 32, 200), (4, 64, 128), (8, None, 90), (4, 128, 300)])
def test_outputs_err_far_less_than_rounding_to_nearest(zero: str, bits: int, group_size: int | None, k: int) -> None:
    precision = Precision(bits, group_size, zero)  # type: ignore[arg-type]
    weight, x = torch.randn(24, k), inputs(1000, k)
    found = quantize_for_inputs(weight, precision, torch.float16, statistics(x, 0, 24)).dequantize()
    plain = quantize(weight, precision).dequantize()
    assert output_error(x, weight, found) < 0.5 * output_error(x, weight, plain)


@pytest.mark.parametrize("zero", KINDS)
def test_weights_that_are_quantized_already_stay_as_they_are(zero: str) -> None:
    precision = Precision(4, 32, zero)  # type: ignore[arg-type]
    codes = torch.randint(16, (8, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    scale = (torch.rand(8, 4, 1) + 0.5).half().float()
    offset = {"sym": -8 * scale, "asym": -5 * scale, "offset": (torch.randn(8, 4, 1)).half().float()}[zero]
    weight = (codes * scale + offset).view(8, 128)
    found = quantize_for_inputs(weight, precision, torch.float16, statistics(inputs(500, 128), 0, 8)).dequantize()
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)


def damping(h: torch.Tensor) -> torch.Tensor:
    """To add to H [k, k]: of its mean diagonal 1 %, of a channel's own no more than 30 %, and a trifle."""
    own, mean = h.diagonal(), float(h.diagonal().mean())
    return torch.diag(torch.minimum(0.3 * own, torch.full_like(own, 0.01 * mean)) + 1e-5 * mean)


def test_codes_are_nearly_the_best_of_all_at_their_scale() -> None:
    """Of all 4096 choices of 4 codes. A single row may be further off: coordinate descent has local optima."""
    ratios = []
    for _ in range(20):
        weight, x = torch.randn(1, 4), inputs(100, 4)
        h = x.T @ x / len(x)
        h += damping(h)
        found = quantize_for_inputs(weight, Precision(3), torch.float16, statistics(x, 0, 1))
        every = found.scales[0].double() * (torch.cartesian_prod(*[torch.arange(8)] * 4) - 4)
        wrong = weight.double() - torch.cat([every, found.dequantize().double()])
        errors = ((wrong @ h) * wrong).sum(1)
        ratios.append(float(errors[-1] / errors[:-1].min()))
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) < 1.3


@pytest.mark.parametrize("bits", [3, 4])
def test_the_last_scale_is_the_least_squares_one_beside_all_else(bits: int) -> None:
    weight, x = torch.randn(6, 128), inputs(400, 128)
    h = x.T @ x / len(x)
    h += damping(h)
    found = quantize_for_inputs(weight, Precision(bits, 32, "asym"), torch.float16, statistics(x, 0, 6))
    values, last = found.dequantize().double(), torch.arange(128) >= 96
    levels = torch.where(last, values / found.scales[:, -1:].double(), 0.0)  # codes without zeros
    rest = weight.double() - torch.where(last, 0.0, values)
    best = ((levels @ h) * rest).sum(1) / ((levels @ h) * levels).sum(1)
    torch.testing.assert_close(found.scales[:, -1].double(), best, rtol=1e-3, atol=0)


def test_the_target_is_moved_towards_the_least_squares_solution() -> None:
    """8 bits are fine enough to see where the target is. The drift is that of other weights on other inputs."""
    n, k, tokens = 5, 64, 2000
    weight, x = torch.randn(n, k), inputs(tokens, k)
    wanted = (x + 0.3 * torch.randn_like(x)) @ torch.randn(k, n, dtype=torch.float64)
    drift = (wanted - x @ weight.double().T).T @ x / tokens
    more = damping(x.T @ x).sqrt().numpy()  # rows that an ideal weight is damped by
    damped, outputs = (
        np.concatenate([x.numpy(), more]),
        np.concatenate([wanted.numpy(), more @ weight.double().numpy().T]),
    )
    solution = torch.from_numpy(np.linalg.lstsq(damped, outputs, rcond=None)[0].T)
    expected = weight.double() + CORRECTION * (solution - weight.double())
    found = quantize_for_inputs(weight, Precision(8, 32, "asym"), torch.float16, statistics(x, drift, n)).dequantize()
    assert output_error(x, expected, found) < 1e-3 * output_error(x, expected, weight)


def test_small_channels_are_not_lost_among_large_ones() -> None:
    """Channels with small inputs and large weights beside others, as functions of both may be the same without them."""
    n, k, precision = 16, 256, Precision(4, 64, "asym")
    spread = torch.exp(1.5 * torch.randn(k))
    weight, x = torch.randn(n, k) / spread, inputs(1000, k) * spread
    found = quantize_for_inputs(weight, precision, torch.float16, statistics(x, 0, n)).dequantize()
    plain = quantize(weight, precision).dequantize()
    assert output_error(x, weight, found) < 0.1 * output_error(x, weight, plain)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, x, precision = torch.randn(6, 96), inputs(300, 96), Precision(3, 32, "asym")
    whole = quantize_for_inputs(weight, precision, torch.float16, statistics(x, 0, 6)).dequantize()
    alone = quantize_for_inputs(weight[2:4], precision, torch.float16, statistics(x, 0, 2)).dequantize()
    torch.testing.assert_close(whole[2:4], alone)


@pytest.mark.parametrize("zero", KINDS)
def test_columns_without_inputs_and_rows_of_zeros_do_no_harm(zero: str) -> None:
    x = inputs(300, 64)
    x[:, 10:40] = 0
    weight = torch.randn(4, 64)
    weight[1], weight[2, 32:] = 0, 0
    found = quantize_for_inputs(weight, Precision(4, 32, zero), torch.float16, statistics(x, 0, 4)).dequantize()  # type: ignore[arg-type]
    assert found.isfinite().all() and not found[1].any()
    silent = quantize_for_inputs(weight, Precision(4, 32, zero), torch.float16, statistics(0 * x, 0, 4))  # type: ignore[arg-type]
    assert (silent.dequantize() - weight).abs().max() < 0.5


def test_values_that_are_not_finite_are_refused() -> None:
    weight = torch.randn(4, 32)
    weight[2, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize_for_inputs(weight, Precision(4, 32), torch.float16, statistics(inputs(50, 32), 0, 4))
