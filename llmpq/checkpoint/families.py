"""The model families as data: what their configurations and tensors are called, and in which they differ.

A family says where each number of a ModelSpec stands in config.json, and the name of every tensor. No code asks for a
family by name, so a new family is one more `Family`. Names are those of transformers' own classes; a GGUF file's names
and keys are translated to them on reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmpq.spec import LinearShape, ModelSpec, UsageError
from llmpq.spec.ranges import shown


@dataclass(frozen=True)
class Key:
    """A value of config.json; `default` is transformers' own for an absent one, None: it must be there."""

    name: str
    default: Any = None


@dataclass(frozen=True)
class GgufForm:
    """How llama.cpp writes a family. Keys of `config` come after "<architecture>.", names of `layer` after "blk.N."."""

    architecture: str
    config: Mapping[str, str]  # transformers' key -> GGUF key
    tensors: Mapping[str, str]  # GGUF name -> transformers' name, without ".weight" and ".bias"
    layer: Mapping[str, str]  # the same inside a layer
    interleaved: tuple[str, ...]  # linears whose rows within a head are ordered for rotation of neighbouring pairs
    biases: Mapping[str, str]  # transformers' key that says whether there is one -> a linear that has it then


@dataclass(frozen=True)
class Family:
    """One family of decoders. Tensor names come without ".weight" and ".bias"."""

    name: str
    architectures: tuple[str, ...]  # as "architectures" or "model_type" of config.json spells them
    config: Mapping[str, Key]  # ModelSpec field -> where it stands
    fixed: Mapping[str, Any]  # ModelSpec field -> its value in the whole family
    table: str
    head: str
    layer: str  # prefix of a layer's tensors, with {} for its number
    linears: Mapping[str, tuple[str, ...]]  # fused linear -> its parts, whose rows follow each other
    attention_norm: str
    mlp_norm: str
    final_norm: str
    positions: str = ""  # learned positions
    project_in: str = ""
    project_out: str = ""
    required: Mapping[str, Any] = field(default_factory=dict)  # config key -> the only value that is implemented
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' own of keys that are absent
    harmless: tuple[str, ...] = ()  # patterns of tensors that a checkpoint may have, and that are computed instead
    gguf: GgufForm | None = None


# Keys of config.json that change what is computed, in ways that no family here has. Each has the values that change
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
    "no_rope_layers": ([],),
}

# The same for the metadata of a GGUF file, without the "<architecture>." that its keys begin with. A key that stands
# here with None changes nothing, whatever its value is. A key that neither stands here nor in the family's GgufForm is
# refused by name.
GGUF_NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "leading_dense_block_count"), (0,)),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "rope.scaling.attn_factor"), (0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "pooling_type", "nextn_predict_layers"), (0,)),
    "attention.causal": (True,),
    **dict.fromkeys(("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")),
}


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "llama"),
    config={
        "num_layers": Key("num_hidden_layers"),
        "hidden_size": Key("hidden_size"),
        "num_heads": Key("num_attention_heads"),
        "intermediate_size": Key("intermediate_size"),
        "vocab_size": Key("vocab_size"),
        "max_positions": Key("max_position_embeddings", 2048),
        "norm_eps": Key("rms_norm_eps", 1e-6),
        "activation": Key("hidden_act", "silu"),
        "attention_bias": Key("attention_bias", False),
        "mlp_bias": Key("mlp_bias", False),
        "tied_embeddings": Key("tie_word_embeddings", False),
    },
    fixed={"norm": "rms", "norm_first": True, "gated_mlp": True, "position_offset": 0},
    table="model.embed_tokens",
    head="lm_head",
    layer="model.layers.{}.",
    linears={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="model.norm",
    harmless=(r".*rotary_emb\.inv_freq", r"blk\.\d+\.attn_rot_embd\.weight"),
    gguf=GgufForm(
        architecture="llama",
        config={
            "num_hidden_layers": "block_count",
            "hidden_size": "embedding_length",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "intermediate_size": "feed_forward_length",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "sliding_window": "attention.sliding_window",
        },
        tensors={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        layer={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        interleaved=("self_attn.q_proj", "self_attn.k_proj"),
        biases={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"},
    ),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM", "mistral"),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    gguf=None,  # llama.cpp writes them as llama
)

OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM", "opt"),
    config={
        "num_layers": Key("num_hidden_layers"),
        "hidden_size": Key("hidden_size"),
        "num_heads": Key("num_attention_heads"),
        "intermediate_size": Key("ffn_dim"),
        "vocab_size": Key("vocab_size"),
        "max_positions": Key("max_position_embeddings", 2048),
        "activation": Key("activation_function", "relu"),
        "attention_bias": Key("enable_bias", True),
        "mlp_bias": Key("enable_bias", True),
        "tied_embeddings": Key("tie_word_embeddings", True),
        "norm_first": Key("do_layer_norm_before", True),
    },
    fixed={"norm": "layer", "norm_eps": 1e-5, "gated_mlp": False, "position_offset": 2},
    table="model.decoder.embed_tokens",
    head="lm_head",
    layer="model.decoder.layers.{}.",
    linears={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.out_proj",),
        "up": ("fc1",),
        "down": ("fc2",),
    },
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    final_norm="model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    required={"layer_norm_elementwise_affine": True},
    harmless=(r".*decoder\.version",),
)

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, OPT)}

