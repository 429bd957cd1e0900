"""Linears in the forms of bitsandbytes: LLM.int8, and NF4 or FP4, also with scales that are quantized again.

    weight         int8 [n, k]
    SCB            float32 [n]      w = number * SCB / 127
    weight_format  0: in rows

    weight                    two codes to a byte, in whatever type and shape
    weight.quant_map          float32 [16]: the number of each code
    weight.absmax             float32, for each block of so many numbers; or uint8, with the next two
    weight.nested_quant_map   float32 [256]
    weight.nested_absmax      float32, for each block of so many scales
    weight.quant_state.bitsandbytes__nf4, or __fp4: JSON with shape, sizes of blocks and the offset of scales

Source: QuantState and Linear8bitLt of bitsandbytes 0.50.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.stored_linear import CodebookLinear, ScaledLinear, StoredLinear, expect, stored_array
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_LEVEL = 127


class BitsAndBytesLinears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("SCB", *_STATES)
    suffixes = (
        *("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map", *_STATES),
    )

    def __init__(self, config: MethodConfig) -> None:
        neutral = (
            *("quant_method", "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "bnb_4bit_quant_type"),
            *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"),
            *("llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant"),
            *("bnb_4bit_quant_storage", "modules_to_not_convert"),
        )
        config.known((), neutral, {})
        self._model = config.model

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> StoredLinear:
        if "SCB" in tensors:
            return self._int8(f"{module}.weight", tensors)
        return self._codebook(f"{module}.weight", tensors)

    def _int8(self, name: str, tensors: Mapping[str, TensorEntry]) -> ScaledLinear:
        weight = tensors["weight"]
        n, k = (*weight.shape, 0, 0)[:2]
        expect(weight, ("I8",), self._model, (n, k))
        scales = expect(tensors["SCB"], ("F32",), self._model, (n,))
        others = tuple(tensors[kind] for kind in ("weight_format",) if kind in tensors)
        for entry in others:
            if expect(entry, ("U8",), self._model, (), (1,)) and stored_array(entry).any():
                raise UsageError(
                    f"{self._model}: {entry.name} is {stored_array(entry).item()}; only 0, in rows, is read"
                )
        return ScaledLinear(name, (n, k), weight, scales, (1, k), _LEVEL, others)

    def _codebook(self, name: str, tensors: Mapping[str, TensorEntry]) -> CodebookLinear:
        entry = next(tensors[kind] for kind in _STATES if kind in tensors)
        expect(entry, ("U8",), self._model, (math.prod(entry.shape),))
        try:
            state = json.loads(stored_array(entry).tobytes())
            n, k = map(int, state["shape"])
            block, inner = int(state["blocksize"]), int(state.get("nested_blocksize", 1))
            offset = float(state.get("nested_offset", 0.0))
            blocks = -(-n * k // block)
            inner_blocks = -(-blocks // inner)
        except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
            raise UsageError(f"{self._model}: {entry.name} does not say how {name} is quantized") from None
        weight, nested = tensors["weight"], "weight.nested_absmax" in tensors
        codes = expect(weight, ("U8", "I8", "F16", "BF16", "F32"), self._model, weight.shape)
        if min(n, k, block, inner) < 1 or codes.nbytes != -(-n * k // 2) or not math.isfinite(offset):
            raise UsageError(f"{self._model}: {name} has {codes.nbytes} bytes, which are no [{n}, {k}] of 4 bits")

        def part(kind: str, of: str, size: int) -> TensorEntry:
            return expect(tensors[f"weight.{kind}"], (of,), self._model, (size,))

        codebook, scales = part("quant_map", "F32", 16), part("absmax", "U8" if nested else "F32", blocks)
        if not nested:
            return CodebookLinear(name, (n, k), codes, codebook, scales, block, others=(entry,))
        inner_codebook = part("nested_quant_map", "F32", 256)
        inner_scales = part("nested_absmax", "F32", inner_blocks)
        return CodebookLinear(
            name, (n, k), codes, codebook, scales, block, inner_codebook, inner_scales, inner, offset, (entry,)
        )
