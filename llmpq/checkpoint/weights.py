"""WeightSource: the tensors of a model, some rows at a time, from files or made up.

Files are memory-mapped, so that only the rows in use take memory of the process's own.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from llmpq.checkpoint.bit_fields import Array
from llmpq.checkpoint.door import refusing
from llmpq.checkpoint.gguf_blocks import read_blocks
from llmpq.checkpoint.mapped_file import Bytes, fetch, map_file
from llmpq.checkpoint.model_files import Checkpoint, Stored, describe
from llmpq.checkpoint.mxfp4 import decoded
from llmpq.checkpoint.stored_linear import IntegerLinear, StoredLinear, as_array
from llmpq.checkpoint.tensor_index import STORED, PieceEntry, TensorEntry
from llmpq.checkpoint.tensor_names import Part, Piece, Places, decoder_tensors
from llmpq.quant import CHUNK, QuantTensor, pack
from llmpq.spec import ModelSpec, Precision, UsageError

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_WORDS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
_AHEAD = 2**20  # bytes of a tensor that are fetched while those before them are in use
_DUMMY_BLOCK = 64  # rows that are made together


Rows = torch.Tensor | QuantTensor
FiniteRows = TypeVar("FiniteRows", torch.Tensor, QuantTensor)


def floating(rows: Rows) -> torch.Tensor:
    """The numbers that rows stand for, in a floating dtype."""
    return rows.dequantize() if isinstance(rows, QuantTensor) else rows


def dense(source: WeightSource, unit: str, part: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows start..stop of a part in float32."""
    return torch.cat([floating(rows).float() for rows in source.rows(unit, part, start, stop)])


def dense_expert(source: WeightSource, unit: str, name: str, n: int, expert: int) -> torch.Tensor:
    """The weight [n, k] of one expert of a linear in float32; of a linear that is no mixture, expert 0 is all."""
    return dense(source, unit, f"{name}.weight", expert * n, (expert + 1) * n)


class WeightSource(Protocol):
    """The weights of a model by unit and part (llmpq/checkpoint/families.py). Each reader opens its own."""

    cacheable: bool  # whether it is worth keeping what its rows were quantized to

    def rows(self, unit: str, part: str, start: int = 0, stop: int | None = None) -> Iterator[Rows]:
        """Rows start..stop of a part (elements of a vector), in order, about CHUNK numbers at a time, on the CPU.

        Those of ModelSpec.stored are QuantTensors, others in a floating dtype of the file's choice. Parts of a fused
        linear may differ.
        """


