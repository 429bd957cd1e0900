"""Tiny random models that see images, too, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tests.support.tiny_models import LLAMA, randomized, save_tokenizer

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "intermediate_size": 32}
_QWEN_VISION |= {"out_hidden_size": 48, "patch_size": 14}
_CLIP, _SIGLIP = ({**_VISION, "model_type": f"{kind}_vision_model"} for kind in ("clip", "siglip"))


def _rope(*sections: int, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [*sections], **others}}


_GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 6,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# Name -> configuration class; what the text model has beside LLAMA; the vision part; the rest.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3Config", _GEMMA3, _VISION, {"mm_tokens_per_image": 4}),
    "mistral3": (
        "Mistral3Config",
        {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
        {**_VISION, "model_type": "pixtral"},
        {"tie_word_embeddings": False},
    ),
    "llava": ("LlavaConfig", {"model_type": "llama"}, _CLIP, {}),
    "llava_next": ("LlavaNextConfig", {"model_type": "mistral", "sliding_window": 6}, _CLIP, {}),
    "llava_onevision": ("LlavaOnevisionConfig", {"model_type": "qwen2", "tie_word_embeddings": True}, _SIGLIP, {}),
    "internvl": ("InternVLConfig", {"model_type": "qwen2"}, _VISION, {"tie_word_embeddings": False}),
    "idefics3": ("Idefics3Config", {"model_type": "llama"}, _VISION, {}),
    "smolvlm": ("SmolVLMConfig", {"model_type": "llama"}, _VISION, {}),
    "qwen2_vl": ("Qwen2VLConfig", _rope(1, 3, 2), _QWEN_VISION, {}),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", _rope(2, 2, 2), _QWEN_VISION, {}),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {"head_dim": 16, **_rope(4, 2, 2, mrope_interleaved=True)},
        {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        {},
    ),
}


def save_multimodal(folder: Path, kind: str) -> transformers.PreTrainedModel:
    """Write a model of KINDS with random weights, and a byte-level tokenizer, to `folder`; return it."""
    name, text, vision, others = KINDS[kind]
    config = getattr(transformers, name)(text_config={**LLAMA, **text}, vision_config=vision, **others)
    model = randomized(transformers.AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model
