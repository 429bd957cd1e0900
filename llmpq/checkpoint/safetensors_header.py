"""Where the tensors of a folder's safetensors files lie. Only headers are read, so that it takes milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmpq.checkpoint.tensor_index import Index, TensorEntry, indexed
from llmpq.spec import UsageError
from llmpq.spec.json_file import distinct, read_object
from llmpq.spec.ranges import shown

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_LONGEST = 100_000_000  # bytes of a header, as in the safetensors library


def safetensors_index(folder: Path) -> Index:
    """The tensors of a checkpoint folder, from the files that transformers would read. Raises UsageError."""
    index: Index = {}
    for path in _files(folder):
        for name, entry in _read_file(path).items():
            if name in index:
                raise UsageError(
                    f"the tensor {name} is in {index[name].path} and in {path}; keep the files of one model"
                )
            index[name] = entry
    return index


def with_prefix(index: Index, prefix: str, head: str) -> Index:
    """Some checkpoints were saved from the model without its `head`, whose names then lack the prefix."""
    if any(name.startswith(prefix) for name in index):
        return index
    return {name if name.startswith(f"{head}.") else prefix + name: entry for name, entry in index.items()}


def _files(folder: Path) -> Sequence[Path]:
    """One file by its usual name, those that an index lists, or all there are."""
    one, listed = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file():
        return [one]
    if listed.is_file():
        shards = read_object(listed).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UsageError(f"{listed} is broken: it has no weight_map of names to files")
        paths = [folder / name for name in sorted(set(shards.values()))]
        for path in paths:
            if path.parent != folder or path.suffix != ".safetensors":
                raise UsageError(f"{listed} names {shown(str(path))}, which is no *.safetensors file of its folder")
            if not path.is_file():
                raise UsageError(f"{path} is missing: {listed.name} names it; download it again")
        return paths
    paths = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not paths:
        for path in folder.glob("*.safetensors"):
            if path.is_symlink():
                raise UsageError(f"{path} is a link to {path.readlink()}, which is not there")
        raise UsageError(f"{folder} holds no *.safetensors file; save the model with safe serialization")
    return paths


def _read_file(path: Path) -> Index:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise UsageError(f"{path} is truncated or no safetensors file: its header does not fit; download it again")
        if length > _LONGEST:
            raise UsageError(f"{path} is broken: its header has {length} bytes; the format allows {_LONGEST}")
        try:
            header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=distinct)
            header.pop("__metadata__", None)
            entries = [_entry(path, 8 + length, name, tensor) for name, tensor in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f" ({error})" if type(error) is ValueError else ""
            raise UsageError(f"{path} is broken: its header is not that of a safetensors file{what}") from None
    index = indexed(path, size, entries)
    for name, entry in index.items():
        bytes_each = BYTES.get(entry.type)
        if bytes_each is not None and entry.nbytes != math.prod(entry.shape) * bytes_each:
            raise UsageError(
                f"{path} is broken: {name} {list(entry.shape)} in {entry.type} does not take {entry.nbytes} bytes"
            )
    return index


def _entry(path: Path, base: int, name: str, tensor: dict[str, Any]) -> TensorEntry:
    begin, end = tensor["data_offsets"]
    shape = tuple(tensor["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end - begin, *shape)):
        raise ValueError(f"shape and offsets of {shown(name)} are {shown(tensor['shape'])} and {begin}, {end}")
    return TensorEntry(path, name, base + begin, end - begin, shape, str(tensor["dtype"]))
