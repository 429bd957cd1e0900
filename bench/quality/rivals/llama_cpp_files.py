"""llama.cpp's file types with an importance matrix: mean x^2 of each linear's inputs over the calibration text.

That matrix is made once for all types, so only the seconds of the first have it in them. Both tables stay 16 bit, as
everyone's do. Where k is no multiple of 256, llama.cpp takes a wider type than it is asked for; bits are counted as
they are stored.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from bench.quality.beds import Bed, network
from bench.quality.gguf_bed import by_halves, form_of, gguf_name, is_interleaved, write_gguf
from bench.quality.rivals import Quantized, Task


def quantize(task: Task, kind: str) -> Quantized:
    """Raises ValueError for a model that gguf_bed.py does not write."""
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain.gguf", Path(folder) / "small.gguf"
        write_gguf(task.bed, plain)
        importance = _importance(task.bed, tuple(map(tuple, task.token_ids.tolist())))
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread = torch.get_num_threads()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.output_tensor_type = parameters.token_embedding_type = int(GGMLQuantizationType.F16)
        parameters.imatrix = _entries(task.bed, importance)
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(small).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama_model_quantize cannot make {kind}")
        return _read(task.bed, small)


@functools.cache
@torch.inference_mode()
def _importance(bed: Bed, windows: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
    """Mean x^2, float32 [k], of what goes into each linear."""
    model = network(bed.folder)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + x.flatten(0, -2).double().square().sum(0)

    for name in bed.linears:
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: watch(name, x[0]))
    for window in windows:
        model.model(torch.tensor([window]))
    return {name: (total / sum(map(len, windows))).float() for name, total in sums.items()}


def _entries(bed: Bed, importance: Mapping[str, torch.Tensor]) -> Any:
    """For llama.cpp; what they point to must live as long as `importance`. The last is empty, and ends the list."""
    form = form_of(bed)
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items()):
        entry.name = f"{gguf_name(form, name)}.weight".encode()
        entry.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
        entry.size = values.numel()
    return entries


def _read(bed: Bed, path: Path) -> Quantized:
    form, tensors = form_of(bed), {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    weights, stored_bits = {}, 0.0
    for name in bed.linears:
        tensor = tensors[f"{gguf_name(form, name)}.weight"]
        rows = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        weights[name] = by_halves(rows, bed.model.spec.head_dim) if is_interleaved(form, name) else rows
        stored_bits += 8 * float(tensor.n_bytes)
    return Quantized(weights, stored_bits)
