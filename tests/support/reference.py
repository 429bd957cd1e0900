"""Independent truths: float64 on plain tensors, written as the definitions read.

Each is computed on clean copies and must be finite: some of torch's own products read beyond the last column of a
ragged row (oneDNN's on AMX does), and NaN in what lies there would become part of the truth.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from llmpq.quant import QuantTensor, pack
from llmpq.spec import Precision


def random_weight(
    n: int, k: int, precision: Precision, dtype: torch.dtype = torch.float16
) -> QuantTensor | torch.Tensor:
    """A weight of uniformly random codes, zeros and scales (of both signs): every code occurs, and no structure.

    Offsets are minus the scale times what a zero may be, a whole number or not.
    """
    if not precision.quantized:
        return torch.randn(n, k).to(dtype)
    groups = precision.num_groups(k)
    codes = torch.randint(2**precision.bits, (n, k), dtype=torch.uint8)
    scales = (torch.randn(n, groups) * 2.0 ** (1 - precision.bits)).to(dtype)
    zeros = random_zeros(scales, precision)
    return QuantTensor(pack(codes, precision.bits), scales, zeros, precision, (n, k))


def random_zeros(scales: torch.Tensor, precision: Precision) -> torch.Tensor | None:
    """Zeros or offsets to go with scales [n, groups]; as `random_weight` says."""
    if precision.zero == "sym":
        return None
    if precision.zero == "asym":
        return torch.randint(2**precision.bits, scales.shape, dtype=torch.uint8)
    return (-scales.float() * torch.rand(scales.shape) * (2**precision.bits - 1)).to(scales.dtype)


def dense(weight: QuantTensor | torch.Tensor) -> torch.Tensor:
    """The float32 weights [n, k] that are to be multiplied; exact."""
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()


def clean(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU, alone in its storage but for zeros behind its last value."""
    storage = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    return storage[: tensor.numel()].view(tensor.shape).copy_(tensor)


def finite(truth: torch.Tensor) -> torch.Tensor:
    """The truth itself; an AssertionError if it is none."""
    assert truth.isfinite().all(), "the reference is not finite"
    return truth


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """torch's own x @ weight.T + bias in `dtype`, on the CPU; finite."""
    return finite(F.linear(*(clean(t.to(dtype)) for t in (x, weight)), None if bias is None else clean(bias.to(dtype))))


