"""ggml's K-quants, from the shared libraries inside llama-cpp-python: one graph node for each copy of the weight."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_int, c_int64, c_size_t, c_uint8, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from bench.kernels.rivals import Contender, Problem


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    """ggml_cplan, with room behind for fields that a later version may add."""

    _fields_ = (("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("rest", c_uint8 * 64))


def _load() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'llama_cpp'")
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    signatures: tuple[tuple[Any, ...], ...] = (
        (base.ggml_init, c_void_p, _InitParams),
        (base.ggml_new_tensor_2d, c_void_p, c_void_p, c_int, c_int64, c_int64),
        (base.ggml_get_data, c_void_p, c_void_p),
        (base.ggml_row_size, c_size_t, c_int, c_int64),
        (base.ggml_quantize_chunk, c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        (base.ggml_mul_mat, c_void_p, c_void_p, c_void_p, c_void_p),
        (base.ggml_new_graph, c_void_p, c_void_p),
        (base.ggml_build_forward_expand, None, c_void_p, c_void_p),
        (cpu.ggml_cpu_init, None),
        (cpu.ggml_graph_plan, _Plan, c_void_p, c_int, c_void_p),
        (cpu.ggml_graph_compute, c_int, c_void_p, POINTER(_Plan)),
    )
    for function, result, *arguments in signatures:
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


_base, _cpu = _load()
_OVERHEAD = 2**22  # bytes for the descriptions of tensors and graph
_F32 = int(GGMLQuantizationType.F32)


def _array(tensor: int, rows: int, row_bytes: int) -> np.ndarray:
    """The tensor's bytes, writable."""
    address = _base.ggml_get_data(tensor)
    return np.ctypeslib.as_array((c_uint8 * (rows * row_bytes)).from_address(address)).reshape(rows, row_bytes)


def contender(problem: Problem, kind: str) -> Contender:
    n, k = problem.shape
    quantization = GGMLQuantizationType[kind]
    row_bytes = _base.ggml_row_size(quantization, k)
    rows = np.empty((n, row_bytes), np.uint8)
    source = problem.weight.contiguous()
    _base.ggml_quantize_chunk(quantization, source.data_ptr(), rows.ctypes.data, 0, n, k, None)
    copies = problem.copies(rows.nbytes)
    context = _base.ggml_init(_InitParams(copies * rows.nbytes + _OVERHEAD, None, False))
    weights = [_base.ggml_new_tensor_2d(context, quantization, k, n) for _ in range(copies)]
    for i, weight in enumerate(weights):
        _array(weight, n, row_bytes)[:] = np.roll(rows, i, 0)

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        m = len(x)
        outputs = _base.ggml_init(_InitParams(4 * m * (k + copies * n) + _OVERHEAD, None, False))
        x_input = _base.ggml_new_tensor_2d(outputs, _F32, k, m)
        _array(x_input, m, 4 * k)[:] = x.numpy().view(np.uint8)
        graph = _base.ggml_new_graph(outputs)
        products = [_base.ggml_mul_mat(outputs, weight, x_input) for weight in weights]
        for product in products:
            _base.ggml_build_forward_expand(graph, product)
        plan = _cpu.ggml_graph_plan(graph, problem.threads, None)
        work = np.empty(plan.work_size, np.uint8)
        plan.work_data = work.ctypes.data
        y = torch.from_numpy(_array(products[0], m, 4 * n).view(np.float32))

        def sweep(work: np.ndarray = work) -> torch.Tensor:
            if _cpu.ggml_graph_compute(graph, plan):
                raise RuntimeError("ggml_graph_compute failed")
            return y

        return sweep

    return Contender(rows.nbytes, copies, lambda: torch.from_numpy(dequantize(rows, quantization)), bind)