class _Tensor(Protocol):
    """A tensor of a checkpoint, whose rows are read when they are needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> Rows:
        """Rows start..stop."""


def open_weights(checkpoint: Checkpoint, spec: ModelSpec) -> WeightSource:
    """The weights of a checkpoint. Raises UsageError if its files do not hold what `spec` says."""
    described = describe(checkpoint)
    if checkpoint.format == "dummy":
        tensors = decoder_tensors(spec, described.family)
        return Weights(
            {
                (unit, part): [DummyTensor(piece.label, piece.shape, part.endswith(".bias")) for piece in of]
                for (unit, part), of in tensors.items()
            },
            cacheable=False,
        )
    located = described.locate(spec)

    @functools.cache
    def mapped(path: Path) -> Bytes:
        with refusing(f"{checkpoint.path} cannot be read as a model"):
            return map_file(path)

    def file_tensor(entry: TensorEntry) -> FileTensor:
        scales = None if entry.scales is None else file_tensor(entry.scales)
        return FileTensor(entry, mapped(entry.path), scales)

    def tensor(entry: Stored) -> _Tensor:
        if isinstance(entry, PieceEntry):
            if isinstance(entry.tensor, TensorEntry):
                return FilePiece(entry.piece, file_tensor(entry.tensor))
            linear = entry.tensor
            assert isinstance(linear, StoredLinear)
            return LinearTensor(entry.piece, linear, {one.path: mapped(one.path) for one in linear.tensors})
        if isinstance(entry, TensorEntry):
            return FileTensor(entry, mapped(entry.path))
        zeros = None if entry.zeros is None else FileTensor(entry.zeros, mapped(entry.zeros.path))
        qweight, scales = (FileTensor(part, mapped(part.path)) for part in (entry.qweight, entry.scales))
        return PackedTensor(entry.precision, entry.shape, qweight, scales, zeros)

    return Weights({part: [*map(tensor, entries)] for part, entries in located.items()}, cacheable=True)


class Weights:
    """A WeightSource of tensors whose rows follow each other within each part."""

    def __init__(self, tensors: Mapping[Part, Sequence[_Tensor]], *, cacheable: bool) -> None:
        self._tensors = tensors
        self.cacheable = cacheable

    def rows(self, unit: str, part: str, start: int = 0, stop: int | None = None) -> Iterator[Rows]:
        first = 0  # row of the part at which the tensor begins
        for tensor in self._tensors[unit, part]:
            n, step = tensor.shape[0], max(1, CHUNK // math.prod(tensor.shape[1:]))
            end = n if stop is None else min(n, stop - first)
            for at in range(max(0, start - first), end, step):
                yield _read(tensor, at, min(at + step, end))  # held by nobody here while the next is read
            first += n


def _read(tensor: _Tensor, start: int, stop: int) -> Rows:
    """Rows of a tensor, read by one thread.

    A portion takes a millisecond at most. Where other processes keep the cores busy, several threads would wait for
    each other for ten in each operation.
    """
    with _one_thread():
        return tensor.read(start, stop)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch shares nothing out to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors or GGUF file. GGUF types that are not in STORED are dequantized to float32.

    UsageError, by name, if it holds what is no finite number.
    """

    entry: TensorEntry
    file: Bytes  # mapped
    scales: FileTensor | None = None  # of a tensor in MXFP4

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def flat(self) -> FileTensor:
        """All its numbers after each other, as a vector."""
        return replace(self, entry=replace(self.entry, shape=(math.prod(self.shape),)))

    def _raw(self, places: Places) -> Bytes:
        entry = self.entry
        rows = self.file[entry.offset : entry.offset + entry.nbytes].reshape(
            math.prod(entry.shape[:-1] or entry.shape), -1
        )
        places = entry.places(places)
        first, last = (places.start, places.stop) if isinstance(places, slice) else (places.min(), places.max())
        fetch(rows[first : last + 1 + _AHEAD // rows.shape[1]])
        return np.array(rows[places])

    def numbers(self, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor of a type that torch has."""
        shape = (stop - start, *self.entry.shape[1:])
        return torch.from_numpy(self._raw(slice(start, stop))).view(_DTYPES[self.entry.type]).view(shape)

    def columns(self, places: Places, matrix: int = 0) -> torch.Tensor:
        """Columns of one of the matrices [..., k, n] of a floating type, as rows."""
        entry = self.entry
        words = self.file[entry.offset : entry.offset + entry.nbytes].view(_WORDS[entry.type])
        words = words.reshape(-1, *entry.shape[-2:])[matrix]
        rows = torch.from_numpy(np.ascontiguousarray(words[:, places].T)).view(_DTYPES[entry.type])
        return self._checked(rows)

    def read(self, start: int, stop: int) -> Rows:
        return self.rows(slice(start, stop))

    def rows(self, places: Places) -> Rows:
        """Rows of a tensor, all of whose axes but the last number its rows."""
        entry, raw = self.entry, self._raw(places)
        if self.scales is not None:
            return self._checked(decoded(torch.from_numpy(raw), torch.from_numpy(self.scales._raw(places))))
        shape = (len(raw), *entry.shape[1:][-1:])
        if entry.type in _DTYPES:
            return self._checked(torch.from_numpy(raw).view(_DTYPES[entry.type]).view(shape))
        if entry.type in STORED:
            return self._checked(read_blocks(torch.from_numpy(raw), entry.type))
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return self._checked(torch.from_numpy(dequantize(raw, GGMLQuantizationType[entry.type])).view(shape))

    def _checked(self, numbers: FiniteRows) -> FiniteRows:
        entry = self.entry
        if not is_finite(numbers):
            held = f" in {STORED[entry.type].scales}" if entry.type in STORED else ""
            raise UsageError(f"{entry.path}: the tensor {entry.name} holds values that are not finite numbers{held}")
        return numbers


@dataclass(frozen=True)
class FilePiece:
    """A piece of a part of the decoder."""

    piece: Piece
    tensor: FileTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape

    def read(self, start: int, stop: int) -> Rows:
        places, piece, tensor = self.piece.places(start, stop), self.piece, self.tensor
        if len(piece.shape) == 1:
            tensor = tensor.flat
        rows = tensor.columns(places, piece.matrix) if piece.transposed else tensor.rows(places)
        return rows if not piece.plus or isinstance(rows, QuantTensor) else rows.float() + piece.plus


@dataclass(frozen=True)
class PackedTensor:
    """A quantized linear of a folder that llmpq has written. UsageError if its numbers are none of a QuantTensor."""

    precision: Precision
    shape: tuple[int, int]
    qweight: FileTensor
    scales: FileTensor
    zeros: FileTensor | None

    def read(self, start: int, stop: int) -> QuantTensor:
        qweight, scales = self.qweight.numbers(start, stop), self.scales.numbers(start, stop)
        zeros = None if self.zeros is None else self.zeros.numbers(start, stop)
        if zeros is not None and self.precision.zero == "asym" and int(zeros.max()) >= 2**self.precision.bits:
            raise UsageError(f"{self.qweight.entry.path}: a zero point of {self.qweight.entry.name} is no code")
        rows = QuantTensor(qweight, scales, zeros, self.precision, (stop - start, self.shape[1]))
        if not is_finite(rows):
            raise UsageError(f"{self.scales.entry.path}: {self.scales.entry.name} holds what is no finite number")
        return rows


@dataclass(frozen=True)
class LinearTensor:
    """A piece of a linear that others have quantized. UsageError for numbers that are not as its form says, or finite.

    Where it has rows of each head in turn, those between them are decoded, too: words of some forms hold several rows.
    """

    piece: Piece
    linear: StoredLinear
    files: Mapping[Path, Bytes]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape

    def _tensor(self, entry: TensorEntry) -> Array:
        return as_array(entry, self.files[entry.path][entry.offset : entry.offset + entry.nbytes])

    def read(self, start: int, stop: int) -> Rows:
        linear, precision, n = self.linear, self.linear.precision, stop - start
        places = chosen = self.piece.places(start, stop)
        if isinstance(places, slice):
            start, stop, chosen = places.start, places.stop, slice(None)
        else:
            start, stop = int(places[0]), int(places[-1]) + 1
            chosen = places - start
        if precision is None or not isinstance(linear, IntegerLinear):
            rows: Rows = torch.from_numpy(linear.floating(self._tensor, start, stop)[chosen])
        else:
            codes, scales, zeros = (
                torch.from_numpy(np.array(part[chosen], order="C"))
                for part in (
                    linear.code_rows(self._tensor, start, stop),
                    linear.held_per_group(linear.scale_rows(self._tensor, start, stop)),
                    linear.held_per_group(linear.zero_rows(self._tensor, start, stop)),
                )
            )
            rows = QuantTensor(
                pack(codes, precision.bits),
                scales.view(_DTYPES[linear.scales.type]),
                zeros if precision.zero == "asym" else None,
                precision,
                (n, self.shape[1]),
            )
        if not is_finite(rows):
            raise UsageError(f"{linear.scales.path}: {linear.name} has scales that are not finite numbers")
        return rows


def is_finite(rows: Rows) -> bool:
    """Whether no number is infinite or NaN."""
    if isinstance(rows, QuantTensor):
        floats = [part for part in (rows.scales, rows.zeros) if part is not None and part.is_floating_point()]
        return all(map(is_finite, floats))
    low, high = torch.aminmax(rows)  # NaN if any number is; several times as fast as isfinite
    return math.isfinite(low) and math.isfinite(high)


@dataclass(frozen=True)
class DummyTensor:
    """Random numbers of a trained model's magnitude; the same ones in any slices.

    Matrices keep the variance of their input, so that activations and logits stay of order 1. Norms are the identity,
    biases zero.
    """

    name: str
    shape: tuple[int, ...]
    is_bias: bool = False

    def read(self, start: int, stop: int) -> torch.Tensor:
        if len(self.shape) == 1:
            return torch.full((stop - start,), 0.0 if self.is_bias else 1.0)
        first, end = start // _DUMMY_BLOCK, -(-stop // _DUMMY_BLOCK)
        offset = first * _DUMMY_BLOCK
        return torch.cat([self._block(i) for i in range(first, end)])[start - offset : stop - offset]

    def _block(self, number: int) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.name} {number}".encode()).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        largest = math.sqrt(3 / self.shape[1])  # of a uniform distribution with variance 1 / k
        return torch.empty(_DUMMY_BLOCK, self.shape[1]).uniform_(-largest, largest, generator=generator)
