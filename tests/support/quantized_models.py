"""What is read of a model that others have quantized, and what programs write of how they did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmpq.checkpoint import model_files
from llmpq.checkpoint.model_files import Model
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.models.decoder_stage import build_stage
from llmpq.quant import QuantTensor
from llmpq.spec import NATIVE
from tests.support.decoding import CPU, EXACT, all_logits, random_sequences, single_plan, transformers_logits
from tests.support.tiny_models import heads_in_turn

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.01}
ASYM = {"sym": False, "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "iters": 200, "data_type": "int"}
DOWN, HEAD, Q = "model.layers.0.mlp.down_proj", "lm_head", "model.layers.0.self_attn.q_proj"


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


def parts(model: Model) -> Iterator[tuple[str, str, list[str]]]:
    """Unit, part and modules of the linears."""
    tensors = model_files.decoder_tensors(model.spec, model_files.describe(model.checkpoint).family)
    for (unit, part), pieces in tensors.items():
        if unit.startswith("layer") and part.removesuffix(".weight") in model.spec.linears(unit):
            yield unit, part, [piece.name.removesuffix(".weight") for piece in pieces]


def served_logits(model: Model, tokens: list[int]) -> torch.Tensor:
    """With all native that can be, and the rest in float32."""
    plan = single_plan(model.spec)
    stored, layers = model.spec.stored, range(model.spec.num_layers)
    precisions = tuple(NATIVE if f"layer.{i}" in stored else plan.precision(f"layer.{i}") for i in layers)
    stage = replace(plan.stages[0], precisions=precisions, activations="a16")
    head = replace(plan.head, precision=NATIVE) if "head" in stored else plan.head
    plan = replace(plan, stages=(stage,), head=head)
    built = build_stage(model.spec, open_weights(model.checkpoint, model.spec), plan, 0, CPU, **EXACT)
    return all_logits([built], {0: tokens}, [24])[0]


def assert_rows(model: Model, weights: dict[str, np.ndarray[Any, Any]]) -> dict[str, set[str]]:
    """Rows of the layers' linears are the weights. Part -> the precisions of its rows ("": they are floating)."""
    source, kinds = open_weights(model.checkpoint, model.spec), {}
    for unit, part, modules in parts(model):
        expected = torch.from_numpy(np.concatenate([weights[module] for module in dict.fromkeys(modules)]))
        if modules[0].endswith("query_key_value"):
            order = heads_in_turn(torch.arange(len(expected)), model.spec.num_heads, model.spec.num_kv_heads)
            expected = torch.empty_like(expected).index_copy_(0, order, expected)
        found = list(source.rows(unit, part))
        kinds[part] = {str(rows.precision) if isinstance(rows, QuantTensor) else "" for rows in found}
        n = len(expected)
        for start, stop in (0, n), (5, 6), (7, n - 3):
            rows = torch.cat([floating(rows).double() for rows in source.rows(unit, part, start, stop)])
            # What a QuantTensor stands for fits float32. Other weights are rounded to it.
            torch.testing.assert_close(rows, expected[start:stop], atol=0, rtol=2.0**-24 if "" in kinds[part] else 0)
    return kinds


def assert_logits(model: Model, network: Any) -> None:
    """Those of a model are those of transformers' network."""
    tokens = random_sequences()[3]
    expected = transformers_logits(network, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(served_logits(model, tokens), expected, atol=2e-5, rtol=0)


def assert_read(
    folder: Path, network: Any, weights: dict[str, np.ndarray[Any, Any]], stored: str, notes: int = 0
) -> Model:
    """Rows of a folder's linears are the weights, all in one precision, and its logits those of the network."""
    model = model_files.open_model(str(folder))
    assert set().union(*assert_rows(model, weights).values()) == {stored}
    assert {str(p) for p in model.spec.stored.get("layer.0", {}).values()} == ({stored} if stored else set())
    assert len(model.notes) == notes + (not stored)
    assert_logits(model, network)
    return model


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """None: without that tensor."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})
