"""The header of a GGUF file: its metadata, and where its tensors lie.

It is read with the standard library, in milliseconds. (It holds the tokenizer, of whose long lists only the tokens that
end an answer are read.) Every error is a UsageError that names the file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmpq.checkpoint import mapped_file
from llmpq.checkpoint.tensor_index import Index, TensorEntry, indexed
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

# Type number -> struct code. 8 is a string, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
_LONGEST_LIST, _LONGEST_STRING = 2**22, 2**26  # entries and bytes; tokenizers stay below
_KEPT = 2**12  # numbers of a list that is kept: one for each layer
_DIMENSIONS = 4
_FETCHED = 2**17  # bytes at once
_STRINGS = 2**10  # of a list, between two looks at what has to be fetched
# Tokens that end an answer, whether or not a file says so, by their texts: as in llama.cpp's src/llama-vocab.cpp.
_ENDS = frozenset(
    b"<|endoftext|> <|end_of_text|> <|im_end|> <|end|> <|eot_id|> <|eom_id|> <|return|> <|call|> <end_of_turn> <EOT> "
    b"<end_of_utterance>".split()
)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

Metadata = dict[str, Any]


def read_gguf(path: Path) -> tuple[Metadata, Index]:
    """Metadata and tensors, under their own names, of a GGUF file; if it is a part of a split one, of all parts.

    Lists of numbers are tuples, longer ones None. Of lists of strings there are the places of those that end an answer
    where they are tokens, {text: place}, or None. Raises UsageError.
    """
    parts = _read_parts(path)
    metadata, index = parts[0].metadata, dict(parts[0].index)
    for part in parts[1:]:
        if both := index.keys() & part.index.keys():
            raise UsageError(f"{part.path} is broken: another part has the tensor {min(both)}, too")
        index |= part.index
    expected = metadata.get("split.tensors.count", len(index))
    if len(parts) > 1 and expected != len(index):
        raise UsageError(f"{path}: its {len(parts)} parts hold {len(index)} tensors, the first says {shown(expected)}")
    return metadata, index


def tokenizer_alone(path: Path) -> tuple[Metadata, bytes]:
    """Metadata, and a GGUF file that holds nothing of this one, or of all its parts, but architecture and tokenizer.

    Raises UsageError.
    """
    part = _read_parts(path)[0]
    entries = [
        place for key, place in part.places.items() if key.startswith("tokenizer.") or key == "general.architecture"
    ]
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)))
    with part.path.open("rb") as file:
        for start, end in entries:
            file.seek(start)
            out += file.read(end - start)
    return part.metadata, bytes(out)


@dataclass(frozen=True)
class _Part:
    path: Path
    metadata: Metadata
    places: dict[str, tuple[int, int]]  # where the entry of each key begins and ends
    index: Index


def _read_parts(path: Path) -> list[_Part]:
    """A file by itself, or all parts of a split one in order. Raises UsageError, naming a part that is missing."""
    read = _read_file(path)
    count = read.metadata.get("split.count", 1)
    if count in (0, 1):
        return [read]
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise UsageError(f"{path} has split.count = {shown(count)}; the names of its parts must end in 00001-of-0000N")
    parts = []
    for number in range(count):
        part = path.with_name(f"{named[1]}-{number + 1:05}-of-{named[3]}.gguf")
        if not part.is_file():
            raise UsageError(f"{part} is missing: the model is split into {count} files, which belong in one folder")
        parts.append(_read_file(part))
        if [parts[-1].metadata.get(key) for key in ("split.no", "split.count")] != [number, count]:
            raise UsageError(f"{part} does not say that it is part {number + 1} of {count}; download it again")
    return parts


class _Reader:
    """Reads the values of a header one after the other. Raises struct.error at its end, ValueError for nonsense."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at
        self.places: dict[str, tuple[int, int]] = {}  # of the keys of metadata
        self._fetched = 0
        if hasattr(data, "madvise"):  # else the system reads megabytes around a byte, of tensors that others load
            data.madvise(mmap.MADV_RANDOM)

    def fetch(self) -> None:
        """Let the system begin to read what comes next."""
        if self.at + _FETCHED > self._fetched:
            start = max(self.at, self._fetched)
            self._fetched = start + _FETCHED
            mapped_file.fetch(np.frombuffer(self.data, np.uint8)[start : self._fetched])

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def skip(self, size: int) -> int:
        """Pass `size` bytes; where they begin."""
        start = self.at
        self.at += size
        if self.at > len(self.data):
            raise struct.error
        return start

    def string(self) -> str:
        length = self.scalar("Q")
        if length > _LONGEST_STRING:
            raise ValueError(f"a string has {length} bytes")
        start = self.skip(length)
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _LIST:
            return self.scalar(_code(kind))
        element, count = self.scalar("I"), self.scalar("Q")
        if count > _LONGEST_LIST:
            raise ValueError(f"a list has {count} entries")
        if element == _STRING:
            length, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
            ends, last = dict[str, int](), ord(">")
            for first in range(0, count, _STRINGS):  # of hundreds of thousands
                for place in range(first, min(first + _STRINGS, count)):
                    start, at = at + 8, at + 8 + length(data, at)[0]
                    if data[at - 1] == last and data[start:at] in _ENDS:
                        ends[data[start:at].decode()] = place
                self.skip(at - self.at)
                self.fetch()
            return ends or None
        code = f"<{count}{_code(element)}"
        start = self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.data, start) if count <= _KEPT else None

    def metadata(self, count: int) -> Metadata:
        values: Metadata = {}
        for _ in range(count):
            self.fetch()
            start = self.at
            key = self.string()
            if key in values:
                raise ValueError(f"{shown(key)} comes twice")
            try:
                values[key] = self.value(self.scalar("I"))
            except ValueError as error:
                raise ValueError(f"{shown(key)}: {error}") from None
            self.places[key] = start, self.at
        return values


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError("lists of lists are not read" if kind == _LIST else f"there is no type {kind}")
    return _SCALARS[kind]


