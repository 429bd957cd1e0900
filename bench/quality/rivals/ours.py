"""Our own quantizers, on fused linears as they are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bench.quality.beds import Bed
from bench.quality.evaluation import Windows
from bench.quality.rivals import Quantized, Task
from llmpq.checkpoint.model_files import describe
from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.checkpoint.weights import open_weights
from llmpq.measure import calibrated_weights
from llmpq.spec import W16, Precision, UnitPrecision
from llmpq.spec.precision import ZeroKind


def quantize(task: Task, quantizer: str, zero: ZeroKind = "asym", own_text: bool = False) -> Quantized:
    """`own_text`: read as much of the calibration text as `llmpq quantize` does, not as much as all rivals do."""
    precision, model, token_ids = Precision(task.bits, task.group_size, zero, quantizer), task.bed.model, task.token_ids
    if own_text:
        size = calibrated_weights.SEQUENCES, calibrated_weights.SEQUENCE_LENGTH
        token_ids = Windows.spread("calibration", task.text, *size).token_ids
    layers = {unit: precision for unit in model.spec.units if unit.startswith("layer.")}
    return left_of(task.bed, token_ids.flatten().tolist(), layers, len(token_ids))


def left_of(
    bed: Bed,
    token_ids: Sequence[int],
    options: Mapping[str, UnitPrecision],
    sequences: int = calibrated_weights.SEQUENCES,
) -> Quantized:
    """What is left of a bed's linears with `options` for its layers, for quantizers that read so much of a text."""
    spec, source = bed.model.spec, open_weights(bed.model.checkpoint, bed.model.spec)
    tensors = decoder_tensors(spec, describe(bed.model.checkpoint).family)
    weights: dict[str, torch.Tensor] = {}
    stored_bits = 0
    options = dict.fromkeys(spec.units, W16) | dict(options)
    units = calibrated_weights.quantized_in_turn(spec, source, options, token_ids, sequences=sequences)
    for unit, linears in units:
        for part, quantized in linears.items():
            stored_bits += 8 * quantized.nbytes
            pieces = tensors[unit, f"{part}.weight"]
            rows = quantized.dequantize().split([piece.shape[0] for piece in pieces])
            weights |= {piece.name.removesuffix(".weight"): of for piece, of in zip(pieces, rows, strict=True)}
    return Quantized(weights, stored_bits)
