"""Checkpoints that others have quantized: their weights are those that the form's definition gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmpq.checkpoint import model_files
from llmpq.checkpoint.model_files import Model
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.models.decoder_stage import build_stage
from llmpq.quant import QuantTensor
from llmpq.spec import NATIVE
from tests.support.decoding import CPU, EXACT, all_logits, random_sequences, single_plan, transformers_logits
from tests.support.quantized_files import (
    awq,
    four_bits,
    gptq,
    llm_int8,
    pack_quantized,
    scaled,
    write_quantized_folder,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.01}
ASYM = {"sym": False, "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "iters": 200, "data_type": "int"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32], "fmt": "e4m3"}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
FP8_TENSOR = {**FP8, "weight_block_size": None}
DOWN, HEAD, Q = "model.layers.0.mlp.down_proj", "lm_head", "model.layers.0.self_attn.q_proj"
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


def compressed(form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    stored = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": {**stored, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def channel(bits: int, **weights: Any) -> dict[str, Any]:
    return compressed(num_bits=bits, strategy="channel", group_size=None, **weights)


def floats(strategy: str, **weights: Any) -> dict[str, Any]:
    return compressed("float-quantized", num_bits=8, type="float", strategy=strategy, group_size=None, **weights)


# Name -> linears as written, quantization_config, and how a layer is stored ("": its rows are floating numbers).
FORMS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gptq": (gptq(), GPTQ, "w4-g32-sym-stored"),
    "gptq without g_idx": (gptq(g_idx=False, dtype=BF16), GPTQ, "w4-g32-sym-stored"),
    "gptq asym": (gptq(symmetric=False), {**GPTQ, "sym": False}, "w4-g32-asym-stored"),
    "gptq 3 bits": (gptq(bits=3, symmetric=False), {**GPTQ, "bits": 3, "sym": False}, "w3-g32-asym-stored"),
    "gptq_v2 3 bits": (gptq(less=0, bits=3, symmetric=False), {**GPTQ, **ASYM, "bits": 3}, "w3-g32-asym-stored"),
    "gptq_v2": (gptq(less=0, symmetric=False), {**GPTQ, **ASYM}, "w4-g32-asym-stored"),
    "gptq 8 bits, rows": (gptq(bits=8, group=None), {**GPTQ, "bits": 8, "group_size": -1}, "w8-grow-sym-stored"),
    "gptq in act-order": (gptq(act_order=True), {**GPTQ, "desc_act": True}, ""),
    "gptq with float32 scales": (gptq(dtype=torch.float32), GPTQ, ""),
    "gptq in groups of 16": (gptq(group=16), {**GPTQ, "group_size": 16}, ""),
    "gptq in groups of 96": (
        gptq(group=96, symmetric=False, less=0),
        {**GPTQ, **ASYM, "group_size": 96},
        "w4-g32-asym-stored",
    ),
    "awq": (awq(symmetric=False), AWQ, "w4-g32-asym-stored"),
    "awq, rows": (awq(group=None), {**AWQ, "group_size": -1, "zero_point": False}, "w4-grow-sym-stored"),
    "awq as AutoAWQ has it": (
        awq(symmetric=False),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
        "w4-g32-asym-stored",
    ),
    "auto-round": (gptq(), {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}, "w4-g32-sym-stored"),
    "auto-round, version 2": (
        gptq(less=0, symmetric=False),
        {**AUTO_ROUND, "sym": False, "packing_format": "auto_round:gptqmodel"},
        "w4-g32-asym-stored",
    ),
    "auto-round awq": (awq(), {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, "w4-g32-sym-stored"),
    "compressed-tensors": (pack_quantized(dtype=BF16), compressed(), "w4-g32-sym-stored"),
    "compressed-tensors asym": (pack_quantized(symmetric=False), compressed(symmetric=False), "w4-g32-asym-stored"),
    "compressed-tensors in act-order": (pack_quantized(act_order=True), compressed(actorder="group"), ""),
    "compressed-tensors 8 bits": (pack_quantized(bits=8, group=None), channel(8), "w8-grow-sym-stored"),
    "compressed-tensors 8 bits asym": (
        pack_quantized(bits=8, group=None, symmetric=False),
        channel(8, symmetric=False),
        "w8-grow-asym-stored",
    ),
    "compressed-tensors float8": (scaled(E4M3, (1, 10**6), "weight_scale", dtype=BF16), floats("channel"), ""),
    "compressed-tensors float8, one scale": (scaled(E4M3, None, "weight_scale", one=1), floats("tensor"), ""),
    "compressed-tensors float8, blocks": (
        scaled(E4M3, (48, 32), "weight_scale"),
        floats("block", block_structure=[48, 32]),
        "",
    ),
    "compressed-tensors int8": (
        scaled(torch.int8, (1, 10**6), "weight_scale", dtype=BF16),
        compressed("int-quantized", num_bits=8, strategy="channel", group_size=None),
        "",
    ),
    "fp8": (scaled(E4M3, (48, 32), "weight_scale_inv"), FP8, ""),
    "fp8 e5m2, one scale": (scaled(E5M2, None, "weight_scale_inv", one=0), {**FP8_TENSOR, "fmt": "e5m2"}, ""),
    "bitsandbytes int8": (llm_int8, BNB8, ""),
    "bitsandbytes nf4": (four_bits("nf4", nested=4, storage=BF16), BNB4, ""),
    "bitsandbytes fp4": (four_bits("fp4", block=128), BNB4, ""),
}


def parts(model: Model) -> Iterator[tuple[str, str, list[str]]]:
    """Unit, part and modules of the linears."""
    tensors = model_files.decoder_tensors(model.spec, model_files.describe(model.checkpoint).family)
    for (unit, part), names in tensors.items():
        if unit.startswith("layer") and part.removesuffix(".weight") in model.spec.layer_linears:
            yield unit, part, [name.removesuffix(".weight") for name in names]


def served_logits(model: Model, tokens: list[int]) -> torch.Tensor:
    """With all native that can be, and the rest in float32."""
    plan = single_plan(model.spec)
    stored = model.spec.stored
    precisions = tuple(
        NATIVE if f"layer.{i}" in stored else plan.precision(f"layer.{i}") for i in range(model.spec.num_layers)
    )
    stage = replace(plan.stages[0], precisions=precisions, activations="a16")
    head = replace(plan.head, precision=NATIVE) if "head" in stored else plan.head
    plan = replace(plan, stages=(stage,), head=head)
    built = build_stage(model.spec, open_weights(model.checkpoint, model.spec), plan, 0, CPU, **EXACT)
    return all_logits([built], {0: tokens}, [24])[0]


def assert_read(folder: Path, network: Any, weights: dict[str, np.ndarray[Any, Any]], stored: str) -> Model:
    """Rows of a folder's linears are the weights, and its logits those of the network."""
    model = model_files.open_model(str(folder))
    source = open_weights(model.checkpoint, model.spec)
    for unit, part, modules in parts(model):
        expected = torch.from_numpy(np.concatenate([weights[module] for module in modules]))
        found = list(source.rows(unit, part))
        assert {str(rows.precision) if isinstance(rows, QuantTensor) else "" for rows in found} == {stored}
        n = len(expected)
        for start, stop in (0, n), (5, 6), (7, n - 3):
            rows = torch.cat([floating(rows).double() for rows in source.rows(unit, part, start, stop)])
            # What a QuantTensor stands for fits float32. Other weights are rounded to it.
            torch.testing.assert_close(rows, expected[start:stop], atol=0, rtol=0 if stored else 2.0**-24)
    assert {str(p) for p in model.spec.stored.get("layer.0", {}).values()} == ({stored} if stored else set())
    assert len(model.notes) == (not stored)
    tokens = random_sequences()[3]
    expected = transformers_logits(network, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(served_logits(model, tokens), expected, atol=2e-5, rtol=0)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_definition(form: str, tmp_path: Path) -> None:
    linear, quantization, stored = FORMS[form]
    sizes = {"hidden_size": 96, "intermediate_size": 192} if "96" in form else {}
    network, weights = write_quantized_folder(tmp_path, linear, quantization, **sizes)
    assert_read(tmp_path, network, weights, stored)
