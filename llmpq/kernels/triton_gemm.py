"""The Triton backend: one kernel for all widths, on the stored format (llmpq/quant/packing.py).

It runs where triton does, and on CPU tensors under triton's interpreter (TRITON_INTERPRET=1 before triton is first
imported), which is how it is tested without a GPU. A row's result does not depend on the other rows, except with plain
16-bit weights, whose products are torch's own; see llmpq/kernels/cuda.py.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from llmpq.kernels.cuda import multiply_plain
from llmpq.kernels.reference import allocate, embedding, fill
from llmpq.kernels.weight import PreparedWeight
from llmpq.spec import Precision

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_DTYPES",
    "Config",
    "allocate",
    "config",
    "embedding",
    "fill",
    "gemm",
    "is_available",
]

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("a16",)


@dataclass(frozen=True, slots=True)
class Config:
    """How the kernel is cut into programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(precision: Precision) -> Config:
    """The tile for a weight. It is no function of m, so that the order of sums is none either."""
    return Config(block_m=16, block_n=64, block_k=min(128, precision.group_size or 128), num_warps=4, num_stages=3)


def _interpreted() -> bool:
    """Whether triton was told to interpret when it made the kernel."""
    import triton

    from llmpq.kernels.triton_kernel import gemm_kernel

    return not isinstance(gemm_kernel, triton.JITFunction)


def is_available() -> str | None:
    """None if triton can run here, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'llmpq[triton]'"
    if torch.cuda.is_available() or _interpreted():
        return None
    return "there is no CUDA device, and triton is not interpreting (TRITON_INTERPRET=1)"


def gemm(x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, out: torch.Tensor, activations: str) -> None:
    """out = x @ w.T + bias with x [m, k], out [m, n] and bias [n] of one dtype, on the current stream.

    Sums are float32; the first call for a (precision, dtype, k) compiles.
    """
    if not w.precision.quantized:
        return multiply_plain(x, w.data[0], bias, out)
    if x.dtype == torch.bfloat16 and _interpreted():  # whose tl.dot takes bfloat16's bits for whole numbers
        wide = torch.empty_like(out, dtype=torch.float32)
        gemm(x.float(), w, None if bias is None else bias.float(), wide, activations)
        out.copy_(wide)
        return None
    from llmpq.kernels.triton_kernel import gemm_kernel

    tile = config(w.precision)
    qweight, scales = w.data[:2]
    grid = (-(-w.n // tile.block_n), -(-x.shape[0] // tile.block_m))
    with torch.cuda.device_of(x):
        gemm_kernel[grid](
            x,
            qweight,
            scales,
            scales if w.precision.symmetric else w.data[2],
            scales if bias is None else bias,
            out,
            x.shape[0],
            w.n,
            x.stride(0),
            out.stride(0),
            K=w.k,
            BITS=w.precision.bits,
            GROUP_SIZE=w.precision.group_size or w.k,
            SYMMETRIC=w.precision.symmetric,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return None
