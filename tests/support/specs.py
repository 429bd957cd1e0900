"""A ModelSpec for tests that need no weights."""

from __future__ import annotations

from typing import Any

from llmpq.spec import ModelSpec


def tiny_model(**changes: Any) -> ModelSpec:
    values = {
        "name": "tiny",
        "content_hash": "hash",
        "num_layers": 3,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_positions": 128,
        "dtype": "bfloat16",
        "tied_embeddings": False,
        "embedding_dim": 64,
        "norm_eps": 1e-5,
        "norm": "rms",
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_first": True,
        "final_norm": True,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "position_offset": 0,
        "eos_token_ids": (2,),
        "bos_token_id": None,
    }
    return ModelSpec(**{**values, **changes})
