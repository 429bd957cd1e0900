"""Tiny random models of every supported kind, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 272

LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Name -> configuration class, differences from the family's tiny configuration above.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-head-dim": ("LlamaConfig", {"head_dim": 16}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-rope-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "opt": ("OPTConfig", {}),
    "opt-untied": ("OPTConfig", {"tie_word_embeddings": False}),
    "opt-350m": ("OPTConfig", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-final-norm": ("OPTConfig", {"_remove_final_layer_norm": True}),
    "opt-gelu-no-bias": ("OPTConfig", {"activation_function": "gelu", "enable_bias": False}),
}

_GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
_GPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 8,
}
# Every other family, and its options. Windows are shorter than the sequences that tests use.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-window": ("MistralConfig", {"sliding_window": 6}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": 0}),
    "smollm3-window": (
        "SmolLM3Config",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": (
        "Gemma2Config",
        {**_GEMMA, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "sliding_window": 6, "sliding_window_pattern": 3}),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi": ("PhiConfig", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "pad_token_id": 0,
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 8,
            "sliding_window": 7,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "starcoder2": ("Starcoder2Config", {"num_key_value_heads": 1, "sliding_window": 6}),
    "llama-dynamic": (
        "LlamaConfig",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
        },
    ),
    "llama-no-window": ("LlamaConfig", {"sliding_window": 6}),  # a key that its code does not read
    "gemma3-no-cap": ("Gemma3TextConfig", {**_GEMMA, "attn_logit_softcapping": 1.0}),
    "phi-tied": ("PhiConfig", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("LlamaConfig", {"num_key_value_heads": 1, "vocab_size": 263}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB_SIZE, "eos_token_id": 1},
    ),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("GPTNeoXConfig", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "falcon": ("FalconConfig", {}),
    "falcon-sequential": ("FalconConfig", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon-new": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
_SPARSE_WINDOW = {"use_sliding_window": True, "sliding_window": 6}
_SPARSE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_GPT_OSS = {
    "intermediate_size": 36,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 6,
    "pad_token_id": 0,
    "rope_parameters": {**_YARN, "truncate": False},
}
# Mixtures of experts.
FORMS |= {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_SPARSE, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SPARSE, "head_dim": 16, "num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "gpt_oss": ("GptOssConfig", _GPT_OSS),
    "qwen2_moe-window": (
        "Qwen2MoeConfig",
        {**_SPARSE, "shared_expert_intermediate_size": 56, **_SPARSE_WINDOW, "max_window_layers": 2},
    ),
    "qwen3_moe-window": ("Qwen3MoeConfig", {**_SPARSE, "head_dim": 16, **_SPARSE_WINDOW, "max_window_layers": 2}),
}
_BASES: dict[str, dict[str, Any]] = {"OPTConfig": _OPT, "GPT2Config": {}, "BloomConfig": {}}
_BASES |= {"GPTNeoXConfig": _GPT, "FalconConfig": _GPT}


def family_of_kind(kind: str) -> str:
    """The model_type of one of KINDS or FORMS, as transformers has it."""
    name, _ = {**KINDS, **FORMS}[kind]
    model_type: str = getattr(transformers, name).model_type
    return model_type


def make_model(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> transformers.PreTrainedModel:
    """A model of one of KINDS or FORMS with random weights, norms and biases included."""
    name, differences = {**KINDS, **FORMS}[kind]
    config = getattr(transformers, name)(**{**_BASES.get(name, LLAMA), **differences, **overrides})
    return randomized(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)


def randomized(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A model with random weights, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Matrices far from the identity and norms far from 1, so that nothing left out goes unnoticed.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            elif name.endswith("_bias"):
                parameter.copy_(0.3 * noise)  # of all experts
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def save_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, shards: int = 1, **overrides: Any
) -> transformers.PreTrainedModel:
    """Write a model of KINDS or FORMS and a byte-level tokenizer to `folder`, as a hub model has it; return it."""
    model = make_model(kind, dtype, **overrides)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1024)
    save_tokenizer(folder)
    return model


def heads_in_turn(rows: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Rows of all queries, keys and values as gpt_neox, bloom and falcon store them: for each key head its queries, it,
    and its values."""
    parts = rows.unflatten(0, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads])
    return torch.cat([part.unflatten(0, (kv_heads, -1)) for part in parts], 1).flatten(0, 2)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are <s>, </s> and the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
