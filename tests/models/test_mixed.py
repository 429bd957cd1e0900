"""Mixed layers: a precision for each fused linear, from a plan's JSON to the tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.checkpoint.model_files import Model, load_model, open_model
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.cli.main import main
from llmpq.cli.options import constraints_of_plan
from llmpq.measure.quantized_model import as_served, write_quantized
from llmpq.models.decoder import DecoderLayer
from llmpq.models.decoder_stage import build_stage
from llmpq.quant import quantize
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import NATIVE, W16, Mixed, ModelSpec, Plan, Precision, UnitPrecision, UsageError
from llmpq.spec.formatting import format_stage, format_width
from llmpq.spec.model import DENSE
from tests.support.decoding import CPU, WIDE_CACHE, all_logits, random_sequences, single_plan, transformers_logits
from tests.support.pipelines import make_plan, tiny_model
from tests.support.quantized_files import gptq, write_quantized_folder
from tests.support.quantized_models import GPTQ
from tests.support.specs import tiny_model as tiny_spec

W3, W4, W8 = Precision(3, 32), Precision(4, 32, "asym"), Precision(8, 64)
MIXED = Mixed((("qkv", W8), ("out", W3), ("up", W3), ("down", W4)))
OTHER = Mixed((("qkv", W4), ("out", W4), ("up", W3), ("down", W3)))
KEPT = Mixed((("qkv", NATIVE), ("out", W3), ("up", W3), ("down", NATIVE)))
TEXT = "The quick brown fox jumps over the lazy dog. 0123456789! " * 80
PROMPTS = [[5, 6, 7], [8], [9, 10]]


def mixed_plan(spec: ModelSpec, split: tuple[int, ...], *layers: UnitPrecision) -> Plan:
    """Layer i as layers[i % len(layers)], tables at 4 bits."""
    plan = make_plan(spec, split, 2, 2)
    chosen = [layers[i % len(layers)] for i in range(spec.num_layers)]
    return plan.with_precisions([W4, *chosen, W4])


def test_text_is_read_back_and_16_bit_is_refused() -> None:
    assert str(MIXED) == "qkv:w8-g64-sym-rtn,out:w3-g32-sym-rtn,up:w3-g32-sym-rtn,down:w4-g32-asym-rtn"
    assert Mixed.parse(str(MIXED)) == MIXED
    assert str(KEPT) == "qkv:native,out:w3-g32-sym-rtn,up:w3-g32-sym-rtn,down:native"
    assert Mixed.parse(str(KEPT)) == KEPT
    plan = mixed_plan(tiny_spec(), (1, 2), MIXED, W16, KEPT)
    assert Plan.from_dict(plan.to_dict()) == plan
    for text in ("qkv:w16", "qkv", "qkv:w4-g32-sym-rtn,"):
        with pytest.raises(ValueError):
            Mixed.parse(text)


def test_a_plan_names_every_linear_of_a_layer_and_of_layers_only() -> None:
    spec = tiny_spec()
    plan = replace(mixed_plan(spec, (1, 2), MIXED), model_hash=spec.content_hash)
    plan.check_model(spec)
    for unit, wrong, problem in (
        (2, Mixed(MIXED.linears[:3]), r"layer\.1 has qkv, out, up, down, but precisions are given for qkv, out, up"),
        (2, Mixed(MIXED.linears[::-1]), "precisions are given for down, up, out, qkv"),
        (0, MIXED, "embedding has table, but"),
        (2, Mixed((("qkv", Precision(4, 32, "sym", "gguf")), *MIXED.linears[1:])), "made by others"),
        (2, KEPT, "stores nothing in a precision that kernels read"),
    ):
        units = [plan.precision(unit) for unit in spec.units]
        units[unit] = wrong
        with pytest.raises(UsageError, match=problem):
            plan.with_precisions(units).check_model(spec)


def test_people_see_the_bits_of_each_linear() -> None:
    assert format_width(MIXED.width) == "8/3/3/4 bits"
    assert format_width(KEPT.width) == "native/3/3/native bits"
    plan = mixed_plan(tiny_spec(), (1, 2), W8, MIXED, MIXED)
    assert format_stage(plan, 1) == "8/3/3/4 x2, head 4"


def test_linears_may_stay_as_others_quantized_them_beside_some_that_are_quantized_again(tmp_path: Path) -> None:
    network, _ = write_quantized_folder(tmp_path, gptq(), GPTQ, num_hidden_layers=2)
    model = open_model(str(tmp_path))
    stored = model.spec.stored["layer.0"]
    assert model.spec.linear_precisions("layer.0", KEPT) == {**stored, "out": W3, "up": W3}
    plan = single_plan(model.spec).with_precisions([W16, KEPT, NATIVE, W16])
    plan = replace(plan, stages=(replace(plan.stages[0], activations="a16"),))
    source = open_weights(model.checkpoint, model.spec)
    stage = build_stage(model.spec, source, plan, 0, CPU, "reference", **WIDE_CACHE)
    for module in network.model.layers[0].modules():
        for name in ("o_proj", "gate_proj", "up_proj"):
            if hasattr(module, name):
                linear = getattr(module, name)
                linear.weight.data = quantize(linear.weight.data, W3).dequantize()
    tokens = random_sequences()[3]
    logits = all_logits([stage], {0: tokens}, portions=[24])[0]
    torch.testing.assert_close(logits, transformers_logits(network, tokens), atol=1e-3, rtol=0)


def vectors_of(layer: DecoderLayer) -> list[torch.Tensor]:
    """Its norms' weights and all biases."""
    norms, linears = layer.norms.values(), [layer.linear(name) for name in DENSE]
    vectors = [*(norm.weight for norm in norms), *(getattr(of, "bias", None) for of in (*norms, *linears))]
    return [vector for vector in vectors if vector is not None]


