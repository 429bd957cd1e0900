"""The quantizers by name: how a floating-point weight becomes a QuantTensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from llmpq.quant import gptq, rtn
from llmpq.quant.tensor import SCALE_DTYPES, InputStatistics, QuantTensor
from llmpq.spec import Precision


class Quantizer(Protocol):
    """Quantizes a floating-point weight [n, k] to a precision, with scales of `scale_dtype`, for the inputs it gets.

    Raises ValueError, also if it needs to know these and does not.
    """

    def __call__(
        self, weight: torch.Tensor, precision: Precision, scale_dtype: torch.dtype, inputs: InputStatistics | None, /
    ) -> QuantTensor: ...


def _for_any_inputs(
    weight: torch.Tensor, precision: Precision, scale_dtype: torch.dtype, inputs: InputStatistics | None
) -> QuantTensor:
    return rtn.round_to_nearest(weight, precision, scale_dtype)


_QUANTIZERS: Mapping[str, Quantizer] = {"rtn": _for_any_inputs, "gptq": gptq.quantize_for_inputs}


def quantize(
    weight: torch.Tensor,
    precision: Precision,
    *,
    scale_dtype: torch.dtype = torch.float16,
    inputs: InputStatistics | None = None,
) -> QuantTensor:
    """Quantize a weight [n, k] by the precision's quantizer, which may ask for `inputs`. Raises ValueError."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] == 0:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, expected floating-point [n, k]")
    if not precision.quantized:
        raise ValueError("precision is w16, which is not quantized")
    if precision.quantizer not in _QUANTIZERS:
        raise ValueError(f"weights cannot be quantized to {precision}; the quantizer is {', '.join(_QUANTIZERS)}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype is {scale_dtype}, expected one of {SCALE_DTYPES}")
    return _QUANTIZERS[precision.quantizer](weight, precision, scale_dtype, inputs)
