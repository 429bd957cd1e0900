"""From a configuration, config.json or the metadata of a GGUF file, to a ModelSpec.

What a configuration says is used, changes nothing, or is refused by name: a key that is passed over might be one that
changes the results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.families import ACTIVATIONS, FAMILIES, GGUF_NEUTRAL, NEUTRAL, Family, GgufForm, family_of
from llmpq.spec import InvalidField, ModelSpec, RopeScaling, UsageError
from llmpq.spec.ranges import shown

Config = Mapping[str, Any]

_ROPE_KEYS = {
    *("rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor", "finetuned"),
}


def spec_from_config(config: Config, name: str, content_hash: str) -> ModelSpec:
    """The ModelSpec of a transformers configuration. Raises UsageError, naming what is missing or not supported.

    A model stored in float32 is served with float16 as its 16-bit type. A sliding attention window limits
    `max_positions`: within it, windowed and full attention are the same.
    """
    family = family_of_config(config)
    config = {**family.defaults, **config}
    _check_neutral(config, family, name)
    fields: dict[str, Any] = dict(family.fixed)
    for field, key in family.config.items():
        value = config.get(key.name)
        fields[field] = key.default if value is None else value
        if fields[field] is None:
            raise UsageError(f"{name}: its configuration has no {key.name!r}")
    for field in ("hidden_size", "num_heads", "max_positions"):  # what is calculated with below
        _check_size(fields[field], family.config[field].name, name)
    hidden, heads, activation = fields["hidden_size"], fields["num_heads"], fields["activation"]
    if str(activation) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UsageError(f"{name}: the activation {shown(activation)} is not supported; there are {known}")
    theta, scaling = (None, None) if family.positions else _rope(config, name, fields["max_positions"])
    if window := _size(config, "sliding_window", 0, name):
        fields["max_positions"] = min(fields["max_positions"], window)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch.")
    try:
        return ModelSpec.from_dict(
            {
                **fields,
                "name": name,
                "content_hash": content_hash,
                "activation": ACTIVATIONS[activation],
                "num_kv_heads": _size(config, "num_key_value_heads", heads, name),
                "head_dim": _size(config, "head_dim", hidden // heads, name),
                "dtype": "float16" if stored == "float32" else stored,
                "embedding_dim": _size(config, "word_embed_proj_dim", hidden, name) if family.project_in else hidden,
                "final_norm": fields["norm_first"] and not config.get("_remove_final_layer_norm", False),
                "rope_theta": theta,
                "rope_scaling": None if scaling is None else scaling.to_dict(),
                "eos_token_ids": _token_ids(config.get("eos_token_id")),
                "bos_token_id": config.get("bos_token_id"),
            }
        )
    except InvalidField as error:
        raise UsageError(f"{name}: its configuration cannot be used: {error}") from None


def _check_neutral(config: Config, family: Family, name: str) -> None:
    """Raise UsageError for a key that changes what is computed in a way that is not implemented."""
    required = {key: (value,) for key, value in family.required.items()}
    for key, neutral in {**NEUTRAL, **required}.items():
        if config.get(key) is not None and config[key] not in neutral:
            only = f", only {' or '.join(map(repr, neutral))}" if neutral else ""
            raise UsageError(f"{name}: {key} = {shown(config[key])} is not supported{only}")
    kinds = config.get("layer_types") or []
    windowed = ["sliding_attention"] if config.get("sliding_window") else []
    if not isinstance(kinds, list) or any(kind not in ["full_attention", *windowed] for kind in kinds):
        raise UsageError(f"{name}: layer_types = {shown(kinds)} is not supported")


def _size(config: Config, key: str, default: int, name: str) -> int:
    """A positive whole number of the configuration; `default` where it is absent, null or 0. Raises UsageError."""
    value = config.get(key) or default
    return _check_size(value, key, name) if value else 0


def _check_size(value: Any, key: str, name: str) -> int:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name}: {key} = {shown(value)} is no positive whole number")
    return value


def _token_ids(value: Any) -> list[Any]:
    """End-of-sequence tokens, which may be none, one or a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def family_of_config(config: Config) -> Family:
    """The family that a transformers configuration is of. Raises UsageError."""
    architectures = config.get("architectures") or config.get("model_type")
    return family_of(str(architectures[0] if isinstance(architectures, list) else architectures))


