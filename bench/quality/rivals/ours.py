"""Our own quantizers, on fused linears as they are served."""

from __future__ import annotations

import torch

from bench.quality.rivals import Quantized, Task
from llmpq.checkpoint.families import decoder_tensors
from llmpq.checkpoint.model_files import describe
from llmpq.checkpoint.weights import open_weights
from llmpq.measure import calibrated_weights
from llmpq.spec import W16, Precision
from llmpq.spec.precision import ZeroKind


def quantize(task: Task, quantizer: str, zero: ZeroKind = "asym") -> Quantized:
    spec, source = task.bed.model.spec, open_weights(task.bed.model.checkpoint, task.bed.model.spec)
    precision = Precision(task.bits, task.group_size, zero, quantizer)
    options = {unit: precision if unit.startswith("layer.") else W16 for unit in spec.units}
    sequences = len(task.token_ids)  # all of the text that rivals get
    shapes = decoder_tensors(spec, describe(task.bed.model.checkpoint).family)
    weights: dict[str, torch.Tensor] = {}
    stored_bits = 0
    token_ids = task.token_ids.flatten().tolist()
    units = calibrated_weights.quantized_in_turn(spec, source, options, token_ids, sequences=sequences)
    for unit, linears in units:
        for part, quantized in linears.items():
            stored_bits += 8 * quantized.nbytes
            tensors = shapes[unit, f"{part}.weight"]
            pieces = quantized.dequantize().split([shape[0] for shape in tensors.values()])
            weights |= {name.removesuffix(".weight"): piece for name, piece in zip(tensors, pieces, strict=True)}
    return Quantized(weights, stored_bits)
