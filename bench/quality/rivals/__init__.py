"""Quantizers that are compared, ours and those of other libraries, on the weights that they leave.

Each module beside this one has `quantize(task, **options)`. It imports its library when it is itself imported, so one
that is missing disturbs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from bench.quality.beds import Bed

ITERATIONS = 50, 200  # of auto-round, whose own default is 200; 50 take 20 seconds of a core for each demo layer

# Name -> module, options, and the (bits, group size) it is measured at beyond those that all are.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "llmpq rtn": ("ours", {"quantizer": "rtn"}),
    "llmpq gptq": ("ours", {"quantizer": "gptq"}),
    "llmpq gptq by default": ("ours", {"quantizer": "gptq", "own_text": True}),
    "llmpq gptq offset": ("ours", {"quantizer": "gptq", "zero": "offset"}),
    "llmpq gptq sym": ("ours", {"quantizer": "gptq", "zero": "sym"}),
    "hqq": ("half_quadratic", {}),
    "gptqmodel": ("gptq_model", {}),
    "gptqmodel gptaq": ("gptq_model", {"corrected": True}),
}
METHODS |= {f"auto-round {count} iterations": ("auto_rounding", {"iterations": count}) for count in ITERATIONS}
# llama.cpp's have a size of their own: name -> nominal bits
LLAMA_CPP = {"Q4_K_M": 4, "Q4_0": 4, "Q3_K_M": 3, "IQ4_XS": 4, "IQ3_S": 3}
METHODS |= {f"llama.cpp {kind}": ("llama_cpp_files", {"kind": kind}) for kind in LLAMA_CPP}
OURS = "llmpq "
DISTRIBUTIONS = ("transformers", "hqq", "gptqmodel", "auto-round", "llama-cpp-python")


@dataclass(frozen=True)
class Task:
    """What is quantized, and how. Methods that want no calibration, or that have one size only, pass over the rest."""

    bed: Bed
    text: Sequence[int]  # tokens of all of the calibration text
    token_ids: torch.Tensor  # int64 [sequences, length]: what all methods read of it
    bits: int
    group_size: int


@dataclass(frozen=True)
class Quantized:
    """What is left of the linears of a bed."""

    weights: Mapping[str, torch.Tensor]  # float32 [n, k] that each linear stands for, by its name
    stored_bits: float  # of all of them: codes, scales, zeros, and what is kept in other types

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / sum(weight.numel() for weight in self.weights.values())


def grouped_bits(weights: Mapping[str, torch.Tensor], bits: int, group_size: int, zero_bits: int) -> float:
    """Bits of codes, 16-bit scales, and zeros for each group along k, the last of which may be short."""
    groups = sum(n * -(-k // group_size) for n, k in (weight.shape for weight in weights.values()))
    return sum(weight.numel() for weight in weights.values()) * bits + groups * (16 + zero_bits)


def quantize(name: str, task: Task) -> Quantized:
    """Raises whatever the rival raises, or ImportError where it is not installed."""
    module, options = METHODS[name]
    quantized: Quantized = import_module(f"bench.quality.rivals.{module}").quantize(task, **options)
    wrong = set(task.bed.linears) ^ set(quantized.weights)
    if wrong:
        raise ValueError(f"{name} left out, or made up, {min(wrong)}")
    return quantized


def sizes(name: str, bits: list[int], groups: list[int]) -> list[tuple[int, int | None]]:
    """Bits and group sizes at which a method is measured."""
    kind = METHODS[name][1].get("kind")
    if kind is not None:
        return [(LLAMA_CPP[kind], None)] if LLAMA_CPP[kind] in bits else []
    return [(b, group) for b in bits for group in groups]
