"""From the metadata of a GGUF file to a configuration as config.json has it.

What a file says is used, changes nothing, or is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.configuration import check_size
from llmpq.checkpoint.family import Config, Family, Key
from llmpq.checkpoint.gguf_forms import KEYS, NEUTRAL_KEYS, NORM_EPS, GgufForm
from llmpq.checkpoint.gguf_rope import rope_scaling
from llmpq.checkpoint.tensor_index import Index
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

_THETA = 10000.0  # llama.cpp's, where a file has none


def config_from_gguf(
    metadata: Mapping[str, Any], index: Index, factors: Mapping[str, list[float]], form: GgufForm, name: str
) -> dict[str, Any]:
    """The metadata of a GGUF file as transformers would write it in config.json. Raises UsageError.

    `index` has its tensors under their own names, `factors` what is in those of gguf_rope.FACTORS.
    """
    if metadata.get("general.type", "model") != "model":
        raise UsageError(f"{name}: general.type = {shown(metadata['general.type'])}; it is no model by itself")
    family, prefix = form.stored(index), f"{form.architecture}."
    own = {
        key.removeprefix(prefix): _one_value(value, key, name)
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    config: dict[str, Any] = {"model_type": family.name}
    for key, ours in _names(form, family).items():
        if key in own:
            config[ours] = _number(own.pop(key), f"{prefix}{key}", name)
    head_dim, heads = head_dim_of(config, family, name), family.config["num_heads"].of(config)
    for field, usual in (("num_kv_heads", heads), ("head_dim", head_dim)):  # not those of the family's defaults
        if field in family.config:
            config.setdefault(family.config[field].names[0], usual)
    neutral: dict[str, tuple[Any, ...] | None] = {
        **NEUTRAL_KEYS,
        "attention.value_length": (head_dim,),
        "attention.key_length": (head_dim,),
    }
    neutral |= dict.fromkeys(NORM_EPS.values())  # of norms that the family does not have
    neutral |= {"attention.head_count_kv": (heads,), "rope.dimension_count": (head_dim,)}
    neutral["feed_forward_length"] = (4 * (family.config["hidden_size"].of(config) or 0),)
    if family.rotates is not None:
        theta = own.pop("rope.freq_base", _THETA)
        config[family.rope_theta.names[0]] = _number(theta, f"{prefix}rope.freq_base", name)
        if family.partial_rotary is not None:
            dims = _number(own.pop("rope.dimension_count", head_dim), f"{prefix}rope.dimension_count", name)
            config[family.partial_rotary.names[0]] = _share(dims, head_dim)
        max_positions = family.config["max_positions"].of(config)
        if scaling := rope_scaling(own, factors, max_positions, prefix, name):
            config["rope_scaling"] = scaling
    _check_unread(own, neutral, head_dim, prefix, name)
    config |= form.derived(config, index)
    config |= _from_tensors(index, form, family, config)
    tokens = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    config["eos_token_id"] = list(dict.fromkeys(token for token in tokens if token is not None))
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return config


def _names(form: GgufForm, family: Family) -> dict[str, str]:
    """GGUF key -> transformers', of the numbers that are read."""
    fields = {**KEYS, NORM_EPS[family.fixed["norm"]]: "norm_eps"}
    return {**{key: family.config[of].names[0] for key, of in fields.items() if of in family.config}, **form.keys}


def _one_value(value: Any, key: str, name: str) -> Any:
    """A value of metadata, which may stand there once for each layer. UsageError if it differs between layers."""
    if value is None or isinstance(value, tuple):
        if not value or any(other != value[0] for other in value):
            raise UsageError(f"{name}: {key} = {shown(value)} is not supported; expected one value for all layers")
        return value[0]
    return value


def _number(value: Any, key: str, name: str) -> Any:
    """A number, or what is true or false. Raises UsageError."""
    if type(value) not in (int, float, bool) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{name}: {key} = {shown(value)} is no number above 0")
    return value


def _share(dims: float, head_dim: int) -> float:
    """What part of a head `dims` dimensions are: the number whose product with head_dim is cut to `dims`."""
    share = dims / head_dim
    return share if int(share * head_dim) == dims else math.nextafter(share, math.inf)


def _check_unread(
    own: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...] | None], head_dim: int, prefix: str, name: str
) -> None:
    """Raise UsageError for a key that was not read, and changes what is computed."""
    for key, value in own.items():
        allowed: tuple[Any, ...] | None = neutral.get(key, ())
        if key == "attention.scale":
            usual = head_dim**-0.5
            near = isinstance(value, float) and math.isclose(value, usual, rel_tol=1e-6)
            allowed = (0, value if near else usual)
        if allowed is not None and value not in allowed:
            only = f", only {' or '.join(map(repr, allowed))}" if allowed else ""
            raise UsageError(f"{name}: {prefix}{key} = {shown(value)} is not supported{only}")


def _from_tensors(index: Index, form: GgufForm, family: Family, config: Config) -> dict[str, Any]:
    """What is known by which tensors there are, and by their shapes."""
    found: dict[str, Any] = {family.config["tied_embeddings"].names[0]: "output.weight" not in index}
    vocabulary = family.config["vocab_size"]
    if vocabulary.of(config) is None and "token_embd.weight" in index:
        found[vocabulary.names[0]] = index["token_embd.weight"].shape[0]
    theirs = {name: gguf for gguf, name in form.layer_names(family).items()}
    for linear, key in family.biases.items():
        if isinstance(key, Key) and key.names[0] not in found:
            found[key.names[0]] = f"blk.0.{theirs[family.linears[linear][0]]}.bias" in index
    return found


def head_dim_of(config: Config, family: Family, name: str) -> int:
    """Rows of an attention head. Raises UsageError."""
    hidden, heads = (
        check_size(family.config[field].of(config) or 1, family.config[field].names[0], name)
        for field in ("hidden_size", "num_heads")
    )
    given = family.config["head_dim"].of(config) if "head_dim" in family.config else None
    return check_size(given or hidden // heads, "head_dim", name)
