"""The backend in plain torch: what the others are compared with, and what runs where none of them does.

It computes in float32, but for products on a CPU and those of quantized activations, which are in float64. They go row
by row, since a matrix product's bits may depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from llmpq.kernels.backends.plain_experts import combine as combine
from llmpq.kernels.backends.plain_experts import grouped_gemm as grouped_gemm
from llmpq.kernels.backends.plain_experts import route as route
from llmpq.kernels.sequences import CacheLayer, DeviceSequences, Sequences
from llmpq.kernels.weight import PreparedWeight
from llmpq.quant import CHUNK, QuantTensor
from llmpq.quant.activations import rounded_activations
from llmpq.quant.packing import packed_words
from llmpq.quant.tensor import zeros_dtype
from llmpq.spec import ACTIVATION_MODES, Precision
from llmpq.spec.layers import KV_BLOCK, blocks_for

ACTIVATION_DTYPES = (torch.float32,)
ACTIVATIONS = ACTIVATION_MODES


def is_available() -> str | None:
    """It always is."""
    return None


def allocate(
    n: int, k: int, precision: Precision, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """(weight,) or the (qweight, scales[, zeros]) of a QuantTensor."""
    if not precision.quantized:
        return (torch.empty(n, k, dtype=dtype, device=device),)
    groups = precision.num_groups(k)
    qweight = torch.empty(n, packed_words(k, precision.bits), dtype=torch.int32, device=device)
    scales = torch.empty(n, groups, dtype=dtype, device=device)
    kind = zeros_dtype(precision, dtype)
    if kind is None:
        return qweight, scales
    return qweight, scales, torch.empty(n, groups, dtype=kind, device=device)


def fill(
    data: tuple[torch.Tensor, ...],
    row_start: int,
    part: QuantTensor | torch.Tensor,
    *,
    n: int,
    k: int,
    precision: Precision,
) -> None:
    """Copy the rows of `part`."""
    sources = (part.qweight, part.scales, part.zeros) if isinstance(part, QuantTensor) else (part,)
    for target, source in zip(data, sources):
        if source is not None:
            target[row_start : row_start + len(source)].copy_(source)


def _rows(w: PreparedWeight, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of the weight, dequantized."""
    parts = [tensor[rows] for tensor in w.data]
    if not w.precision.quantized:
        return parts[0].to(dtype)
    zeros = parts[2] if len(parts) == 3 else None
    return QuantTensor(parts[0], parts[1], zeros, w.precision, (len(parts[0]), w.k)).dequantize(dtype)


def gemm(x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, out: torch.Tensor, activations: str) -> None:
    """out = x @ w.T + bias, all float32; only some rows of the weight exist dequantized at any time."""
    if activations != "a16":
        x = rounded_activations(x, w.precision.group_size, activations)
    elif x.device.type == "cpu":  # whose float32 sums have other bits with other numbers of threads
        x = x.double()
    bias = None if bias is None else bias.to(x.dtype)
    row = torch.empty(1, w.k, dtype=x.dtype, device=x.device)  # at one address, since that may decide on bits, too
    step = max(1, CHUNK // w.k)
    for columns in (slice(start, min(start + step, w.n)) for start in range(0, w.n, step)):
        weight = _rows(w, columns, x.dtype)
        part = None if bias is None else bias[columns]
        for i in range(len(x)):
            row.copy_(x[i])
            out[i, columns] = F.linear(row, weight, part)[0]


def embedding(ids: torch.Tensor, w: PreparedWeight, out: torch.Tensor) -> None:
    """Rows `ids` of the weight, dequantized, in `out` [t, k]."""
    out.copy_(_rows(w, ids, out.dtype))


# In place.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.ops.aten.silu_,
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
}


def activate_(x: torch.Tensor, activation: str, gated: bool) -> None:
    """The activation of x [t, n], in place; see `llmpq.kernels.activate_`.

    On a CPU row by row: torch computes what is left over of a vector's width by another function than the rest, and
    splits large tensors among threads in the middle of rows.
    """
    for rows in (x,) if x.is_cuda else x.split(1):
        y, up = rows.chunk(2, -1) if gated else (rows, None)
        if activation == "swiglu_clamped":
            assert up is not None
            gate, up = y.float().clamp(max=7), up.float().clamp(-7, 7)
            y.copy_(gate * torch.sigmoid(1.702 * gate) * (up + 1))
            continue
        _ACTIVATIONS[activation](y)
        if up is not None:
            y.mul_(up)


def scale_(x: torch.Tensor, factor: float, cap: float | None) -> None:
    """As `llmpq.kernels.scale_` says, in float32."""
    for rows in (x,) if x.is_cuda else x.split(1):  # as `activate_`
        y = rows.float() * factor
        rows.copy_(y if cap is None else cap * torch.tanh(y / cap))


def add_positions_(x: torch.Tensor, table: torch.Tensor, sequences: Sequences) -> None:
    """x [t, n] += the rows of a table of learned positions."""
    x.add_(table[sequences.on(table.device).positions])


def last_rows(x: torch.Tensor, sequences: Sequences, out: torch.Tensor) -> None:
    """Rows of x [t, n]; see `llmpq.kernels.last_rows`."""
    torch.index_select(x, 0, sequences.on(x.device).query_starts[1:] - 1, out=out)


def argmax(x: torch.Tensor, out: torch.Tensor) -> None:
    """The first column of the largest number in each row of x [rows, size]."""
    torch.argmax(x, -1, out=out)


