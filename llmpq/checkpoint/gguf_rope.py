"""What a GGUF file says of rotary embeddings, as a rope_scaling of config.json.

llama.cpp's keys stand for its own formula: a file's attention factor is multiplied by yarn's usual one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.gguf_metadata import OwnMetadata
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

FREQS, LONG, SHORT = FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def scaling_of(own: OwnMetadata, tensors: Mapping[str, list[float]], max_positions: Any) -> dict[str, Any] | None:
    """The scaling by a file's own keys, which are taken, and by those of the tensors FACTORS that it has.

    As in llama.cpp, a factor is linear without a type, and the original context the whole one without its length.
    Raises UsageError.
    """
    factor, kind = _factor(own), own.get("rope.scaling.type")
    scaled = factor not in (None, 0, 1)
    original = {
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length") or max_positions,
    }
    factors = {tensor: numbers for tensor, numbers in tensors.items() if any(number != 1 for number in numbers)}
    if factors and (kind == "yarn" or scaled):
        raise UsageError(f"{own.name}: {min(factors)} beside a rope.scaling of its own is not supported")
    if kind == "yarn" and not scaled:
        raise own.missing("rope.scaling.factor", beside="rope.scaling.type")
    own.take("rope.scaling.type")
    if LONG in factors or SHORT in factors or kind == "longrope":
        found = {"rope_type": "longrope", "short_factor": factors.get(SHORT), "long_factor": factors.get(LONG)}
        return {**found, **original, "attention_factor": own.take_number("rope.scaling.attn_factor", 0) or 1.0}
    if FREQS in factors:
        return {"rope_type": "factors", "factors": factors[FREQS]}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, **original, **_yarn(own, factor)}
    if kind == "none" or (kind in (None, "linear") and not scaled):
        return None
    return {"rope_type": kind or "linear", "factor": factor}


def _factor(own: OwnMetadata) -> Any:
    """The factor, which has an older key."""
    older = own.take("rope.scale_linear")
    factor = own.take("rope.scaling.factor", older)
    for key, value in (("rope.scale_linear", older), ("rope.scaling.factor", factor)):
        if value is not None and (type(value) not in (int, float) or not 0 <= value < math.inf or value != factor):
            other = f" beside a rope.scaling.factor of {shown(factor)}" if value != factor else ""
            raise UsageError(f"{own.name}: its {key} = {shown(value)}{other} is not supported")
    return factor


def _yarn(own: OwnMetadata, factor: float) -> dict[str, Any]:
    turns = {key: own.take(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    attention = [own.take_number(f"rope.scaling.{key}", 0) or 1.0 for key in ("attn_factor", "yarn_attn_factor")]
    if attention != [1.0, 1.0]:
        turns["attention_factor"] = math.prod(attention) * (1.0 + 0.1 * math.log(factor))
    return {key: value for key, value in turns.items() if value}
