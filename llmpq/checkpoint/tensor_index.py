"""Where each tensor of a checkpoint lies, and which of them a model is made of.

gguf_header.py and safetensors_header.py beside it read the entries. Every error is a UsageError that names file or
model.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llmpq.checkpoint.family import Family
from llmpq.checkpoint.gguf_forms import GgufForm
from llmpq.checkpoint.mapped_file import fetch
from llmpq.checkpoint.tensor_names import Part, Piece, Places
from llmpq.spec import Precision, UsageError, ZeroKind


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file: `nbytes` at `offset`, row after row."""

    path: Path
    name: str  # in the file
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    type: str  # F32, F16, BF16, or a quantized type of GGUF such as Q4_1
    scales: TensorEntry | None = None  # of a tensor in MXFP4 (mxfp4.py)
    interleaved: int = 0  # rows of a head whose halves are interleaved in the file; 0: rows are in order

    def places(self, rows: Places) -> Places:
        """Where these rows are in the file.

        GGUF rotates neighbouring rows of a head as pairs, transformers row j of its first half with row j of its
        second: row (half, j) of a head here is row (j, half) there.
        """
        size = self.interleaved
        if not size:
            return rows
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return rows - rows % size + rows % size % (size // 2) * 2 + rows % size // (size // 2)


class Located(Protocol):
    """What locate() asks of an entry."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class PieceEntry:
    """A piece of a part of the decoder, and the tensor that it is in, or the linear that others have quantized."""

    piece: Piece
    tensor: Located


Index = dict[str, TensorEntry]


class StoredAs(NamedTuple):
    """How a tensor is quantized: what parts of a fused linear must have in common to be one weight as they are."""

    precision: Precision
    scales: str = "F16"  # their type


def _stored(bits: int, group_size: int, zero: ZeroKind, scales: str = "F16") -> StoredAs:
    return StoredAs(Precision(bits, group_size, zero, "gguf"), scales)


# GGUF types whose rows are QuantTensors, exactly or but for the rounding of scales (gguf_blocks.py).
STORED = {
    "Q4_0": _stored(4, 32, "sym"),
    "Q4_1": _stored(4, 32, "offset"),
    "Q5_0": _stored(8, 32, "sym"),
    "Q5_1": _stored(8, 32, "offset"),
    "Q8_0": _stored(8, 32, "sym"),
    "IQ4_NL": _stored(8, 32, "sym"),
    "IQ4_XS": _stored(8, 32, "sym"),
    "MXFP4": _stored(8, 32, "sym", "BF16"),
    "Q3_K": _stored(8, 256, "sym"),
    "Q4_K": _stored(4, 32, "offset"),
    "Q5_K": _stored(8, 32, "offset"),
    "TQ1_0": _stored(3, 256, "sym"),
    "TQ2_0": _stored(3, 256, "sym"),
}
FLOATING = ("F32", "F16", "BF16")
_SAMPLE = 4096
_COMPARED = 2**20  # bytes at once


def indexed(path: Path, size: int, entries: Iterable[TensorEntry]) -> Index:
    """The tensors of a file of `size` bytes by name. UsageError unless each has its own name and bytes in the file."""
    index: Index = {}
    last: TensorEntry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        end = entry.offset + entry.nbytes
        if end > size:
            raise UsageError(f"{path} is truncated: {size} bytes, but {entry.name} ends at {end}")
        if last is not None and entry.offset < last.offset + last.nbytes:
            raise UsageError(f"{path} is broken: the tensors {last.name} and {entry.name} overlap")
        if entry.name in index:
            raise UsageError(f"{path} is broken: it has the tensor {entry.name} twice")
        index[entry.name] = last = entry
    return index


def translated(index: Index, family: Family, form: GgufForm, head_dim: int) -> Index:
    """The tensors of a GGUF file under transformers' names; those that are not known keep theirs."""
    names, layer_names = form.names(family), form.layer_names(family)
    renamed: Index = {}
    for name, entry in index.items():
        stem, _, kind = name.rpartition(".")
        known, interleaved = names.get(stem), 0
        if stem.startswith("blk."):
            number, _, inner = stem.removeprefix("blk.").partition(".")
            if part := layer_names.get(inner):
                known = f"{family.layer.format(number)}{part}"
                interleaved = head_dim if form.is_interleaved(part) else 0
        # Some files have a matrix of one row, the gate of a shared expert, as a vector.
        shape = (1, *entry.shape) if stem.endswith("ffn_gate_inp_shexp") and len(entry.shape) == 1 else entry.shape
        renamed[f"{known}.{kind}" if known else name] = replace(entry, shape=shape, interleaved=interleaved)
    return renamed


def locate(
    index: Mapping[str, Located], tensors: Mapping[Part, Sequence[Piece]], harmless: Sequence[str], model: str
) -> dict[Part, list[PieceEntry]]:
    """Where the pieces of each part are: in TensorEntries, or in what is made of several (stored_linear.py).

    UsageError unless all are there, in their shape and a type that is read, and no other: a tensor that were left out
    might be one that changes the results. `harmless` are patterns of names that may be.
    """
    used: set[str] = set()
    for piece in (piece for pieces in tensors.values() for piece in pieces):
        name = piece.name
        if name not in index:
            raise UsageError(f"{model}: the tensor {name} is missing from the checkpoint")
        entry = index[name]
        shape = piece.tensor_shape if isinstance(entry, TensorEntry) else piece.linear_shape
        if entry.shape != shape:
            raise UsageError(f"{model}: {name} has the shape {list(entry.shape)}, its configuration says {list(shape)}")
        if isinstance(entry, TensorEntry) and not is_readable(entry, len(piece.shape)):
            raise UsageError(
                f"{model}: {name} is stored as {entry.type}, which is not read; F32, F16 and BF16 always are"
            )
        used.add(name)
    unused = [entry.name for name, entry in index.items() if name not in used and not _is_harmless(entry, harmless)]
    if unused:
        others = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise UsageError(
            f"{model}: the checkpoint has the tensor {unused[0]}{others}, which its configuration has no use for; "
            "without it the results would be others"
        )
    return {part: [PieceEntry(piece, index[piece.name]) for piece in pieces] for part, pieces in tensors.items()}


def _is_harmless(entry: Located, patterns: Sequence[str]) -> bool:
    """Whether the results are the same without a tensor: it is computed instead, or a bias of zeros."""
    if any(re.fullmatch(pattern, entry.name) for pattern in patterns):
        return True
    return entry.name.endswith(".bias") and isinstance(entry, TensorEntry) and not stored_bytes(entry).any()


def passed_over(index: Mapping[str, Located], used: Collection[str], model: str) -> tuple[str, ...]:
    """What to say of the tensors that locate() had no use for, given those that are used."""
    unused = [entry.name for entry in index.values() if entry.name not in used]
    if not unused:
        return ()
    others = f" and {len(unused) - 1} more tensors" if len(unused) > 1 else ""
    return (f"{model}: {min(unused)}{others} of its files are not used, as the results are the same without",)


def is_readable(entry: TensorEntry, axes: int) -> bool:
    """Whether the type of a tensor is one that weights.py reads for a part of so many axes."""
    if axes == 1 or entry.type in FLOATING or entry.path.suffix == ".safetensors":
        return entry.type in FLOATING or (axes > 1 and entry.scales is not None)
    return entry.type in STORED or _dequantizes(entry.type)


@functools.cache
def _dequantizes(kind: str) -> bool:
    """Whether the gguf library has a decoder for a type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    number = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def stored_bytes(entry: TensorEntry) -> np.memmap[Any, np.dtype[np.uint8]]:
    """uint8 [nbytes]: what the file has for a tensor, mapped."""
    mapped = np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.nbytes,))
    fetch(mapped)
    return mapped


def stored_numbers(entry: TensorEntry, name: str) -> list[float]:
    """The numbers of a vector in float32. UsageError, naming the model, if it is none."""
    if entry.type != "F32" or len(entry.shape) != 1:
        raise UsageError(f"{name}: {entry.name} is {entry.type} {list(entry.shape)}, expected a vector in F32")
    return [float(number) for number in stored_bytes(entry).view(np.float32)]


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors are the same. Reads them up to the first difference."""
    if (one.type, one.shape, one.nbytes) != (other.type, other.shape, other.nbytes):
        return False
    steps = range(0, one.nbytes, _COMPARED)
    here, there = stored_bytes(one), stored_bytes(other)
    return all(np.array_equal(here[at : at + _COMPARED], there[at : at + _COMPARED]) for at in steps)


def content_hash(index: Index, configuration: str) -> str:
    """16 hex digits over the configuration, and name, type, shape, place and both ends of every tensor.

    Each tensor counts with its first and last 4 KiB: any retrained, converted or replaced tensor shows, at a cost of
    milliseconds. A change that leaves both ends of every tensor as they were does not show.
    """
    digest = hashlib.sha256(configuration.encode())
    by_file: dict[Path, list[tuple[str, TensorEntry]]] = {}
    scales = {f"{name} scales": entry.scales for name, entry in index.items() if entry.scales is not None}
    for name, entry in sorted((index | scales).items()):
        by_file.setdefault(entry.path, []).append((name, entry))
    for path, entries in by_file.items():
        digest.update(str(path.stat().st_size).encode())
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # else the system reads ahead what may be another stage's
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for name, entry in entries:
                digest.update(f"{name} {entry.type} {entry.shape} {entry.offset} {entry.nbytes}".encode())
                for offset in (0, max(0, entry.nbytes - _SAMPLE)):
                    file.seek(entry.offset + offset)
                    digest.update(file.read(min(_SAMPLE, entry.nbytes)))
    return digest.hexdigest()[:16]
