"""The model families with LayerNorms, as data beside families.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmpq.checkpoint.families import LLAMA, SIZES, everywhere
from llmpq.checkpoint.family import Config, Family, Key, whole_number

_LAYER_NORM = {"norm": "layer", "gated_mlp": False, "final_norm": True, "position_offset": None}
_ALL_BIASES: dict[str, Key | bool] = dict.fromkeys(("qkv", "out", "up", "down"), True)

STARCODER2 = replace(
    LLAMA,
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM", "starcoder2"),
    config={
        **LLAMA.config,
        "norm_eps": Key("norm_epsilon", default=1e-5),
        "activation": Key("hidden_act", default="gelu_pytorch_tanh"),
    },
    fixed=_LAYER_NORM,
    window=everywhere,
    biases=dict.fromkeys(("qkv", "out", "up", "down"), Key("use_bias", default=True)),
    linears={**LLAMA.linears, "up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
    defaults={"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True},
)

PHI = replace(
    LLAMA,
    name="phi",
    architectures=("PhiForCausalLM", "phi"),
    config={
        **LLAMA.config,
        "norm_eps": Key("layer_norm_eps", default=1e-5),
        "activation": Key("hidden_act", default="gelu_new"),
    },
    fixed={**_LAYER_NORM, "block": "parallel_one_norm"},
    biases={**_ALL_BIASES, "head": True},
    partial_rotary=Key("partial_rotary_factor", default=0.5),
    linears={**LLAMA.linears, "out": ("self_attn.dense",), "up": ("mlp.fc1",), "down": ("mlp.fc2",)},
    norms={"attention_norm": "input_layernorm"},
    final_norm="model.final_layernorm",
)

GPT_NEOX = replace(
    PHI,
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM", "gpt_neox"),
    config={**PHI.config, "activation": Key("hidden_act", default="gelu")},
    fixed=_LAYER_NORM,
    derived=lambda config: {"block": "parallel" if config.get("use_parallel_residual", True) else "pre"},
    biases={**_ALL_BIASES, **dict.fromkeys(("qkv", "out"), Key("attention_bias", default=True))},
    rope_theta=Key("rope_theta", "rotary_emb_base", default=10000.0),
    partial_rotary=Key("partial_rotary_factor", "rotary_pct", default=0.25),
    table="gpt_neox.embed_in",
    head="embed_out",
    layer="gpt_neox.layers.{}.",
    linears={
        "qkv": ("attention.query_key_value",),
        "out": ("attention.dense",),
        "up": ("mlp.dense_h_to_4h",),
        "down": ("mlp.dense_4h_to_h",),
    },
    norms={"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    final_norm="gpt_neox.final_layer_norm",
    grouped_qkv=True,
    implements=("use_parallel_residual",),
    required={"use_parallel_residual": (True, False)},
    harmless=(r".*rotary_emb\.inv_freq", r".*\.attention\.(bias|masked_bias)"),
)


def _falcon(config: Config) -> dict[str, Any]:
    heads = whole_number(config, "num_attention_heads")
    kv_heads = whole_number(config, "num_kv_heads", heads)
    size = {"intermediate_size": config.get("ffn_hidden_size") or 4 * whole_number(config, "hidden_size")}
    if config.get("new_decoder_architecture"):
        two = config.get("num_ln_in_parallel_attn") in (None, 2)
        return {**size, "block": "parallel" if two else "parallel_one_norm", "num_kv_heads": kv_heads}
    parallel = config.get("parallel_attn", True)
    return {
        **size,
        "block": "parallel_one_norm" if parallel else "pre",
        "num_kv_heads": 1 if config.get("multi_query", True) else heads,
    }


FALCON = replace(
    GPT_NEOX,
    name="falcon",
    architectures=("FalconForCausalLM", "falcon"),
    config={
        **GPT_NEOX.config,
        "intermediate_size": Key("ffn_hidden_size"),
        "num_kv_heads": Key("num_kv_heads"),
        "norm_eps": Key("layer_norm_epsilon", default=1e-5),
        "activation": Key("activation", default="gelu"),
        "tied_embeddings": Key("tie_word_embeddings", default=True),
    },
    derived=_falcon,
    biases=dict.fromkeys(("qkv", "out", "up", "down"), Key("bias", default=False)),
    rope_theta=Key("rope_theta", default=10000.0),
    partial_rotary=None,
    table="transformer.word_embeddings",
    head="lm_head",
    layer="transformer.h.{}.",
    linears={
        "qkv": ("self_attention.query_key_value",),
        "out": ("self_attention.dense",),
        "up": ("mlp.dense_h_to_4h",),
        "down": ("mlp.dense_4h_to_h",),
    },
    parallel_norms={"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
    final_norm="transformer.ln_f",
    implements=("parallel_attn", "new_decoder_architecture"),
    harmless=(),
)


def _width(config: Config, other: str) -> int:
    """hidden_size, which may be called otherwise."""
    return whole_number(config, other if config.get(other) else "hidden_size")


BLOOM = replace(
    FALCON,
    name="bloom",
    architectures=("BloomForCausalLM", "bloom"),
    config={
        **SIZES,
        "num_layers": Key("n_layer", "num_hidden_layers"),
        "hidden_size": Key("hidden_size", "n_embed"),
        "num_heads": Key("n_head", "num_attention_heads"),
        "max_positions": Key("seq_length", default=2**17),  # nothing in it ends with some position
        "norm_eps": Key("layer_norm_epsilon", default=1e-5),
        "tied_embeddings": Key("tie_word_embeddings", default=True),
    },
    fixed={**_LAYER_NORM, "activation": "gelu_pytorch_tanh", "alibi": True, "embedding_norm": True},
    derived=lambda config: {"intermediate_size": 4 * _width(config, "n_embed")},
    biases=_ALL_BIASES,
    rotates=None,
    parallel_norms={},
    embedding_norm="transformer.word_embeddings_layernorm",
    implements=(),
)

GPT2 = replace(
    BLOOM,
    name="gpt2",
    architectures=("GPT2LMHeadModel", "gpt2"),
    config={
        **BLOOM.config,
        "hidden_size": Key("n_embd", "hidden_size"),
        "intermediate_size": Key("n_inner"),
        "max_positions": Key("n_positions", "max_position_embeddings", default=1024),
        "activation": Key("activation_function", default="gelu_new"),
    },
    fixed={**_LAYER_NORM, "position_offset": 0},
    derived=lambda config: {} if config.get("n_inner") else {"intermediate_size": 4 * _width(config, "n_embd")},
    table="transformer.wte",
    linears={"qkv": ("attn.c_attn",), "out": ("attn.c_proj",), "up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
    norms={"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    positions="transformer.wpe",
    embedding_norm="",
    grouped_qkv=False,
    transposed=True,
    harmless=(r".*\.attn\.(bias|masked_bias)",),
)

OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM", "opt"),
    config={
        **SIZES,
        "intermediate_size": Key("ffn_dim"),
        "activation": Key("activation_function", default="relu"),
        "tied_embeddings": Key("tie_word_embeddings", default=True),
        "embedding_dim": Key("word_embed_proj_dim"),
    },
    fixed={"norm": "layer", "norm_eps": 1e-5, "gated_mlp": False, "position_offset": 2},
    derived=lambda config: {
        "block": "pre" if config.get("do_layer_norm_before", True) else "post",
        "final_norm": config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False),
    },
    biases=dict.fromkeys(("qkv", "out", "up", "down"), Key("enable_bias", default=True)),
    rotates=None,
    table="model.decoder.embed_tokens",
    head="lm_head",
    layer="model.decoder.layers.{}.",
    linears={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.out_proj",),
        "up": ("fc1",),
        "down": ("fc2",),
    },
    norms={"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"},
    final_norm="model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    required={"layer_norm_elementwise_affine": (True,)},
    harmless=(r".*decoder\.version",),
)
