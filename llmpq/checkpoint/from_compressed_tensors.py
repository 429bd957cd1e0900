"""Linears in the forms of compressed-tensors: pack-quantized, int-quantized and float-quantized.

    weight_packed      int32 [n, k * bits / 32]        codes, along k: signed numbers plus the middle code
    weight_zero_point  int32 [n * bits / 32, groups]   the same of zero points, along n; none if symmetric
                       int8 [n, groups]                up to version 0.9.2: signed numbers
    weight_scale       [n, groups]                     w = scale * (code - zero)
    weight_shape       [2]                             n, k
    weight_g_idx       int32 [k]                       the group of each column

    weight             int8 or float8 [n, k]           w = scale * number
    weight_scale       one number, [n, 1], or one for each block of rows and columns

Source: compressed-tensors 0.20.1. What activations, keys and values were to be quantized to is passed over: here they
are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmpq.checkpoint.bit_fields import Fields, SignedBytes
from llmpq.checkpoint.method_config import MethodConfig, compiled
from llmpq.checkpoint.stored_linear import (
    FLOATS,
    SCALES,
    IntegerLinear,
    StoredLinear,
    expect,
    scaled,
    stored_array,
    unordered_groups,
)
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError

PACKED_BITS = (4, 8)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_EMPTY: Mapping[str, tuple[Any, ...]] = {
    "transform_config": ({},),
    "moe_sparsity_config": ({},),
    "quantization_status": ("compressed", "frozen"),
}


class CompressedLinears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("weight_packed", "weight_scale")
    suffixes = (
        *("weight_packed", "weight_zero_point", "weight_scale", "weight_shape", "weight_g_idx"),
        *("weight", "input_scale", "output_scale", "input_zero_point"),
    )

    def __init__(self, config: MethodConfig) -> None:
        used = ("config_groups", "format", "sparsity_config")
        config.known(used, ("quant_method", "ignore", "global_compression_ratio", "version", "kv_cache_scheme"), _EMPTY)
        config.choice("format", FORMATS)
        if sparsity := config.values.get("sparsity_config"):
            MethodConfig(sparsity, config.model, "sparsity_config").choice("format", ("dense",))
        self._model = config.model
        groups = MethodConfig(config.values.get("config_groups"), config.model, "config_groups").values
        schemes = [MethodConfig(scheme, config.model, f"config_groups.{name}") for name, scheme in groups.items()]
        # The others are those of attention, or of activations alone.
        self._schemes = [self._scheme(scheme) for scheme in schemes if scheme.values.get("weights") is not None]

    def _scheme(self, scheme: MethodConfig) -> tuple[Sequence[str], MethodConfig]:
        """The targets of a group, and how it stores weights."""
        scheme.known(("targets", "weights", "input_activations", "format"), (), {"output_activations": ()})
        scheme.choice("format", (None, *FORMATS))
        targets = scheme.values.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise scheme.refusal("targets", "is no list of names")
        weights = MethodConfig(scheme.values["weights"], self._model, f"{scheme.where}.weights")
        weights.known(
            ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure"),
            ("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
            {"dynamic": (False,)},
        )
        weights.choice("strategy", (None, "tensor", "channel", "group", "block"))
        return targets, weights

    def _weights_of(self, module: str) -> MethodConfig:
        """How a module is stored: by the group that names it, else by that of all linears."""
        named = [weights for targets, weights in self._schemes if any(_names(target, module) for target in targets)]
        found = named or [weights for targets, weights in self._schemes if "Linear" in targets]
        if not found or any(other.values != found[0].values for other in found):
            raise UsageError(f"{self._model}: its config_groups do not say in one way how {module} is quantized")
        return found[0]

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> StoredLinear:
        weights = self._weights_of(module)
        if "weight_packed" in tensors:
            return self._packed(f"{module}.weight", tensors, weights)
        return self._unpacked(f"{module}.weight", tensors, weights)

    def _packed(self, name: str, tensors: Mapping[str, TensorEntry], weights: MethodConfig) -> IntegerLinear:
        bits = weights.choice("num_bits", PACKED_BITS)
        weights.choice("type", ("int",), "int")
        group = self._group(weights)
        n, k = map(int, stored_array(expect(tensors["weight_shape"], ("I64", "I32"), self._model, (2,))))
        count = 1 if group is None else -(-k // group)
        codes = Fields(tensors["weight_packed"], bits, 1, False)
        expect(codes.entry, ("I32",), self._model, codes.shape(n, k))
        scales = expect(tensors["weight_scale"], SCALES, self._model, (n, count))
        zeros: Fields | SignedBytes | None = None
        symmetric = weights.flag("symmetric", True)
        if (entry := tensors.get("weight_zero_point")) is not None and entry.type == "I8":
            zeros = SignedBytes(expect(entry, ("I8",), self._model, (n, count)), bits)
        elif entry is not None:
            zeros = Fields(entry, bits, 0, False)
            expect(entry, ("I32",), self._model, zeros.shape(n, count))
        elif not symmetric:
            raise UsageError(f"{self._model}: {name} has no weight_zero_point, but symmetric is false")
        groups = None
        if (entry := tensors.get("weight_g_idx")) is not None and not _is_unused(entry):
            groups = unordered_groups(entry, k, group, self._model)
        return IntegerLinear(name, (n, k), codes, scales, zeros, group, symmetric, groups=groups)

    def _group(self, weights: MethodConfig) -> int | None:
        """Columns of a group of integers; None: the whole row."""
        size = None if weights.values.get("group_size") is None else weights.group_size()
        strategy = weights.choice("strategy", ("group", "channel"), "channel" if size is None else "group")
        if (strategy == "channel") != (size is None):
            raise weights.refusal("group_size", f"does not go with the strategy {strategy}")
        return size

    def _unpacked(self, name: str, tensors: Mapping[str, TensorEntry], weights: MethodConfig) -> StoredLinear:
        number, scale = tensors["weight"], tensors["weight_scale"]
        n, k = (*number.shape, 0, 0)[:2]
        expect(number, (*FLOATS, "I8"), self._model, (n, k))
        weights.choice("num_bits", (8,))
        if not weights.flag("symmetric", True):
            raise weights.refusal("symmetric", "is not supported for weights that are not packed")
        strategy, block = weights.values.get("strategy") or "tensor", (n, k)
        if strategy in ("group", "channel"):
            group = self._group(weights)
            block = (1, group or k)
            if number.type == "I8":
                expect(scale, SCALES, self._model, (n, -(-k // block[1])))
                return IntegerLinear(name, (n, k), SignedBytes(number), scale, None, group, True)
        elif strategy == "block":
            block = two_sizes(weights, "block_structure")
        others = tuple(entry for kind, entry in tensors.items() if kind not in ("weight", "weight_scale"))
        return scaled(name, number, scale, block, self._model, others)


def two_sizes(config: MethodConfig, key: str) -> tuple[int, int]:
    """Rows and columns of a block. Raises UsageError."""
    sizes = config.values.get(key)
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise config.refusal(key, "is no pair of rows and columns")
    return sizes[0], sizes[1]


def _names(target: str, module: str) -> bool:
    """Whether a target, a name or "re:" and a pattern, is a module's."""
    return target == module or (target.startswith("re:") and compiled(target[3:]).match(module) is not None)


def _is_unused(groups: TensorEntry) -> bool:
    """Whether all are -1: columns are in order."""
    return groups.type == "I32" and bool((stored_array(groups) == 2**32 - 1).all())
