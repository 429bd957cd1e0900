"""A bed as a GGUF file of float32: what llama.cpp quantizes."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter

from bench.quality.beds import Bed, read_tensors
from llmpq.checkpoint.gguf_forms import FORMS, GgufForm
from llmpq.checkpoint.model_files import describe


def form_of(bed: Bed) -> GgufForm:
    """Raises ValueError for a model that llama.cpp is not given, an OPT."""
    family = describe(bed.model.checkpoint).family
    if family.name not in FORMS:
        raise ValueError(f"a {family.name} is not written for llama.cpp")
    return FORMS[family.name]


def gguf_name(form: GgufForm, name: str) -> str:
    """What a tensor is called in a GGUF file, both names without ".weight" or ".bias"."""
    layer = form.family.layer.removesuffix("{}.")
    if not name.startswith(layer):
        return {theirs: ours for ours, theirs in form.names(form.family).items()}[name]
    number, _, rest = name.removeprefix(layer).partition(".")
    names = {theirs: ours for ours, theirs in form.layer_names(form.family).items()}
    return f"blk.{number}.{names[rest]}"


def is_interleaved(form: GgufForm, name: str) -> bool:
    layer = form.family.layer.removesuffix("{}.")
    return name.startswith(layer) and form.is_interleaved(name.removeprefix(layer).partition(".")[2])


def write_gguf(bed: Bed, path: Path) -> None:
    """A bed as llama.cpp wants it, float32, without a tokenizer. Raises ValueError as `form_of`."""
    form, config = form_of(bed), describe(bed.model.checkpoint).config
    writer = GGUFWriter(path, form.architecture)
    for theirs, key in {**form.numbers(form.family), "rope.freq_base": "rope_theta"}.items():
        if config.get(key):
            add = writer.add_float32 if isinstance(config[key], float) else writer.add_uint32
            add(f"{form.architecture}.{theirs}", config[key])
    writer.add_tokenizer_model("none")  # llama.cpp runs no file that does not say so
    writer.add_uint32(f"{form.architecture}.rope.dimension_count", bed.model.spec.head_dim)
    for name, tensor in read_tensors(bed.model).items():
        stem, _, kind = name.rpartition(".")
        if is_interleaved(form, stem):
            tensor = by_pairs(tensor, bed.model.spec.head_dim)
        writer.add_tensor(f"{gguf_name(form, stem)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head in the order in which neighbours are rotated together."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()


def by_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()
