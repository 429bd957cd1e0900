"""The model families with mixtures of experts, as data beside families.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmpq.checkpoint.families import LLAMA, QWEN2, QWEN3, everywhere
from llmpq.checkpoint.family import Config, Key, Mixture, whole_number
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    architectures=("MixtralForCausalLM", "mixtral"),
    config={**LLAMA.config, "norm_eps": Key("rms_norm_eps", default=1e-5)},
    biases={},
    mixture=Mixture(
        count=Key("num_local_experts", "num_experts", default=8),
        per_token=Key("num_experts_per_tok", default=2),
        size=Key("intermediate_size"),
        normalized=True,
        tensors={
            "up": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
            "down": ("block_sparse_moe.experts.{}.w2",),
            "router": ("block_sparse_moe.gate",),
        },
    ),
    window=everywhere,
    rope_theta=Key("rope_theta", default=1000000.0),
    implements=("num_local_experts", "num_experts", "num_experts_per_tok"),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},  # llama.cpp writes them as llama
)


def _is_sparse(config: Config, layer: int) -> bool:
    others = config.get("mlp_only_layers") or []
    if not isinstance(others, list):
        raise UsageError(f"mlp_only_layers = {shown(others)} is no list")
    return layer not in others and (layer + 1) % whole_number(config, "decoder_sparse_step", 1) == 0


def _is_windowed_in_qwen2_moe(config: Config, layer: int) -> bool:
    early = layer < int(config.get("max_window_layers", 28))
    return bool(config.get("use_sliding_window")) and early and layer % 2 == 0


_QWEN_TENSORS: Mapping[str, tuple[str, ...]] = {
    "up": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "down": ("mlp.experts.{}.down_proj",),
    "router": ("mlp.gate",),
}
QWEN2_MOE = replace(
    QWEN2,
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM", "qwen2_moe"),
    biases={"qkv": Key("qkv_bias", default=True)},
    window=_is_windowed_in_qwen2_moe,
    mixture=Mixture(
        count=Key("num_experts", "num_local_experts", default=60),
        per_token=Key("num_experts_per_tok", default=4),
        size=Key("moe_intermediate_size", default=1408),
        normalized=Key("norm_topk_prob", default=False),
        tensors={
            **_QWEN_TENSORS,
            "shared_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            "shared_down": ("mlp.shared_expert.down_proj",),
            "shared_gate": ("mlp.shared_expert_gate",),
        },
        shared_size=Key("shared_expert_intermediate_size", default=5632),
        at=_is_sparse,
    ),
    implements=("num_local_experts", "num_experts", "num_experts_per_tok"),
    defaults={"num_key_value_heads": 16, "max_position_embeddings": 32768, "sliding_window": 4096},
)

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "qwen3_moe"),
    window=lambda config, i: bool(config.get("use_sliding_window")),
    mixture=Mixture(
        count=Key("num_experts", "num_local_experts", default=128),
        per_token=Key("num_experts_per_tok", default=8),
        size=Key("moe_intermediate_size", default=768),
        normalized=Key("norm_topk_prob", default=False),
        tensors=_QWEN_TENSORS,
        at=_is_sparse,
    ),
    implements=("num_local_experts", "num_experts", "num_experts_per_tok"),
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
)

GPT_OSS = replace(
    LLAMA,
    name="gpt_oss",
    architectures=("GptOssForCausalLM", "gpt_oss"),
    config={**LLAMA.config, "norm_eps": Key("rms_norm_eps", default=1e-5)},
    fixed={**LLAMA.fixed, "activation": "swiglu_clamped", "attention_sinks": True},
    biases={**dict.fromkeys(("qkv", "out"), Key("attention_bias", default=True)), "up": True, "down": True},
    window=lambda config, i: i % 2 == 0,
    mixture=Mixture(
        count=Key("num_local_experts", "num_experts", default=128),
        per_token=Key("num_experts_per_tok", "experts_per_token", default=4),
        size=Key("intermediate_size"),
        normalized=True,  # a softmax over the chosen
        tensors={
            "up": ("mlp.experts.gate_up_proj",),
            "down": ("mlp.experts.down_proj",),
            "router": ("mlp.router",),
        },
        router_bias=True,
        layout="columns",
        alternating=True,
        suffixes={"weight": "", "bias": "_bias"},
    ),
    rope={"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
    rope_theta=Key("rope_theta", default=150000.0),
    sinks="self_attn.sinks",
    implements=("num_local_experts", "num_experts", "num_experts_per_tok"),
    required={"hidden_act": ("silu",), "swiglu_limit": (7, 7.0), "swiglu_alpha": (1.702,)},
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
    },
)
