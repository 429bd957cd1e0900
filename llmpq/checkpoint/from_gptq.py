"""Linears in the GPTQ form, whatever quantized them: GPTQ, HQQ or AutoRound.

    qweight  int32 [k * bits / 32, n]        codes, along k
    qzeros   int32 [groups, n * bits / 32]   zero points, along n; less 1 in version 1, as they are in version 2
    scales   [groups, n]                     w = scale * (code - zero)
    g_idx    int32 [k]                       the group of each column; in no order if columns were quantized in theirs

Sources: the classes QuantLinear of AutoGPTQ 0.7.1 and gptqmodel 7.6. bit_fields.py says how bits lie. A zero point of 0
is -1 in version 1, which takes from its neighbour in some writers and is 2**bits in some readers: it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmpq.checkpoint.bit_fields import WORD, Fields
from llmpq.checkpoint.linear_settings import LinearSettings
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.stored_linear import SCALES, IntegerLinear, expect, unordered_groups
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError

BITS = (3, 4, 8)
VERSIONS = {"gptq": True, "gptq_v2": False}  # checkpoint_format -> whether zero points are stored less 1


class GptqLinears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("qweight",)
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: LinearSettings, less_one: bool) -> None:
        """`less_one`: whether zero points are stored less 1."""
        self._settings, self._less_one = settings, less_one

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> IntegerLinear:
        config = self._settings.of(module)
        bits, group = config.choice("bits", BITS), config.group_size(default=128)
        model, qweight = config.model, tensors["qweight"]
        if len(qweight.shape) != 2 or qweight.shape[0] * WORD % bits:
            raise UsageError(f"{model}: {qweight.name} {list(qweight.shape)} are no codes of {bits} bits")
        n, k = qweight.shape[1], qweight.shape[0] * WORD // bits
        count = 1 if group is None else -(-k // group)
        codes, zeros = Fields(qweight, bits, 1, True), Fields(tensors["qzeros"], bits, 0, True)
        expect(qweight, ("I32",), model, codes.shape(n, k))
        expect(zeros.entry, ("I32",), model, zeros.shape(n, count))
        scales = expect(tensors["scales"], SCALES, model, (count, n))
        groups = unordered_groups(tensors["g_idx"], k, group, model) if "g_idx" in tensors else None
        name, symmetric = f"{module}.weight", config.flag("sym", True)
        return IntegerLinear(name, (n, k), codes, scales, zeros, group, symmetric, self._less_one, groups)


def gptq_linears(config: MethodConfig) -> GptqLinears:
    """Those of GPTQ's own configuration. Raises UsageError."""
    version = "format" if config.values.get("checkpoint_format") is None else "checkpoint_format"
    less_one = VERSIONS[config.choice(version, VERSIONS, "gptq")]
    return GptqLinears(LinearSettings(config, ("checkpoint_format", "format")), less_one)
