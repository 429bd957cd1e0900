"""Linears in AWQ's form "gemm", whatever quantized them: 4 bits, with 8 numbers to a word in an order of its own.

    qweight  int32 [k, n / 8]        codes, along n
    qzeros   int32 [groups, n / 8]   zero points, along n
    scales   [groups, n]             w = scale * (code - zero)

Source: WQLinear_GEMM of AutoAWQ 0.2.9. Field i of a word holds number 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmpq.checkpoint.bit_fields import Fields
from llmpq.checkpoint.linear_settings import LinearSettings
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.stored_linear import SCALES, IntegerLinear, expect
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of numbers 0, 1, ... among the fields of a word
_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}  # of AutoAWQ -> of all others


class AwqLinears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("qweight",)
    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, settings: LinearSettings) -> None:
        self._settings = settings

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> IntegerLinear:
        config = self._settings.of(module)
        config.choice("bits", (BITS,))
        group, symmetric = config.group_size(default=128), config.flag("sym", True)
        model, qweight = config.model, tensors["qweight"]
        if len(qweight.shape) != 2:
            raise UsageError(f"{model}: {qweight.name} {list(qweight.shape)} are no codes")
        k, n = qweight.shape[0], qweight.shape[1] * len(PLACES)
        count = 1 if group is None else -(-k // group)
        codes, zeros = (Fields(tensors[kind], BITS, 0, True, PLACES) for kind in ("qweight", "qzeros"))
        expect(qweight, ("I32",), model, codes.shape(n, k))
        expect(zeros.entry, ("I32",), model, zeros.shape(n, count))
        scales = expect(tensors["scales"], SCALES, model, (count, n))
        return IntegerLinear(f"{module}.weight", (n, k), codes, scales, zeros, group, symmetric)


def awq_linears(config: MethodConfig) -> AwqLinears:
    """Those of AWQ's own configuration, as AutoAWQ or transformers writes it. Raises UsageError."""
    values = {_NAMES.get(key, key): value for key, value in config.values.items()}
    config.choice("format" if config.values.get("version") is None else "version", ("gemm",), "gemm")
    config.choice("backend", ("auto", "autoawq"), "auto")
    values["sym"] = not config.flag("zero_point", not config.flag("sym", False))
    used = ("zero_point", "version", "format", "checkpoint_format")
    return AwqLinears(LinearSettings(MethodConfig(values, config.model), used))
