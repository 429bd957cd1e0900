"""Linears in the GPTQ form, whatever quantized them: GPTQ, HQQ or AutoRound.

    qweight  int32 [k * bits / 32, n]        codes, along k
    qzeros   int32 [groups, n * bits / 32]   zero points, along n; less 1 in version 1, as they are in version 2
    scales   [groups, n]                     w = scale * (code - zero)
    g_idx    int32 [k]                       the group of each column; in no order if columns were quantized in theirs

Sources: the classes QuantLinear of AutoGPTQ 0.7.1 and gptqmodel 7.6. bit_fields.py says how bits lie. A zero point of 0
is -1 in version 1, which takes from its neighbour in some writers and is 2**bits in some readers: it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmpq.checkpoint.bit_fields import WORD, Fields
from llmpq.checkpoint.method_config import MethodConfig, begins
from llmpq.checkpoint.stored_linear import SCALES, IntegerLinear, expect, unordered_groups
from llmpq.checkpoint.tensor_index import TensorEntry
from llmpq.spec import UsageError

BITS = (3, 4, 8)
VERSIONS = {"gptq": True, "gptq_v2": False}  # checkpoint_format -> whether zero points are stored less 1
# How the codes were found, by which program, and what these programs do when they load them.
NEUTRAL = (
    *("quant_method", "method", "desc_act", "lm_head", "meta", "damp_percent", "damp_auto_increment", "static_groups"),
    *("true_sequential", "act_group_aware", "mse", "model_name_or_path", "model_file_base_name", "model_seqlen"),
    *("tokenizer", "dataset", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "backend"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "hyb_act"),
    *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "modules_to_not_convert", "provider"),
    *("gptaq", "foem", "hessian", "mock_quantization", "is_sequential", "quantized_by", "v2", "v2_alpha"),
)
ONLY: Mapping[str, tuple[Any, ...]] = {
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
    "adapter": ({},),
    "rotation": ("",),
    "activation": ({},),
}


class GptqLinears:
    """A Form (quantized_forms.py): reads the linears of one checkpoint."""

    keys = ("qweight",)
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: MethodConfig) -> None:
        config.known(("bits", "group_size", "sym", "checkpoint_format", "format", "dynamic"), NEUTRAL, ONLY)
        version = "format" if config.values.get("checkpoint_format") is None else "checkpoint_format"
        self._set(config, VERSIONS[config.choice(version, VERSIONS, "gptq")], config.values.get("dynamic"))

    def _set(self, config: MethodConfig, less_one: bool, overrides: object) -> None:
        self._config, self._less_one = config, less_one
        self._overrides = dict(MethodConfig(overrides or {}, config.model, "quantization of single modules").values)
        for name, values in self._overrides.items():
            one = MethodConfig(values, config.model, f"quantization of {name}")
            one.known(
                ("bits", "group_size", "sym"), (*NEUTRAL, *AUTO_ROUND_NEUTRAL), {**ONLY, "data_type": ("int", "float")}
            )

    def _config_of(self, module: str) -> MethodConfig:
        """That of one module. Names of `dynamic` are patterns that its own begins with, after "+:" or nothing."""
        for pattern, values in self._overrides.items():
            if pattern == module or begins(pattern.removeprefix("+:"), module):
                merged = {**self._config.values, **values}
                return MethodConfig(merged, self._config.model, f"quantization of {module}")
        return self._config

    def linear(self, module: str, tensors: Mapping[str, TensorEntry]) -> IntegerLinear:
        config = self._config_of(module)
        bits, group = config.choice("bits", BITS), config.group_size(default=128)
        model, qweight = config.model, tensors["qweight"]
        if len(qweight.shape) != 2 or qweight.shape[0] * WORD % bits:
            raise UsageError(f"{model}: {qweight.name} {list(qweight.shape)} are no codes of {bits} bits")
        n, k = qweight.shape[1], qweight.shape[0] * WORD // bits
        count = 1 if group is None else -(-k // group)
        codes, zeros = Fields(qweight, bits, 1, True), Fields(tensors["qzeros"], bits, 0, True)
        expect(qweight, ("I32",), model, codes.shape(n, k))
        expect(zeros.entry, ("I32",), model, zeros.shape(n, count))
        scales = expect(tensors["scales"], SCALES, model, (count, n))
        groups = unordered_groups(tensors["g_idx"], k, group, model) if "g_idx" in tensors else None
        name, symmetric = f"{module}.weight", config.flag("sym", True)
        return IntegerLinear(name, (n, k), codes, scales, zeros, group, symmetric, self._less_one, groups)


# What AutoRound writes of how it found the codes.
AUTO_ROUND_NEUTRAL = (
    *("quant_method", "autoround_version", "amp", "batch_size", "dataset", "enable_minmax_tuning", "iters", "lr"),
    *("enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "low_gpu_mem_usage", "minmax_lr"),
    *("nsamples", "scale_dtype", "seqlen", "supported_types", "quant_block_list", "block_name_to_quantize", "act_sym"),
    *("to_quant_block_names", "static_kv_granularity", "static_attention_granularity", "act_group_size", "act_dynamic"),
    *(
        "act_data_type",
        "modules_to_not_convert",
        "provider",
        "lm_head",
        "super_bits",
        "super_group_size",
        "model_dtype",
    ),
)
AUTO_ROUND_ONLY: Mapping[str, tuple[Any, ...]] = {
    "data_type": ("int",),
    "act_bits": (16, 32),
    **dict.fromkeys(("static_kv_dtype", "static_attention_dtype"), ()),
    **dict.fromkeys(("rotation_config", "rotation_configs", "regex_config"), ({}, [])),
}


class AutoRoundLinears(GptqLinears):
    """AutoRound's own configuration of the same tensors: its packing_format says which version they are."""

    def __init__(self, config: MethodConfig) -> None:
        used = ("bits", "group_size", "sym", "packing_format", "extra_config")
        config.known(used, AUTO_ROUND_NEUTRAL, AUTO_ROUND_ONLY)
        versions = {"auto_round:auto_gptq": True, "auto_round:gptqmodel": False, "auto_round": False}
        less_one = versions[config.choice("packing_format", versions)]
        self._set(config, less_one, config.values.get("extra_config"))
