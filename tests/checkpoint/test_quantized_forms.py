"""Checkpoints that others have quantized: their weights are those that the form's definition gives."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.checkpoint import model_files
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.quantized_model import write_quantized
from llmpq.spec import NATIVE, W16, UsageError
from tests.support.decoding import single_plan
from tests.support.quantized_files import (
    awq,
    four_bits,
    gptq,
    llm_int8,
    pack_quantized,
    scaled,
    write_quantized_folder,
)
from tests.support.quantized_models import (
    ASYM,
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
    parts,
)
from tests.support.tiny_models import FORMS as MODELS

QUANTIZED = [kind for kind in MODELS if "-" not in kind and kind != "gpt_oss"]  # which has all experts in one tensor
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32], "fmt": "e4m3"}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
FP8_TENSOR = {**FP8, "weight_block_size": None}
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


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
        "w8-grow-sym-stored",
    ),
    "fp8": (scaled(E4M3, (48, 32), "weight_scale_inv"), FP8, ""),
    "fp8 e5m2, one scale": (scaled(E5M2, None, "weight_scale_inv", one=0), {**FP8_TENSOR, "fmt": "e5m2"}, ""),
    "bitsandbytes int8": (llm_int8, BNB8, ""),
    "bitsandbytes nf4": (four_bits("nf4", nested=4, storage=BF16), BNB4, ""),
    "bitsandbytes fp4": (four_bits("fp4", block=128), BNB4, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_definition(form: str, tmp_path: Path) -> None:
    linear, quantization, stored = FORMS[form]
    sizes = {"hidden_size": 96, "intermediate_size": 192} if "96" in form else {}
    network, weights = write_quantized_folder(tmp_path, linear, quantization, **sizes)
    assert_read(tmp_path, network, weights, stored)


@pytest.mark.full
@pytest.mark.family("GPTQ")
@pytest.mark.parametrize("kind", ["llama-gqa", "mistral", "opt", *QUANTIZED])
def test_a_family_with_quantized_layers_equals_transformers(kind: str, tmp_path: Path) -> None:
    """In groups of whole rows, as tiny models are no multiples of 32 wide."""
    quantization, sizes = {**GPTQ, "group_size": -1}, {"n_head": 4} if kind == "bloom" else {}
    network, weights = write_quantized_folder(
        tmp_path, gptq(group=None), quantization, kind=kind, hidden_size=64, **sizes
    )
    assert_read(tmp_path, network, weights, "w4-grow-sym-stored")


@pytest.mark.parametrize("form", ["gptq asym", "awq", "compressed-tensors 8 bits asym", "fp8", "bitsandbytes nf4"])
def test_rows_of_heads_in_turn_are_read_in_our_order(form: str, tmp_path: Path) -> None:
    linear, quantization, stored = FORMS[form]
    network, weights = write_quantized_folder(tmp_path, linear, quantization, kind="falcon-new")
    assert_read(tmp_path, network, weights, stored)


def test_each_module_may_have_bits_of_its_own_and_biases_of_zeros_change_nothing(tmp_path: Path) -> None:
    dynamic = {f"+:.*{DOWN.split('.')[-1]}": {"bits": 8, "group_size": -1}, "-:.*o_proj": {}, HEAD: {"bits": 3}}
    others = {DOWN: gptq(bits=8, group=None), HEAD: gptq(bits=3), Q: gptq(act_order=True)}
    quantization = {**GPTQ, "dynamic": dynamic, "lm_head": True}
    network, weights = write_quantized_folder(tmp_path, gptq(), quantization, others=others, vocab_size=288)
    change_tensors(tmp_path, {f"{DOWN}.bias": torch.zeros(64), f"{Q}.rotary_emb.inv_freq": torch.ones(8)})
    model = model_files.open_model(str(tmp_path))
    # Of q, k and v, one is in act-order, so that qkv is not native.
    assert {unit: {name: str(p) for name, p in of.items()} for unit, of in model.spec.stored.items()} == {
        "layer.0": {"out": "w4-g32-sym-stored", "up": "w4-g32-sym-stored", "down": "w8-grow-sym-stored"},
        "head": {"table": "w3-g32-sym-stored"},
    }
    kinds = assert_rows(model, weights)
    assert kinds == {
        "qkv.weight": {"", "w4-g32-sym-stored"},
        "out.weight": {"w4-g32-sym-stored"},
        "up.weight": {"w4-g32-sym-stored"},
        "down.weight": {"w8-grow-sym-stored"},
    }
    assert "1 of its 8 quantized linears (gptq) have groups of columns in no order" in model.notes[0]
    assert f"{DOWN}.bias and 1 more tensors of its files are not used" in model.notes[1]
    assert_logits(model, network)


def test_a_quantized_head_is_not_the_table_that_it_is_said_to_be_tied_to(tmp_path: Path) -> None:
    network, weights = write_quantized_folder(tmp_path, awq(), {**AWQ, "zero_point": False}, others={HEAD: awq()})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    model = assert_read(tmp_path, network, weights, "w4-g32-sym-stored", notes=1)
    assert not model.spec.tied_embeddings and "the two differ" in model.notes[0]


I32 = torch.int32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each form."""

    @functools.cache
    def folder(form: str) -> Path:
        path = tmp_path_factory.mktemp("form")
        write_quantized_folder(path, *FORMS[form][:2])
        return path

    return folder