def assert_close_to_native(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y = x @ weight.T + bias, at most twice as far from float64 as torch's own product in x's dtype is.

    One unit in the last place of the largest float32 result is allowed on top, for results where torch is exact. Unless
    there are many results, the largest error is a matter of luck: torch's product is then taken with its terms in other
    orders, too. (Of 300 products of 33 x 31 and 31 x 33, our error is 1.05 times torch's in the median and beyond the
    limit twice; it is 0.65 times the worst of 16 orders in the median, and at most 1.8 times.)
    """
    assert y.dtype == x.dtype
    exact = linear(x, weight, bias, torch.float64)
    assert y.shape == exact.shape
    if y.numel() == 0:
        return
    y, x, weight = y.cpu(), x.cpu(), weight.cpu()
    error, native_error = float((y.double() - exact).abs().max()), 0.0
    for order in range(16 if y.numel() < 4096 else 1):
        terms = torch.randperm(x.shape[-1]) if order else slice(None)
        native = linear(x[..., terms], weight[:, terms], bias, x.dtype)
        native_error = max(native_error, float((native.double() - exact).abs().max()))
    limit = 2 * native_error + 2.0**-23 * float(exact.abs().max())
    assert error <= limit, f"max abs error is {error:.3g}, that of the native product {native_error:.3g}"


def rounded_activations(x: torch.Tensor, group_size: int | None, activations: str) -> torch.Tensor:
    """What is multiplied in place of x [m, k], float64: x itself in a16, else int8 codes times float32 scales."""
    if activations == "a16":
        return x.double()
    (m, k), size = x.shape, min(group_size or 128, 128)
    rounded = np.empty((m, k))
    for start in range(0, k, size):
        group = x[:, start : start + size].float().numpy()
        with np.errstate(all="ignore"):
            largest = np.abs(group).max(1, keepdims=True)
            inverse = np.float32(127) / largest
            scale = np.where(np.isinf(inverse), 0, largest / np.float32(127))
            steps = np.where(np.isinf(inverse), 0, group * inverse)
            hi = np.rint(steps)
            part = scale.astype(float) * hi.astype(float)
            if activations == "a8x2":
                lo = np.rint((steps - hi) * np.float32(254))
                part += (scale / np.float32(254)).astype(float) * lo.astype(float)
        part[~np.isfinite(largest[:, 0])] = np.nan
        rounded[:, start : start + size] = part
    return torch.from_numpy(rounded)


def assert_close_to_float64(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y = x @ weight.T + bias for a float64 x; the relative (Frobenius) error is at most 1e-6.

    Rounding y to 16 bits comes on top. Where few results happen to cancel, the error is related to the size that sums
    of terms of this size have, were their signs random.
    """
    exact = linear(x, weight, bias, torch.float64)
    assert y.shape == exact.shape
    if y.numel() == 0:
        return
    y, weight, x = y.cpu(), weight.cpu().double(), x.cpu()
    offset = torch.zeros(len(weight)).double() if bias is None else bias.cpu().double()
    typical = linear(x.square(), weight.square(), offset.square(), torch.float64).sum().sqrt()
    error = float((y.double() - exact).norm() / torch.maximum(exact.norm(), typical).clamp_min(1e-300))
    limit = 1e-6 + (0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2)
    assert error <= limit, f"relative error is {error:.3g}"


def assert_product(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: QuantTensor | torch.Tensor,
    bias: torch.Tensor | None = None,
    activations: str = "a16",
) -> None:
    """y = x @ weight.T + bias, in x's dtype and as exactly as the mode of activations promises."""
    assert y.dtype == x.dtype
    if activations == "a16":
        return assert_close_to_native(y, x, dense(weight), bias)
    assert isinstance(weight, QuantTensor)
    x = rounded_activations(x.cpu(), weight.precision.group_size, activations)
    return assert_close_to_float64(y, x, dense(weight), bias)


def int8_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of keys or values [..., d], as their definition reads, where all numbers are finite."""
    numbers = x.float().cpu().numpy()
    scales = np.abs(numbers).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(numbers / np.where(scales == 0, np.float32(1), scales))
    return torch.from_numpy(codes.astype(np.int8)).to(x.device), torch.from_numpy(scales[..., 0]).to(x.device)


def held(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., d] as a cache of `dtype` has them, float64."""
    if dtype.is_floating_point:
        return x.to(dtype).double()
    codes, scales = int8_codes(x)
    return codes.double() * scales.double()[..., None]


def attention_float64(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: list[int],
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention one query and one head at a time."""
    q, k_cache, v_cache = q.double(), k_cache.double(), v_cache.double()
    out = torch.empty_like(q)
    shared = q.shape[1] // k_cache.shape[1]
    token = 0
    for slot, queries, context in zip(slots, query_lens, context_lens, strict=True):
        for position in range(context - queries, context):
            for head in range(q.shape[1]):
                first = 0 if window is None else max(0, position + 1 - window)
                keys = clean(k_cache[slot, head // shared, first : position + 1])
                values = clean(v_cache[slot, head // shared, first : position + 1])
                scores = scale * (keys @ q[token, head])
                if slopes is not None:
                    scores += slopes[head].double() * torch.arange(first - position, 1)
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head, None].double()))
                out[token, head] = scores.softmax(0)[: len(values)] @ values
            token += 1
    return finite(out)


def rms_norm_float64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return finite(x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double())


def layer_norm_float64(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    return finite(x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double())


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference, over that of the truth."""
    norm = float(finite(exact).double().norm())
    error = float((found.double() - exact.double()).norm())
    return error / norm if norm else (0.0 if error == 0 else math.inf)
