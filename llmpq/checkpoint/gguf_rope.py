"""What a GGUF file says of rotary embeddings, as a rope_scaling of config.json.

llama.cpp's keys stand for its own formula: a file's attention factor is multiplied by yarn's usual one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmpq.spec import UsageError
from llmpq.spec.ranges import shown

FREQS, LONG, SHORT = FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def rope_scaling(
    own: dict[str, Any], factors: Mapping[str, list[float]], max_positions: Any, prefix: str, name: str
) -> dict[str, Any] | None:
    """The scaling by a file's own keys, which are taken from them, and by its tensors FACTORS. Raises UsageError.

    As in llama.cpp a factor is linear without a type, and the original context the whole one.
    """
    kind = own.pop("rope.scaling.type", None)
    older = own.pop("rope.scale_linear", None)
    factor = own.pop("rope.scaling.factor", older)
    if older not in (None, factor):
        raise UsageError(
            f"{name}: {prefix}rope.scale_linear = {shown(older)}, but rope.scaling.factor = {shown(factor)}"
        )
    factors = {tensor: numbers for tensor, numbers in factors.items() if any(number != 1 for number in numbers)}
    scaled = factor not in (None, 0, 1)
    original = own.get("rope.scaling.original_context_length") or max_positions
    if factors and (kind == "yarn" or scaled):
        raise UsageError(f"{name}: {min(factors)} beside a rope.scaling of its own is not supported")
    if LONG in factors or SHORT in factors or kind == "longrope":
        return {
            "rope_type": "longrope",
            "short_factor": factors.get(SHORT),
            "long_factor": factors.get(LONG),
            "original_max_position_embeddings": original,
            "attention_factor": _positive(own, "rope.scaling.attn_factor", 1.0, prefix, name),
        }
    if FREQS in factors:
        return {"rope_type": "factors", "factors": factors[FREQS]}
    if kind == "yarn":
        if not scaled:
            raise UsageError(f"{name}: {prefix}rope.scaling.type = 'yarn', but no {prefix}rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, **_yarn(own, factor, original, prefix, name)}
    if kind == "none" or (kind in (None, "linear") and not scaled):
        return None
    return {"rope_type": kind or "linear", "factor": factor}


def _yarn(own: dict[str, Any], factor: Any, original: Any, prefix: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"original_max_position_embeddings": original}
    for key in ("beta_fast", "beta_slow"):
        if value := own.pop(f"rope.scaling.yarn_{key}", None):
            found[key] = value
    given = [_positive(own, f"rope.scaling.{key}", 1.0, prefix, name) for key in ("attn_factor", "yarn_attn_factor")]
    if given != [1.0, 1.0] and type(factor) in (int, float) and 0 < factor < math.inf:
        found["attention_factor"] = math.prod(given) * (1.0 + 0.1 * math.log(factor))
    return found


def _positive(own: dict[str, Any], key: str, default: float, prefix: str, name: str) -> float:
    """A number above 0, which is taken from a file's own keys; 0 is as if it were not there. Raises UsageError."""
    value = own.pop(key, 0) or default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UsageError(f"{name}: {prefix}{key} = {shown(value)} is no number above 0")
    return float(value)
