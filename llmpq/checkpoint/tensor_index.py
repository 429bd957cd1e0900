"""Where each tensor of a checkpoint lies: the headers of safetensors and GGUF files, read and checked.

Only headers are read, with the standard library, so that it takes milliseconds. (A GGUF header holds the tokenizer;
its lists are skipped.) Every error is a UsageError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmpq.checkpoint.families import Family, GgufForm, Part
from llmpq.spec import BLOCK, ModelSpec, Precision, UsageError


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file: `nbytes` at `offset`, row after row."""

    path: Path
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
_SAFETENSORS_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# GGUF metadata: type number -> struct code. 8 is a string, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
_SAMPLE = 4096


def safetensors_index(folder: Path) -> Index:
    """The tensors of all `*.safetensors` files of a checkpoint folder."""
    index: Index = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UsageError(f"{folder} holds no *.safetensors file; save the model with safe serialization")
    for path in paths:
        index |= _safetensors_file(path)
    # Some checkpoints were saved from the model without its head, whose names then lack the prefix.
    if not any(name.startswith("model.") for name in index):
        index = {name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in index.items()}
    return index


def _safetensors_file(path: Path) -> Index:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise UsageError(f"{path} is truncated or no safetensors file: its header does not fit; download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [_safetensors_entry(path, 8 + length, name, tensor) for name, tensor in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} is broken: its header is not that of a safetensors file") from None
    for name, entry in entries:
        end = entry.offset + entry.nbytes
        if end > size:
            raise UsageError(f"{path} is truncated: {size} bytes, but {name} ends at {end}")
        bytes_each = _SAFETENSORS_BYTES.get(entry.type)
        if bytes_each is not None and entry.nbytes != math.prod(entry.shape) * bytes_each:
            raise UsageError(
                f"{path} is broken: {name} {list(entry.shape)} in {entry.type} does not take {entry.nbytes} bytes"
            )
    return dict(entries)


def _safetensors_entry(path: Path, base: int, name: str, tensor: dict[str, Any]) -> tuple[str, TensorEntry]:
    begin, end = tensor["data_offsets"]
    if not 0 <= int(begin) <= int(end):
        raise ValueError
    shape = tuple(int(size) for size in tensor["shape"])
    return name, TensorEntry(path, base + int(begin), int(end) - int(begin), shape, str(tensor["dtype"]))


class _GgufReader:
    """Reads the values of a GGUF header one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.at += length
        if self.at > len(self.data):
            raise struct.error
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """A value of metadata; None for a list."""
        if kind == _STRING:
            return self.string()
        if kind != _LIST:
            return self.scalar(_SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            self.at += count * struct.calcsize("<" + _SCALARS[element])
        elif element == _STRING:
            unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            self.at = at
        else:
            for _ in range(count):
                self.value(element)
        return None


def read_gguf(path: Path) -> tuple[dict[str, Any], Index]:
    """The metadata, without its lists, and the tensors, under their own names, of a GGUF file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 24 or file.read(4) != b"GGUF":
            raise UsageError(f"{path} is no GGUF file, or is truncated: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _GgufReader(data)
            reader.at = 4
            version = reader.scalar("I")
            if version not in (2, 3):
                raise UsageError(f"{path} is of GGUF version {version}; versions 2 and 3 are supported")
            try:
                num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
                metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(num_values)}
                tensors = []
                for _ in range(num_tensors):
                    name = reader.string()
                    shape = tuple(reader.scalar("Q") for _ in range(reader.scalar("I")))[::-1]  # theirs: fastest first
                    kind, offset = GGMLQuantizationType(reader.scalar("I")), reader.scalar("Q")
                    tensors.append((name, shape, kind, offset))
            except (struct.error, KeyError, ValueError):
                raise UsageError(f"{path} is truncated or broken: its header cannot be read") from None
    alignment = metadata.get("general.alignment", 32)
    base = -(-reader.at // alignment) * alignment
    index: Index = {}
    for name, shape, kind, offset in tensors:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_bytes
        if base + offset + nbytes > size:
            raise UsageError(f"{path} is truncated: {size} bytes, but {name} ends at {base + offset + nbytes}")
        index[name] = TensorEntry(path, base + offset, nbytes, shape, kind.name)
    return metadata, index


def translated(index: Index, family: Family, form: GgufForm, head_dim: int) -> Index:
    """The tensors of a GGUF file under transformers' names; those that are not known keep theirs."""
    renamed: Index = {}
    for name, entry in index.items():
        stem, _, kind = name.rpartition(".")
        interleaved = 0
        if stem.startswith("blk."):
            number, _, inner = stem.removeprefix("blk.").partition(".")
            part = form.layer.get(inner)
            interleaved = head_dim if part in form.interleaved else 0
            stem = f"{family.layer.format(number)}{part}" if part else stem
        stem = form.tensors.get(stem, stem)
        renamed[f"{stem}.{kind}"] = replace(entry, interleaved=interleaved)
    return renamed


def locate(
    index: Index, tensors: Mapping[Part, Mapping[str, tuple[int, ...]]], model: str
) -> dict[Part, list[TensorEntry]]:
    """The entries of each part's tensors. UsageError unless all are there, in their shape and a type that is read."""
    for shapes in tensors.values():
        for name, shape in shapes.items():
            if name not in index:
                raise UsageError(f"{model}: the tensor {name} is missing from the checkpoint")
            entry = index[name]
            if entry.shape != shape:
                raise UsageError(
                    f"{model}: {name} has the shape {list(entry.shape)}, its configuration says {list(shape)}"
                )
            if entry.path.suffix == ".safetensors" and entry.type not in _SAFETENSORS_BYTES:
                raise UsageError(f"{model}: {name} is stored as {entry.type}; there are F32, F16 and BF16")
    return {part: [index[name] for name in shapes] for part, shapes in tensors.items()}


def stored_precisions(
    located: Mapping[Part, Sequence[TensorEntry]], spec: ModelSpec
) -> dict[str, dict[str, Precision]]:
    """Unit -> linear -> precision in the file, of units all of whose linears are in one such precision each."""
    stored = {}
    for unit in spec.units:
        types = {name: {entry.type for entry in located[unit, f"{name}.weight"]} for name in spec.linears(unit)}
        if all(len(of_parts) == 1 and of_parts <= STORED.keys() for of_parts in types.values()):
            stored[unit] = {name: STORED[kind] for name, (kind,) in types.items()}
    return stored


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
