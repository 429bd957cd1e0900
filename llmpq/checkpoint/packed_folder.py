"""The folder of a model that llmpq has quantized: config.json, a safetensors file for each unit, and a tokenizer.

Tensors are named by unit and part (families.py), whatever the family: `layer.3.qkv.qweight`, `.scales` and `.zeros` of
a quantized linear (quant/packing.py draws its codes), and `layer.3.attention_norm.weight` of all else. A tied head has
no table of its own. config.json is the source's, and says in `quantization_config` how each linear is quantized:

    {"quant_method": "llmpq", "source": content hash, "precisions": {unit: {linear: "w4-g64-asym-gptq"}}}
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmpq.checkpoint.families import Part
from llmpq.checkpoint.tensor_index import FLOATING, STORED, Index, TensorEntry
from llmpq.quant import QuantTensor
from llmpq.quant.packing import packed_words
from llmpq.quant.tensor import zeros_dtype
from llmpq.spec import ModelSpec, Precision, UsageError
from llmpq.spec.files import temporary_beside, write_text

METHOD = "llmpq"
Precisions = dict[str, dict[str, Precision]]  # of the quantized linears, by unit and name
_KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int32: "I32"}


def precisions_of(config: Mapping[str, Any]) -> tuple[str, Precisions] | None:
    """The source's content hash, and how linears are quantized; None if a configuration is of no such folder.

    Raises ValueError.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return None
    unknown = set(quantization) - {"quant_method", "source", "precisions"}
    if unknown:
        raise ValueError(f"its quantization_config has {min(unknown)!r}, which a newer llmpq may have written")
    precisions = {
        unit: {name: Precision.parse(text) for name, text in of.items()}
        for unit, of in quantization["precisions"].items()
    }
    return str(quantization["source"]), precisions


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """Where the tensors of a quantized linear lie."""

    precision: Precision
    shape: tuple[int, int]  # n, k
    qweight: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None


def locate_packed(
    index: Index, tensors: Mapping[Part, Mapping[str, tuple[int, ...]]], precisions: Precisions, spec: ModelSpec
) -> dict[Part, list[TensorEntry | PackedEntry]]:
    """The entry of each part. UsageError unless all are there, in their shape and type, and no other."""
    used: set[str] = set()

    def entry(name: str, types: tuple[str, ...], shape: tuple[int, ...]) -> TensorEntry:
        used.add(name)
        found = index.get(name)
        if found is None:
            raise UsageError(f"{spec.name}: the tensor {name} is missing; quantize the model again")
        if found.shape != shape or found.type not in types:
            raise UsageError(
                f"{spec.name}: {name} is {found.type} {list(found.shape)}, expected {' or '.join(types)} {list(shape)}"
            )
        return found

    located: dict[Part, list[TensorEntry | PackedEntry]] = {}
    for (unit, part), shapes in tensors.items():
        tied = spec.tied_embeddings and (unit, part) == ("head", "table.weight")
        owner, linear = "embedding" if tied else unit, part.removesuffix(".weight")
        shape = (sum(one[0] for one in shapes.values()), *next(iter(shapes.values()))[1:])
        precision = precisions.get(owner, {}).get(linear) if part != linear else None
        if precision is None:
            located[unit, part] = [entry(f"{owner}.{part}", FLOATING, shape)]
            continue
        n, k = shape
        groups = (n, precision.num_groups(k))
        scales = entry(f"{owner}.{linear}.scales", ("F16", "BF16"), groups)
        kind = zeros_dtype(precision, torch.float16 if scales.type == "F16" else torch.bfloat16)
        located[unit, part] = [
            PackedEntry(
                precision,
                (n, k),
                entry(f"{owner}.{linear}.qweight", ("I32",), (n, packed_words(k, precision.bits))),
                scales,
                None if kind is None else entry(f"{owner}.{linear}.zeros", (_KINDS[kind],), groups),
            )
        ]
    if unused := set(index) - used:
        raise UsageError(f"{spec.name}: the tensor {min(unused)} is not part of the model; quantize it again")
    return located


