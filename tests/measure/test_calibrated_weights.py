"""What a quantizer is told of a linear's inputs, against transformers' own inputs in float64."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmpq.checkpoint.model_files import describe, load_model
from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.calibrated_weights import quantized_in_turn
from llmpq.measure.calibration_pass import COPIED, CalibrationPass, second_moment
from llmpq.quant import InputStatistics, QuantTensor, quantize
from llmpq.spec import W16
from tests.support.linear_inputs import GPTQ, LENGTH, Given, inputs_of, note_given
from tests.support.pipelines import tiny_model
from tests.support.tiny_models import heads_in_turn


def test_a_second_moment_wider_than_what_is_multiplied_at_a_time() -> None:
    x = torch.randn(50, 600, generator=torch.Generator().manual_seed(0))
    moment = second_moment(x)
    torch.testing.assert_close(moment, x.double().T @ x.double() / 50, rtol=1e-5, atol=1e-6)
    assert torch.equal(moment, moment.T)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    return note_given(monkeypatch)


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-biases", "opt", "opt-350m", "gpt_neox", "falcon-new"])
def test_statistics_are_those_of_the_quantized_model_beside_the_exact_one(
    kind: str, tmp_path: Path, given: list[Given]
) -> None:
    """Of all linears: those before it are quantized already, and what an output is added to has drifted, too."""
    model = load_model(tiny_model(tmp_path, kind))
    spec, family = model.spec, describe(model.checkpoint).family
    options = dict.fromkeys(spec.units, GPTQ) | {"embedding": W16, "head": W16}
    token_ids = torch.randint(spec.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    units = quantized_in_turn(spec, open_weights(model.checkpoint, spec), options, token_ids.flatten().tolist())

    exact, served = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64) for _ in range(2))
    tensors, state = decoder_tensors(spec, family), served.state_dict()
    linears = spec.linears("layer.0")
    modules = {name: tensors["layer.0", f"{name}.weight"][0].name.removesuffix(".weight") for name in linears}
    before = {"out": family.layer.format(0).rstrip("."), "down": family.layer.format(0) + family.norms["mlp_norm"]}
    in_turn = torch.arange(linears["qkv"].n)
    if modules["qkv"].endswith("query_key_value"):
        in_turn = heads_in_turn(in_turn, spec.num_heads, spec.num_kv_heads)
    for unit, weights in units:
        if not unit.startswith("layer."):
            continue
        at = {name: path.replace(".0.", f".{unit.removeprefix('layer.')}.") for name, path in modules.items()}
        streams = {name: path.replace(".0", f".{unit.removeprefix('layer.')}", 1) for name, path in before.items()}
        assert list(weights) == list(linears)
        for name, quantized in weights.items():
            weight, statistics = given.pop(0)
            x, y = (inputs_of(network, {name: at[name]}, token_ids)[name] for network in (served, exact))
            target = (y - x) @ weight.double().T
            if spec.block == "pre" and name in streams:
                was, is_ = (inputs_of(n, {name: streams[name]}, token_ids)[name] for n in (exact, served))
                target += was - is_
            expected = target.T @ x / len(x)
            assert statistics.drift is not None
            torch.testing.assert_close(statistics.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            size = float(expected.abs().max())
            torch.testing.assert_close(statistics.drift, expected, rtol=1e-3, atol=1e-3 * size + 1e-6)
            names, found = list(dict.fromkeys(piece.name for piece in tensors[unit, f"{name}.weight"])), quantized
            if name == "qkv" and len(names) == 1:  # as in the order of its tensor
                stored = exact.state_dict()[names[0]].float()
                assert torch.equal(weight[in_turn], stored)
                alike = InputStatistics(statistics.second_moment, statistics.drift[in_turn])
                found = quantize(stored, GPTQ, inputs=alike, scale_dtype=torch.bfloat16)
                assert torch.equal(quantized.dequantize()[in_turn], found.dequantize())
            for tensor, rows in zip(names, found.dequantize().double().split([len(state[name]) for name in names])):
                state[tensor].copy_(rows)
    assert not given


@pytest.mark.parametrize("kind", ["llama-tied", "opt", "opt-350m"])
def test_a_table_for_embedding_and_head_is_quantized_for_both(kind: str, tmp_path: Path, given: list[Given]) -> None:
    """For what goes into the head of the exact model, and as if every row itself were read now and then."""
    model = load_model(tiny_model(tmp_path, kind))
    spec = model.spec
    token_ids = torch.randint(spec.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    options, source = dict.fromkeys(spec.units, GPTQ), open_weights(model.checkpoint, spec)
    units = dict(quantized_in_turn(spec, source, options, token_ids.flatten().tolist()))
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    x = inputs_of(network, {"head": "lm_head"}, token_ids)["head"]
    h = x.T @ x / len(x)
    weight, statistics = given[0]
    assert torch.equal(weight.double(), network.lm_head.weight)
    expected = h + COPIED * h.diagonal().mean() * torch.eye(len(h))
    torch.testing.assert_close(statistics.second_moment, expected, rtol=1e-4, atol=1e-5)
    assert statistics.drift is None and len(given) == 1 + spec.num_layers * len(spec.linears("layer.0"))

    def error(quantized: QuantTensor) -> float:
        difference = quantized.dequantize().double() - weight.double()
        return float(((difference @ h) * difference).sum())

    assert error(units["embedding"]["table"]) < 0.5 * error(quantize(weight, replace(GPTQ, quantizer="rtn")))
    assert not units["head"]


@pytest.mark.parametrize("kind", ["llama-gqa", "opt-350m", "qwen2_moe"])
def test_no_layer_is_held_when_its_turn_is_over(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the collector of cycles, which counts objects and not the bytes of a layer and its inputs."""
    layers: list[weakref.ref[Any]] = []
    make = CalibrationPass.layer

    def noted(text: CalibrationPass, *arguments: Any) -> Any:
        layers.append(weakref.ref(layer := make(text, *arguments)))
        return layer

    monkeypatch.setattr(CalibrationPass, "layer", noted)
    model = load_model(tiny_model(tmp_path, kind))
    source, ids = open_weights(model.checkpoint, model.spec), list(range(60))
    gc.collect()
    gc.disable()
    try:
        for unit, _ in quantized_in_turn(model.spec, source, dict.fromkeys(model.spec.units, GPTQ), ids):
            assert [layer() for layer in layers] == [None] * len(layers), unit
    finally:
        gc.enable()
    assert len(layers) >= model.spec.num_layers
