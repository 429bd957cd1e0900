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
from llmpq.checkpoint.gguf_metadata import OwnMetadata
from llmpq.checkpoint.gguf_rope import scaling_of
from llmpq.checkpoint.tensor_index import Index
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

_NEEDED = "block_count", "embedding_length", "attention.head_count"
_THETA = 10000.0  # llama.cpp's, where a file has none


def config_from_gguf(
    metadata: Mapping[str, Any], index: Index, factors: Mapping[str, list[float]], form: GgufForm, name: str
) -> dict[str, Any]:
    """The metadata of a GGUF file as transformers would write it in config.json. Raises UsageError.

    `index` has its tensors under their own names, `factors` what is in those of gguf_rope.FACTORS.
    """
    if metadata.get("general.type", "model") != "model":
        raise UsageError(f"{name}: general.type = {shown(metadata['general.type'])}; it is no model by itself")
    family, own = form.stored(index), OwnMetadata(metadata, form.architecture, name)
    config: dict[str, Any] = {"model_type": family.name}
    sizes = _take_numbers(own, form, family, config)
    head_dim, heads = head_dim_of(config, family, name), family.config["num_heads"].of(config)
    for field, usual in (("num_kv_heads", heads), ("head_dim", head_dim)):  # not those of the family's defaults
        if field in family.config:
            config.setdefault(family.config[field].names[0], usual)
    if family.rotates is not None:
        config |= _rotation(own, factors, family, config, head_dim)
    own.check_rest(_neutral(own, head_dim, heads))
    config |= form.derived(config, index)
    derived = family.derived(config)
    for key, value in sizes.items():
        own.check(key, value, (derived.get(KEYS[key], value),))
    config |= _from_tensors(index, form, family, config)
    config["eos_token_id"] = _end_tokens(metadata)
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return config


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer: those that the file names, and those whose texts do; Phi-3 and Gemma name one.

    gpt-oss answers in several messages. <|end|> ends only one of them, as llama.cpp has it, too.
    """
    by_text = metadata.get("tokenizer.ggml.tokens") or {}
    tokens = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    inner = by_text.get("<|end|>") if {"<|return|>", "<|call|>"} <= by_text.keys() else None
    return [token for token in dict.fromkeys([*tokens, *by_text.values()]) if token not in (None, inner)]


def _take_numbers(own: OwnMetadata, form: GgufForm, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Take the numbers that are read into a configuration; those of KEYS are returned by their keys, too."""
    for key in _NEEDED:
        if key not in own:
            raise own.missing(key)
    sizes = {key: own.get(key) for key in KEYS if key in own}
    for key, ours in form.numbers(family).items():
        if key in own:
            config[ours] = own.take_number(key)
    return sizes


def _rotation(
    own: OwnMetadata, factors: Mapping[str, list[float]], family: Family, config: Config, head_dim: int
) -> dict[str, Any]:
    """What a configuration says of rotary embeddings."""
    found = {family.rope_theta.names[0]: own.take_number("rope.freq_base", _THETA)}
    if family.partial_rotary is not None:
        share = own.take_number("rope.dimension_count", head_dim) / head_dim
        if int(share * head_dim) < round(share * head_dim):  # so that it is cut to the same number
            share = math.nextafter(share, math.inf)
        found[family.partial_rotary.names[0]] = share
    scaling = scaling_of(own, factors, family.config["max_positions"].of(config))
    return {**found, "rope_scaling": scaling} if scaling else found


def _neutral(own: OwnMetadata, head_dim: int, heads: int) -> dict[str, tuple[Any, ...] | None]:
    """Key -> the values that change nothing, of those that a family may leave unread; None: all."""
    usual = head_dim**-0.5
    scale = own.get("attention.scale")
    near = isinstance(scale, float) and math.isclose(scale, usual, rel_tol=1e-6)
    return {
        **NEUTRAL_KEYS,
        **dict.fromkeys(NORM_EPS.values()),  # of norms that the family does not have
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), (head_dim,)),
        "attention.head_count_kv": (heads,),
        "attention.scale": (0, scale if near else usual),
    }


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
        check_size(family.config[field].of(config), family.config[field].names[0], name)
        for field in ("hidden_size", "num_heads")
    )
    given = family.config["head_dim"].of(config) if "head_dim" in family.config else None
    return check_size(given or hidden // heads, "head_dim", name)