def stored_precisions(
    located: Mapping[Part, Sequence[TensorEntry | PackedEntry]], spec: ModelSpec
) -> dict[str, dict[str, Precision]]:
    """Unit -> linear -> precision in the file, of units all of whose linears are in one such precision each."""
    stored = {}
    for unit in spec.units:
        of_unit: dict[str, Precision] = {}
        for name in spec.linears(unit):
            found = {_precision(entry) for entry in located[unit, f"{name}.weight"]}
            if len(found) == 1 and (precision := found.pop()) is not None:
                of_unit[name] = precision
        if len(of_unit) == len(spec.linears(unit)):
            stored[unit] = of_unit
    return stored


def _precision(entry: TensorEntry | PackedEntry) -> Precision | None:
    """In which a tensor is quantized as kernels read it."""
    return entry.precision if isinstance(entry, PackedEntry) else STORED.get(entry.type)


class PackedFolder:
    """Writes such a folder, unit by unit; units that an earlier attempt of the same `key` has written are read."""

    def __init__(self, folder: Path, key: str, spec: ModelSpec, precisions: Precisions) -> None:
        self._folder, self._key, self._spec, self._precisions = folder, key, spec, precisions
        self._names: dict[str, str] = {}  # of tensors, with the files that hold them

    def read(self, unit: str) -> dict[str, QuantTensor] | None:
        """The quantized linears of a unit that is written; None if it is not."""
        try:
            with safe_open(self._path(unit), "pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return None
        self._note(unit, tensors)
        found = {}
        for linear, precision in self._precisions.get(unit, {}).items():
            qweight, scales = (tensors[f"{unit}.{linear}.{part}"] for part in ("qweight", "scales"))
            shape = self._spec.linears(unit)[linear]
            zeros = tensors.get(f"{unit}.{linear}.zeros")
            found[linear] = QuantTensor(qweight, scales, zeros, precision, (shape.n, shape.k))
        return found

    def write(self, unit: str, weights: Mapping[str, QuantTensor], others: Mapping[str, torch.Tensor]) -> None:
        """The quantized linears of a unit, and its other parts. Raises OSError."""
        tensors = {f"{unit}.{part}": tensor.contiguous() for part, tensor in others.items()}
        for linear, weight in weights.items():
            tensors[f"{unit}.{linear}.qweight"] = weight.qweight
            tensors[f"{unit}.{linear}.scales"] = weight.scales
            if weight.zeros is not None:
                tensors[f"{unit}.{linear}.zeros"] = weight.zeros
        path = self._path(unit)
        temporary = temporary_beside(path)
        try:
            with temporary.open("xb") as file:
                mode = os.fstat(file.fileno()).st_mode  # as the user's files are; the library's are for them alone
            save_file(tensors, temporary, {"key": self._key})
            temporary.chmod(stat.S_IMODE(mode))
            temporary.replace(path)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        finally:
            temporary.unlink(missing_ok=True)
        self._note(unit, tensors)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write what makes a model of the files, given the source's configuration. Raises UsageError."""
        index = {"metadata": {}, "weight_map": dict(sorted(self._names.items()))}
        names = {unit: {name: str(p) for name, p in of.items()} for unit, of in self._precisions.items()}
        quantization = {"quant_method": METHOD, "source": self._spec.content_hash, "precisions": names}
        for name, content in (
            ("model.safetensors.index.json", index),
            ("config.json", {**config, "quantization_config": quantization}),
        ):
            write_text(self._folder / name, json.dumps(content, indent=1) + "\n")

    def _path(self, unit: str) -> Path:
        return self._folder / f"{unit}.safetensors"

    def _note(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names |= dict.fromkeys(tensors, self._path(unit).name)
