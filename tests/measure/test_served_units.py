"""Quantizing for the inputs of the model as it is: against GPTQ with second moments of transformers' own inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import open_weights
from llmpq.kernels import gemm
from llmpq.measure import served_units
from llmpq.measure.hessian_indicator import hessian
from llmpq.measure.served_units import ServedUnits
from llmpq.quant import InputStatistics, quantize
from llmpq.quant.gptq import quantize_for_inputs
from llmpq.spec import Precision
from tests.support.experts import Expert, moment_of_few
from tests.support.linear_inputs import inputs_of
from tests.support.tiny_models import save_model

RTN, GPTQ = Precision(3, 32, "asym"), Precision(3, 32, "asym", "gptq")
MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def assert_fitted(ours: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, what: str) -> None:
    """A quantized weight has the error of GPTQ for inputs of the second moment h, which is below that of rounding."""

    def error(quantized: torch.Tensor) -> float:
        difference = quantized.double() - weight
        return float(((difference @ h) * difference).sum())

    expected = quantize_for_inputs(weight.float(), GPTQ, torch.float16, InputStatistics(h))
    assert error(ours) == pytest.approx(error(expected.dequantize()), rel=0.02), what
    assert error(ours) < 0.9 * error(quantize(weight.float(), RTN).dequantize()), what


def test_linears_and_the_head_are_quantized_for_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_units, "SEQUENCES", 8)
    monkeypatch.setattr(served_units, "SEQUENCE_LENGTH", 50)
    model = save_model(tmp_path, "llama-gqa", torch.float16).double()
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    tokens = torch.randint(spec.vocab_size, (8, 50), generator=torch.Generator().manual_seed(0))
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, i: inputs.__setitem__(m, i[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    units = ServedUnits(spec, open_weights(checkpoint, spec), tokens.flatten().tolist())

    def check(ours: torch.Tensor, modules: list[torch.nn.Module], what: str) -> None:
        x = inputs[modules[0]]
        assert_fitted(ours, torch.cat([module.weight.detach() for module in modules]), x.T @ x / len(x), what)

    for i, layer in enumerate(model.model.layers):
        for name, parts in MODULES.items():
            modules = [layer.get_submodule(part) for part in parts]
            ours = units.linear(f"layer.{i}", name, GPTQ)(torch.eye(spec.linears("layer.0")[name].k)).T
            check(ours, modules, f"{i}.{name}")
    check(gemm(torch.eye(spec.hidden_size), units.table("head", GPTQ)).T, [model.lm_head], "head")


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_experts_are_quantized_for_the_tokens_that_choose_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_units, "SEQUENCES", 8)
    monkeypatch.setattr(served_units, "SEQUENCE_LENGTH", 50)
    model = save_model(tmp_path, kind, torch.float16).double()
    model.config._experts_implementation = "eager"  # its grouped products know no float64
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    tokens = torch.randint(spec.vocab_size, (8, 50), generator=torch.Generator().manual_seed(0))
    units = ServedUnits(spec, open_weights(checkpoint, spec), tokens.flatten().tolist())
    mixture = model.model.layers[0].mlp
    x = inputs_of(model, {"x": "model.layers.0.mlp"}, tokens)["x"]
    with torch.no_grad():
        _, _, chosen = (mixture.router if kind == "gpt_oss" else mixture.gate)(x)
    for name in ("up", "down"):
        for number, found in enumerate(units.experts("layer.0", name, GPTQ).weights):
            expert = Expert(mixture, number, chosen)
            weight, inputs = expert.weight(name), x[expert.tokens]
            inputs = inputs if name == "up" else expert.activated(inputs)
            h = moment_of_few(inputs.T @ inputs / len(inputs), len(inputs))
            assert_fitted(gemm(torch.eye(found.k), found).T, weight, h, f"{number}.{name}")


@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_a_quantizer_that_knows_the_inputs_has_less_error(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind, torch.float16)
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    tokens = torch.randint(spec.vocab_size, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    omega = hessian(open_weights(checkpoint, spec), spec, [RTN, GPTQ], tokens)
    for unit in spec.units:
        fitted, rounded = omega[unit][str(GPTQ)], omega[unit][str(RTN)]
        if unit == "embedding":  # one table for both, whose errors count for more in the head
            assert 0 < fitted < 2 * rounded
        else:
            assert 0 < fitted < 0.9 * rounded
