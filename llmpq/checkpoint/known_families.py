"""All model families, by the names that configurations have for them."""

from __future__ import annotations

from collections.abc import Mapping

from llmpq.checkpoint.families import GEMMA, GEMMA2, GEMMA3, GRANITE, LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3
from llmpq.checkpoint.family import Family
from llmpq.checkpoint.layer_norm_families import BLOOM, FALCON, GPT2, GPT_NEOX, OPT, PHI, STARCODER2
from llmpq.checkpoint.mixture_families import GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

FAMILIES = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, SMOLLM3, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, GRANITE, OLMO2, STARCODER2),
        *(GPT2, GPT_NEOX, OPT, BLOOM, FALCON, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS),
    )
}

_LATENT = "attends to a compressed latent (kv_lora_rank) of keys and values, which the KV cache here does not hold"
_CHUNKED = "attends within chunks, and scales what goes into its experts"
_CROSSED = "has layers that attend to images"
_BOTH_WAYS = "attends to a prompt in both directions"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("Llama4ForConditionalGeneration", "Llama4ForCausalLM", "llama4", "llama4_text"), _CHUNKED),
    **dict.fromkeys(("MllamaForConditionalGeneration", "mllama", "mllama_text_model"), _CROSSED),
    **dict.fromkeys(("PaliGemmaForConditionalGeneration", "paligemma"), _BOTH_WAYS),
}


def family_of(architecture: str) -> Family:
    """The family of an "architectures" or "model_type" entry. UsageError."""
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family
    known = ", ".join(family.architectures[0] for family in FAMILIES.values())
    if architecture in _REFUSED:
        raise UsageError(
            f"the architecture {shown(architecture)} is not supported: it {_REFUSED[architecture]}; there are {known}"
        )
    raise UsageError(f"the architecture {shown(architecture)} is not known; there are {known}")
