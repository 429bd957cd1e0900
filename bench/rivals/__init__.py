"""The linears that are timed against each other on the CPU: ours and those of other libraries.

Each module beside this one wraps one library in `contender(problem, **options)`. It imports its library when it is
itself imported, so one that is missing disturbs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from llmpq.quant import QuantTensor, quantize
from llmpq.quant.packing import unpack
from llmpq.spec import Precision

RIVALS = {
    "onnxruntime int4": ("onnxruntime", {"bits": 4}),
    "onnxruntime int8": ("onnxruntime", {"bits": 8}),
    "OpenVINO int4 a8": ("openvino", {"bits": 4, "quantize_activations": True}),
    "OpenVINO int4 fp32": ("openvino", {"bits": 4, "quantize_activations": False}),
    "OpenVINO int8 fp32": ("openvino", {"bits": 8, "quantize_activations": False}),
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
DISTRIBUTIONS = ("onnxruntime", "openvino", "auto-round-lib", "zentorch", "llama-cpp-python", "torch")


@dataclass(frozen=True)
class Contender:
    """One way to multiply, ready to be timed."""

    nbytes: int  # of one copy of the weight, as it is read
    copies: int
    weight: Callable[[], torch.Tensor] | None  # [n, k] that the first copy stands for; None: there is no product
    # x float32 [m, k] -> a function that multiplies x with each copy once and returns the first product [m, n]
    bind: Callable[[torch.Tensor], Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Problem:
    """The weight to be multiplied, and how."""

    weight: torch.Tensor  # float32 [n, k]
    group_size: int
    threads: int
    rotated_bytes: int  # of all copies together at least; 0: one copy
    _quantized: dict[int, QuantTensor] = field(default_factory=dict)

    @cached_property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    def copies(self, nbytes: int) -> int:
        return max(1, -(-self.rotated_bytes // nbytes))

    def quantized(self, bits: int) -> QuantTensor:
        """Symmetric, made once."""
        if bits not in self._quantized:
            self._quantized[bits] = quantize(self.weight, Precision(bits, self.group_size))
        return self._quantized[bits]

    def codes(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as plain numbers: codes uint8 [n, k] and scales float32 [n, groups]; 2**(bits - 1) means zero."""
        quantized = self.quantized(bits)
        return unpack(quantized.qweight, bits, self.shape[1]).to(torch.uint8), quantized.scales.float()


def build(name: str, problem: Problem) -> Contender:
    """Raises whatever the rival raises, or ImportError where it is not installed."""
    module, options = RIVALS[name]
    contender: Contender = import_module(f"bench.rivals.{module}").contender(problem, **options)
    return contender


def versions() -> dict[str, str]:
    """Of the rivals that are installed."""
    found = {}
    for distribution in DISTRIBUTIONS:
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found
