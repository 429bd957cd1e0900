"""WeightSource: the tensors of a model, read some rows at a time, from files or made up.

Files are memory-mapped, so that no more than the rows asked for takes memory of the process's own.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llmpq.checkpoint.families import tensor_shapes
from llmpq.checkpoint.model_files import Checkpoint, read_config
from llmpq.checkpoint.tensor_index import Index, check_tensors
from llmpq.spec import ModelSpec, UsageError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DUMMY_BLOCK = 64  # rows that are made together


class WeightSource(Protocol):
    """Rows of tensors by their full name in transformers' form. Each reader opens its own."""

    spec: ModelSpec
    cacheable: bool  # whether quantizing what it gives is worth keeping

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start..stop of a tensor (elements of a vector) in a floating dtype of the file's choice, on the CPU."""


def open_weights(checkpoint: Checkpoint, spec: ModelSpec) -> WeightSource:
    """The weights of a checkpoint. Raises UsageError if its files do not hold what `spec` says."""
    if checkpoint.format == "dummy":
        return DummyWeights(spec)
    _, index = read_config(checkpoint)
    check_tensors(index, tensor_shapes(spec), spec)
    return FileWeights(spec, index)


class FileWeights:
    """Tensors of safetensors or GGUF files. Quantized GGUF types are dequantized to float32."""

    cacheable = True

    def __init__(self, spec: ModelSpec, index: Index) -> None:
        self.spec = spec
        self._index = index
        self._files: dict[Path, np.memmap] = {}

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        entry = self._index[name]
        if entry.path not in self._files:
            self._files[entry.path] = np.memmap(entry.path, np.uint8, "r")
        stop = entry.shape[0] if stop is None else stop
        whole = self._files[entry.path][entry.offset : entry.offset + entry.nbytes].reshape(entry.shape[0], -1)
        raw = whole[self._interleaved(start, stop)] if entry.interleaved else np.array(whole[start:stop])
        shape = (stop - start, *entry.shape[1:])
        if entry.type in _DTYPES:
            return torch.from_numpy(raw).view(_DTYPES[entry.type]).view(shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return torch.from_numpy(dequantize(raw, GGMLQuantizationType[entry.type])).view(shape)
        except NotImplementedError:
            raise UsageError(f"{entry.path}: the GGUF type {entry.type} of {name} cannot be dequantized") from None

    def _interleaved(self, start: int, stop: int) -> Any:
        """Where rows start..stop are in the file: int64 [stop - start].

        GGUF rotates neighbouring rows of a head as pairs, transformers row j of its first half with row j of its
        second: row (half, j) of a head here is row (j, half) there.
        """
        head, row = np.divmod(np.arange(start, stop), self.spec.head_dim)
        half, j = np.divmod(row, self.spec.head_dim // 2)
        return head * self.spec.head_dim + 2 * j + half


class DummyWeights:
    """Random weights of a trained model's magnitude; any slicing of a tensor gives the same values.

    Matrices keep the variance of their input, so that activations and logits stay of order 1. Norms are the identity,
    biases zero.
    """

    cacheable = False

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._shapes = tensor_shapes(spec)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        shape = self._shapes[name]
        stop = shape[0] if stop is None else stop
        if len(shape) == 1:
            return torch.full((stop - start,), 0.0 if name.endswith(".bias") else 1.0)
        first, end = start // _DUMMY_BLOCK, -(-stop // _DUMMY_BLOCK)
        blocks = [self._block(name, i, shape[1]) for i in range(first, end)]
        offset = first * _DUMMY_BLOCK
        return torch.cat(blocks)[start - offset : stop - offset]

    @staticmethod
    def _block(name: str, number: int, k: int) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        largest = math.sqrt(3 / k)  # of a uniform distribution with variance 1 / k
        return torch.empty(_DUMMY_BLOCK, k).uniform_(-largest, largest, generator=generator)
