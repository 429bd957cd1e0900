"""Linears in float8 with the inverse of what multiplied them, as DeepSeek and Qwen publish them (quant_method "fp8").

    weight            float8 [n, k]
    weight_scale_inv  for each block of weight_block_size rows and columns, or one number:  w = scale_inv * number
    weight_scale      the same under another name

Sources: DeepSeek-V3's weights README, and transformers 5.24, integrations/finegrained_fp8.py. What activations were to
be quantized to is passed over: here they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.from_compressed_tensors import two_sizes
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.stored_linear import FLOATS, ScaledLinear, expect, scaled
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError


class Fp8Linears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("weight_scale_inv", "weight_scale")
    suffixes = ("weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale")

    def __init__(self, config: MethodConfig) -> None:
        neutral = ("quant_method", "activation_scheme", "modules_to_not_convert", "ignored_layers", "dequantize")
        only: dict[str, tuple[Any, ...]] = {"fmt": ("e4m3", "e5m2"), "scale_fmt": ("float",)}
        only |= {"expert_dtype": ("fp8",), "modules_to_convert": ([],)}
        config.known(("weight_block_size",), neutral, only)
        self._model, self._block = config.model, None
        if config.values.get("weight_block_size") is not None:
            self._block = two_sizes(config, "weight_block_size")

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> ScaledLinear:
        scales = [tensors[key] for key in self.keys if key in tensors]
        if len(scales) != 1:
            raise UsageError(f"{self._model}: {module} has both a weight_scale_inv and a weight_scale")
        number = tensors["weight"]
        n, k = (*number.shape, 0, 0)[:2]
        expect(number, FLOATS, self._model, (n, k))
        block = self._block or ((1, k) if scales[0].shape in ((n, 1), (n,)) else (n, k))
        others = tuple(entry for entry in tensors.values() if entry not in (number, scales[0]))
        return scaled(f"{module}.weight", number, scales[0], block, self._model, others)
