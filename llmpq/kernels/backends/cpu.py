"""The C++ backend for CPUs: products, attention and norms in float32, in the widest instruction set the processor has.

The environment variable LLMPQ_ISA (portable, avx2, avxvnni, avx512 or amx) caps the instruction set; it is read once,
at first use. AMX is used only if it asks for it: that has not yet been measured. This file hands over addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch

from llmpq.kernels.backends import large_pages
from llmpq.kernels.backends.cpu_extension import extension as _cpu
from llmpq.kernels.backends.cpu_layout import PANEL, allocate, fill
from llmpq.spec import UsageError
from llmpq.spec.cluster import Isa
from llmpq.spec.layers import KV_BLOCK

if TYPE_CHECKING:
    from llmpq.kernels.sequences import CacheLayer, Sequences
    from llmpq.kernels.weight import PreparedWeight

__all__ = ["ACTIVATIONS", "ACTIVATION_DTYPES", "PANEL", "allocate", "fill"]

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16)
_MODES = {"a16": 0, "a8": 1, "a8x2": 2}  # as in csrc/gemm.h
ACTIVATIONS = tuple(_MODES)
_ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh", "swiglu_clamped")  # as in csrc/cpu/kernels.h


def is_available() -> str | None:
    """None if the extension module is there, else how to get it. Raises UsageError if LLMPQ_ISA is not one."""
    if _cpu is None:
        return (
            "the extension module llmpq._cpu is not built; run `pip install .` or `python setup.py build_ext --inplace`"
        )
    wanted = os.environ.get("LLMPQ_ISA", "")
    if wanted and wanted not in get_args(Isa):
        raise UsageError(f"LLMPQ_ISA is {wanted!r}, expected one of {', '.join(get_args(Isa))}")
    return None


def isa() -> Isa:
    """The instruction set in use. Raises UsageError if LLMPQ_ISA names none."""
    try:
        name: Isa = _cpu.isa()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return name


def handle(w: PreparedWeight) -> Any:
    """What the extension module needs to know of a weight, looked up once."""
    addresses = [tensor.data_ptr() for tensor in w.data]
    return _cpu.Weight(
        *addresses,
        *(0,) * (3 - len(addresses)),
        w.n,
        w.k,
        w.precision.group_size or w.k,
        w.precision.bits,
        w.dtype == torch.bfloat16,
        w.precision.zero == "offset",
    )


def gemm(
    x: torch.Tensor,
    w: PreparedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
    residual: torch.Tensor | None = None,
) -> None:
    """out [m, n] = x [m, k] @ w.T + bias [n] + residual; x and out are float32 or bfloat16.

    A residual is float32, with the strides of `out`.
    """
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    _cpu.gemm(
        w.handle,
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.stride()[0],
        out.stride()[0],
        x.dtype == torch.bfloat16,
        _MODES[activations],
        torch.get_num_threads(),
        0 if residual is None else residual.data_ptr(),
    )


def route(logits: torch.Tensor, normalized: bool, sigmoid: bool, experts: torch.Tensor, weights: torch.Tensor) -> None:
    """As `llmpq.kernels.route` says, for float32 logits."""
    _cpu.route(
        *(logits.data_ptr(), experts.data_ptr(), weights.data_ptr(), *logits.shape, experts.shape[1]),
        *(logits.stride(0), normalized, sigmoid, torch.get_num_threads()),
    )


def grouped_gemm(
    x: torch.Tensor,
    weights: Sequence[PreparedWeight],
    experts: torch.Tensor,
    biases: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
) -> None:
    """As `llmpq.kernels.grouped_gemm` says; x and out are float32 or bfloat16."""
    if biases is not None and biases.dtype != torch.float32:
        biases = biases.float()
    _cpu.grouped_gemm(
        [w.handle for w in weights],
        *(x.data_ptr(), experts.data_ptr(), 0 if biases is None else biases.data_ptr(), out.data_ptr()),
        *(*experts.shape, x.stride(0), len(x) > len(experts)),
        *(x.dtype == torch.bfloat16, _MODES[activations], torch.get_num_threads()),
    )


def combine(y: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
    """As `llmpq.kernels.combine` says, for float32."""
    _cpu.combine(
        *(y.data_ptr(), weights.data_ptr(), residual.data_ptr(), out.data_ptr()),
        *(*weights.shape, y.shape[1], torch.get_num_threads()),
    )


def embedding(ids: torch.Tensor, w: PreparedWeight, out: torch.Tensor) -> None:
    """Rows ids (int64 [t]) of the weight, dequantized, in `out` [t, k]."""
    ids = ids.contiguous()
    rows = out if out.dtype == torch.float32 else torch.empty(out.shape)
    _cpu.embedding(w.handle, ids.data_ptr(), rows.data_ptr(), len(ids), torch.get_num_threads())
    if rows is not out:
        out.copy_(rows)


def activate_(x: torch.Tensor, activation: str, gated: bool) -> None:
    """The activation of x [t, n], float32, in place; see `llmpq.kernels.activate_`."""
    rows, size = x.shape
    kind = _ACTIVATIONS.index(activation)
    _cpu.activate(x.data_ptr(), rows, size // 2 if gated else size, x.stride(0), kind, gated, torch.get_num_threads())


def scale_(x: torch.Tensor, factor: float, cap: float | None) -> None:
    """As `llmpq.kernels.scale_` says, for float32."""
    _cpu.scale(x.data_ptr(), *x.shape, x.stride(0), factor, cap or 0.0, torch.get_num_threads())


def add_positions_(x: torch.Tensor, table: torch.Tensor, sequences: Sequences) -> None:
    """x [t, n] += the rows of a table of learned positions, float32; see `llmpq.kernels.add_positions_`."""
    _cpu.add_positions(sequences.handle, table.data_ptr(), x.data_ptr(), x.shape[1], torch.get_num_threads())


def last_rows(x: torch.Tensor, sequences: Sequences, out: torch.Tensor) -> None:
    """Rows of x [t, n], float32; see `llmpq.kernels.last_rows`."""
    _cpu.last_rows(sequences.handle, x.data_ptr(), out.data_ptr(), x.shape[1], torch.get_num_threads())


def argmax(x: torch.Tensor, out: torch.Tensor) -> None:
    """The column of the largest number in each row of x [rows, size], float32."""
    x = x.contiguous()
    _cpu.argmax(x.data_ptr(), out.data_ptr(), *x.shape, torch.get_num_threads())


def cache_shapes(blocks: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of keys 16 positions together, lane = position; values filled up to whole vectors. See csrc/cpu/kernels.h."""
    value_dim = -(-head_dim // PANEL) * PANEL
    return (kv_heads, blocks, KV_BLOCK // PANEL, head_dim, PANEL), (kv_heads, blocks, KV_BLOCK, value_dim)


def allocate_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of a cache: in large pages, which become resident when they are first written."""
    return large_pages.zeros(shape, dtype)


def cache_handle(cache: CacheLayer) -> Any:
    """What the extension module needs to know of a layer's cache."""
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    assert cache.keys.dtype in (torch.float32, torch.float16, torch.int8)
    return _cpu.KvCache(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(cache.kv_heads, cache.head_dim, cache.blocks, cache.slot_blocks),
        *(cache.is_ring, cache.keys.element_size()),
    )


def sequences_handle(sequences: Sequences) -> Any:
    """What the extension module needs to know of the sequences of a step."""
    lens = (sequences.slots, sequences.query_lens, sequences.context_lens, sequences.tables)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in lens)
    return _cpu.Sequences(*addresses, len(sequences.slots), sequences.columns)


def rotate_and_store(
    qkv: torch.Tensor, cache: CacheLayer, sequences: Sequences, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """As `llmpq.kernels.rotate_and_store` says, for float32 qkv."""
    cos, sin, dims = (0, 0, 0) if rotary is None else (*(table.data_ptr() for table in rotary), rotary[0].shape[1])
    _cpu.rotate_and_store(
        cache.handle,
        sequences.handle,
        qkv.data_ptr(),
        cos,
        sin,
        qkv.shape[1] - 2 * cache.kv_heads,
        qkv.stride(0),
        dims,
        torch.get_num_threads(),
    )


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
    """As `llmpq.kernels.attention` says, for float32 q."""
    _, heads, head_dim = q.shape
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    _cpu.attention(
        cache.handle,
        sequences.handle,
        q.data_ptr(),
        out.data_ptr(),
        heads,
        q.stride(0),
        scale,
        window or cache.max_len,
        cap or 0.0,
        *(0 if of_heads is None else of_heads.data_ptr() for of_heads in (sinks, slopes)),
        torch.get_num_threads(),
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """residual + x / sqrt(mean(x**2) + eps) * weight over the last dim of x, float32."""
    return _normalize(_cpu.rms_norm, x, weight, None, eps, out, residual)


def head_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """As `llmpq.kernels.head_norm_` says, for float32."""
    weight = weight.float().contiguous()
    _cpu.head_norm(x.data_ptr(), weight.data_ptr(), *x.shape, x.stride(0), eps, torch.get_num_threads())


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor | None
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim of x, float32."""
    return _normalize(_cpu.layer_norm, x, weight, bias, eps, out)


def hand_over_seconds(threads: int, count: int) -> torch.Tensor:
    """float64 [count]: how long it takes, each time, until all of so many threads that are awake have begun and ended.

    For measurements: it is what an operation of a step pays for being done by several threads.
    """
    seconds = torch.zeros(count, dtype=torch.float64)
    _cpu.time_hand_overs(threads, count, seconds.data_ptr())
    return seconds


def new_program() -> Any:
    """One without operations; see `llmpq.kernels.Program`."""
    return _cpu.Program()


def run_program(
    program: Any,
    rows: int,
    tokens: torch.Tensor | None,
    sequences: Sequences | None,
    seconds: torch.Tensor | None,
) -> None:
    """Run a program; see `llmpq.kernels.Program.run`."""
    ids, times = (0 if tensor is None else tensor.data_ptr() for tensor in (tokens, seconds))
    handle = None if sequences is None else sequences.handle
    program.run(rows, ids, handle, torch.get_num_threads(), times)


def _normalize(
    kernel: Callable[..., None],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    weight = weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else residual.contiguous()
    if out is None:
        out = torch.empty(x.shape)
    kernel(
        rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        len(rows),
        size,
        rows.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return out
