"""A ModelSpec for tests that need no weights."""

from __future__ import annotations

from typing import Any

from llmpq.spec import LayerKind, ModelSpec, Rope


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
        "final_norm": True,
        "position_offset": None,
        "layer_kinds": (LayerKind(rope=Rope(1e4, 16)),),
        "eos_token_ids": (2,),
        "bos_token_id": None,
    }
    return ModelSpec(**{**values, **changes})
