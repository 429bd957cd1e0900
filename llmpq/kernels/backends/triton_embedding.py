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
    table = w.data[0]
    scales = w.data[1] if precision.quantized else table  # where there are none, something to point at
    zeros = w.data[2] if precision.quantized and precision.zero != "sym" else scales
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
