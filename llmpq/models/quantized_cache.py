"""Quantized weights in the cache: three .npy files for each fused linear, written once and memory-mapped after.

Rows go to the files as they are quantized and come back as views, so neither way takes more anonymous memory than a
few MiB. A weight that was just quantized is read from the files, too: two processes that use the same weight then share
its pages.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmpq import quant
from llmpq.cache import find, keep
from llmpq.quant import CHUNK, QuantTensor
from llmpq.quant.packing import packed_words
from llmpq.spec import LinearShape, Precision

_KIND = "quantized"


@functools.cache
def quantizer_version() -> str:
    """12 hex digits that change with the files that decide what a weight is quantized to."""
    digest = hashlib.sha256()
    for path in sorted(Path(quant.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cached(
    key: str,
    shape: LinearShape,
    precision: Precision,
    scale_dtype: torch.dtype,
    quantized: Callable[[], Iterable[QuantTensor]],
) -> Iterator[QuantTensor]:
    """The rows of the weight that `key` names, in portions; `quantized` makes them if they are not in the cache.

    It is called a second time if the cache cannot be written.
    """

    def look() -> QuantTensor | None:
        return find(_KIND, entry, lambda folder: _load(folder, shape, precision, scale_dtype))

    entry = f"{key}-{precision}-{quantizer_version()}"
    whole = look()
    if whole is None:
        keep(_KIND, entry, lambda folder: _save(folder, quantized(), shape, precision))
        whole = look()
    if whole is None:
        yield from quantized()
        return
    step = max(1, CHUNK // shape.k)
    for start in range(0, shape.n, step):
        yield whole.rows(start, min(start + step, shape.n))


def _columns(k: int, precision: Precision) -> dict[str, tuple[np.dtype[Any], int]]:
    """The files of a quantized weight: name -> dtype, elements per row. Scales and offsets are stored by their bits."""
    groups = precision.num_groups(k)
    columns: dict[str, tuple[np.dtype[Any], int]] = {
        "qweight": (np.dtype(np.int32), packed_words(k, precision.bits)),
        "scales": (np.dtype(np.int16), groups),
    }
    if precision.zero != "sym":
        columns["zeros"] = (np.dtype(np.uint8 if precision.zero == "asym" else np.int16), groups)
    return columns


def _save(folder: Path, portions: Iterable[QuantTensor], shape: LinearShape, precision: Precision) -> None:
    """Write rows as they come. (Not memory-mapped: a full disk is then an error, not a dead process.)"""
    with ExitStack() as stack:
        files = {}
        for name, (dtype, columns) in _columns(shape.k, precision).items():
            files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
            header = {"descr": dtype.str, "fortran_order": False, "shape": (shape.n, columns)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for portion in portions:
            for name, file in files.items():
                tensor: torch.Tensor = getattr(portion, name)
                file.write((tensor.view(torch.int16) if tensor.is_floating_point() else tensor).numpy().data)


def _load(folder: Path, shape: LinearShape, precision: Precision, scale_dtype: torch.dtype) -> QuantTensor:
    """Raises OSError, or ValueError for another shape than the weight has."""
    columns = _columns(shape.k, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the arrays are read-only; nothing writes to them
        arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in columns}
    for name, array in arrays.items():
        if array.shape != (shape.n, columns[name][1]):
            raise ValueError(f"{name} has the shape {tuple(array.shape)}")
    scales, zeros = arrays["scales"].view(scale_dtype), arrays.get("zeros")
    if zeros is not None and precision.zero == "offset":
        zeros = zeros.view(scale_dtype)
    return QuantTensor(arrays["qweight"], scales, zeros, precision, (shape.n, shape.k))
