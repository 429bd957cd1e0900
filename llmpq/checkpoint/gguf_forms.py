"""How llama.cpp writes the families in GGUF files. What it calls a part of the decoder is one name in all of them.

Names are those of gguf.constants; what is stored in another order or form than transformers has it is known from
llama.cpp's conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmpq.checkpoint.families import GEMMA, GEMMA2, GEMMA3, GRANITE, LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3
from llmpq.checkpoint.family import Config, Family
from llmpq.checkpoint.layer_norm_families import BLOOM, FALCON, GPT2, GPT_NEOX, PHI, STARCODER2
from llmpq.checkpoint.mixture_families import GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

# GGUF key -> ModelSpec field. Keys come after "<architecture>.".
KEYS: Mapping[str, str] = {
    "block_count": "num_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_positions",
}
NORM_EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}

# Metadata that changes what is computed, unless it is read, with the values that change nothing. A key that stands here
# with None changes nothing, whatever its value is. One that neither stands here nor is read is refused by name.
NEUTRAL_KEYS: Mapping[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "leading_dense_block_count"), (0,)),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "rope.scaling.attn_factor"), (0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.sliding_window", "pooling_type", "nextn_predict_layers"), (0,)),
    **dict.fromkeys(("rope.scaling.yarn_log_multiplier", "attention.temperature_scale"), (0,)),
    "rope.scaling.yarn_ext_factor": (1,),
    "attention.causal": (True,),
    **dict.fromkeys(("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")),
    **dict.fromkeys(("rope.dimension_sections", "n_deepstack_layers")),  # of images
}

_WHOLE = {  # of a Family, in which the name of a tensor stands -> GGUF name
    "table": "token_embd",
    "positions": "position_embd",
    "embedding_norm": "token_embd_norm",
    "final_norm": "output_norm",
    "head": "output",
}
_LINEARS = {  # linear, and of how many tensors its family makes it -> their GGUF names
    ("qkv", 1): ("attn_qkv",),
    ("qkv", 3): ("attn_q", "attn_k", "attn_v"),
    ("out", 1): ("attn_output",),
    ("up", 1): ("ffn_up",),
    ("up", 2): ("ffn_gate", "ffn_up"),
    ("down", 1): ("ffn_down",),
}
_EXPERTS = {  # part of a mixture of experts -> the GGUF names of its tensors, which hold all experts
    "up": ("ffn_gate_exps", "ffn_up_exps"),
    "down": ("ffn_down_exps",),
    "router": ("ffn_gate_inp",),
    "shared_up": ("ffn_gate_shexp", "ffn_up_shexp"),
    "shared_down": ("ffn_down_shexp",),
    "shared_gate": ("ffn_gate_inp_shexp",),
}
_NORMS = {
    "attention_norm": "attn_norm",
    "attention_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_out_norm": "post_ffw_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


def _nothing(config: Config, tensors: Collection[str]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class GgufForm:
    """One architecture of GGUF files."""

    architecture: str
    family: Family  # as transformers has it
    interleaved: bool = False  # rows of a head of q and k are ordered for the rotation of neighbouring pairs
    keys: Mapping[str, str] = field(default_factory=dict)  # GGUF key -> transformers', beside KEYS
    # What a configuration has, and metadata does not or not in such a way; from the rest of it and the tensors' names.
    derived: Callable[[Config, Collection[str]], Mapping[str, Any]] = _nothing
    layer: Mapping[str, str] = field(default_factory=dict)  # GGUF name -> transformers', of a layer, beside the usual
    differences: Mapping[str, Any] = field(default_factory=dict)  # fields of the family that are others here

    def stored(self, tensors: Collection[str]) -> Family:
        """The family as a file with these tensors has it.

        Matrices and the rows of qkv are in plain order, norms as they multiply. Some have one tensor of q, k and v
        where transformers has three.
        """
        family = replace(self.family, grouped_qkv=False, transposed=False, norm_plus=0.0, **self.differences)
        if family.mixture is not None:
            family = replace(family, mixture=family.mixture.in_gguf)
        if "blk.0.attn_qkv.weight" in tensors and not self.interleaved:
            family = replace(family, linears={**family.linears, "qkv": family.linears["qkv"][:1]})
        return family

    def names(self, family: Family) -> dict[str, str]:
        """GGUF name -> transformers', of what is in no layer, without ".weight"."""
        return {theirs: name for attribute, theirs in _WHOLE.items() if (name := getattr(family, attribute))}

    def layer_names(self, family: Family) -> dict[str, str]:
        """The same within a layer, without "blk.N." and what transformers has in its place."""
        mixed = {} if family.mixture is None else family.mixture.tensors
        linears = {
            theirs: name
            for linear, names in family.linears.items()
            if linear not in mixed  # no layer has both
            for theirs, name in zip(_LINEARS[linear, len(names)], names, strict=True)
        }
        experts = {
            theirs: name for part, names in mixed.items() for theirs, name in zip(_EXPERTS[part], names, strict=True)
        }
        others = self.layer.values()
        norms = {_NORMS[part]: name for part, name in family.norms.items() if name not in others}
        return {**linears, **experts, **norms, **self.layer}

    def linear_names(self, family: Family, mixed: bool) -> dict[str, tuple[str, ...]]:
        """Fused linear -> the names of its tensors within a layer, without "blk.N."; `mixed`: of a layer of experts."""
        experts = {} if family.mixture is None or not mixed else family.mixture.tensors
        dense = {
            linear: _LINEARS[linear, len(names)] for linear, names in family.linears.items() if linear not in experts
        }
        return {**dense, **{part: _EXPERTS[part] for part in experts}}

    def numbers(self, family: Family) -> dict[str, str]:
        """GGUF key -> transformers', of the metadata that is read, but for that of rotary embeddings."""
        fields = {**KEYS, NORM_EPS[family.fixed["norm"]]: "norm_eps"}
        known = {key: family.config[of].names[0] for key, of in fields.items() if of in family.config}
        return {**known, **self.keys}

    def is_interleaved(self, part: str) -> bool:
        """Whether that is so of a layer's tensor, by its name in transformers."""
        return self.interleaved and part in self.family.linears["qkv"][:2]


