"""The folder of a model that llmpq has quantized: config.json, a safetensors file for each unit, and a tokenizer.

Tensors are named by unit and part (tensor_names.py), whatever the family: `layer.3.qkv.qweight`, `.scales` and `.zeros`
of a quantized linear (quant/packing.py draws its codes), and `layer.3.attention_norm.weight` of all else. A tied head
has no table of its own. config.json is the source's, and says in `quantization_config` how each linear is quantized:

    {"quant_method": "llmpq", "source": content hash, "precisions": {unit: {linear: "w4-g64-asym-gptq"}}}

packed_writer.py writes such a folder, in the form PackedForm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmpq.checkpoint.stored_linear import IntegerLinear
from llmpq.checkpoint.tensor_index import FLOATING, STORED, Index, PieceEntry, StoredAs, TensorEntry
from llmpq.checkpoint.tensor_names import Part, Piece
from llmpq.spec import BLOCK, ModelSpec, Precision, UsageError
from llmpq.spec.ranges import shown

METHOD = "llmpq"
Precisions = dict[str, dict[str, Precision]]  # of the quantized linears, by unit and name


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
    source, precisions = quantization.get("source"), quantization.get("precisions")
    if not isinstance(source, str):
        raise ValueError("its quantization_config does not say which model is the source; quantize that again")
    if not isinstance(precisions, dict) or not all(isinstance(of, dict) for of in precisions.values()):
        raise ValueError("its quantization_config has no precisions of units and their linears; quantize it again")
    return source, {
        unit: {name: _parse(unit, name, text) for name, text in of.items()} for unit, of in precisions.items()
    }


def _parse(unit: str, name: str, text: object) -> Precision:
    """A precision that is written in a configuration. Raises ValueError."""
    with suppress(ValueError):
        if (precision := Precision.parse(str(text))).quantized:
            return precision
    raise ValueError(f"its quantization_config has {unit}.{name} in {shown(text)}, which is no quantized precision")


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """Where the tensors of a quantized linear lie."""

    precision: Precision
    shape: tuple[int, int]  # n, k
    qweight: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None


def locate_packed(
    index: Index, tensors: Mapping[Part, Sequence[Piece]], precisions: Precisions, spec: ModelSpec
) -> dict[Part, list[PieceEntry | TensorEntry | PackedEntry]]:
    """The entry of each part. UsageError unless all are there, in their shape and type, and no other."""
    used: set[str] = set()
    for unit, of in precisions.items():
        known = spec.linears(unit) if unit in spec.units else {}
        for name in of.keys() - known.keys():
            raise UsageError(f"{spec.name}: its quantization_config has {shown(f'{unit}.{name}')}, which is no linear")

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

    located: dict[Part, list[PieceEntry | TensorEntry | PackedEntry]] = {}
    for (unit, part), pieces in tensors.items():
        tied = spec.tied_embeddings and (unit, part) == ("head", "table.weight")
        owner, linear = "embedding" if tied else unit, part.removesuffix(".weight")
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        precision = precisions.get(owner, {}).get(linear) if part != linear else None
        if precision is None:
            located[unit, part] = [entry(f"{owner}.{part}", FLOATING, shape)]
            continue
        n, k = shape
        groups = (n, precision.num_groups(k))
        scales = entry(f"{owner}.{linear}.scales", ("F16", "BF16"), groups)
        kind = {"sym": None, "asym": "U8", "offset": scales.type}[precision.zero]
        located[unit, part] = [
            PackedEntry(
                precision,
                (n, k),
                entry(f"{owner}.{linear}.qweight", ("I32",), (n, -(-k // BLOCK) * precision.bits)),
                scales,
                None if kind is None else entry(f"{owner}.{linear}.zeros", (kind,), groups),
            )
        ]
    if unused := set(index) - used:
        raise UsageError(f"{spec.name}: the tensor {min(unused)} is not part of the model; quantize it again")
    return located


def stored_precisions(
    located: Mapping[Part, Sequence[PieceEntry | TensorEntry | PackedEntry]], spec: ModelSpec
) -> dict[str, dict[str, Precision]]:
    """Unit -> linear -> precision in the file, of linears all of whose parts are in one such precision."""
    stored = {}
    for unit in spec.units:
        of_unit: dict[str, Precision] = {}
        for name in spec.linears(unit):
            found = {_stored_as(entry) for entry in located[unit, f"{name}.weight"]}
            if len(found) == 1 and (kind := found.pop()) is not None:
                of_unit[name] = kind.precision
        if of_unit:
            stored[unit] = of_unit
    return stored


def _stored_as(entry: PieceEntry | TensorEntry | PackedEntry) -> StoredAs | None:
    """How a tensor is quantized, if that is as kernels read it."""
    tensor = entry.tensor if isinstance(entry, PieceEntry) else entry
    if isinstance(tensor, TensorEntry):
        return STORED.get(tensor.type)
    if isinstance(tensor, PackedEntry | IntegerLinear) and tensor.precision is not None:
        return StoredAs(tensor.precision, tensor.scales.type)
    return None
