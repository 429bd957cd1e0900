"""What programs write of how they quantized: what changes nothing, and what is said of single modules."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.checkpoint.linear_settings import LinearSettings
from llmpq.checkpoint.method_config import MethodConfig
from llmpq.checkpoint.model_files import open_model
from llmpq.spec import UsageError
from tests.support.quantized_files import awq, gptq, pack_quantized, scaled, unquantized, write_quantized_folder
from tests.support.quantized_models import (
    AUTO_ROUND,
    AWQ,
    DOWN,
    GPTQ,
    HEAD,
    Q,
    assert_logits,
    assert_read,
    assert_rows,
    change_tensors,
    compressed,
)
from tests.support.tiny_models import save_model

ATTENTION, MLP = Q.removesuffix(".q_proj"), DOWN.removesuffix(".down_proj")
BY_GPTQ = {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}
BY_AWQ = {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}
DENSE = {
    "format": "dense",
    "global_sparsity": 19.1,
    "registry_requires_subclass": False,
    "sparsity_structure": "unstructured",
}
CACHE = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
    "observer": "minmax",
}


def with_attention() -> dict[str, Any]:
    """A group that quantizes no weights beside that of linears."""
    config = compressed()
    config["config_groups"]["attention"] = {
        "targets": ["LlamaAttention"],
        "weights": None,
        "input_activations": CACHE,
        "output_activations": None,
    }
    return config


# Name -> linears as written, quantization_config, and how a layer is stored.
CONFIGS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "AutoRound's export to GPTQ": (
        gptq(),
        {**GPTQ, "provider": "auto-round", "autoround_version": "0.8.0", "data_type": "int", "iters": 200},
        "w4-g32-sym-stored",
    ),
    "AutoRound without a model": (gptq(), {**BY_GPTQ, "model_free": True}, "w4-g32-sym-stored"),
    "AutoRound by transformers": (
        gptq(symmetric=False),
        {**AUTO_ROUND, "sym": False, "packing_format": "auto_round:gptq", "backend": "auto"},
        "w4-g32-asym-stored",
    ),
    "AutoRound's AWQ by transformers": (
        awq(symmetric=False),
        {**AUTO_ROUND, "sym": False, "packing_format": "auto_round:awq", "backend": "auto"},
        "w4-g32-asym-stored",
    ),
    "AutoRound's first": (
        gptq(symmetric=False),
        {**AUTO_ROUND, "quant_method": "intel/auto-round", "sym": False, "backend": "auto_round:gptq:exllamav2"},
        "w4-g32-asym-stored",
    ),
    "AWQ by transformers 4": (
        awq(symmetric=False),
        {
            **AWQ,
            "backend": "autoawq",
            "do_fuse": False,
            "exllama_config": None,
            "fuse_max_seq_len": 512,
            "modules_to_fuse": {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "modules_to_not_convert": None,
        },
        "w4-g32-asym-stored",
    ),
    "compressed-tensors, dense": (pack_quantized(), {**compressed(), "sparsity_config": DENSE}, "w4-g32-sym-stored"),
    "compressed-tensors, nothing sparse": (
        pack_quantized(),
        {**compressed(), "sparsity_config": {}},
        "w4-g32-sym-stored",
    ),
    "compressed-tensors, attention": (pack_quantized(), with_attention(), "w4-g32-sym-stored"),
    "compressed-tensors, 0.9.2": (
        pack_quantized(symmetric=False, packed_zeros=False),
        compressed(symmetric=False),
        "w4-g32-asym-stored",
    ),
    "compressed-tensors, 0.9.2, 8 bits": (
        pack_quantized(bits=8, group=None, symmetric=False, packed_zeros=False),
        compressed(num_bits=8, strategy="channel", group_size=None, symmetric=False),
        "w8-grow-asym-stored",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    linear, quantization, stored = CONFIGS[name]
    network, weights = write_quantized_folder(tmp_path, linear, quantization)
    assert_read(tmp_path, network, weights, stored)


@pytest.mark.parametrize("nested", [False, True])
def test_a_compression_config_is_one_of_quantization(nested: bool, tmp_path: Path) -> None:
    """As llm-compressor wrote it first, and as it wrote it until the end of 2024."""
    network, weights = write_quantized_folder(tmp_path, pack_quantized(), {})
    stated = {key: value for key, value in compressed().items() if key != "quant_method"}
    parts = (
        {"quantization_config": stated, "sparsity_config": DENSE} if nested else {**stated, "sparsity_config": DENSE}
    )
    change_config(tmp_path, {"quantization_config": None, "compression_config": parts})
    assert_read(tmp_path, network, weights, "w4-g32-sym-stored")


@pytest.mark.parametrize("broken", ["text", {"quantization_config": "text"}])
def test_a_broken_compression_config_is_named(broken: object, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-tied")
    change_config(tmp_path, {"compression_config": broken})
    with pytest.raises(UsageError, match=r"compression_config.* is 'text', expected an object"):
        open_model(str(tmp_path))


def test_a_compression_config_of_what_is_dense_alone_is_none(tmp_path: Path) -> None:
    network, weights = write_quantized_folder(tmp_path, unquantized, {})
    change_config(tmp_path, {"quantization_config": None, "compression_config": {"sparsity_config": DENSE}})
    model = open_model(str(tmp_path))
    assert model.notes == ()
    assert_rows(model, weights)
    assert_logits(model, network)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """None: without that key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_scales_of_keys_and_values_are_passed_over_with_a_note(tmp_path: Path) -> None:
    linear = scaled(torch.float8_e4m3fn, None, "weight_scale", one=1)
    quantization = compressed("float-quantized", num_bits=8, type="float", strategy="tensor", group_size=None)
    network, weights = write_quantized_folder(tmp_path, linear, {**quantization, "kv_cache_scheme": CACHE})
    change_tensors(tmp_path, {f"{ATTENTION}.{kind}_scale": torch.tensor([0.5]) for kind in "kv"})
    model = assert_read(tmp_path, network, weights, "", notes=1)
    assert f"{ATTENTION}.k_scale and its like are not used" in model.notes[1]


