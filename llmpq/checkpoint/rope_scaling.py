"""From what a configuration says of rotary embeddings and their scaling to a Rope.

Formulas: linear, arXiv 2306.15595; llama3, arXiv 2407.21783 (section 3.4.2) and its published configuration; yarn,
arXiv 2309.00071 (sections 3.2 to 3.4); longrope, arXiv 2402.13753; dynamic NTK as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmpq.spec import Rope, UsageError
from llmpq.spec.ranges import shown

_ALWAYS = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
# Keys of each kind of scaling, beside _ALWAYS. "finetuned" changes nothing.
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": set(),
    "dynamic": set(),
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "yarn": _YARN,
    "longrope": {"short_factor", "long_factor", "short_mscale", "long_mscale", "attention_factor"},
    "factors": {"factors"},  # what a GGUF file has as a tensor
}
_ALIASES = {"su": "longrope"}


class RopeReader:
    """Reads the Rope of a configuration whose heads have `head_dim` dimensions. Every error is a UsageError."""

    def __init__(self, config: Mapping[str, Any], name: str, head_dim: int, max_positions: int) -> None:
        self._config, self._name, self._head_dim, self._max_positions = config, name, head_dim, max_positions

    def read(self, rope: Mapping[str, Any], theta: Any, partial: Any) -> Rope:
        """That of `rope`, a rope_scaling or rope_parameters.

        theta, and what part of a head rotates, are for where it says nothing of them; None: a whole head always does.
        """
        factor = rope.get("factor")
        kind = str(rope.get("rope_type") or rope.get("type") or ("default" if factor is None else "linear"))
        kind = _ALIASES.get(kind, kind)
        if kind not in _KEYS:
            known = ", ".join(kind for kind in _KEYS if kind not in ("default", "factors"))
            raise UsageError(f"{self._name}: the rope scaling {shown(kind)} is not supported; there are {known}")
        if kind == "default" and factor not in (None, 1):
            raise UsageError(f"{self._name}: its rope scaling has a factor, {shown(factor)}, but the type 'default'")
        for key, value in rope.items():
            if value is not None and key not in _ALWAYS | _KEYS[kind] | {"finetuned"}:
                raise UsageError(f"{self._name}: {key!r} in a rope scaling of type {kind!r} is not supported")
        scaling = _Scaling(self, rope, kind)
        theta, key = scaling.number("rope_theta", theta), "partial_rotary_factor"
        part = self._config.get(key) if rope.get(key) is None else rope[key]
        if partial is None and part not in (None, 1):
            raise UsageError(f"{self._name}: {key} = {shown(part)} is not supported, only 1")
        dims = int(self._head_dim * scaling.number(key, partial or 1.0))
        if dims < 2 or dims % 2 or dims > self._head_dim:
            raise UsageError(
                f"{self._name}: {dims} dimensions, of a head_dim of {self._head_dim}, are no pairs that rotate"
            )
        inverse = [theta ** (-2 * j / dims) for j in range(dims // 2)]
        return Rope(theta, dims, **_FORMS[kind](scaling, inverse, theta))


class _Scaling:
    """The numbers of a scaling."""

    def __init__(self, reader: RopeReader, rope: Mapping[str, Any], kind: str) -> None:
        self._reader, self._rope, self._kind = reader, rope, kind
        self.max_positions: int = reader._max_positions

    def get(self, key: str) -> Any:
        return self._rope.get(key)

    def number(self, key: str, default: Any = None) -> float:
        value = self._rope.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < math.inf:
            but = "" if value is None else f" as a positive number, but {shown(value)}"
            raise UsageError(f"{self._reader._name}: its {self._kind} rope scaling has no {key!r}{but}")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self._rope.get(key)
        if not isinstance(values, list | tuple) or any(type(value) not in (int, float) for value in values):
            raise UsageError(f"{self._reader._name}: its {self._kind} rope scaling has no list of numbers {key!r}")
        return tuple(map(float, values))

    @property
    def original_positions(self) -> int:
        key = "original_max_position_embeddings"
        value = self._rope.get(key) or self._reader._config.get(key) or self.max_positions
        if type(value) is not int or value < 1:
            raise UsageError(f"{self._reader._name}: {key} = {shown(value)} of its rope is no positive whole number")
        return value

    @property
    def factor(self) -> float:
        return self.number("factor", self.max_positions / self.original_positions)


def _default(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    return {}


def _linear(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    return {"factors": (scaling.number("factor"),) * len(inverse)}


def _factors(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    return {"factors": scaling.numbers("factors")}


def _llama3(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    """Only waves longer than the original context are slowed down, with a gradual transition."""
    factor, original = scaling.number("factor"), scaling.original_positions
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        raise UsageError(f"{scaling._reader._name}: its high_freq_factor is {high}, with a low_freq_factor of {low}")

    def divisor(frequency: float) -> float:
        kept = min(1.0, max(0.0, (original * frequency / (2 * math.pi) - low) / (high - low)))
        return 1 / ((1 - kept) / factor + kept)

    return {"factors": tuple(map(divisor, inverse))}


def _yarn(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    """Pairs that turn often within the original context stay, those that turn less than once are slowed down."""
    dims, factor, original = 2 * len(inverse), scaling.factor, scaling.original_positions

    def pair_of(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.number("beta_fast", 32)), pair_of(scaling.number("beta_slow", 1))
    if scaling.get("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high if high != low else high + 0.001

    def divisor(j: int) -> float:
        slowed = min(1.0, max(0.0, (j - low) / (high - low)))
        return 1 / (slowed / factor + (1 - slowed))

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scales = scaling.get("mscale"), scaling.get("mscale_all_dim")
    usual = temperature(scales[0]) / temperature(scales[1]) if all(scales) else temperature(1.0)
    return {
        "factors": tuple(divisor(j) for j in range(len(inverse))),
        "magnitude": scaling.number("attention_factor", usual),
    }


def _longrope(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    """One factor for each pair, found by search; others for long sequences."""
    original, factor = scaling.original_positions, scaling.factor
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = scaling.number("attention_factor", usual)
    return {
        "factors": scaling.numbers("short_factor"),
        "long_factors": scaling.numbers("long_factor"),
        "original_positions": original,
        "magnitude": scaling.number("short_mscale", magnitude),
        "long_magnitude": scaling.number("long_mscale", magnitude),
    }


def _dynamic(scaling: _Scaling, inverse: list[float], theta: float) -> dict[str, Any]:
    return {"dynamic": scaling.number("factor"), "original_positions": scaling.max_positions}


_FORMS: Mapping[str, Callable[[_Scaling, list[float], float], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}