def _window(config: Config, tensors: Collection[str]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window")}


def _gemma_of_27b(layers: int) -> Callable[[Config, Collection[str]], dict[str, Any]]:
    """llama.cpp knows the scale of attention by the number of layers: only the largest model has one of its own."""

    def derived(config: Config, tensors: Collection[str]) -> dict[str, Any]:
        per_head = config["hidden_size"] // config["num_attention_heads"]
        largest = config.get("num_hidden_layers") == layers
        return {"query_pre_attn_scalar": per_head if largest else config.get("head_dim") or per_head}

    return derived


def _gemma3(config: Config, tensors: Collection[str]) -> dict[str, Any]:
    return {**_gemma_of_27b(62)(config, tensors), **_window(config, tensors)}


def _granite(config: Config, tensors: Collection[str]) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    usual = {"attention_multiplier": head_dim**-0.5}
    usual |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    return {key: config.get(key) or value for key, value in usual.items()}


def _falcon(config: Config, tensors: Collection[str]) -> dict[str, Any]:
    norms = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
    return {"new_decoder_architecture": True, "num_ln_in_parallel_attn": norms}


def _with_norm(normalized: bool) -> Callable[[Config, Collection[str]], dict[str, Any]]:
    """llama.cpp knows by the architecture whether the weights of a token's experts add up to 1."""
    return lambda config, tensors: {"norm_topk_prob": config.get("norm_topk_prob", normalized)}


def _gpt_oss(config: Config, tensors: Collection[str]) -> dict[str, Any]:
    """Its yarn does not round to whole pairs, which no file says."""
    scaling = config.get("rope_scaling")
    return {"rope_scaling": {**scaling, "truncate": False}} if scaling and scaling["rope_type"] == "yarn" else {}


_MIXTURE = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size", "expert_weights_norm": "norm_topk_prob"}
_SLIDING = {"attention.sliding_window": "sliding_window"}
_CAPS = {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")}

FORMS: Mapping[str, GgufForm] = {
    form.architecture: form
    for form in (
        GgufForm("llama", LLAMA, interleaved=True, keys=_SLIDING),
        GgufForm("mistral3", MISTRAL, interleaved=True, keys=_SLIDING, derived=_window),
        GgufForm("smollm3", SMOLLM3, interleaved=True),
        GgufForm("qwen2", QWEN2),
        GgufForm("qwen3", QWEN3),
        GgufForm("qwen2vl", QWEN2),  # the text model alone; what sees images is a file of its own
        GgufForm("qwen3vl", QWEN3),
        GgufForm(
            "qwen2moe",
            QWEN2_MOE,
            keys={
                **_MIXTURE,
                **_EXPERT_SIZE,
                "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            },
            derived=_with_norm(False),
        ),
        GgufForm("qwen3moe", QWEN3_MOE, keys={**_MIXTURE, **_EXPERT_SIZE}, derived=_with_norm(True)),
        GgufForm(
            "gpt-oss",
            GPT_OSS,
            keys={**_SLIDING, **_MIXTURE, "expert_feed_forward_length": "intermediate_size"},
            derived=_gpt_oss,
            layer={"post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
            differences={"sinks": "self_attn.sinks.weight"},
        ),
        GgufForm("gemma", GEMMA),
        GgufForm("gemma2", GEMMA2, keys={**_SLIDING, **_CAPS}, derived=_gemma_of_27b(46)),
        GgufForm(
            "gemma3",
            GEMMA3,
            keys={
                **_SLIDING,
                "attention.sliding_window_pattern": "sliding_window_pattern",
                "rope.freq_base_swa": "rope_local_base_freq",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            derived=_gemma3,
        ),
        GgufForm("phi2", PHI),
        GgufForm("phi3", PHI3, keys=_SLIDING),
        GgufForm(
            "granite",
            GRANITE,
            interleaved=True,
            keys={
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
            derived=_granite,
        ),
        GgufForm("olmo2", OLMO2),
        GgufForm("starcoder2", STARCODER2, keys=_SLIDING),
        GgufForm("gpt2", GPT2),
        GgufForm("gptneox", GPT_NEOX, keys={"use_parallel_residual": "use_parallel_residual"}),
        GgufForm("bloom", BLOOM),
        GgufForm(
            "falcon",
            FALCON,
            derived=_falcon,
            layer={"attn_norm_2": "ln_attn"},  # attn_norm is that of the MLP, where there are two
            differences={
                "norms": {"attention_norm": "input_layernorm"},
                "parallel_norms": {"attention_norm": "ln_attn", "mlp_norm": "input_layernorm"},
            },
        ),
    )
}


# llama.cpp writes these as llama, too.
_MISTRAL = GgufForm("llama", MISTRAL, interleaved=True, keys=_SLIDING)
_MIXTRAL = GgufForm("llama", MIXTRAL, interleaved=True, keys={**_SLIDING, **_MIXTURE})


def gguf_form(metadata: Mapping[str, Any], tensors: Collection[str], name: str) -> GgufForm:
    """That of a GGUF file's "general.architecture" with these tensors. Raises UsageError."""
    architecture = metadata.get("general.architecture")
    form = FORMS.get(str(architecture))
    if form is None:
        known = ", ".join(FORMS)
        raise UsageError(f"{name}: the GGUF architecture {shown(architecture)} is not known; there are {known}")
    if architecture == "llama" and "blk.0.ffn_gate_inp.weight" in tensors:
        return _MIXTRAL
    return _MISTRAL if metadata.get("llama.attention.sliding_window") else form
