"""From config.json to a ModelSpec.

What a configuration says is used, changes nothing, or is refused by name: a key that is passed over might be one that
changes the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmpq.checkpoint.families import ACTIVATIONS, NEUTRAL
from llmpq.checkpoint.family import Config, Family, Key
from llmpq.checkpoint.known_families import family_of
from llmpq.checkpoint.rope_scaling import RopeReader
from llmpq.spec import Experts, InvalidField, LayerKind, ModelSpec, Rope, UsageError
from llmpq.spec.layers import shortest_period
from llmpq.spec.ranges import shown

_FULL, _WINDOWED = "full_attention", "sliding_attention"  # as "layer_types" has them


def spec_from_config(config: Config, name: str, content_hash: str) -> ModelSpec:
    """The ModelSpec of a transformers configuration. Raises UsageError, naming what is missing or not supported.

    A model stored in float32 is served with float16 as its 16-bit type.
    """
    family = family_of_config(config)
    config = {**family.defaults, **config}
    _check_neutral(config, family, name)
    fields = _fields(config, family, name)
    for field in ("num_layers", "hidden_size", "num_heads", "max_positions"):  # what is calculated with below
        check_size(fields[field], family.config[field].names[0], name)
    hidden, heads, activation = fields["hidden_size"], fields["num_heads"], fields["activation"]
    if str(activation) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UsageError(f"{name}: the activation {shown(activation)} is not supported; there are {known}")
    head_dim = fields["head_dim"] or hidden // heads
    ropes = _Ropes(config, family, name, check_size(head_dim, "head_dim", name), fields["max_positions"])
    kv_heads = check_size(fields["num_kv_heads"] or heads, "num_key_value_heads", name)
    kinds = _layer_kinds(config, family, name, fields["num_layers"], ropes)
    fields["max_positions"] = ropes.longest(kinds, fields["max_positions"])
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch.")
    try:
        return ModelSpec.from_dict(
            {
                **fields,
                "name": name,
                "content_hash": content_hash,
                "activation": ACTIVATIONS[activation],
                "num_kv_heads": kv_heads,
                "head_dim": head_dim,
                "dtype": "float16" if stored == "float32" else stored,
                "embedding_dim": fields["embedding_dim"] or hidden,
                "biases": [linear for linear, key in family.biases.items() if _is_true(key, config)],
                "eos_token_ids": _token_ids(config.get("eos_token_id")),
                "bos_token_id": config.get("bos_token_id"),
                "layer_kinds": [kind.to_dict() for kind in kinds],
            }
        )
    except InvalidField as error:
        raise UsageError(f"{name}: its configuration cannot be used: {error}") from None


_OPTIONAL = {
    "num_kv_heads": None,
    "head_dim": None,
    "embedding_dim": None,
}  # what has a value without a configuration's


def _fields(config: Config, family: Family, name: str) -> dict[str, Any]:
    """The fields of a ModelSpec that the configuration has, or that the family fixes or calculates."""
    fields: dict[str, Any] = {**_OPTIONAL, **family.fixed}
    try:
        derived = family.derived(config)
    except (UsageError, ArithmeticError) as error:
        raise UsageError(f"{name}: its configuration cannot be used: {error}") from None
    for field, key in family.config.items():
        if field in derived or field in family.fixed:
            continue
        fields[field] = key.of(config)
        if fields[field] is None and field not in _OPTIONAL:
            raise UsageError(f"{name}: its configuration has no {key.names[0]!r}")
        if field in _OPTIONAL and fields[field] in (None, 0):
            fields[field] = None
    return {**fields, **derived}


def _is_true(key: Any, config: Config) -> bool:
    return key if isinstance(key, bool) else bool(key.of(config))


def _check_neutral(config: Config, family: Family, name: str) -> None:
    """Raise UsageError for a key that changes what is computed in a way that is not implemented."""
    unread = {key: values for key, values in NEUTRAL.items() if key not in family.implements}
    for key, neutral in {**unread, **family.required}.items():
        if config.get(key) is not None and config[key] not in neutral:
            only = f", only {' or '.join(map(repr, neutral))}" if neutral else ""
            raise UsageError(f"{name}: {key} = {shown(config[key])} is not supported{only}")


class _Ropes:
    """The Rope of layers that attend to all, and of those within a window, where these differ."""

    def __init__(self, config: Config, family: Family, name: str, head_dim: int, max_positions: int) -> None:
        self._config, self._family, self._name = config, family, name
        older, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
        rope = newer or older or family.rope
        if not isinstance(rope, Mapping) or (older and newer and older != newer):
            raise UsageError(
                f"{name}: rope_scaling = {shown(older)} and rope_parameters = {shown(newer)} are not supported"
            )
        self._reader = RopeReader(config, name, head_dim, max_positions)
        self._of_types = {kind: rope.get(kind) for kind in (_FULL, _WINDOWED)}
        self._rope = rope

    def of(self, kind: str) -> Rope:
        """That of a kind of layer, as "layer_types" has it."""
        theta, rope = self._family.rope_theta.of(self._config), self._rope
        local = self._config.get("rope_local_base_freq")
        if any(of is not None for of in self._of_types.values()):
            theta, rope = (local or 10000.0) if kind == _WINDOWED else theta, self._of_types[kind] or {}
            if not isinstance(rope, Mapping):
                raise UsageError(f"{self._name}: the {kind} of its rope_parameters is {shown(rope)}")
        elif kind == _WINDOWED and local is not None:  # an older form, whose scaling is that of the others
            theta, rope = local, {}
        partial = self._family.partial_rotary
        return self._reader.read(rope, theta, None if partial is None else partial.of(self._config))

    @staticmethod
    def longest(kinds: Sequence[LayerKind], positions: int) -> int:
        """Positions that a model can attend to: more than it says where scaling depends on the length."""
        stretched = [kind.rope.dynamic for kind in kinds if kind.rope is not None and kind.rope.dynamic is not None]
        return int(positions * max(stretched, default=1.0))


def _layer_kinds(config: Config, family: Family, name: str, layers: int, ropes: _Ropes) -> tuple[LayerKind, ...]:
    """The kinds of layers, as far as they do not repeat."""
    window = _size(config, "sliding_window", name) if family.window is not None else None
    types = config.get("layer_types") or []
    allowed = (_FULL, _WINDOWED) if window else (_FULL,)
    if not isinstance(types, list) or len(types) not in (0, layers) or any(of not in allowed for of in types):
        raise UsageError(f"{name}: layer_types = {shown(types)} is not supported")

    experts = _experts(config, family, name)

    def kind(i: int) -> LayerKind:
        windowed = window is not None and (
            types[i] == _WINDOWED if types else family.window is not None and family.window(config, i)
        )
        rotates = family.rotates is not None and family.rotates(config, i)
        return LayerKind(
            window if windowed else None,
            ropes.of(_WINDOWED if windowed else _FULL) if rotates else None,
            experts if family.mixture is not None and family.mixture.at(config, i) else None,
        )

    try:
        return shortest_period([kind(i) for i in range(min(layers, _MOST_LAYERS))])
    except (TypeError, ValueError, UsageError) as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise UsageError(f"{name}: its configuration cannot be used: {error}") from None


def _experts(config: Config, family: Family, name: str) -> Experts | None:
    """The mixture of experts that layers have, if any. Raises UsageError."""
    mixture = family.mixture
    if mixture is None or mixture.count.of(config) == 0:
        return None

    def size(key: Key) -> int:
        return check_size(key.of(config), key.names[0], name)

    try:
        return Experts(
            size(mixture.count),
            size(mixture.per_token),
            size(mixture.size),
            _is_true(mixture.normalized, config),
            0 if mixture.shared_size is None else size(mixture.shared_size),
            mixture.router_bias,
        )
    except InvalidField as error:
        raise UsageError(f"{name}: its configuration cannot be used: {error}") from None


_MOST_LAYERS = 10_000  # that a ModelSpec may have: refused there, not counted here


def _size(config: Config, key: str, name: str) -> int | None:
    """A positive whole number of the configuration; None where it is absent, null or 0. Raises UsageError."""
    value = config.get(key)
    return check_size(value, key, name) if value else None


def check_size(value: Any, key: str, name: str) -> int:
    """The value of a key if it is a positive whole number. Raises UsageError."""
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
