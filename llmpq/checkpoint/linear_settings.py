"""What GPTQ, AWQ and AutoRound say of how linears are packed: of all of them, and of single ones.

These programs write each other's forms, and in each form whatever they write in their own: so all readers know one list
of keys. Sources: AutoGPTQ 0.7.1, gptqmodel 7.6, AutoAWQ 0.2.9, auto-round 0.16.1, and transformers 4 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llmpq.checkpoint.method_config import MethodConfig, compiled

OF_ONE = ("bits", "group_size", "sym")
# How the codes were found, by which program, and what these programs do when they load and run them.
NEUTRAL = (
    *("quant_method", "method", "desc_act", "lm_head", "meta", "damp_percent", "damp_auto_increment", "static_groups"),
    *("true_sequential", "act_group_aware", "mse", "model_name_or_path", "model_file_base_name", "model_seqlen"),
    *("tokenizer", "dataset", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "backend"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "hyb_act"),
    *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "modules_to_not_convert", "provider"),
    *("gptaq", "foem", "hessian", "mock_quantization", "is_sequential", "quantized_by", "v2", "v2_alpha"),
    *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
    *("autoround_version", "amp", "enable_minmax_tuning", "iters", "lr", "minmax_lr", "model_free", "model_dtype"),
    *("enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "low_gpu_mem_usage", "nsamples"),
    *("scale_dtype", "seqlen", "supported_types", "quant_block_list", "to_quant_block_names", "act_sym", "act_dynamic"),
    *("act_data_type", "act_group_size", "static_kv_granularity", "static_attention_granularity"),
    *("super_bits", "super_group_size"),
)
ONLY: Mapping[str, tuple[Any, ...]] = {
    "data_type": ("int",),
    "act_bits": (16, 32),
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
    "rotation": ("",),
    **dict.fromkeys(("static_kv_dtype", "static_attention_dtype"), ()),
    **dict.fromkeys(("adapter", "activation", "rotation_config", "rotation_configs", "regex_config"), ({}, [])),
}


class LinearSettings:
    """A quantization_config, and for single modules what it says of these.

    `dynamic` has patterns that names begin with, after "+:" or nothing. `extra_config` has names, which go first, and
    patterns of what is somewhere in a name.
    """

    def __init__(self, config: MethodConfig, others: Collection[str]) -> None:
        """`others`: what its form uses beside OF_ONE. Raises UsageError for what is not known or not supported."""
        config.known((*OF_ONE, *others, "dynamic", "extra_config"), NEUTRAL, ONLY)
        self._config = config
        self._named = dict(self._singles("extra_config"))
        self._patterns = [(compiled(name.removeprefix("+:")).match, of) for name, of in self._singles("dynamic")]
        patterns = (name for name in self._named if re.search(r"[^\w.-]", name))
        self._patterns += [(compiled(name).search, self._named[name]) for name in patterns]

    def _singles(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names, and what is said of them; those of 16 bits aside, whose tensors show that they are not quantized."""
        model = self._config.model
        for name, values in MethodConfig(self._config.values.get(key) or {}, model, key).values.items():
            one = MethodConfig(values, model, f"quantization of {name}")
            bits = one.values.get("bits")
            if isinstance(bits, int) and bits >= 16:
                continue
            one.known(OF_ONE, NEUTRAL, ONLY)
            yield name, {key: value for key, value in one.values.items() if value is not None}

    def of(self, module: str) -> MethodConfig:
        values = self._named.get(module)
        if values is None:
            values = next((values for is_meant, values in self._patterns if is_meant(module)), None)
        if values is None:
            return self._config
        return MethodConfig({**self._config.values, **values}, self._config.model, f"quantization of {module}")
