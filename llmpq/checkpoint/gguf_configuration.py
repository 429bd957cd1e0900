"""From the metadata of a GGUF file to a configuration as config.json has it.

What a file says is used, changes nothing, or is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.configuration import check_size
from llmpq.checkpoint.families import FAMILIES, GGUF_NEUTRAL
from llmpq.checkpoint.family import Config, Family, GgufForm
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown


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
    heads = check_size(config.get("num_attention_heads") or 1, "num_attention_heads", name)
    hidden = check_size(config.get("hidden_size") or 1, "hidden_size", name)
    return check_size(config.get("head_dim") or hidden // heads, "head_dim", name)


def gguf_form(architecture: str, name: str) -> tuple[Family, GgufForm]:
    """The family of a GGUF file's "general.architecture", and how it is written there. Raises UsageError."""
    known = {family.gguf.architecture: (family, family.gguf) for family in FAMILIES.values() if family.gguf is not None}
    if architecture not in known:
        raise UsageError(
            f"{name}: the GGUF architecture {shown(architecture)} is not known; there is {', '.join(known)}"
        )
    return known[architecture]
