"""Which form the linears of a safetensors checkpoint are in, by its quantization_config, and what each is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from llmpq.checkpoint.from_auto_round import auto_round_linears
from llmpq.checkpoint.from_awq import awq_linears
from llmpq.checkpoint.from_bitsandbytes import BitsAndBytesLinears
from llmpq.checkpoint.from_compressed_tensors import CompressedLinears
from llmpq.checkpoint.from_fp8 import Fp8Linears
from llmpq.checkpoint.from_gptq import gptq_linears
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.stored_linear import StoredLinear
from llmpq.checkpoint.tensor_index import Index, TensorEntry
from llmpq.spec import UsageError
from llmpq.spec.ranges import shown


class Form(Protocol):
    """How one method stores linears. Made of a MethodConfig; raises UsageError for what it says and is not read."""

    @property
    def keys(self) -> tuple[str, ...]:
        """A tensor of a quantized linear, and of no other, is called "<module>.<key>" by one of these."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The same of all its tensors, the bias aside."""

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> StoredLinear:
        """A linear, given those of its tensors by suffix that are there. UsageError if they are not as they should."""


class _Tensors(dict[str, TensorEntry]):
    """The tensors of a module by suffix. One that is missing is named."""

    def __init__(self, model: str, module: str, tensors: Mapping[str, TensorEntry]) -> None:
        super().__init__(tensors)
        self._of = f"{model}: the tensor {module}"

    def __missing__(self, suffix: str) -> TensorEntry:
        raise UsageError(f"{self._of}.{suffix} is missing from the checkpoint")


_OF_CACHE = {"compressed-tensors": (".q_scale", ".k_scale", ".v_scale")}  # scales of queries, keys and values
_FORMS: Mapping[str, Callable[[MethodConfig], Form]] = {
    "gptq": gptq_linears,
    "awq": awq_linears,
    "compressed-tensors": CompressedLinears,
    "fp8": Fp8Linears,
    "bitsandbytes": BitsAndBytesLinears,
    "auto-round": auto_round_linears,
    "intel/auto-round": auto_round_linears,
}


def quantized_linears(
    quantization: object, index: Index, model: str
) -> tuple[Index, dict[str, StoredLinear], tuple[str, ...]]:
    """Tensors that are as they are; quantized linears by the name of their weight; what to say of them. UsageError."""
    config = MethodConfig(quantization, model)
    method = config.choice("quant_method", _FORMS)
    form = _FORMS[method](config)
    of_cache = {name for name in index if name.endswith(_OF_CACHE.get(method, ()))}
    rest = {name: entry for name, entry in index.items() if name not in of_cache}
    linears = dict[str, StoredLinear]()
    for name in index:
        module = next((name[: -len(key) - 1] for key in form.keys if name.endswith(f".{key}")), None)
        if module is None or f"{module}.weight" in linears:
            continue
        tensors = {kind: rest.pop(f"{module}.{kind}") for kind in form.suffixes if f"{module}.{kind}" in rest}
        linears[f"{module}.weight"] = form.linear(module, _Tensors(model, module, tensors))
    if not linears:
        raise UsageError(f"{model}: its quantization_config says {shown(method)}, but no tensor of it is quantized so")
    scales = {linear.scales.type for linear in linears.values() if linear.precision is not None}
    if len(scales) > 1:
        raise UsageError(f"{model}: its scales are {' and '.join(sorted(scales))}; save them in one type")
    notes = _notes(method, linears, model)
    if of_cache:
        notes += (f"{model}: {min(of_cache)} and its like are not used, as keys and values are not quantized here",)
    return rest, linears, notes


def _notes(method: str, linears: Mapping[str, StoredLinear], model: str) -> tuple[str, ...]:
    """Of the linears that cannot be native."""
    reasons = Counter(linear.not_native for linear in linears.values() if linear.not_native)
    return tuple(
        f"{model}: {'all' if count == len(linears) else count} of its {len(linears)} quantized linears ({method}) have "
        f"{reason}, which no kernel reads; they are dequantized, and quantized again as the plan says"
        for reason, count in reasons.items()
    )