def _read_file(path: Path) -> _Part:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 24 or file.read(4) != b"GGUF":
            raise UsageError(f"{path} is no GGUF file, or is truncated: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data, at=4)
            version = reader.scalar("I")
            if version not in (2, 3):
                if version & 0xFFFF == 0:
                    raise UsageError(f"{path} is a big-endian GGUF file; convert it with gguf-convert-endian")
                raise UsageError(f"{path} is of GGUF version {version}; versions 2 and 3 are supported")
            try:
                num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
                metadata = reader.metadata(num_values)
                tensors = []
                for _ in range(num_tensors):
                    reader.fetch()
                    name, dimensions = reader.string(), reader.scalar("I")
                    if dimensions > _DIMENSIONS:
                        raise ValueError(f"{shown(name)} has {dimensions} dimensions")
                    shape = tuple(reader.scalar("Q") for _ in range(dimensions))[::-1]  # theirs: fastest first
                    tensors.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
            except (struct.error, OverflowError, IndexError):
                raise UsageError(f"{path} is truncated or broken: its header goes on behind its end") from None
            except ValueError as error:
                raise UsageError(f"{path} is truncated or broken: its header cannot be read: {error}") from None
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise UsageError(f"{path} is broken: general.alignment = {shown(alignment)} is no power of two")
    base = -(-reader.at // alignment) * alignment
    entries = []
    for name, shape, number, offset in tensors:
        if number not in GGML_QUANT_SIZES:
            raise UsageError(
                f"{path}: {shown(name)} is of GGUF type {number}, which is not known (31 to 33 are Q4_0_4_4, Q4_0_4_8 "
                "and Q4_0_8_8, which llama.cpp has dropped); take a file in another type, such as Q4_0"
            )
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise UsageError(f"{path} is broken: rows of {shape[-1]} are no whole blocks of {kind.name}, as {name} has")
        entries.append(
            TensorEntry(path, name, base + offset, math.prod(shape) // block * block_bytes, shape, kind.name)
        )
    return _Part(path, metadata, reader.places, indexed(path, size, entries))