# transformers' name of an activation -> ModelSpec's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def family_of(architecture: str) -> Family:
    """The family of an "architectures" or "model_type" entry, or of a GGUF "general.architecture". UsageError."""
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family
    known = [a for family in FAMILIES.values() for a in family.architectures if a.endswith("CausalLM")]
    raise UsageError(f"the architecture {shown(architecture)} is not known; there are {', '.join(known)}")


Part = tuple[str, str]  # unit, and tensor within it: ("layer.3", "qkv.weight"), ("head", "norm.bias")


def decoder_tensors(spec: ModelSpec, family: Family) -> dict[Part, dict[str, tuple[int, ...]]]:
    """What a checkpoint of this model must have: part of the decoder -> name and shape of its tensors in the file.

    The rows of a part's tensors follow each other: those of a fused linear are several. Parts are `table`, `positions`
    and `project` of the embedding, the linears, `attention_norm` and `mlp_norm` of a layer, and `norm`, `project` and
    `table` of the head. A tied head's table is the embedding's.
    """
    tensors: dict[Part, dict[str, tuple[int, ...]]] = {}

    def add_linear(unit: str, part: str, names: Sequence[str], shape: LinearShape) -> None:
        rows = [shape.n // len(names)] * len(names)
        if part == "qkv":
            rows = [spec.num_heads * spec.head_dim, spec.kv_dim, spec.kv_dim]
        tensors[unit, f"{part}.weight"] = {f"{name}.weight": (n, shape.k) for name, n in zip(names, rows, strict=True)}
        if shape.bias:
            tensors[unit, f"{part}.bias"] = {f"{name}.bias": (n,) for name, n in zip(names, rows, strict=True)}

    def add_norm(unit: str, part: str, name: str) -> None:
        for kind in ("weight", "bias") if spec.norm == "layer" else ("weight",):
            tensors[unit, f"{part}.{kind}"] = {f"{name}.{kind}": (spec.hidden_size,)}

    add_linear("embedding", "table", [family.table], spec.table)
    if family.positions:
        positions = (spec.max_positions + spec.position_offset, spec.hidden_size)
        tensors["embedding", "positions.weight"] = {f"{family.positions}.weight": positions}
    for unit, name in (("embedding", family.project_in), ("head", family.project_out)):
        if projection := spec.projection(unit):
            add_linear(unit, "project", [name], projection)
    for i in range(spec.num_layers):
        unit, prefix = f"layer.{i}", family.layer.format(i)
        add_norm(unit, "attention_norm", prefix + family.attention_norm)
        for part, shape in spec.layer_linears.items():
            add_linear(unit, part, [prefix + name for name in family.linears[part]], shape)
        add_norm(unit, "mlp_norm", prefix + family.mlp_norm)
    if spec.final_norm:
        add_norm("head", "norm", family.final_norm)
    add_linear("head", "table", [family.table if spec.tied_embeddings else family.head], spec.table)
    return tensors
