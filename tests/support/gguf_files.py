"""Tiny GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from tests.support.tiny_models import make_model

ALL_TYPES = {  # of parts of a layer: one of each kind of type that can be read
    "q_proj": "Q8_0",
    "k_proj": "Q4_1",
    "v_proj": "Q4_0",
    "up_proj": "Q5_1",
    "down_proj": "F16",
    "o_proj": "BF16",
}
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "gpt_neox": "gptneox"}  # others: alike
_ARCHITECTURES |= {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
_BY_PAIRS = {"llama", "mistral3", "smollm3", "granite"}  # that rotate neighbouring rows of a head
_MIXTURES = {"qwen2moe", "qwen3moe", "gpt-oss"}
_EXPERT_KEYS = {
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
_PLUS_ONE = {"gemma", "gemma2", "gemma3"}  # whose norms are written as they multiply


def write_gguf(
    path: Path,
    kind: str = "llama-gqa",
    *,
    types: Mapping[str, str] = ALL_TYPES,
    architecture: str | None = None,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, Sequence[float]] = MappingProxyType({}),
    split: int = 0,
    fused: bool = False,
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """Write a tiny model, each part in its one of `types`, others in F32; return the model it stands for.

    `metadata` replaces values and adds some, None takes one away, and `tensors` adds vectors. With `split`, parts have
    so many tensors; `fused` has q, k and v in one. `overrides` are of the configuration.
    """
    llama = {"hidden_size": 64, "intermediate_size": 96} if kind.startswith("llama") else {}
    model = make_model(kind, **{**llama, **overrides})
    config = model.config
    architecture = architecture or _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    values = {f"{architecture}.{key}": value for key, value in _metadata(config, architecture).items()}
    values |= {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(config.vocab_size)], "tokenizer.ggml.eos_token_id": 1}
    for key, value in {**values, **metadata}.items():
        if value is not None:
            value_type = gguf.GGUFValueType.get_type
            element = value_type(value[0]) if isinstance(value, list) else None
            writer.kv_data[0][key] = gguf.GGUFValue(value, value_type(value), element)
    with torch.no_grad():
        rows = {name: (tensor, kept) for name, tensor, kept in _tensors(model, architecture, types)}
    if fused:
        for q in [name for name in rows if ".attn_q." in name]:
            of = [rows.pop(q.replace("attn_q.", f"attn_{part}.")) for part in "qkv"]
            rows[q.replace("attn_q.", "attn_qkv.")] = np.concatenate([tensor for tensor, _ in of]), of[0][1]
    for name, (tensor, kept) in rows.items():
        writer.add_tensor(name, tensor, raw_dtype=kept)
    for name, numbers in {**_rope_tensors(config), **tensors}.items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _tensors(
    model: transformers.PreTrainedModel, architecture: str, types: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray[Any, Any], gguf.GGMLQuantizationType]]:
    """Name, stored rows and type of each. The model gets the numbers that these stand for."""
    config = model.config
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        part = name.split(".")[-2]
        if part == "experts":
            yield from _expert_tensors(name, parameter, architecture, gguf.GGMLQuantizationType[types.get(part, "F32")])
            continue
        if name.endswith(".sinks"):
            yield f"blk.{name.split('.')[2]}.attn_sinks.weight", parameter.numpy(), gguf.GGMLQuantizationType.F32
            continue
        stored = gguf.GGMLQuantizationType[types.get(part, "F32") if parameter.dim() == 2 else "F32"]
        transposed = parameter.dim() == 2 and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        rows = parameter.T if transposed else parameter
        rows = rows + 1 if architecture in _PLUS_ONE and name.endswith("norm.weight") else rows
        data = gguf.quants.quantize(np.ascontiguousarray(rows.numpy()), stored)
        if stored != gguf.GGMLQuantizationType.F32:
            numbers = torch.from_numpy(gguf.quants.dequantize(data, stored))
            parameter.copy_(numbers.T if transposed else numbers.view(parameter.shape))
        if architecture in _BY_PAIRS and part in ("q_proj", "k_proj"):
            # Row (half, j) of a head becomes row (j, half).
            half = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            data = data.reshape(-1, 2, half // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if part == "query_key_value":
            # Rows (kv head; q, ..., q, k, v; j) become all of q, all of k, all of v.
            size = config.hidden_size // config.num_attention_heads
            by_head = data.reshape(_kv_heads(config), -1, size, *data.shape[1:])
            parts = by_head[:, :-2], by_head[:, -2:-1], by_head[:, -1:]
            data = np.concatenate([part.reshape(-1, *data.shape[1:]) for part in parts])
        bare = name.removeprefix("transformer.") if architecture == "bloom" else name
        yield names.get_name(bare, (".weight", ".bias")), data, stored


def _expert_tensors(
    name: str, parameter: torch.nn.Parameter, architecture: str, stored: gguf.GGMLQuantizationType
) -> Iterator[tuple[str, np.ndarray[Any, Any], gguf.GGMLQuantizationType]]:
    """Gate, up and down of all experts, [experts, n, k] each, or their biases. The parameter gets their numbers."""
    _, _, layer, _, _, part = name.split(".")
    gpt_oss, is_bias = architecture == "gpt-oss", part.endswith("_bias")
    stored = gguf.GGMLQuantizationType.F32 if is_bias else stored
    rows = parameter.transpose(1, 2) if gpt_oss and not is_bias else parameter  # a view, which is written to
    if part.startswith("down"):
        pieces = {"ffn_down_exps": rows}
    elif gpt_oss:
        pieces = {"ffn_gate_exps": rows[:, ::2], "ffn_up_exps": rows[:, 1::2]}
    else:
        pieces = dict(zip(("ffn_gate_exps", "ffn_up_exps"), rows.chunk(2, 1), strict=True))
    for theirs, piece in pieces.items():
        data = gguf.quants.quantize(np.ascontiguousarray(piece.numpy()), stored)
        piece.copy_(torch.from_numpy(gguf.quants.dequantize(data, stored)))
        yield f"blk.{layer}.{theirs}.{'bias' if is_bias else 'weight'}", data, stored


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else 4
    return getattr(config, "num_key_value_heads", config.num_attention_heads)


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    """What the converter writes, without "<architecture>.", as far as it is of use."""

    def first(*names: str, default: Any = None) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), default)

    head_dim = first("head_dim", default=config.hidden_size // config.num_attention_heads)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": first("max_position_embeddings", default=config.hidden_size),
        "embedding_length": config.hidden_size,
        "feed_forward_length": first("ffn_hidden_size", "intermediate_size", default=4 * config.hidden_size),
        "attention.head_count": config.num_attention_heads,
    }
    if architecture not in ("gpt2", "gptneox"):
        values["attention.head_count_kv"] = _kv_heads(config)
    for key, *ours in (("rms_", "rms_norm_eps"), ("", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")):
        if (eps := first(*ours)) is not None:
            values[f"attention.layer_norm_{key}epsilon"] = eps
    if "head_dim" in config.to_dict() and config.head_dim is not None:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in _BY_PAIRS:
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
    if architecture in ("phi2", "phi3", "gptneox"):
        values["rope.dimension_count"] = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    if architecture in (*_BY_PAIRS, *_MIXTURES, "qwen2", "qwen3", "olmo2", "starcoder2", "phi3", "gemma3"):
        rope = config.rope_parameters
        values |= _rope(rope.get("full_attention", rope))
        if "sliding_attention" in rope:
            values["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    for key, ours in _EXPERT_KEYS.items():
        if (number := first(*ours)) is not None:
            values[key] = number
    if architecture in ("phi3", "gemma2", "gemma3", "gpt-oss"):
        values["attention.sliding_window"] = config.sliding_window or 0
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if architecture in ("gemma2", "gemma3") and (cap := first(key)):
            values[key] = cap
    if architecture == "granite":
        values |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        values |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if architecture == "gptneox":
        values["use_parallel_residual"] = config.use_parallel_residual
    if architecture == "falcon":
        values["tensor_data_layout"] = "jploski"
    return values


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    values = {"rope.freq_base": float(rope["rope_theta"])}
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind in ("yarn", "longrope"):
        values["rope.scaling.original_context_length"] = original
    if kind == "longrope":
        scale = 64 / original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return values


def _rope_tensors(config: Any) -> dict[str, list[float]]:
    """The factors of rope scalings that are written as tensors, by the published formulas."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    if rope.get("rope_type") != "llama3":
        return {}
    half = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for j in range(half):
        wave = 2 * math.pi * rope["rope_theta"] ** (j / half)
        smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": factors}
