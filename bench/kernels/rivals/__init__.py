"""The linears that are timed against each other: ours and those of other libraries, on the CPU and on a GPU.

Each module beside this one that wraps a library does so in `contender(problem, **options)`. It imports its library when
it is itself imported, so one that is missing disturbs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from llmpq.quant import QuantTensor, quantize
from llmpq.quant.packing import unpack
from llmpq.spec import Precision
from llmpq.spec.precision import ZeroKind

RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnxruntime int4": ("onnxruntime", {"bits": 4}),
    "onnxruntime int8": ("onnxruntime", {"bits": 8}),
    "OpenVINO int4 a8": ("openvino", {"bits": 4, "quantize_activations": True}),
    "OpenVINO int4 fp32": ("openvino", {"bits": 4}),
    "OpenVINO int8 fp32": ("openvino", {"bits": 8}),
    "OpenVINO int4 bf16": ("openvino", {"bits": 4, "precision": "bf16"}),
    "OpenVINO int8 bf16": ("openvino", {"bits": 8, "precision": "bf16"}),
    "auto-round int3": ("auto_round", {"bits": 3}),
    "auto-round int4": ("auto_round", {"bits": 4}),
    "zentorch DA8W4": ("zentorch", {"bits": 4}),
    "zentorch int8": ("zentorch", {"bits": 8}),
    "torch dynamic int8": ("pytorch", {"kind": "dynamic"}),
    "torch int4pack": ("pytorch", {"kind": "int4pack"}),
    "torch float32": ("pytorch", {"kind": "float32"}),
    "torch bfloat16": ("pytorch", {"kind": "bfloat16"}),
    "ggml Q3_K": ("ggml", {"kind": "Q3_K"}),
    "ggml Q4_K": ("ggml", {"kind": "Q4_K"}),
    "memory read": ("memory", {}),
}
GPU_RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "cuBLAS": ("pytorch_gpu", {"kind": "cublas"}),
    **{f"dequantize + cuBLAS int{bits}": ("dequantized", {"bits": bits}) for bits in (3, 4, 8)},
    "torch _weight_int4pack_mm": ("pytorch_gpu", {"kind": "int4pack"}),
    **{f"Humming int{bits}": ("humming", {"bits": bits}) for bits in (3, 4, 8)},
    **{f"Marlin int{bits}": ("vllm", {"kind": "marlin", "bits": bits}) for bits in (4, 8)},
    **{f"Machete int{bits}": ("vllm", {"kind": "machete", "bits": bits}) for bits in (4, 8)},
    **{f"gptq_gemm int{bits}": ("vllm", {"kind": "gptq", "bits": bits}) for bits in (3, 4, 8)},
    **{f"gemlite int{bits}": ("gemlite", {"bits": bits}) for bits in (4, 8)},
    "bitsandbytes NF4": ("bitsandbytes", {}),
    "GPU memory read": ("gpu_memory", {}),
}
DISTRIBUTIONS = ("onnxruntime", "openvino", "auto-round-lib", "zentorch", "llama-cpp-python", "torch")
VLLM_LIBRARY = "LLMPQ_VLLM_LIBRARY"  # the environment variable that names the file
GPU_DISTRIBUTIONS = ("torch", "triton", "humming-kernels", "gemlite", "bitsandbytes")


@dataclass(frozen=True)
class Contender:
    """One way to multiply, ready to be timed."""

    nbytes: int  # of one copy of the weight, as it is read
    copies: int
    weight: Callable[[], torch.Tensor] | None  # [n, k] that the first copy stands for; None: there is no product
    # x [m, k] of the problem's dtype -> a function that multiplies x with each copy once and returns the first product
    bind: Callable[[torch.Tensor], Callable[[], torch.Tensor]]
    # The product of x with the first copy alone, where it is timed as a single call, too.
    single: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """The weight to be multiplied, and how."""

    weight: torch.Tensor  # float32 [n, k], on the device that multiplies
    group_size: int
    threads: int  # of the CPU
    rotated_bytes: int  # of all copies together at least; 0: one copy
    dtype: torch.dtype = torch.float32  # of x
    _quantized: dict[Precision, QuantTensor] = field(default_factory=dict)

    @cached_property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    def copies(self, nbytes: int) -> int:
        return max(1, -(-self.rotated_bytes // nbytes))

    def rotated(self, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """These tensors, which are one weight together, and as many copies as there are to be."""
        copies = self.copies(sum(tensor.nbytes for tensor in tensors))
        return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(copies - 1))]

    def quantized(self, bits: int, zero: ZeroKind = "sym") -> QuantTensor:
        """Made once; its scales are of x's dtype, float16 where that has 32 bits."""
        precision = Precision(bits, self.group_size, zero)
        if precision not in self._quantized:
            scale_dtype = torch.float16 if self.dtype == torch.float32 else self.dtype
            self._quantized[precision] = quantize(self.weight, precision, scale_dtype=scale_dtype)
        return self._quantized[precision]

    def codes(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as plain numbers: codes uint8 [n, k] and scales float32 [n, groups]; 2**(bits - 1) means zero."""
        quantized = self.quantized(bits)
        return unpack(quantized.qweight, bits, self.shape[1]).to(torch.uint8), quantized.scales.float()


def in_turn(
    linears: Sequence[Callable[[torch.Tensor], torch.Tensor]], dtype: torch.dtype | None = None
) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
    """`Contender.bind` of functions that multiply x with one copy each; x is made `dtype` beforehand."""
    first, *others = linears

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x if dtype is None else x.to(dtype)

        def sweep() -> torch.Tensor:
            y = first(x)
            for linear in others:
                linear(x)
            return y

        return sweep

    return bind


def build(name: str, problem: Problem) -> Contender:
    """Raises whatever the rival raises, or ImportError where it is not installed."""
    module, options = (RIVALS | GPU_RIVALS)[name]
    contender: Contender = import_module(f"bench.kernels.rivals.{module}").contender(problem, **options)
    return contender
