"""The models that all contenders run, each written once in every format that one of them reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.end_to_end.child import Job
from bench.models import qwen_coder
from bench.quality.beds import Bed, read_tensors, save_tokenizer
from bench.quality.gguf_bed import write_gguf
from llmpq.checkpoint.families import LLAMA
from llmpq.checkpoint.model_files import Model, describe, open_model
from llmpq.checkpoint.tensor_names import decoder_tensors

# A llama of half a billion parameters, tied, with the demo model's tokenizer.
HALF_BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1280,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 3456,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float16",
}
_STD = 0.02  # of random weights


def _smollm2(work: Path) -> Job:
    return _stored("demo", work)


def _qwen(work: Path) -> Job:
    return _stored(str(qwen_coder.fetch(work)), work)


def _stored(name: str, work: Path) -> Job:
    """A GGUF file, and what it holds in float32 as transformers reads it."""
    model, folder = open_model(name), work / "transformers"
    if not (folder / "config.json").exists():
        described = describe(model.checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, tied = read_tensors(model), model.spec.tied_embeddings
        if tied:
            del tensors[f"{described.family.head}.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        save_tokenizer(model.checkpoint, folder)
        architecture = described.family.architectures[0]
        differences = {"architectures": [architecture], "dtype": "float32", "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps({**described.config, **differences}, indent=1))
    return Job(name, str(folder), str(model.checkpoint.path), str(work), threads=1, quantizer="gptq")


def _half_billion(work: Path) -> Job:
    folder, gguf = work / "transformers", work / "model.gguf"
    if not gguf.exists():
        write_random(folder, HALF_BILLION)
        save_tokenizer(open_model("demo").checkpoint, folder)
        partial = gguf.with_suffix(".partial")
        write_gguf(Bed("0.5B", folder, open_model(str(folder))), partial)
        partial.rename(gguf)
    return Job(str(folder), str(folder), str(gguf), str(work), threads=1)


def write_random(folder: Path, config: dict[str, object]) -> Model:
    """A llama of this configuration with normal float16 weights, norms of ones: a folder that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model = open_model(str(folder), "dummy")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for piece in (piece for pieces in decoder_tensors(model.spec, LLAMA).values() for piece in pieces):
        normal = torch.randn(piece.shape, generator=generator) * _STD
        tensors[piece.name] = (torch.ones(piece.shape) if len(piece.shape) == 1 else normal).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_model(str(folder))


MODELS: dict[str, Callable[[Path], Job]] = {"smollm2": _smollm2, "qwen": _qwen, "0.5B": _half_billion}
WITH_TEXT = ("smollm2", "qwen")  # whose perplexity means anything


def prepare(name: str, work: Path) -> Job:
    """The files of one of MODELS below `work`, written if they are not there. Its threads are to be set."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    return MODELS[name](folder)
