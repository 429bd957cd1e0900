"""The model families as data: what their configurations and tensors are called, and in which they differ.

No code asks for a family by name, so a new family is one more `Family`, which known_families.py lists. Those here have
RMSNorms and gated MLPs; layer_norm_families.py has those with LayerNorms, mixture_families.py those with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmpq.checkpoint.family import Config, Family, Key, number, whole_number
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

# Keys of config.json that change what is computed, unless a family `implements` them. Each has the values that change
# nothing; null is always one of them. Any other value is refused by name.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_emb"), (1,)
    ),
    **dict.fromkeys(("lm_head_multiplier", "attention_out_multiplier", "key_multiplier", "embedding_scale"), (1,)),
    **dict.fromkeys(("attention_multiplier", "attention_scale", "query_pre_attn_scalar", "softmax_scale"), ()),
    **dict.fromkeys(("scale_depth", "mup_multiplier", "clip_qkv", "attention_chunk_size", "kv_lora_rank"), ()),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"), (0,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), (0, 1)),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "num_nextn_predict_layers"), (0, 1)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "attn_output_gate", "scale_embedding"), (False,)),
    **dict.fromkeys(("alibi", "use_alibi", "parallel_attn", "use_parallel_residual", "rope_interleaved"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"), (False,)),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "apply_residual_connection_post_layernorm"), (False,)),
    **dict.fromkeys(("new_decoder_architecture",), (False,)),
    "no_rope_layers": ([],),
    "scale_attn_weights": (True,),
}

SIZES = {
    "num_layers": Key("num_hidden_layers"),
    "hidden_size": Key("hidden_size"),
    "num_heads": Key("num_attention_heads"),
    "intermediate_size": Key("intermediate_size"),
    "vocab_size": Key("vocab_size"),
    "max_positions": Key("max_position_embeddings", default=2048),
    "tied_embeddings": Key("tie_word_embeddings", default=False),
}
_RMS = {"norm": "rms", "gated_mlp": True, "final_norm": True, "position_offset": None}
_ATTENTION_BIAS = Key("attention_bias", default=False)


def everywhere(config: Config, layer: int) -> bool:
    """In all layers."""
    return True


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "llama"),
    config={
        **SIZES,
        "norm_eps": Key("rms_norm_eps", default=1e-6),
        "activation": Key("hidden_act", default="silu"),
        "num_kv_heads": Key("num_key_value_heads"),
        "head_dim": Key("head_dim"),
    },
    fixed=_RMS,
    biases={
        **dict.fromkeys(("qkv", "out"), _ATTENTION_BIAS),
        **dict.fromkeys(("up", "down"), Key("mlp_bias", default=False)),
    },
    table="model.embed_tokens",
    head="lm_head",
    layer="model.layers.{}.",
    linears={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    norms={"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    final_norm="model.norm",
    harmless=(r".*rotary_emb\.inv_freq", r"blk\.\d+\.attn_rot_embd\.weight"),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM", "mistral"),
    biases={},
    window=everywhere,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
)


def _is_windowed_in_qwen(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window")) and layer >= int(config.get("max_window_layers", 28))


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "qwen2"),
    biases={"qkv": True},
    window=_is_windowed_in_qwen,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
)

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM", "qwen3"),
    fixed={**_RMS, "qk_norm": "head"},
    biases=dict.fromkeys(("qkv", "out"), _ATTENTION_BIAS),
    norms={**LLAMA.norms, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    window=_is_windowed_in_qwen,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
)


def _has_rope_in_smollm3(config: Config, layer: int) -> bool:
    given = config.get("no_rope_layers")
    if not given:
        return bool((layer + 1) % whole_number(config, "no_rope_layer_interval", 4))
    if not isinstance(given, list) or layer >= len(given):
        raise UsageError(f"no_rope_layers = {shown(given)} does not say whether layer {layer} rotates")
    return bool(given[layer])


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    architectures=("SmolLM3ForCausalLM", "smollm3"),
    window=lambda config, i: bool(config.get("use_sliding_window")) and not _has_rope_in_smollm3(config, i),
    rotates=_has_rope_in_smollm3,
    rope_theta=Key("rope_theta", default=2000000.0),
    implements=("no_rope_layers",),
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True},
)


def _granite(config: Config) -> dict[str, Any]:
    """The stream is kept divided by the residual multiplier, which norms do not see but for their epsilon."""
    residual = number(config, "residual_multiplier", 1.0)
    return {
        "embedding_scale": number(config, "embedding_multiplier", 1.0) / residual,
        "norm_eps": number(config, "rms_norm_eps", 1e-6) / residual**2,
        "attention_scale": number(config, "attention_multiplier", 1.0),
        "logit_scale": 1.0 / number(config, "logits_scaling", 1.0),
    }


GRANITE = replace(
    LLAMA,
    name="granite",
    architectures=("GraniteForCausalLM", "granite"),
    derived=_granite,
    implements=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    architectures=("Olmo2ForCausalLM", "olmo2"),
    config={**LLAMA.config, "norm_eps": Key("rms_norm_eps", default=1e-5)},
    fixed={**_RMS, "block": "out", "qk_norm": "row"},
    biases=dict.fromkeys(("qkv", "out"), _ATTENTION_BIAS),
    norms={
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    architectures=("Phi3ForCausalLM", "phi3"),
    config={**LLAMA.config, "norm_eps": Key("rms_norm_eps", default=1e-5)},
    biases={},
    window=everywhere,
    linears={
        "qkv": ("self_attn.qkv_proj",),
        "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_up_proj",),
        "down": ("mlp.down_proj",),
    },
    partial_rotary=Key("partial_rotary_factor", default=1.0),
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
)


def _gemma(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"embedding_scale": whole_number(config, "hidden_size") ** 0.5}
    if config.get("query_pre_attn_scalar") is not None:
        found["attention_scale"] = number(config, "query_pre_attn_scalar") ** -0.5
    for field, key in (("attention_cap", "attn_logit_softcapping"), ("logit_cap", "final_logit_softcapping")):
        found[field] = number(config, key) if config.get(key) else None
    return found


GEMMA = replace(
    LLAMA,
    name="gemma",
    architectures=("GemmaForCausalLM", "gemma"),
    config={**LLAMA.config, "activation": Key("hidden_activation", default="gelu_pytorch_tanh")},
    derived=_gemma,
    biases=dict.fromkeys(("qkv", "out"), _ATTENTION_BIAS),
    norm_plus=1.0,
    # Its first configurations say "gelu", and have always meant the approximation.
    required={"hidden_act": ("gelu", "gelu_pytorch_tanh")},
    defaults={"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True},
)

_SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_GEMMA_KEYS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    architectures=("Gemma2ForCausalLM", "gemma2"),
    fixed={**_RMS, "block": "sandwich"},
    norms=_SANDWICH,
    window=lambda config, i: i % 2 == 0,
    implements=_GEMMA_KEYS,
    required={},
    defaults={
        **GEMMA.defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM", "gemma3_text"),
    fixed={**_RMS, "block": "sandwich", "qk_norm": "head"},
    norms={**_SANDWICH, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    derived=lambda config: {**_gemma(config), "attention_cap": None},  # which its attention does not use
    window=lambda config, i: bool((i + 1) % whole_number(config, "sliding_window_pattern", 6)),
    rope_theta=Key("rope_theta", default=1000000.0),
    defaults={
        **GEMMA.defaults,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_local_base_freq": 10000.0,
    },
)


# transformers' name of an activation -> ModelSpec's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    "swiglu_clamped": "swiglu_clamped",
}
