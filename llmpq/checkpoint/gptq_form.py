"""The GPTQ form of a quantized model, which gptqmodel and transformers read, and vLLM by its description.

Linears are those of transformers' model: q, k and v, for example, are apart, or one with the rows of each head in turn.
Each linear of a layer has four tensors, whichever way its weight lies:

    qweight  int32 [k * bits / 32, n]        codes one after the other along k, the first in the lowest bits
    qzeros   int32 [groups, n * bits / 32]   zero points less 1, packed so along n
    scales   float16 [groups, n]             w = scale * (code - zero)
    g_idx    int32 [k]                       the group of each column

All else is in 16 bits under transformers' names. Readers differ in what they make of zero points other than the middle
code (vLLM's kernels take no other, and adding that 1 overflows where a zero point is 0), so all are the middle code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.functional import pad

from llmpq.checkpoint.family import Family
from llmpq.checkpoint.tensor_names import decoder_tensors, rows_of_tensors
from llmpq.quant import QuantTensor
from llmpq.quant.packing import packed_words
from llmpq.spec import W16, ModelSpec, Precision, UnitPrecision, UsageError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, None)  # that all of them read


def gptq_options(spec: ModelSpec, option: UnitPrecision) -> dict[str, UnitPrecision]:
    """That of the layers as this form has it, and 16 bits for the tables."""
    layers = replace(option, zero="sym") if isinstance(option, Precision) else option
    return {unit: layers if unit.startswith("layer.") else W16 for unit in spec.units}


class GptqForm:
    """The form of one model. Raises UsageError for options that it cannot hold."""

    def __init__(self, spec: ModelSpec, family: Family, options: Mapping[str, UnitPrecision]) -> None:
        self._spec, self._precision = spec, _one_precision(spec, options)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._parts = decoder_tensors(spec, family)
        self._architecture = family.architectures[0]
        self.metadata: Mapping[str, str] = {"format": "pt"}  # without which transformers refuses a file
        if any(len(piece.tensor_shape) > len(piece.shape) for pieces in self._parts.values() for piece in pieces):
            raise UsageError(
                f"{spec.name}: a {family.name} has all experts in one tensor, for which the GPTQ form has no linears; "
                "choose --format llmpq"
            )
        for unit in spec.units[1:-1]:
            for linear, shape in spec.linears(unit).items():
                for name, rows in self._linears(unit, linear):
                    self._check(name, len(rows), shape.k)

    def _check(self, name: str, n: int, k: int) -> None:
        fields, group = 32 // self._precision.bits, self._precision.group_size or 1
        for what, size, divisor in (("rows", n, fields), ("columns", k, fields), ("columns", k, group)):
            if size % divisor:
                raise UsageError(
                    f"{name} has {size} {what}, no multiple of {divisor} as the GPTQ form needs at {self._precision}; "
                    "choose another --group-size, or --format llmpq"
                )

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the source as that of the folder."""
        rest = {key: value for key, value in config.items() if key != "dtype"}
        quantization = {
            "quant_method": "gptq",
            "bits": self._precision.bits,
            "group_size": self._precision.group_size or -1,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "meta": {"quantizer": [f"llmpq:{version('llmpq')}"]},
        }
        dtype = str(self._dtype).removeprefix("torch.")
        named = {"architectures": [self._architecture], **rest, "torch_dtype": dtype}
        return {**named, "quantization_config": quantization}

    def tensors(
        self, unit: str, weights: Mapping[str, QuantTensor], others: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All tensors of a unit, by their names in the file."""
        found: dict[str, torch.Tensor] = {}
        for part, tensor in others.items():
            pieces = self._parts[unit, part]
            for name, places in rows_of_tensors(pieces).items():
                stored = tensor if len(pieces) == 1 else tensor[torch.from_numpy(places)]
                stored = stored - pieces[0].plus if pieces[0].plus else stored
                found[name] = (stored.T if pieces[0].transposed else stored).to(self._dtype).contiguous()
        for linear, weight in weights.items():
            for name, rows in self._linears(unit, linear):
                found |= {f"{name}.{kind}": tensor for kind, tensor in _stored(weight, rows).items()}
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise UsageError(f"{name} holds numbers too large for {tensor.dtype}, as the GPTQ form has them")
        return found

    def weights(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantTensor]:
        """The quantized linears among the tensors of a unit."""
        found = {}
        for linear, shape in self._spec.linears(unit).items() if unit.startswith("layer.") else ():
            names, rows = zip(*self._linears(unit, linear), strict=True)
            order = torch.cat(rows).argsort()
            qweight, scales = (
                torch.cat([tensors[f"{name}.{kind}"] for name in names], 1).T[order] for kind in ("qweight", "scales")
            )
            qweight = pad(qweight, (0, packed_words(shape.k, self._precision.bits) - qweight.shape[1]))
            found[linear] = QuantTensor(
                qweight.contiguous(), scales.contiguous(), None, self._precision, (shape.stacked.n, shape.k)
            )
        return found

    def _linears(self, unit: str, linear: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The linears that a fused one is here, and which of its rows they have, in their order."""
        for name, rows in rows_of_tensors(self._parts[unit, f"{linear}.weight"]).items():
            yield name.removesuffix(".weight"), torch.from_numpy(rows)


def _one_precision(spec: ModelSpec, options: Mapping[str, UnitPrecision]) -> Precision:
    """That of all layers. Raises UsageError."""
    first = options["layer.0"]
    for unit in spec.units:
        expected = first if unit.startswith("layer.") else W16
        if options[unit] != expected:
            raise UsageError(
                f"the GPTQ form has all layers in one precision and the rest in 16 bits, but {unit} is {options[unit]} "
                f"where {expected} is expected; give --bits alone, or --format llmpq"
            )
    if not isinstance(first, Precision) or first.bits not in BITS or first.group_size not in GROUP_SIZES:
        raise UsageError(
            f"the GPTQ form holds 4 or 8 bits in groups of 32, 64, 128 or row, not {first}; choose --bits and "
            "--group-size among these, or --format llmpq"
        )
    if first.zero != "sym":
        raise UsageError(
            f"the GPTQ form has no zero points of its own, as {first} needs; give --bits in place of --plan"
        )
    return first


def _stored(weight: QuantTensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of the linear that has these rows of a weight.

    Our codes of 4 and 8 bits follow each other in the same order (quant/packing.py).
    """
    n, k, bits = len(rows), weight.shape[1], weight.precision.bits
    groups = weight.scales.shape[1]
    zeros = int.from_bytes(bytes([{4: 0x77, 8: 0x7F}[bits]] * 4), "little")
    return {
        "qweight": weight.qweight[rows, : k * bits // 32].T.contiguous(),
        "qzeros": torch.full((groups, n * bits // 32), zeros, dtype=torch.int32),
        "scales": weight.scales[rows].T.half().contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32) // (weight.precision.group_size or k),
    }
