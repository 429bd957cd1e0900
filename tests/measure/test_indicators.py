"""Measured indicators against transformers' own models and autograd in float64, one quantized copy for each unit."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure import cache_divergence, fisher_indicator, kl_indicator
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.fisher_indicator import fisher, output_gradients
from llmpq.measure.indicators import METHODS, sensitivity, with_cache
from llmpq.measure.kl_indicator import kl, single_damages
from llmpq.measure.served_units import ServedUnits
from llmpq.quant import quantize
from llmpq.spec import ModelSpec, Precision, Sensitivity, UsageError
from tests.support.decoding import transformers_logits
from tests.support.quantized_files import gptq, write_quantized_folder
from tests.support.quantized_models import GPTQ
from tests.support.tiny_models import KINDS, save_model

SEQUENCES, LENGTH = 2, 12
W3, W4, W8 = Precision(3, 32), Precision(4, 32), Precision(8, 32, "asym")
FUSED = {"qkv": "[qkv]_proj", "out": "o_proj|out_proj", "up": "gate_proj|up_proj|fc1", "down": "down_proj|fc2"}


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fisher_indicator, kl_indicator, cache_divergence):
        monkeypatch.setattr(module, "SEQUENCES", SEQUENCES)
        monkeypatch.setattr(module, "SEQUENCE_LENGTH", LENGTH)


def saved(kind: str, folder: Path) -> tuple[transformers.PreTrainedModel, WeightSource, ModelSpec, torch.Tensor]:
    """transformers' model in float64, and ours; tokens [sequences, length]."""
    model = save_model(folder, kind, torch.float16).double()
    model.config._experts_implementation = "eager"  # its grouped products know no float64
    checkpoint = resolve(str(folder))
    spec = load_spec(checkpoint)
    tokens = torch.randint(spec.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    return model, open_weights(checkpoint, spec), spec, tokens


def decoder_layers(model: transformers.PreTrainedModel) -> torch.nn.ModuleList:
    layers: torch.nn.ModuleList = (model.model if hasattr(model.model, "layers") else model.model.decoder).layers
    return layers


def with_quantized(
    model: transformers.PreTrainedModel, unit: str, precision: Precision
) -> transformers.PreTrainedModel:
    """A copy in which one unit is quantized, or a linear of it; a table that two units share becomes two."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if unit == "embedding":
        modules = [model.get_input_embeddings()]
    elif unit == "head":
        modules = [model.lm_head]
    else:
        layer = decoder_layers(model)[int(unit.split(".")[1])]
        pieces = FUSED.get(unit.split(".")[-1], "")
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        linears = [(name, module) for name, module in linears if not name.endswith(("router", "shared_expert_gate"))]
        modules = [module for name, module in linears if re.search(rf"(^|\.)({pieces})$", name) or not pieces]
        assert modules
        for experts in (parameter for parameter in layer.parameters() if parameter.dim() == 3):
            with torch.no_grad():
                experts.copy_(torch.stack([quantize(w.float(), precision).dequantize() for w in experts]))
    with torch.no_grad():
        for module in modules:
            module.weight.copy_(quantize(module.weight.float(), precision).dequantize())
    return model


def outputs(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the first layer reads and each layer puts out, [sequences, length, hidden_size], and the logits."""
    seen: list[torch.Tensor] = []

    def note(hidden_states: torch.Tensor) -> None:
        if hidden_states.requires_grad:
            hidden_states.retain_grad()
        seen.append(hidden_states)

    layers = decoder_layers(model)
    handles = [layers[0].register_forward_pre_hook(lambda m, i: note(i[0]))]
    for layer in layers:
        handles.append(layer.register_forward_hook(lambda m, i, o: note(o[0] if isinstance(o, tuple) else o)))
    logits: torch.Tensor = model(tokens).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def gradients(model: transformers.PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Of the summed loss, by `outputs`, [t, hidden_size] each."""
    seen, logits = outputs(model, tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    found = [hidden_states.grad for hidden_states in seen]
    assert all(gradient is not None for gradient in found)
    return [gradient.flatten(0, 1) for gradient in found if gradient is not None]


def fix_labels(monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> torch.Tensor:
    labels = torch.randint(vocab_size, (SEQUENCES * LENGTH,), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(fisher_indicator, "draw", lambda probabilities, generator: labels)
    return labels


@pytest.mark.parametrize("kind", [*KINDS, "mixtral", "qwen2_moe", "gpt_oss"])
def test_gradients_are_those_of_transformers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of layer that the decoder knows."""
    model, source, spec, tokens = saved(kind, tmp_path)
    labels, steps = fix_labels(monkeypatch, spec.vocab_size), itertools.count()
    text = CalibrationPass(spec, source, tokens.flatten().tolist(), SEQUENCES, LENGTH)
    ours = output_gradients(source, spec, text, lambda step=None: next(steps))
    assert next(steps) == 2 * spec.num_layers + 1
    for found, expected in zip(ours, gradients(model, tokens, labels), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-tied", "opt", "opt-350m"])
def test_fisher_is_its_definition(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, spec, tokens = saved(kind, tmp_path)
    labels = fix_labels(monkeypatch, spec.vocab_size)
    omega = fisher(source, spec, [W4, W8], tokens.flatten().tolist(), per_linear=True)
    assert set(omega) == {*spec.units, *(f"{layer}.{name}" for layer in spec.units[1:-1] for name in FUSED)}
    assert fisher(source, spec, [W4], tokens.flatten().tolist()).keys() == set(spec.units)
    slopes = gradients(model, tokens, labels)
    with torch.no_grad():
        exact, logits = outputs(model, tokens)
    for precision in (W4, W8):
        expected = {}
        for unit in omega:
            i = spec.units.index(".".join(unit.split(".")[:2]))
            with torch.no_grad():
                changed, changed_logits = outputs(with_quantized(model, unit, precision), tokens)
            if unit == "head":
                p, change = logits.softmax(-1), changed_logits - logits
                loss = ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean() / 2
            else:
                change = (changed[i] - exact[i]).flatten(0, 1)
                loss = (slopes[i] * change).sum(-1).square().mean() / 2
            expected[unit] = float(loss)
        for layer in spec.units[1:-1]:  # linears share what their layer loses
            alone = sum(expected[f"{layer}.{name}"] for name in FUSED)
            for name in FUSED:
                expected[f"{layer}.{name}"] *= expected[layer] / alone
        for unit, loss in expected.items():
            assert omega[unit][str(precision)] == pytest.approx(loss, rel=0.02), (unit, str(precision))


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-tied", "opt", "opt-350m", "qwen2_moe"])
def test_kl_is_that_of_a_model_with_one_unit_quantized(kind: str, tmp_path: Path) -> None:
    model, source, spec, tokens = saved(kind, tmp_path)
    told: list[float | None] = []
    omega = kl(source, spec, [W4, W8], tokens.flatten().tolist(), lambda text, share=None: told.append(share))
    assert told[0] == 0.0 and told[-1] == 1.0 and len(told) > 20 and told == sorted(told)  # type: ignore[type-var]
    with torch.no_grad():
        reference = model(tokens).logits.log_softmax(-1)
        for unit in spec.units:
            for precision in (W4, W8):
                changed = with_quantized(model, unit, precision)(tokens).logits.log_softmax(-1)
                expected = float((reference.exp() * (reference - changed)).sum(-1).mean())
                assert omega[unit][str(precision)] == pytest.approx(expected, rel=0.02), (unit, str(precision))


def test_a_cache_of_8_bits_diverges_as_in_transformers(tmp_path: Path) -> None:
    """In all layers at once; sensitivities get it once, unless they are in another unit."""
    model, source, spec, tokens = saved("opt", tmp_path)
    found = cache_divergence.int8_cache_kl(source, spec, tokens.flatten().tolist())
    with torch.no_grad():
        p, q = (
            torch.stack([transformers_logits(model, ids, layers) for ids in tokens.tolist()]).double().log_softmax(-1)
            for layers in ((), range(spec.num_layers))
        )
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.01)
    none = Sensitivity(spec.name, spec.content_hash, "kl", "", {})
    checkpoint, text = resolve(str(tmp_path)), "Words of which it is measured. " * 3
    known = with_cache(none, checkpoint, spec, text)
    assert known.omega.keys() == {"kv_cache"} and known.omega["kv_cache"].keys() == {"8"}
    assert 0.2 < known.of_cache(spec, "layer.1", 8) * spec.num_layers / found < 5
    assert with_cache(known, checkpoint, spec, "Others") is known
    with pytest.raises(UsageError, match="by variance are not; choose another --method, or --kv-bits 16"):
        with_cache(replace(none, method="variance"), checkpoint, spec, text)


def test_the_loss_that_a_unit_adds_is_that_of_the_texts_next_tokens(tmp_path: Path) -> None:
    model, source, spec, tokens = saved("llama-gqa", tmp_path)
    ids = tokens.flatten().tolist()
    text = CalibrationPass(spec, source, ids, SEQUENCES, LENGTH)
    damages = single_damages(text, ServedUnits(spec, source, ids), spec, [W4])

    def loss(network: transformers.PreTrainedModel) -> float:
        return float(network(tokens, labels=tokens).loss)

    with torch.no_grad():
        for unit in spec.units:
            added = loss(with_quantized(model, unit, W4)) - loss(model)
            assert damages[unit, W4].loss == pytest.approx(added, rel=0.02, abs=2e-5), unit


def test_fisher_is_the_kl_of_a_small_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On average over labels; exactly so where no token's change meets another's: in the last layer, and the head."""
    _, source, spec, _ = saved("llama-gqa", tmp_path)
    for module in (fisher_indicator, kl_indicator):
        monkeypatch.setattr(module, "SEQUENCES", 60)
        monkeypatch.setattr(module, "SEQUENCE_LENGTH", 50)
    tokens = torch.randint(spec.vocab_size, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    estimated, measured = (method(source, spec, [W8], tokens) for method in (fisher, kl))
    for unit, within in (("layer.2", 0.12), ("head", 0.02)):
        assert estimated[unit][str(W8)] == pytest.approx(measured[unit][str(W8)], rel=within), unit


@pytest.mark.parametrize("method", ["fisher", "kl", "variance"])
def test_omega_of_a_model_that_others_quantized_is_what_its_own_weights_lose(method: str, tmp_path: Path) -> None:
    """The same as of a model that has these weights as floating numbers."""
    network, _ = write_quantized_folder(tmp_path / "stored", gptq(), GPTQ, num_hidden_layers=2)
    network.save_pretrained(tmp_path / "floating")
    omega = []
    for folder in ("stored", "floating"):
        checkpoint = resolve(str(tmp_path / folder))
        spec = load_spec(checkpoint)
        assert bool(spec.stored) == (folder == "stored")
        tokens = torch.randint(spec.vocab_size, (SEQUENCES * LENGTH,), generator=torch.Generator().manual_seed(0))
        omega.append(METHODS[method](open_weights(checkpoint, spec), spec, [W3, W4], tokens.tolist()))
    for unit, of_stored in omega[0].items():
        assert of_stored == pytest.approx(omega[1][unit], rel=1e-3)
        assert 0 < of_stored[str(W4)] < of_stored[str(W3)]


def test_methods_differ_and_are_cached_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model", "llama-gqa")
    checkpoint = resolve(str(tmp_path / "model"))
    spec = load_spec(checkpoint)
    found = {
        method: sensitivity(
            checkpoint, spec, precisions=[W4, Precision(3, 32)], method=method, text="some text to read"
        )
        for method in METHODS
    }
    assert len({omega.of("layer.1", W4) for omega in found.values()}) == len(METHODS)
    for method, omega in found.items():
        assert omega.method == method and set(omega.omega) == set(spec.units)
        assert all(0 < omega.of(unit, W4) < omega.of(unit, Precision(3, 32)) for unit in spec.units), method


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    checkpoint = resolve(str(tmp_path))
    with pytest.raises(UsageError, match="kl"):
        sensitivity(checkpoint, load_spec(checkpoint), precisions=[W4], method="magic", text="abc")  # type: ignore[arg-type]