def test_a_plan_is_explained_by_the_constraints_it_was_made_with() -> None:
    plan = mixed_plan(tiny_spec(), (1, 2), MIXED).with_precisions([W16, MIXED, MIXED, OTHER, W16])
    found = constraints_of_plan(plan)
    assert (found.per_linear, found.group_size) == (True, 64)
    assert not constraints_of_plan(mixed_plan(tiny_spec(), (1, 2), W8)).per_linear


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_each_linear_is_quantized_to_its_own_precision_and_weighs_what_is_predicted(kind: str, tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, kind))
    spec, source = model.spec, open_weights(model.checkpoint, model.spec)
    layer = build_stage(spec, source, mixed_plan(spec, (spec.num_layers,), MIXED), 0, CPU).layers[1]
    loaded = 0
    for name, precision in MIXED.linears:
        weight = torch.cat([floating(rows) for rows in source.rows("layer.1", f"{name}.weight")])
        expected = quantize(weight, precision, scale_dtype=torch.bfloat16)
        found = layer.linear(name).weight
        assert found.precision == precision
        x = torch.eye(found.k)
        torch.testing.assert_close(layer.linear(name)(x) - layer.linear(name)(0 * x), expected.dequantize().T)
        loaded += found.nbytes
    loaded += sum(tensor.nbytes for tensor in vectors_of(layer))
    assert spec.unit_bytes("layer.1", MIXED) == loaded


def generated(model: Model, plan: Plan) -> Any:
    with Engine(plan, model.checkpoint, model.spec) as engine:
        return engine.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True)).sequences


def test_two_processes_give_the_tokens_of_one_and_of_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    model = load_model(tiny_model(tmp_path / "model", "llama-gqa"))
    alone = mixed_plan(model.spec, (model.spec.num_layers,), MIXED, W16, OTHER)
    two = mixed_plan(model.spec, (1, model.spec.num_layers - 1), MIXED, W16, OTHER)
    expected = generated(model, alone)
    assert generated(model, two) == expected
    two.save(tmp_path / "plan.json")
    out = str(tmp_path / "out")
    assert (
        main(["quantize", "--model", str(tmp_path / "model"), "--plan", str(tmp_path / "plan.json"), "--out", out]) == 0
    )
    found = open_model(out)
    assert found.spec.stored["layer.0"] == dict(MIXED.linears)
    assert generated(*as_served(found, two)) == expected
    with pytest.raises(UsageError, match=r"layer\.0 in qkv:w4.*, but .* was quantized to another precision"):
        as_served(found, mixed_plan(model.spec, (1, model.spec.num_layers - 1), OTHER, W16, OTHER))


def test_gptq_makes_each_linear_in_its_own_precision(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "model", "llama-gqa"))
    mixed = Mixed(tuple((name, replace(p, zero="asym", quantizer="gptq")) for name, p in MIXED.linears))
    options = dict.fromkeys(model.spec.units, W16) | {"layer.0": mixed, "layer.2": mixed}
    write_quantized(model, options, tmp_path / "out", text=TEXT)
    found = open_model(str(tmp_path / "out"))
    assert found.spec.stored == {"layer.0": dict(mixed.linears), "layer.2": dict(mixed.linears)}
    source = open_weights(found.checkpoint, found.spec)
    for name, precision in mixed.linears:
        assert all(rows.precision == precision for rows in source.rows("layer.2", f"{name}.weight"))