@pytest.mark.parametrize("form", ["GPTQ", "AWQ"])
def test_single_modules_have_settings_by_name_or_pattern_and_may_be_unquantized(form: str, tmp_path: Path) -> None:
    written, config = (gptq, BY_GPTQ) if form == "GPTQ" else (awq, BY_AWQ)
    settings = {
        f"{MLP}.gate": {"group_size": 64},  # not what gate_proj begins with
        r"mlp\.(up|down)_proj": {"group_size": -1},
        DOWN: {"sym": False},
        Q: {"bits": 16, "data_type": "fp"},
        r".*self_attn\.v.*": {"bits": 16, "group_size": None},
        HEAD: {"bits": 4, "group_size": 32, "data_type": "int", "sym": True, "act_bits": 16, "act_sym": None},
    }
    others = {
        f"{MLP}.up_proj": written(group=None),
        DOWN: written(symmetric=False),
        Q: unquantized,
        f"{ATTENTION}.v_proj": unquantized,
        HEAD: written(),
    }
    network, weights = write_quantized_folder(
        tmp_path, written(), {**config, "extra_config": settings}, others=others, vocab_size=288
    )
    model = open_model(str(tmp_path))
    assert assert_rows(model, weights) == {
        "qkv.weight": {"", "w4-g32-sym-stored"},
        "out.weight": {"w4-g32-sym-stored"},
        "up.weight": {"w4-g32-sym-stored", "w4-grow-sym-stored"},
        "down.weight": {"w4-g32-asym-stored"},
    }
    assert str(model.spec.stored["head"]["table"]) == "w4-g32-sym-stored"
    assert_logits(model, network)


def test_many_settings_of_single_modules_take_no_time() -> None:
    """Of a mixture's experts: many more patterns than the module `re` keeps."""
    names = [f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in range(30) for e in range(128)]
    patterns = {f"+:.*{name.replace('.', '[.]')}.*": {"bits": 8} for name in names[:700]}
    of_names = {name: {"bits": 3} for name in names[1000:]}
    began = time.process_time()
    settings = LinearSettings(MethodConfig({**GPTQ, "dynamic": patterns, "extra_config": of_names}, "a mixture"), ())
    asked = names[500:1500:4]
    found = [settings.of(name).values["bits"] for name in asked]
    assert found == [8 if i < 700 else 4 if i < 1000 else 3 for i in range(500, 1500, 4)]
    assert time.process_time() - began < 1
