"""A bed as a GGUF file of float32: what llama.cpp quantizes."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter

from bench.quality.beds import Bed, read_tensors
from llmpq.checkpoint.gguf_forms import FORMS
from llmpq.checkpoint.model_files import describe

FORM = FORMS["llama"]
_NAMES = {theirs: name for name, theirs in FORM.names(FORM.family).items()}
_LAYER_NAMES = {theirs: name for name, theirs in FORM.layer_names(FORM.family).items()}
_LAYER = FORM.family.layer.removesuffix("{}.")


def gguf_name(name: str) -> str:
    """What a tensor is called in a GGUF file, both names without ".weight"."""
    if not name.startswith(_LAYER):
        return _NAMES[name]
    number, _, rest = name.removeprefix(_LAYER).partition(".")
    return f"blk.{number}.{_LAYER_NAMES[rest]}"


def is_interleaved(name: str) -> bool:
    return name.startswith(_LAYER) and FORM.is_interleaved(name.removeprefix(_LAYER).partition(".")[2])


def write_gguf(bed: Bed, path: Path) -> None:
    """A bed as llama.cpp wants it, float32, without a tokenizer."""
    config = describe(bed.model.checkpoint).config
    writer = GGUFWriter(path, FORM.architecture)
    for theirs, key in {**FORM.numbers(FORM.family), "rope.freq_base": "rope_theta"}.items():
        if config.get(key):
            add = writer.add_float32 if isinstance(config[key], float) else writer.add_uint32
            add(f"{FORM.architecture}.{theirs}", config[key])
    writer.add_tokenizer_model("none")  # llama.cpp runs no file that does not say so
    writer.add_uint32(f"{FORM.architecture}.rope.dimension_count", bed.model.spec.head_dim)
    for name, tensor in read_tensors(bed.model).items():
        plain = name.removesuffix(".weight")
        if is_interleaved(plain):
            tensor = by_pairs(tensor, bed.model.spec.head_dim)
        writer.add_tensor(f"{gguf_name(plain)}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head in the order in which neighbours are rotated together."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()


def by_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()
