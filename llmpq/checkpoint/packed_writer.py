"""Writing the folder of a quantized model, unit by unit, in a form: our own (packed_folder.py), or gptq_form.py."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmpq.checkpoint.packed_folder import METHOD, Precisions
from llmpq.quant import QuantTensor
from llmpq.spec import ModelSpec
from llmpq.spec.files import temporary_beside, write_text


class Form(Protocol):
    """How a quantized model is written."""

    metadata: Mapping[str, str]  # of each file

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the source as that of the folder."""

    def tensors(
        self, unit: str, weights: Mapping[str, QuantTensor], others: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The quantized linears of a unit and its other parts, by their names in the file. Raises UsageError."""

    def weights(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantTensor]:
        """The quantized linears among a unit's tensors."""


class PackedForm:
    """What `open_model` reads bit for bit."""

    def __init__(self, spec: ModelSpec, precisions: Precisions) -> None:
        self._spec, self._precisions = spec, precisions
        self.metadata: Mapping[str, str] = {}

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        names = {unit: {name: str(p) for name, p in of.items()} for unit, of in self._precisions.items()}
        quantization = {"quant_method": METHOD, "source": self._spec.content_hash, "precisions": names}
        return {**config, "quantization_config": quantization}

    def tensors(
        self, unit: str, weights: Mapping[str, QuantTensor], others: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tensors = {f"{unit}.{part}": tensor.contiguous() for part, tensor in others.items()}
        for linear, weight in weights.items():
            tensors[f"{unit}.{linear}.qweight"] = weight.qweight
            tensors[f"{unit}.{linear}.scales"] = weight.scales
            if weight.zeros is not None:
                tensors[f"{unit}.{linear}.zeros"] = weight.zeros
        return tensors

    def weights(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantTensor]:
        found = {}
        for linear, precision in self._precisions.get(unit, {}).items():
            qweight, scales = (tensors[f"{unit}.{linear}.{part}"] for part in ("qweight", "scales"))
            shape = self._spec.linears(unit)[linear].stacked
            zeros = tensors.get(f"{unit}.{linear}.zeros")
            found[linear] = QuantTensor(qweight, scales, zeros, precision, (shape.n, shape.k))
        return found


class PackedWriter:
    """Writes a folder, unit by unit; units that an earlier attempt of the same `key` has written are read."""

    def __init__(self, folder: Path, key: str, form: Form) -> None:
        self._folder, self._key, self._form = folder, key, form
        self._names: dict[str, str] = {}  # of tensors, with the files that hold them

    @property
    def holds_another(self) -> bool:
        """Whether the folder is a finished model, of another key."""
        return (self._folder / "config.json").exists() and self.read("embedding") is None

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
        return self._form.weights(unit, tensors)

    def write(self, unit: str, weights: Mapping[str, QuantTensor], others: Mapping[str, torch.Tensor]) -> None:
        """The quantized linears of a unit, and its other parts. It is no model then until `finish`.

        Raises OSError, and UsageError for what the form cannot hold.
        """
        (self._folder / "config.json").unlink(missing_ok=True)  # of other weights, which would be mixed with these
        tensors = self._form.tensors(unit, weights, others)
        path = self._path(unit)
        temporary = temporary_beside(path)
        try:
            with temporary.open("xb") as file:
                mode = os.fstat(file.fileno()).st_mode  # as the user's files are; the library's are for them alone
            save_file(tensors, temporary, {**self._form.metadata, "key": self._key})
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
        for name, content in (("model.safetensors.index.json", index), ("config.json", self._form.config(config))):
            write_text(self._folder / name, json.dumps(content, indent=1) + "\n")

    def _path(self, unit: str) -> Path:
        return self._folder / f"{unit}.safetensors"

    def _note(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names |= dict.fromkeys(tensors, self._path(unit).name)
