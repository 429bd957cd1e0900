"""Our own quantizers, on fused linears as they are served."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.quality.rivals import Quantized, Task
from llmpq.checkpoint.families import decoder_tensors
from llmpq.checkpoint.model_files import describe
from llmpq.checkpoint.weights import WeightSource, floating, open_weights
from llmpq.measure.calibrated_weights import calibrated_layers
from llmpq.quant import QuantTensor
from llmpq.quant import quantize as round_to_nearest
from llmpq.spec import Precision
from llmpq.spec.precision import ZeroKind


def quantize(task: Task, quantizer: str, zero: ZeroKind = "asym") -> Quantized:
    model = task.bed.model
    precision = Precision(task.bits, task.group_size, zero)
    source = open_weights(model.checkpoint, model.spec)
    if quantizer == "rtn":
        layers = _rounded(task, source, precision)
    else:
        layers = calibrated_layers(model.spec, source, precision, task.token_ids.flatten().tolist())
    shapes = decoder_tensors(model.spec, describe(model.checkpoint).family)
    weights: dict[str, torch.Tensor] = {}
    stored_bits = 0
    for i, linears in enumerate(layers):
        for part, quantized in linears.items():
            stored_bits += 8 * quantized.nbytes
            tensors = shapes[f"layer.{i}", f"{part}.weight"]
            pieces = quantized.dequantize().split([n for n, _ in tensors.values()])
            weights |= {name.removesuffix(".weight"): piece for name, piece in zip(tensors, pieces, strict=True)}
    return Quantized(weights, stored_bits)


def _rounded(task: Task, source: WeightSource, precision: Precision) -> Iterator[dict[str, QuantTensor]]:
    spec = task.bed.model.spec
    for i in range(spec.num_layers):
        rows = {part: source.rows(f"layer.{i}", f"{part}.weight") for part in spec.layer_linears}
        whole = {part: torch.cat([floating(piece).float() for piece in pieces]) for part, pieces in rows.items()}
        yield {part: round_to_nearest(weight, precision) for part, weight in whole.items()}
