"""Products by torch's own matrix multiplication (cuBLAS on a GPU): of plain weights, and of quantized ones that are
dequantized first, which is faster than a fused kernel once there are many rows (llmpq/kernels/gemm_path.py says when).

Bits of a row depend on m here: cuBLAS picks another order of sums for another m.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmpq.kernels.backends.gpu_layout import PANEL
from llmpq.kernels.weight import PreparedWeight

SCRATCH_BYTES = 128 * 2**20  # what is dequantized at once: of a long k still enough rows to keep all of a GPU busy
_TILE = 128  # rows of the weight, in whole panels; what cuBLAS's own tiles divide into

Dequantize = Callable[[PreparedWeight, int, torch.Tensor], None]


def multiply_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x @ weight.T + bias by torch's own product; x, bias and out are of one dtype."""
    columns = weight.to(x.dtype).T
    if bias is None:
        torch.mm(x, columns, out=out)
    else:
        torch.addmm(bias, x, columns, out=out)  # rounds once


def chunk_rows(k: int, dtype: torch.dtype) -> int:
    """Rows of a weight that are dequantized at once: whole tiles that fit in SCRATCH_BYTES, but at least one."""
    return max(1, SCRATCH_BYTES // (k * dtype.itemsize) // _TILE) * _TILE


def multiply_dequantized(
    x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, out: torch.Tensor, dequantize: Dequantize
) -> None:
    """out [m, n] = x [m, k] @ w.T + bias [n], all of one dtype, in chunks of rows of the weight.

    `dequantize(w, panel_start, rows)` writes the weight's rows from PANEL * panel_start on, in x's dtype, to the
    contiguous [r, k] `rows`, on the current stream. The scratch is of a fixed size, so that it can be planned for, and
    every chunk uses the same: it is ordered by the stream, and capturable in a CUDA graph.
    """
    step = chunk_rows(w.k, x.dtype)
    scratch = torch.empty(min(step, w.n), w.k, dtype=x.dtype, device=x.device)
    for start in range(0, w.n, step):
        stop = min(start + step, w.n)
        rows = scratch[: stop - start]
        dequantize(w, start // PANEL, rows)
        multiply_plain(x, rows, None if bias is None else bias[start:stop], out[:, start:stop])


def multiply_unfused(
    x: torch.Tensor,
    w: PreparedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    dequantize: Dequantize,
) -> None:
    """out = x @ w.T + bias + residual by the one of the two above that suits the weight."""
    if w.precision.quantized:
        multiply_dequantized(x, w, bias, out, dequantize)
    else:
        multiply_plain(x, w.data[0], bias, out)
    if residual is not None:
        out.add_(residual)
