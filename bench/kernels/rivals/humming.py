"""humming-kernels' linear, which it compiles for each shape when it is first called; tuning is its own choice."""

from __future__ import annotations

import copy

from humming.layer import HummingLayer

from bench.kernels.rivals import Contender, Problem, in_turn
from bench.kernels.rivals.gptq_format import bit_stream


def contender(problem: Problem, bits: int) -> Contender:
    """Without zero points a code means itself less 2**(bits - 1), as with us."""
    n, k = problem.shape
    codes, scales = problem.codes(bits)
    config = {"dtype": f"int{bits}", "group_size": problem.group_size}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=problem.dtype)
    layer = layer.to(problem.weight.device)
    layer.load_from_tensors({"weight": bit_stream(codes, bits), "weight_scale": scales.to(problem.dtype)})
    layer.transform()
    nbytes = sum(parameter.nbytes for parameter in layer.parameters())
    layers = [layer, *(copy.deepcopy(layer) for _ in range(problem.copies(nbytes) - 1))]
    return Contender(nbytes, len(layers), problem.quantized(bits).dequantize, in_turn(layers))
