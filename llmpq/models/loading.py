"""From a checkpoint's tensors to prepared weights: some rows at a time, quantized on the way.

Nothing is ever held whole but the result: rows are read, quantized and handed to the backend in portions of about a
MiB. What was quantized is kept in the cache as three .npy files for each fused linear, and memory-mapped when needed
again, so that neither way takes anonymous memory beyond the weights themselves and a few MiB.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmpq import kernels, quant
from llmpq.cache import cache_path, writing_folder
from llmpq.checkpoint.families import FAMILIES, part_rows
from llmpq.checkpoint.weights import WeightSource
from llmpq.models.arena import return_free_memory
from llmpq.models.linear import QuantLinear
from llmpq.quant import QuantTensor, quantize
from llmpq.quant.packing import packed_words
from llmpq.spec import W16, ModelSpec, Precision, UsageError

_CHUNK = 2**17  # weights read at once
_CHUNK_PACKED = 2**20  # weights taken from the cache at once

Part = tuple[str, int]  # tensor name, rows


@functools.cache
def quantizer_version() -> str:
    """12 hex digits that change with the files that decide what a weight is quantized to."""
    digest = hashlib.sha256()
    for path in sorted(Path(quant.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Loader:
    """Makes the weights of one stage from a source, on a device and for a backend (None: the best)."""

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        device: torch.device,
        backend: str | None,
        weight_dtype: torch.dtype | None,
    ) -> None:
        self._spec = spec
        self._family = FAMILIES[spec.family]
        self._source = source
        self._device = device
        self._backend = backend
        self._model_dtype: torch.dtype = getattr(torch, spec.dtype)
        self._weight_dtype = weight_dtype or self._model_dtype

    def linear(self, layer: int, name: str, precision: Precision) -> QuantLinear:
        """A fused linear of a decoder layer, with its bias."""
        shape = next(shape for shape in self._spec.layer_linears if shape.name == name)
        prefix = self._family.layer.format(layer)
        names, rows = self._family.linears[name], part_rows(self._spec, name)
        parts = [(f"{prefix}{part}.weight", n) for part, n in zip(names, rows, strict=True)]
        weight = self._weight(f"layer.{layer}.{name}", parts, shape.k, precision)
        bias = torch.cat([self.vector(f"{prefix}{part}.bias") for part in names]) if shape.bias else None
        return QuantLinear(weight, bias)

    def table(self, unit: str, precision: Precision) -> kernels.PreparedWeight:
        """The embedding table or the head's, [vocab_size, embedding_dim]. Tied ones are the same tensor."""
        tied = self._spec.tied_embeddings or unit == "embedding"
        key, name = ("embedding", self._family.table) if tied else ("head", self._family.head)
        return self._weight(key, [(f"{name}.weight", self._spec.vocab_size)], self._spec.embedding_dim, precision)

    def projection(self, name: str, n: int, k: int) -> QuantLinear:
        """A linear [n, k] that is never quantized: OPT-350m's between embedding and hidden size."""
        return QuantLinear(self._weight(name, [(f"{name}.weight", n)], k, W16))

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight or a bias, float32."""
        return self._source.rows(name).to(self._device, torch.float32)

    def positions(self, dtype: torch.dtype, count: int) -> torch.Tensor | None:
        """Learned embeddings of the first `count` positions [count, hidden_size], if the family has them."""
        if not self._family.positions:
            return None
        first = self._family.position_offset
        return self._source.rows(f"{self._family.positions}.weight", first, first + count).to(self._device, dtype)

    def _weight(self, key: str, parts: Sequence[Part], k: int, precision: Precision) -> kernels.PreparedWeight:
        n = sum(rows for _, rows in parts)
        dtype = self._model_dtype if precision.quantized else self._weight_dtype
        builder = kernels.WeightBuilder(n, k, precision, dtype, self._device, self._backend)
        if precision.quantized:
            for quantized in self._quantized(key, parts, n, k, precision.stored):
                builder.add(quantized)
        else:
            for rows in self._rows(parts, k):
                builder.add(rows.to(dtype))
        weight = builder.finish()
        return_free_memory()  # before the next one takes some for good in the middle of it
        return weight

    def _rows(self, parts: Sequence[Part], k: int) -> Iterator[torch.Tensor]:
        """The rows of all parts in order, a portion at a time."""
        step = max(1, _CHUNK // k)
        for name, rows in parts:
            for start in range(0, rows, step):
                yield self._source.rows(name, start, min(start + step, rows))

    def _quantized(
        self, key: str, parts: Sequence[Part], n: int, k: int, precision: Precision
    ) -> Iterator[QuantTensor]:
        """The rows of all parts in order, quantized, a portion at a time; by way of the cache for a real model."""
        if not self._source.cacheable:
            yield from self._quantize(parts, k, precision)
            return
        name = f"{self._spec.content_hash}-{key}-{precision}-{quantizer_version()}"
        try:
            folder = cache_path("quantized", name)
            if not folder.is_dir():
                with writing_folder(folder) as unfinished:
                    _save(unfinished, self._quantize(parts, k, precision), n, k, precision)
        except OSError as error:
            raise UsageError(f"cannot write the cache: {error}; set LLMPQ_CACHE to a folder with free space") from None
        yield from _load(folder, n, k, precision, self._model_dtype)

    def _quantize(self, parts: Sequence[Part], k: int, precision: Precision) -> Iterator[QuantTensor]:
        for rows in self._rows(parts, k):
            if not bool(rows.isfinite().all()):
                raise UsageError(f"{self._spec.name}: {parts[0][0]} holds values that are not finite numbers")
            yield quantize(rows, precision, scale_dtype=self._model_dtype)


def _columns(k: int, precision: Precision) -> dict[str, tuple[Any, int]]:
    """The files of a quantized weight: name -> dtype, elements per row. Scales are stored by their bits."""
    groups = precision.num_groups(k)
    columns = {
        "qweight": (np.dtype(np.int32), packed_words(k, precision.bits)),
        "scales": (np.dtype(np.int16), groups),
        "zeros": (np.dtype(np.uint8), groups),
    }
    if precision.symmetric:
        del columns["zeros"]
    return columns


def _save(folder: Path, portions: Iterator[QuantTensor], n: int, k: int, precision: Precision) -> None:
    """Write rows as they come. (Not memory-mapped: a full disk is then an error, not a dead process.)"""
    with ExitStack() as stack:
        files = {}
        for name, (dtype, columns) in _columns(k, precision).items():
            files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
            header = {"descr": dtype.str, "fortran_order": False, "shape": (n, columns)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for portion in portions:
            for name, file in files.items():
                tensor: torch.Tensor = getattr(portion, name)
                file.write((tensor.view(torch.int16) if name == "scales" else tensor).numpy().data)


def _load(folder: Path, n: int, k: int, precision: Precision, dtype: torch.dtype) -> Iterator[QuantTensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the arrays are read-only; nothing writes to them
        arrays = {
            name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _columns(k, precision)
        }
    scales = arrays["scales"].view(dtype)
    whole = QuantTensor(arrays["qweight"], scales, arrays.get("zeros"), precision, (n, k))
    step = max(1, _CHUNK_PACKED // k)
    for start in range(0, n, step):
        yield whole.rows(start, min(start + step, n))
