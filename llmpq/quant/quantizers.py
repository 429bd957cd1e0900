"""The quantizers by name: how a floating-point weight becomes a QuantTensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from llmpq.quant import rtn
from llmpq.quant.tensor import SCALE_DTYPES, QuantTensor
from llmpq.spec import Precision


class Quantizer(Protocol):
    """Quantizes a floating-point weight [n, k] to a precision, with scales of `scale_dtype`. Raises ValueError."""

    def __call__(self, weight: torch.Tensor, precision: Precision, scale_dtype: torch.dtype) -> QuantTensor: ...


_QUANTIZERS: Mapping[str, Quantizer] = {"rtn": rtn.round_to_nearest}


def quantize(weight: torch.Tensor, precision: Precision, *, scale_dtype: torch.dtype = torch.float16) -> QuantTensor:
    """Quantize a weight [n, k] by the precision's quantizer. Raises ValueError."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] == 0:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, expected floating-point [n, k]")
    if not precision.quantized:
        raise ValueError("precision is w16, which is not quantized")
    if precision.quantizer not in _QUANTIZERS:
        raise ValueError(f"weights cannot be quantized to {precision}; the quantizer is {', '.join(_QUANTIZERS)}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype is {scale_dtype}, expected one of {SCALE_DTYPES}")
    return _QUANTIZERS[precision.quantizer](weight, precision, scale_dtype)