def _rope(config: Config, name: str, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from the older or the newer form of transformers' configurations."""
    older, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    rope = newer or older
    if not isinstance(rope, dict) or (older and newer and older != newer):
        raise UsageError(
            f"{name}: rope_scaling = {shown(older)} and rope_parameters = {shown(newer)} are not supported"
        )
    unknown = [key for key, value in rope.items() if key not in _ROPE_KEYS and value is not None]
    factor, partial = rope.get("factor"), rope.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    kind = rope.get("rope_type") or rope.get("type") or ("default" if factor is None else "linear")
    if kind not in ("default", "linear", "llama3"):
        raise UsageError(f"{name}: the rope scaling {shown(kind)} is not supported; linear and llama3 are")
    if kind == "default" and factor not in (None, 1):
        raise UsageError(f"{name}: its rope scaling has a factor, {shown(factor)}, but the type 'default'")
    if partial not in (None, 1):
        raise UsageError(f"{name}: partial_rotary_factor = {shown(partial)} is not supported")
    if unknown:
        raise UsageError(f"{name}: {unknown[0]!r} in a rope scaling of type {kind!r} is not supported")

    def number(key: str, default: Any = None) -> float:
        value = rope.get(key) or default
        if type(value) not in (int, float):
            but = "" if value is None else f" as a number, but {shown(value)}"
            raise UsageError(f"{name}: its {kind} rope scaling has no {key!r}{but}")
        return float(value)

    theta = number("rope_theta", config.get("rope_theta") or 10000.0)
    try:
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", number("factor"))
        key = "original_max_position_embeddings"
        original = _check_size(rope.get(key) or config.get(key) or max_positions, f"{key} of the rope scaling", name)
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return theta, RopeScaling("llama3", number("factor"), low, high, original)
    except InvalidField as error:
        raise UsageError(f"{name}: its {kind} rope scaling cannot be used: {error}") from None


def config_from_gguf(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metadata of a GGUF file as transformers would write it in config.json. Raises UsageError."""
    architecture = str(metadata.get("general.architecture"))
    family, form = gguf_form(architecture, name)
    if metadata.get("general.type", "model") != "model":
        raise UsageError(f"{name}: general.type = {shown(metadata['general.type'])}; it is no model by itself")
    prefix = f"{architecture}."
    own = {
        key.removeprefix(prefix): _one_value(value, key, name)
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    config: dict[str, Any] = {"model_type": family.name}
    for config_key, key in form.config.items():
        if key in own:
            value = config[config_key] = own.pop(key)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise UsageError(f"{name}: {prefix}{key} = {shown(value)} is no number above 0")
    if scaling := _gguf_scaling(own, prefix, name):
        config["rope_scaling"] = scaling
    head_dim = head_dim_of(config, name)
    neutral = {**GGUF_NEUTRAL, "rope.dimension_count": (head_dim,), "attention.value_length": (head_dim,)}
    scale = own.pop("attention.scale", 0)
    if scale and not (isinstance(scale, float) and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
        raise UsageError(f"{name}: {prefix}attention.scale = {shown(scale)} is not supported, only {head_dim**-0.5}")
    for key, value in own.items():
        allowed = neutral.get(key, ())
        if allowed is not None and value not in allowed:
            only = f", only {' or '.join(map(repr, allowed))}" if allowed else ""
            raise UsageError(f"{name}: {prefix}{key} = {shown(value)} is not supported{only}")
    tokens = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    config["eos_token_id"] = list(dict.fromkeys(token for token in tokens if token is not None))
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return config


def _one_value(value: Any, key: str, name: str) -> Any:
    """A value of metadata, which may stand there once for each layer. UsageError if it differs between layers."""
    if value is None or isinstance(value, tuple):
        if not value or any(other != value[0] for other in value):
            raise UsageError(f"{name}: {key} = {shown(value)} is not supported; expected one value for all layers")
        return value[0]
    return value


def _gguf_scaling(own: dict[str, Any], prefix: str, name: str) -> dict[str, Any] | None:
    """The rope scaling among a file's own keys, which are taken from them; as in llama.cpp, linear without a type."""
    kind = own.pop("rope.scaling.type", "linear")
    older = own.pop("rope.scale_linear", None)
    factor = own.pop("rope.scaling.factor", older)
    if older not in (None, factor):
        raise UsageError(
            f"{name}: {prefix}rope.scale_linear = {shown(older)}, but rope.scaling.factor = {shown(factor)}"
        )
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    return {"rope_type": kind, "factor": factor}


def head_dim_of(config: Config, name: str) -> int:
    """Rows of an attention head. Raises UsageError."""
    heads, hidden = _size(config, "num_attention_heads", 1, name), _size(config, "hidden_size", 1, name)
    return _check_size(_size(config, "head_dim", hidden // heads, name), "head_dim", name)


def gguf_form(architecture: str, name: str) -> tuple[Family, GgufForm]:
    """The family of a GGUF file's "general.architecture", and how it is written there. Raises UsageError."""
    known = {family.gguf.architecture: (family, family.gguf) for family in FAMILIES.values() if family.gguf is not None}
    if architecture not in known:
        raise UsageError(
            f"{name}: the GGUF architecture {shown(architecture)} is not known; there is {', '.join(known)}"
        )
    return known[architecture]
