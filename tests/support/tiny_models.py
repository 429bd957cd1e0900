"""Tiny random models of every supported kind, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 272

_LLAMA = {
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
_LLAMA3_ROPE = {
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
    "llama-rope-llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "opt": ("OPTConfig", {}),
    "opt-untied": ("OPTConfig", {"tie_word_embeddings": False}),
    "opt-350m": ("OPTConfig", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-final-norm": ("OPTConfig", {"_remove_final_layer_norm": True}),
    "opt-gelu-no-bias": ("OPTConfig", {"activation_function": "gelu", "enable_bias": False}),
}


def make_model(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> transformers.PreTrainedModel:
    """A model of one of KINDS with random weights, norms and biases included."""
    name, differences = KINDS[kind]
    config = getattr(transformers, name)(**{**(_OPT if name == "OPTConfig" else _LLAMA), **differences, **overrides})
    generator = torch.Generator().manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices far from the identity and norms far from 1, so that nothing left out goes unnoticed.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.to(dtype)


def save_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, shards: int = 1, **overrides: Any
) -> transformers.PreTrainedModel:
    """Write a model of one of KINDS with a byte-level tokenizer to `folder`, as a hub model has them; return it."""
    model = make_model(kind, dtype, **overrides)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1024)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are <s>, </s> and the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
