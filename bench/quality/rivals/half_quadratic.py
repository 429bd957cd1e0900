"""HQQ with its own settings: needs no calibration. Scales and zeros are rounded to float16, as they are stored."""

from __future__ import annotations

from hqq.core.quantize import Quantizer

from bench.quality.beds import network
from bench.quality.rivals import Quantized, Task


def quantize(task: Task) -> Quantized:
    model, weights, stored_bits = network(task.bed.folder), {}, 0.0
    for name in task.bed.linears:
        weight = model.get_submodule(name).weight.data
        options = {"nbits": task.bits, "group_size": task.group_size, "axis": 1, "bitpack": False, "device": "cpu"}
        codes, meta = Quantizer.quantize(weight, **options)
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        weights[name] = ((codes.float() - zero) * scale).view(weight.shape)
        stored_bits += weight.numel() * task.bits + 16 * (scale.numel() + zero.numel())
    return Quantized(weights, stored_bits)
