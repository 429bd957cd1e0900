"""Rows of a table by their numbers, in Triton: one launch. Importing this file needs no triton."""

from __future__ import annotations

import torch

from llmpq.kernels.backends.gpu_layout import num_planes
from llmpq.kernels.weight import PreparedWeight

_COLUMNS = 1024  # of one program


def embedding(ids: torch.Tensor, w: PreparedWeight, out: torch.Tensor) -> None:
    """Rows ids (int64 [t]) of the weight, dequantized and rounded once, in `out` [t, k]."""
    import triton

    from llmpq.kernels.backends.triton_embedding_kernel import embedding_kernel

    precision = w.precision
    operands = w.data[: 1 + precision.quantized * (1 + (precision.zero != "sym"))]
    table, scales, zeros = (operands + 2 * operands[-1:])[:3]  # where there are none, something to point at
    if len(ids):
        with torch.cuda.device_of(out):
            embedding_kernel[(len(ids), triton.cdiv(w.k, _COLUMNS))](
                ids,
                table,
                scales,
                zeros,
                out,
                w.k,
                BITS=precision.bits,
                PLANES=num_planes(w.k, precision.bits) if precision.quantized else 0,
                GROUP_SIZE=precision.group_size or w.k,
                ZERO=precision.zero if precision.quantized else "",
                BLOCK=_COLUMNS,
                num_warps=4,
                enable_fp_fusion=False,  # the bits of llmpq.quant's formula
            )