@pytest.mark.parametrize(
    ("form", "keys", "tensors", "problem"),
    [
        ("gptq", {"quant_method": "aqlm"}, {}, "quant_method = 'aqlm' in its quantization_config is not supported"),
        ("gptq", {"bits": 2}, {}, "bits = 2 in its quantization_config is not supported; 3, 4, 8 are"),
        ("gptq", {"bits": 8}, {}, "down_proj.qzeros is I32"),
        ("gptq", {"bits": "4"}, {}, "bits = '4'"),
        ("gptq", {"group_size": 0}, {}, "group_size = 0 in its quantization_config is no group size"),
        ("gptq", {"group_size": 64}, {}, "by its quantization_config it should be"),
        ("gptq", {"checkpoint_format": "marlin"}, {}, "checkpoint_format = 'marlin'"),
        ("gptq", {"sym": "yes"}, {}, "sym = 'yes' in its quantization_config is neither true nor false"),
        ("gptq", {"is_marlin_format": True}, {}, "is_marlin_format = True"),
        ("gptq", {"rotation": "hadamard"}, {}, "rotation = 'hadamard'"),
        ("gptq", {"novelty": 1}, {}, "novelty = 1 in its quantization_config is not known"),
        ("gptq", {"dynamic": {".*": {"novelty": 1}}}, {}, "novelty = 1 in its quantization of .* is not known"),
        ("gptq", {}, {f"{DOWN}.scales": None}, f"the tensor {DOWN}.scales is missing"),
        ("gptq", {}, {f"{DOWN}.g_idx": torch.full((96,), 3, dtype=I32)}, f"{DOWN}.g_idx names groups"),
        ("gptq", {}, {f"{DOWN}.g_idx": torch.full((96,), -1, dtype=I32)}, f"{DOWN}.g_idx names groups"),
        ("gptq", {}, {f"{DOWN}.g_scale": torch.ones(2)}, f"the tensor {DOWN}.g_scale, which its configuration"),
        ("gptq", {}, {f"{DOWN}.bias": torch.ones(64)}, f"the tensor {DOWN}.bias, which its configuration"),
        ("gptq", {}, {f"{DOWN}.qzeros": torch.zeros(3, 8, dtype=I32)}, f"{DOWN}.qzeros has zero points other than 8"),
        ("gptq asym", {}, {f"{DOWN}.qzeros": torch.full((3, 8), -1, dtype=I32)}, "has a zero point of 0, which"),
        ("gptq", {}, {f"{DOWN}.scales": torch.full((3, 64), float("inf")).half()}, "scales that are not finite"),
        ("gptq", {}, {f"{DOWN}.scales": torch.ones(3, 64).bfloat16()}, "its scales are BF16 and F16"),
        ("gptq", {}, {f"{DOWN}.qweight": torch.zeros(8, 64, dtype=I32)}, f"{DOWN}.qzeros is I32"),
        ("awq", {"version": "gemv"}, {}, "version = 'gemv' in its quantization_config is not supported; gemm are"),
        ("awq", {"bits": 8}, {}, "bits = 8 in its quantization_config is not supported"),
        ("auto-round", {"packing_format": "auto_round:fp8_static"}, {}, "packing_format = 'auto_round:fp8_static'"),
        ("auto-round", {"act_bits": 8}, {}, "act_bits = 8"),
        ("compressed-tensors", {"format": "marlin-24"}, {}, "format = 'marlin-24'"),
        (
            "gptq",
            {"data_type": "mx_fp"},
            {},
            "data_type = 'mx_fp' in its quantization_config is not supported; only int",
        ),
        ("gptq", {"extra_config": {DOWN: {"data_type": "fp"}}}, {}, f"data_type = 'fp' in its quantization of {DOWN}"),
        ("gptq", {"extra_config": {DOWN: {"act_bits": 8}}}, {}, f"act_bits = 8 in its quantization of {DOWN}"),
        ("gptq", {}, {f"{Q[:-7]}.k_scale": torch.ones(1)}, "self_attn.k_scale, which its configuration has no use for"),
        ("awq", {"backend": "llm-awq"}, {}, "backend = 'llm-awq'"),
        ("auto-round awq", {"extra_config": {DOWN: {"bits": 8}}}, {}, f"bits = 8 in its quantization of {DOWN}"),
        ("auto-round", {"packing_format": None, "backend": "auto"}, {}, "backend = 'auto' in its quantization_config"),
        ("auto-round", {"packing_format": None, "backend": "auto_round:exllamav2"}, {}, "backend = 'auto_round:exl"),
        ("auto-round", {"packing_format": None}, {}, "packing_format = None in its quantization_config"),
        (
            "compressed-tensors",
            {"sparsity_config": {"format": "sparse-24"}},
            {},
            "format = 'sparse-24' in its sparsity",
        ),
        ("compressed-tensors", {"sparsity_config": {"sparsity_structure": "2:4"}}, {}, "format = None in its sparsity"),
        (
            "compressed-tensors asym",
            {},
            {f"{DOWN}.weight_zero_point": torch.full((64, 3), 8, dtype=torch.int8)},
            "weight_zero_point has zero points that are no numbers of 4 bits",
        ),
        ("compressed-tensors", {"config_groups": None}, {}, "its config_groups is None"),
        ("compressed-tensors", compressed(num_bits=2), {}, "num_bits = 2 in its config_groups.group_0.weights"),
        ("compressed-tensors", compressed(strategy="block"), {}, "strategy = 'block'"),
        ("compressed-tensors", compressed(symmetric=False), {}, "has no weight_zero_point, but symmetric is false"),
        ("compressed-tensors", {}, {f"{DOWN}.weight_shape": torch.tensor([64, 99])}, "weight_packed is I32"),
        ("fp8", {"weight_block_size": [64]}, {}, "weight_block_size = [64]"),
        ("fp8", {"scale_fmt": "ue8m0"}, {}, "scale_fmt = 'ue8m0'"),
        ("fp8", {}, {f"{DOWN}.weight_scale_inv": torch.ones(2, 2)}, "weight_scale_inv is F32 [2, 2]"),
        (
            "bitsandbytes int8",
            {},
            {f"{DOWN}.weight_format": torch.tensor(1, dtype=torch.uint8)},
            "is 1; only 0, in rows, is read",
        ),
        ("bitsandbytes nf4", {}, {f"{DOWN}.weight.absmax": torch.ones(3)}, "absmax is F32 [3]"),
    ],
)
def test_what_is_not_read_is_named(
    form: str,
    keys: dict[str, Any],
    tensors: dict[str, torch.Tensor | None],
    problem: str,
    tmp_path: Path,
    written: Callable[[str], Path],
) -> None:
    shutil.copytree(written(form), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= keys
    (tmp_path / "config.json").write_text(json.dumps(config))
    if tensors:
        change_tensors(tmp_path, tensors)
    with pytest.raises(UsageError) as caught:
        model = model_files.open_model(str(tmp_path))
        for unit, part, _ in parts(model):
            list(open_weights(model.checkpoint, model.spec).rows(unit, part))
    assert problem in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_settings_apart_and_layers_that_stay_native(tmp_path: Path) -> None:
    """As AutoGPTQ wrote them first; and a folder of ours, quantized from such a model, keeps what is native."""
    network, weights = write_quantized_folder(tmp_path / "old", gptq(symmetric=False), {})
    path = tmp_path / "old" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "quantization_config"}))
    settings = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "true_sequential": True}
    (tmp_path / "old" / "quantize_config.json").write_text(json.dumps(settings))
    model = assert_read(tmp_path / "old", network, weights, "w4-g32-asym-stored")
    options = {unit: NATIVE if unit in model.spec.stored else W16 for unit in model.spec.units}
    write_quantized(model, options, tmp_path / "ours")
    assert assert_read(tmp_path / "ours", network, weights, "w4-g32-asym-stored").spec.source_hash
    plan = single_plan(model.spec)
    native = replace(plan, stages=(replace(plan.stages[0], precisions=(NATIVE,)),))
    native.check_model(model_files.open_model(str(tmp_path / "ours")).spec)


def test_how_weights_are_stored_is_part_of_what_a_model_is(tmp_path: Path) -> None:
    contents = set()
    for i, quantization in enumerate((GPTQ, {**GPTQ, "checkpoint_format": "gptq_v2"}, {**GPTQ, "sym": False})):
        write_quantized_folder(tmp_path / str(i), gptq(), quantization)
        contents.add(model_files.open_model(str(tmp_path / str(i))).spec.content_hash)
    change_tensors(tmp_path / "2", {f"{DOWN}.g_idx": torch.arange(96, dtype=I32).flip(0) // 32})
    contents.add(model_files.open_model(str(tmp_path / "2")).spec.content_hash)
    assert len(contents) == 4
