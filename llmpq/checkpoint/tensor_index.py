"""Where each tensor of a checkpoint lies, and which of them a model is made of.

gguf_header.py and safetensors_header.py beside it read the entries. Every error is a UsageError that names file or
model.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from llmpq.checkpoint.families import Family, GgufForm, Part
from llmpq.spec import BLOCK, Precision, UsageError


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file: `nbytes` at `offset`, row after row."""

    path: Path
    name: str  # in the file
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    type: str  # F32, F16, BF16, or a quantized type of GGUF such as Q4_1
    interleaved: int = 0  # rows of a head whose halves are interleaved in the file; 0: rows are in order

    def places(self, start: int, stop: int) -> slice | list[int]:
        """Where rows start..stop are in the file.

        GGUF rotates neighbouring rows of a head as pairs, transformers row j of its first half with row j of its
        second: row (half, j) of a head here is row (j, half) there.
        """
        size = self.interleaved
        if not size:
            return slice(start, stop)
        return [
            row - row % size + row % size % (size // 2) * 2 + row % size // (size // 2) for row in range(start, stop)
        ]


Index = dict[str, TensorEntry]

# GGUF types whose rows are QuantTensors as they are (gguf_blocks.py).
STORED = {
    "Q4_0": Precision(4, BLOCK, "sym", "gguf"),
    "Q4_1": Precision(4, BLOCK, "offset", "gguf"),
    "Q8_0": Precision(8, BLOCK, "sym", "gguf"),
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
    renamed: Index = {}
    for name, entry in index.items():
        stem, _, kind = name.rpartition(".")
        known = form.tensors.get(stem)
        interleaved = 0
        if stem.startswith("blk."):
            number, _, inner = stem.removeprefix("blk.").partition(".")
            if part := form.layer.get(inner):
                known = f"{family.layer.format(number)}{part}"
                interleaved = head_dim if part in form.interleaved else 0
        renamed[f"{known}.{kind}" if known else name] = replace(entry, interleaved=interleaved)
    return renamed


class Located(Protocol):
    """What locate() asks of an entry."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Entry = TypeVar("Entry", bound=Located)


def locate(
    index: Mapping[str, Entry],
    tensors: Mapping[Part, Mapping[str, tuple[int, ...]]],
    harmless: Sequence[str],
    model: str,
) -> dict[Part, list[Entry]]:
    """The entries of each part's tensors: TensorEntries, and what is made of several (stored_linear.py).

    UsageError unless all are there, in their shape and a type that is read, and no other: a tensor that were left out
    might be one that changes the results. `harmless` are patterns of names that may be.
    """
    used: set[str] = set()
    for shapes in tensors.values():
        for name, shape in shapes.items():
            if name not in index:
                raise UsageError(f"{model}: the tensor {name} is missing from the checkpoint")
            entry = index[name]
            if entry.shape != shape:
                raise UsageError(
                    f"{model}: {name} has the shape {list(entry.shape)}, its configuration says {list(shape)}"
                )
            if isinstance(entry, TensorEntry) and not is_readable(entry, len(shape)):
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
    return {part: [index[name] for name in shapes] for part, shapes in tensors.items()}


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
        return entry.type in FLOATING
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
    return np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.nbytes,))


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
    for name, entry in sorted(index.items()):
        by_file.setdefault(entry.path, []).append((name, entry))
    for path, entries in by_file.items():
        digest.update(str(path.stat().st_size).encode())
        with path.open("rb") as file:
            for name, entry in entries:
                digest.update(f"{name} {entry.type} {entry.shape} {entry.offset} {entry.nbytes}".encode())
                for offset in (0, max(0, entry.nbytes - _SAMPLE)):
                    file.seek(entry.offset + offset)
                    digest.update(file.read(min(_SAMPLE, entry.nbytes)))
    return digest.hexdigest()[:16]
