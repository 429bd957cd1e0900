"""What a model family is: where the numbers of a ModelSpec stand in its configuration, and what its tensors are called.

families.py beside it has them. Names are those of transformers' own classes; gguf_forms.py says what llama.cpp calls
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmpq.spec import ModelSpec, UsageError
from llmpq.spec.ranges import shown

Config = Mapping[str, Any]


@dataclass(frozen=True, init=False)
class Key:
    """A value of config.json, under the first of `names` that is there. `default` is transformers' own; None: none."""

    names: tuple[str, ...]
    default: Any

    def __init__(self, *names: str, default: Any = None) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "default", default)

    def of(self, config: Config) -> Any:
        """The value, or the default where it is absent or null."""
        found = (config[name] for name in self.names if config.get(name) is not None)
        return next(found, self.default)


@dataclass(frozen=True)
class Mixture:
    """Where the numbers of a family's mixtures of experts stand, and how their tensors lie.

    `tensors` are named as those of a layer; "{}" stands for the number of an expert that has tensors of its own.
    """

    count: Key
    per_token: Key
    size: Key  # intermediate size of each
    normalized: Key | bool
    tensors: Mapping[str, tuple[str, ...]]  # up, down, router; shared_up, shared_down, shared_gate
    shared_size: Key | None = None
    router_bias: bool = False
    at: Callable[[Config, int], bool] = lambda config, layer: True  # which layers have one
    layout: Literal["each", "rows", "columns"] = "each"  # own tensors; or one, [experts, n, k] or [experts, k, n]
    alternating: bool = False  # rows of gate and up take turns
    suffixes: Mapping[str, str] = field(default_factory=lambda: {"weight": ".weight", "bias": ".bias"})

    @property
    def in_gguf(self) -> Mixture:
        """The same as llama.cpp writes it: gate, up and down are a tensor of all experts each."""
        stacked = {"up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"), "down": ("mlp.experts.down_proj",)}
        return replace(
            self,
            tensors={**self.tensors, **stacked},
            layout="rows",
            alternating=False,
            suffixes={"weight": ".weight", "bias": ".bias"},
        )


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive number of a configuration; the default, if there is one, where it is absent. Raises UsageError."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UsageError(f"{key} = {shown(value)} is no positive number")
    return value


def whole_number(config: Config, key: str, default: int | None = None) -> int:
    """The same of whole numbers."""
    value = number(config, key, default)
    if not isinstance(value, int):
        raise UsageError(f"{key} = {shown(value)} is no positive whole number")
    return value


def _nothing(config: Config) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One family of decoders. Tensor names come without ".weight" and ".bias"."""

    name: str
    architectures: tuple[str, ...]  # as "architectures" or "model_type" of config.json spells them
    config: Mapping[str, Key]  # ModelSpec field -> where it stands
    fixed: Mapping[str, Any]  # ModelSpec field -> its value in the whole family
    table: str
    head: str
    layer: str  # prefix of a layer's tensors, with {} for its number
    linears: Mapping[str, tuple[str, ...]]  # fused linear -> its parts, whose rows follow each other
    norms: Mapping[str, str]  # of a layer, by their names in ModelSpec.norms; "q_norm" and "k_norm" where it has them
    final_norm: str
    parallel_norms: Mapping[str, str] = field(default_factory=dict)  # in place of `norms` in layers of block "parallel"
    derived: Callable[[Config], Mapping[str, Any]] = _nothing  # ModelSpec fields that are calculated
    biases: Mapping[str, Key | bool] = field(default_factory=dict)  # linear, or "head" -> whether it has one
    window: Callable[[Config, int], bool] | None = None  # whether layer i attends within "sliding_window"
    rotates: Callable[[Config, int], bool] | None = lambda config, i: True  # whether layer i does; None: none ever does
    rope: Mapping[str, Any] = field(default_factory=dict)  # the scaling where a configuration says nothing of one
    rope_theta: Key = Key("rope_theta", default=10000.0)
    partial_rotary: Key | None = None  # what part of a head's dimensions rotates; None: all of them
    mixture: Mixture | None = None  # of experts, in place of MLPs
    positions: str = ""  # learned positions
    sinks: str = ""  # of attention, whole: they have no ".weight"
    project_in: str = ""
    project_out: str = ""
    embedding_norm: str = ""
    grouped_qkv: bool = False  # the rows of qkv, which is one tensor, are those of each kv head: q, ..., q, k, v
    transposed: bool = False  # matrices of layers are [k, n]
    norm_plus: float = 0.0  # what is added to the weights of norms
    implements: tuple[str, ...] = ()  # keys of NEUTRAL that it reads
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # config key -> the values it may have
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' own of keys that are absent
    harmless: tuple[str, ...] = ()  # patterns of tensors that a checkpoint may have, and that are computed instead

    @property
    def prefix(self) -> str:
        """With which the names of all tensors but those of the head begin."""
        return self.table.partition(".")[0] + "."

    def norm_of(self, spec: ModelSpec, part: str) -> str:
        """The tensor of a layer's norm, without its prefix."""
        parallel = spec.block == "parallel" and part in self.parallel_norms
        return (self.parallel_norms if parallel else self.norms)[part]