def cache_shapes(blocks: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of keys and of values."""
    shape = (kv_heads, blocks, KV_BLOCK, head_dim)
    return shape, shape


def allocate_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of a cache."""
    return torch.zeros(shape, dtype=dtype, device=device)


def rotate_and_store(
    qkv: torch.Tensor, cache: CacheLayer, sequences: Sequences, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """As `llmpq.kernels.rotate_and_store` says."""
    kv_heads = cache.kv_heads
    keys, values = qkv[:, -2 * kv_heads : -kv_heads], qkv[:, -kv_heads:]
    if rotary is not None:
        cos, sin = (sequences.rows_of(table) for table in rotary)
        rotated = qkv[:, :-kv_heads, : cos.shape[-1]]
        swapped = torch.cat(rotated.chunk(2, -1)[::-1], -1)
        rotated.mul_(cos).add_(swapped.mul_(sin))
    at = sequences.on(qkv.device)
    places = _blocks(cache, at, at.token_sequences, at.positions // KV_BLOCK), at.positions % KV_BLOCK
    for cached, scales, new in ((cache.keys, cache.key_scales, keys), (cache.values, cache.value_scales, values)):
        if scales is not None:
            new, new_scales = quantized(new)
            scales.permute(1, 2, 0).index_put_(places, new_scales)
        elif cached.dtype != new.dtype:
            limit = torch.finfo(cached.dtype).max
            new = new.clamp(-limit, limit).to(cached.dtype)
        cached.permute(1, 2, 0, 3).index_put_(places, new)


def quantized(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [t, kv_heads, d] and scales [t, kv_heads] of keys or values; see `llmpq.kernels.rotate_and_store`."""
    new = new.float()
    scales = new.abs().amax(-1)
    scales /= torch.full_like(scales, 127)  # by a tensor: torch multiplies by the inverse of a number on a GPU
    scales.masked_fill_(~scales.isfinite(), torch.nan)
    steps = new / scales.masked_fill(~(scales > 0), 1).unsqueeze(-1)
    return steps.round_().nan_to_num_(0).clamp_(-127, 127).to(torch.int8), scales


def _blocks(cache: CacheLayer, at: DeviceSequences, sequence: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The blocks of the cache that are number `index` of a sequence's."""
    if at.tables is not None and not cache.is_ring:
        return at.tables[sequence, index]
    return at.slots[sequence] * cache.slot_blocks + index % cache.slot_blocks


def attention(
    q: torch.Tensor,
    cache: CacheLayer,
    sequences: Sequences,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> None:
    """As `llmpq.kernels.attention` says. Sequences are worked on one by one, so none changes the bits of another."""
    heads, head_dim = q.shape[1:]
    kv_heads, start = cache.kv_heads, 0
    at = sequences.on(q.device)
    lens = (sequences.query_lens, sequences.context_lens)
    for sequence, (queries, context) in enumerate(zip(*(t.tolist() for t in lens))):
        # The query heads that share a kv head become rows of one matrix: [kv_heads, queries * heads/kv_heads, d].
        rows = q[start : start + queries].float().reshape(queries, kv_heads, -1, head_dim).transpose(0, 1)
        rows = rows.reshape(kv_heads, -1, head_dim)
        first = 0 if window is None else max(0, context - queries - window + 1)  # that a query sees
        blocks = _blocks(cache, at, sequence, torch.arange(first // KV_BLOCK, blocks_for(context), device=q.device))
        keys, values = (
            _positions(cached, scales, blocks, first, context)
            for cached, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
        )
        scores = (rows @ keys.transpose(1, 2)).mul_(scale).view(kv_heads, queries, -1, context - first)
        positions = torch.arange(first, context, device=q.device)
        own = positions[-queries:, None]
        if slopes is not None:
            scores.addcmul_(slopes.view(kv_heads, 1, -1, 1), (positions - own).float()[:, None])
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        unseen = positions > own
        if window is not None:
            unseen |= positions <= own - window
        scores.masked_fill_(unseen[:, None], float("-inf"))
        result = scores.softmax(-1).view(kv_heads, -1, context - first) @ values
        if sinks is not None:  # what a softmax with that further score leaves of one without
            left = (scores.logsumexp(-1) - sinks.view(kv_heads, 1, -1)).sigmoid_()
            result *= left.view(kv_heads, -1, 1)
        out[start : start + queries] = (
            result.view(kv_heads, queries, -1, head_dim).transpose(0, 1).reshape(queries, heads, head_dim)
        )
        start += queries


def _positions(
    cached: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, first: int, end: int
) -> torch.Tensor:
    """Keys or values of positions, float32 [kv_heads, end - first, d], given the blocks where these lie."""
    here = slice(first % KV_BLOCK, first % KV_BLOCK + end - first)
    kept = cached.index_select(1, blocks).flatten(1, 2)[:, here].float()
    if scales is not None:
        kept *= scales.index_select(1, blocks).flatten(1, 2)[:, here, None]
    return kept


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """residual + x / sqrt(mean(x**2) + eps) * weight over the last dim, in float32; the result has x's dtype."""
    y = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    y = (y if residual is None else residual.float() + y).to(x.dtype)
    return y if out is None else out.copy_(y)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor | None
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim, in float32; the result has x's dtype."""
    y = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
    return y if out is None else out.copy_(y)


def head_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """As `llmpq.kernels.head_norm_` says, in float32."""
    x.copy_(rms_norm(x, weight, eps, None, None))
