"""OpenVINO's compressed linear, activations int8 per group, float32 or bfloat16: all copies of the weight in one model.

bfloat16 is what it takes by itself on a processor that multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino
import torch
from openvino import opset13 as ops

from bench.kernels.rivals import Contender, Problem


def contender(problem: Problem, bits: int, quantize_activations: bool = False, precision: str = "f32") -> Contender:
    n, k = problem.shape
    group_size = problem.group_size
    codes, scales = (tensor.numpy() for tensor in problem.codes(bits))
    signed = (codes ^ (1 << bits - 1)).reshape(n, k // group_size, group_size)  # two's complement in `bits` bits
    if bits == 8:
        fields, kind = signed, openvino.Type.i8
    else:
        fields, kind = signed[..., ::2] | signed[..., 1::2] << 4, openvino.Type.i4
    nbytes = fields.nbytes + scales.nbytes
    copies = problem.copies(nbytes)
    x_input = ops.parameter([-1, k], np.float32)
    products = []
    for i in range(copies):  # each with its rows moved, so that no two can be merged
        moved = np.ascontiguousarray(np.roll(fields, i, 0))
        tensor = openvino.Tensor(moved.view(np.int8) if bits == 8 else moved, openvino.Shape(signed.shape), kind)
        weight = ops.convert(ops.constant(tensor, shared_memory=False), np.float32)
        weight = ops.multiply(weight, ops.constant(np.roll(scales, i, 0)[..., None]))
        weight = ops.reshape(weight, ops.constant(np.array([n, k])), False)
        products.append(ops.matmul(x_input, weight, False, True))
    settings = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group_size if quantize_activations else 0,
    }
    compiled = openvino.Core().compile_model(openvino.Model(products, [x_input]), "CPU", settings)

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

        def sweep() -> torch.Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor(0).data)

        return sweep

    return Contender(nbytes, copies, lambda: problem.quantized(bits).dequantize(), bind)
