"""onnxruntime's MatMulNBits, int8 inside (accuracy level 4): one node for each copy of the weight in one graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from bench.kernels.rivals import Contender, Problem


def contender(problem: Problem, bits: int) -> Contender:
    n, k = problem.shape
    group_size = problem.group_size
    codes, scales = (tensor.numpy() for tensor in problem.codes(bits))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    blocks = codes.reshape(n, k // group_size, group_size * bits // 8)
    nbytes = blocks.nbytes + scales.nbytes
    copies = problem.copies(nbytes)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": group_size, "accuracy_level": 4}
    nodes, weights, outputs = [], [], []
    for i in range(copies):  # each with its rows moved, so that no two can be merged
        weights.append(numpy_helper.from_array(np.roll(blocks, i, 0), f"w{i}"))
        weights.append(numpy_helper.from_array(np.roll(scales, i, 0).ravel(), f"s{i}"))
        inputs = ["x", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", n]))
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    graph = helper.make_graph(nodes, "linears", [x_info], outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        binding = session.io_binding()
        binding.bind_cpu_input("x", x.numpy())
        ys = [torch.empty(len(x), n), *[torch.empty(len(x), n)] * (copies - 1)]  # the first is kept
        for i, y in enumerate(ys):
            binding.bind_output(f"y{i}", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())

        def sweep() -> torch.Tensor:
            session.run_with_iobinding(binding)
            return ys[0]

        return sweep

    return Contender(nbytes, copies, lambda: problem.quantized(bits).dequantize(), bind)
