"""From a configuration, config.json or the metadata of a GGUF file, to a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.families import FAMILIES, Family, GgufForm, family_of
from llmpq.spec import InvalidField, ModelSpec, RopeScaling, UsageError


def spec_from_config(config: Mapping[str, Any], name: str, content_hash: str) -> ModelSpec:
    """The ModelSpec of a transformers configuration. Raises UsageError, naming what is missing or not supported.

    A model stored in float32 is served with float16 as its 16-bit type. A sliding attention window limits
    `max_positions`: within it, windowed and full attention are the same.
    """
    family = family_of_config(config)
    for required, value in family.required.items():
        if config.get(required, value) != value:
            raise UsageError(f"{name}: {required} = {config[required]!r} is not supported, only {value!r}")
    fields: dict[str, Any] = dict(family.fixed)
    for field, key in family.config.items():
        value = config.get(key.name)
        fields[field] = key.default if value is None else value
        if fields[field] is None:
            raise UsageError(f"{name}: its configuration has no {key.name!r}")
    hidden, heads, activation = fields["hidden_size"], fields["num_heads"], fields["activation"]
    if activation not in ("silu", "relu", "gelu"):
        raise UsageError(f"{name}: the activation {activation!r} is not supported, only silu, relu and gelu")
    fields["max_positions"] = min(fields["max_positions"], config.get("sliding_window") or fields["max_positions"])
    theta, scaling = (None, None) if family.positions else _rope(config, name, fields["max_positions"])
    eos = config.get("eos_token_id")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch.")
    try:
        return ModelSpec.from_dict(
            {
                **fields,
                "name": name,
                "content_hash": content_hash,
                "num_kv_heads": config.get("num_key_value_heads") or heads,
                "head_dim": config.get("head_dim") or hidden // heads,
                "dtype": "float16" if stored == "float32" else stored,
                "embedding_dim": config.get("word_embed_proj_dim") or hidden if family.project_in else hidden,
                "final_norm": fields["norm_first"] and not config.get("_remove_final_layer_norm", False),
                "rope_theta": theta,
                "rope_scaling": None if scaling is None else scaling.to_dict(),
                "eos_token_ids": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
                "bos_token_id": config.get("bos_token_id"),
            }
        )
    except InvalidField as error:
        raise UsageError(f"{name}: {error}") from None


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that a transformers configuration is of. Raises UsageError."""
    return family_of(str((config.get("architectures") or [config.get("model_type")])[0]))


def _rope(config: Mapping[str, Any], name: str, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from the older or the newer form of transformers' configurations."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "linear", "llama3") or partial != 1.0:
        what = f"the rope scaling {kind!r}" if partial == 1.0 else f"partial_rotary_factor = {partial}"
        raise UsageError(f"{name}: {what} is not supported; of rope scalings, linear and llama3 are")
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or max_positions
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return theta, RopeScaling("llama3", float(rope["factor"]), low, high, int(original))
    except KeyError as error:
        raise UsageError(f"{name}: its {kind} rope scaling has no {error}") from None


def config_from_gguf(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metadata of a GGUF file as transformers would write it in config.json. Raises UsageError."""
    architecture = str(metadata.get("general.architecture"))
    family, form = gguf_form(architecture, name)
    config: dict[str, Any] = {"model_type": family.name}
    for key, gguf_key in form.config.items():
        if f"{architecture}.{gguf_key}" in metadata:
            config[key] = metadata[f"{architecture}.{gguf_key}"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        factor = metadata.get(f"{architecture}.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    head_dim = head_dim_of(config)
    rotated = metadata.get(f"{architecture}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UsageError(f"{name}: it rotates {rotated} of {head_dim} dimensions of a head, which is not supported")
    tokens = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    config["eos_token_id"] = list(dict.fromkeys(token for token in tokens if token is not None))
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return config


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Rows of an attention head."""
    return int(config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1))


def gguf_form(architecture: str, name: str) -> tuple[Family, GgufForm]:
    """The family of a GGUF file's "general.architecture", and how it is written there. Raises UsageError."""
    known = {family.gguf.architecture: (family, family.gguf) for family in FAMILIES.values() if family.gguf is not None}
    if architecture not in known:
        raise UsageError(f"{name}: the GGUF architecture {architecture!r} is not known; there is {', '.join(known)}")
    return known[architecture]
