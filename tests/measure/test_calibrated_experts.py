"""What a quantizer is told of the inputs of experts, against transformers' own routers and experts in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmpq.checkpoint.model_files import Model, load_model
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.calibrated_weights import quantized_in_turn
from llmpq.quant import QuantTensor, quantize
from llmpq.spec import W16
from tests.support.experts import Expert, moment_of_few
from tests.support.linear_inputs import GPTQ, LENGTH, Given, inputs_of, note_given
from tests.support.pipelines import tiny_model

TOKENS = torch.randint(272, (4, LENGTH), generator=torch.Generator().manual_seed(0))
SHARED = {"shared_up": ["gate_proj", "up_proj"], "shared_down": ["down_proj"]}  # by ours, those of transformers


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    return note_given(monkeypatch)


def quantized_layer(model: Model, layer: str) -> dict[str, QuantTensor]:
    """Its linears, all other units being in 16 bits."""
    options = dict.fromkeys(model.spec.units, W16) | {layer: GPTQ}
    source = open_weights(model.checkpoint, model.spec)
    return dict(quantized_in_turn(model.spec, source, options, TOKENS.flatten().tolist()))[layer]


def nearest(weight: torch.Tensor) -> torch.Tensor:
    return quantize(weight, replace(GPTQ, quantizer="rtn"), scale_dtype=torch.bfloat16).dequantize()


def put(made: dict[str, QuantTensor], name: str, modules: list[Any]) -> None:
    """A quantized linear into those that it is in transformers."""
    rows = made[name].dequantize().double().split([module.out_features for module in modules])
    for module, weight in zip(modules, rows, strict=True):
        module.weight.data = weight


def assert_drift(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_statistics_of_an_expert_are_those_of_the_tokens_that_choose_it(
    kind: str, tmp_path: Path, given: list[Given]
) -> None:
    """In the first layer. Routers see what attention makes that is quantized already; outputs are fitted to what the
    experts would give in the exact model, and to what the stream lacks. Each has less error in this than if rounded."""
    model = load_model(tiny_model(tmp_path, kind))
    made = quantized_layer(model, "layer.0")
    exact, served = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64) for _ in range(2))
    exact.config._experts_implementation = served.config._experts_implementation = "eager"  # others know no float64
    attention, mixtures = served.model.layers[0].self_attn, [net.model.layers[0].mlp for net in (exact, served)]
    put(made, "qkv", [attention.q_proj, attention.k_proj, attention.v_proj])
    put(made, "out", [attention.o_proj])
    del given[:2]

    paths = {"stream": "model.layers.0.post_attention_layernorm", "x": "model.layers.0.mlp"}
    (was, wanted), (now, x) = (inputs_of(network, paths, TOKENS).values() for network in (exact, served))
    with torch.no_grad():
        router = mixtures[1].router if kind == "gpt_oss" else mixtures[1].gate
        _, shares, chosen = router(x)
        shared = getattr(mixtures[1], "shared_expert", None)
        gate = x[:, :0] if shared is None else mixtures[1].shared_expert_gate(x).sigmoid()
    squares = torch.cat([shares, gate], 1).square().sum(1, keepdim=True)
    for name in ("up", "down"):
        for number in range(router.num_experts):
            of_exact, expert = (Expert(mixture, number, chosen) for mixture in mixtures)
            weight, statistics = given.pop(0)
            tokens, n = expert.tokens, len(expert.tokens)
            inputs, target = x[tokens], wanted[tokens]
            if name == "down":
                inputs, target = expert.activated(inputs), of_exact.activated(target)
            target = target @ weight.double().T
            if name == "down":
                target += shares[tokens, expert.choices, None] / squares[tokens] * (was - now)[tokens]
            moment, drift = inputs.T @ inputs / n, (target - inputs @ weight.double().T).T @ inputs / n
            expected = moment_of_few(moment, n)
            torch.testing.assert_close(statistics.second_moment, expected, rtol=1e-4, atol=1e-5)
            assert_drift(statistics.drift, drift * n / (n + len(moment) / 4))
            quantized = made[name].rows(number * len(weight), (number + 1) * len(weight)).dequantize().double()
            fitted, rounded = ((inputs @ q.T - target).square().sum() for q in (quantized, nearest(weight).double()))
            assert fitted < 0.8 * rounded
            expert.replace(name, quantized)
    for name, parts in {} if shared is None else SHARED.items():
        weight, statistics = given.pop(0)
        path = {"x": f"model.layers.0.mlp.shared_expert.{parts[0]}"}
        inputs, target = (inputs_of(network, path, TOKENS)["x"] for network in (served, exact))
        missing = (target - inputs) @ weight.double().T
        missing += gate / squares * (was - now) if name == "shared_down" else 0
        torch.testing.assert_close(statistics.second_moment, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
        assert_drift(statistics.drift, missing.T @ inputs / len(inputs))
        put(made, name, [getattr(shared, part) for part in parts])
    assert not given


def test_an_expert_that_no_token_chooses_is_quantized_for_its_weights_alone(
    tmp_path: Path, given: list[Given], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(tiny_model(tmp_path, "gpt_oss"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.router.bias"][2] = -1e4
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    made = quantized_layer(model, "layer.1")
    first = 2  # of `given`, after qkv and out; there are five experts
    for name, (weight, statistics) in {"up": given[first + 2], "down": given[first + 5 + 2]}.items():
        assert not statistics.second_moment.any()
        assert statistics.drift is not None and not statistics.drift.any()
        quantized = made[name].rows(2 * len(weight), 3 * len(weight)).dequantize()
        assert (quantized - weight).square().sum() <= (nearest(weight) - weight).square().sum()
    (told,) = (record.message for record in caplog.records)
    assert "1 of 5 experts get too few tokens of the calibration text" in told
