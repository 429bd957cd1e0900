"""The text model inside a model that sees images, too: its configuration, and its tensors among all there are.

Only text goes in here, and of text such a model computes what its text model does alone. Rotation along three axes
(M-RoPE, arXiv 2409.12191) is plain rotation then: a text token has one position on all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from llmpq.checkpoint.family import Config
from llmpq.checkpoint.known_families import family_of
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

T = TypeVar("T")

# "architectures" or "model_type" -> what the text model is where its configuration does not say.
AROUND: Mapping[str, str] = {
    **dict.fromkeys(("Gemma3ForConditionalGeneration", "gemma3"), "gemma3_text"),
    **dict.fromkeys(("Mistral3ForConditionalGeneration", "mistral3"), "mistral"),
    **dict.fromkeys(("LlavaForConditionalGeneration", "llava"), "llama"),
    **dict.fromkeys(("LlavaNextForConditionalGeneration", "llava_next"), "llama"),
    **dict.fromkeys(("LlavaOnevisionForConditionalGeneration", "llava_onevision"), "qwen2"),
    **dict.fromkeys(("InternVLForConditionalGeneration", "internvl"), "qwen2"),
    **dict.fromkeys(("Idefics3ForConditionalGeneration", "idefics3"), "llama"),
    **dict.fromkeys(("SmolVLMForConditionalGeneration", "smolvlm"), "llama"),
    **dict.fromkeys(("Qwen2VLForConditionalGeneration", "qwen2_vl"), "qwen2_vl_text"),
    **dict.fromkeys(("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"), "qwen2_5_vl_text"),
    **dict.fromkeys(("Qwen3VLForConditionalGeneration", "qwen3_vl"), "qwen3_vl_text"),
}
# The text models of such that are a family under another name.
_FAMILY = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        **others,
    }


_QWEN2_VL = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_window_layers": 80}
# transformers' own of what a configuration within another leaves out, beside what Family.defaults has.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _sizes(4096, 11008, 32, 32, 32000),
    "mistral": _sizes(4096, 14336, 32, 32, 32000),
    "qwen2": _sizes(4096, 22016, 32, 32, 151936),
    "qwen3": _sizes(4096, 22016, 32, 32, 151936),
    "gemma3_text": _sizes(2304, 9216, 26, 8, 262208, num_key_value_heads=4),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _sizes(8192, 29568, 80, 64, 152064, **_QWEN2_VL)),
    "qwen3_vl_text": _sizes(4096, 22016, 32, 32, 151936, max_position_embeddings=128000, rope_theta=500000.0),
}
_DTYPE = ("dtype", "torch_dtype")
_OF_BOTH = (*_DTYPE, "eos_token_id", "bos_token_id", "quantization_config", "compression_config")
# Beginnings of the names of its tensors -> of the text model's own. Files of Qwen's have these already.
_NAMES = {"model.language_model.": "model.", "model.text_model.": "model.", "language_model.": ""}
_LEFT_OUT = re.compile(
    r"(?:model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector|image_newline)(?:\..*)?"
)


def text_config(config: Config) -> dict[str, Any] | None:
    """The text model's configuration, as it has it alone; None if a configuration is that of a text model itself.

    Raises UsageError for a text model of an unknown family.
    """
    names = config.get("architectures") or config.get("model_type")
    kind = AROUND.get(str(names[0] if isinstance(names, list) else names))
    if kind is None:
        return None
    inner = config.get("text_config")
    if inner is None:  # its keys stand among the others
        inner = {key: value for key, value in config.items() if key not in ("model_type", "vision_config")}
    if not isinstance(inner, Mapping):
        raise UsageError(f"text_config = {shown(inner)} is no configuration of a text model")
    kind = str(inner.get("model_type") or kind)
    family = family_of(_FAMILY.get(kind, kind))
    if any(config.get(key) for key in _DTYPE):  # in either spelling; the text model may have the other
        inner = {key: value for key, value in inner.items() if key not in _DTYPE}
    found = {**DEFAULTS.get(kind, {}), **inner, "architectures": [family.architectures[0]]}
    found |= {key: config[key] for key in _OF_BOTH if config.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := found.get(key), Mapping):
            found[key] = _of_text(rope)
    tied = {of.get("tie_word_embeddings") for of in (config, inner)}
    if tied != {None}:
        found["tie_word_embeddings"] = True in tied
    return found


def _of_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What rotation along three axes is of text."""
    kinds = {key: "default" for key in ("type", "rope_type") if rope.get(key) == "mrope"}
    return {key: value for key, value in {**rope, **kinds}.items() if key not in ("mrope_section", "mrope_interleaved")}


def without_vision(index: Mapping[str, T], name: str) -> tuple[dict[str, T], tuple[str, ...]]:
    """The tensors but those of the vision part, and what to say of these, a line."""
    left_out = {tensor: found[1] for tensor in index if (found := _LEFT_OUT.fullmatch(tensor))}
    kept = {tensor: entry for tensor, entry in index.items() if tensor not in left_out}
    if not left_out:
        return kept, ()
    parts = ", ".join(sorted(set(left_out.values())))
    return kept, (f"{name}: its text model alone is used, for text; the vision part ({parts}) is left out",)


def named_as_text(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors under the names that the text model has for them; what it has no name for keeps its own."""
    return {_own_name(name): tensor for name, tensor in tensors.items()}


def _own_name(name: str) -> str:
    return next((own + name.removeprefix(given) for given, own in _NAMES.items() if name.startswith(given)), name)
