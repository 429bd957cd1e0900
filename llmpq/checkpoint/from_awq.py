"""Linears in AWQ's form "gemm", whatever quantized them: 4 bits, with 8 numbers to a word in an order of its own.

    qweight  int32 [k, n / 8]        codes, along n
    qzeros   int32 [groups, n / 8]   zero points, along n
    scales   [groups, n]             w = scale * (code - zero)

Source: WQLinear_GEMM of AutoAWQ 0.2.9. Field i of a word holds number 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.bit_fields import Fields
from llmpq.checkpoint.from_gptq import AUTO_ROUND_NEUTRAL, AUTO_ROUND_ONLY, NEUTRAL
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.stored_linear import SCALES, IntegerLinear, expect
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of numbers 0, 1, ... among the fields of a word
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "backend": ("auto", "autoawq"),
    "pack_dtype": ("int32",),
    "rotation": ("",),
    "activation": ({},),
    "data_type": ("int",),
    "act_bits": (16, 32),
    "adapter": ({},),
    "extra_config": ({},),
    "dynamic": ({},),
}


class AwqLinears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("qweight",)
    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, config: MethodConfig) -> None:
        used = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "sym", "version", "format")
        config.known((*used, "checkpoint_format"), {*NEUTRAL, *AUTO_ROUND_NEUTRAL} - _ONLY.keys(), _ONLY)
        older = "w_bit" in config.values
        config.choice("w_bit" if older else "bits", (BITS,))
        config.choice("format" if config.values.get("version") is None else "version", ("gemm",), "gemm")
        zero_point = config.flag("zero_point", not config.flag("sym", False))
        self._set(config, config.group_size("q_group_size" if older else "group_size", 128), not zero_point)

    def _set(self, config: MethodConfig, group_size: int | None, symmetric: bool) -> None:
        self._model, self._group_size, self._symmetric = config.model, group_size, symmetric

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> IntegerLinear:
        model, qweight = self._model, tensors["qweight"]
        if len(qweight.shape) != 2:
            raise UsageError(f"{model}: {qweight.name} {list(qweight.shape)} are no codes")
        k, n = qweight.shape[0], qweight.shape[1] * len(PLACES)
        count = 1 if self._group_size is None else -(-k // self._group_size)
        codes, zeros = (Fields(tensors[kind], BITS, 0, True, PLACES) for kind in ("qweight", "qzeros"))
        expect(qweight, ("I32",), model, codes.shape(n, k))
        expect(zeros.entry, ("I32",), model, zeros.shape(n, count))
        scales = expect(tensors["scales"], SCALES, model, (count, n))
        return IntegerLinear(f"{module}.weight", (n, k), codes, scales, zeros, self._group_size, self._symmetric)


class AutoRoundAwqLinears(AwqLinears):
    """AutoRound's own configuration of the same tensors."""

    def __init__(self, config: MethodConfig) -> None:
        only = {**AUTO_ROUND_ONLY, "extra_config": ({},)}
        config.known(("bits", "group_size", "sym", "packing_format"), AUTO_ROUND_NEUTRAL, only)
        config.choice("bits", (BITS,))
        self._set(config, config.group_size(default=128), config.flag("sym", True))
