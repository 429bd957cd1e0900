"""Noise indicators against a computation of their own in float64, on transformers' model and its hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import open_weights
from llmpq.measure import indicators, relative_noise
from llmpq.measure.hessian_indicator import hessian
from llmpq.measure.indicators import sensitivity
from llmpq.measure.text import digest
from llmpq.measure.variance_indicator import variance
from llmpq.quant import quantize
from llmpq.spec import W16, Experts, LayerKind, Precision, Sensitivity, UsageError
from tests.support.specs import tiny_model
from tests.support.tiny_models import make_model, save_model

LLAMA_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
OPT_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)


def squared_steps(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """S^2 of every single weight, group by group."""
    steps = torch.empty_like(weight)
    width = precision.group_size or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            group = weight[row, start : start + width]
            if precision.zero == "sym":
                span = 2 * group.abs().max()
            elif precision.zero == "offset":
                span = group.max() - group.min()
            else:
                span = max(group.max(), torch.tensor(0.0)) - min(group.min(), torch.tensor(0.0))
            steps[row, start : start + width] = (span / (2**precision.bits - 1)) ** 2
    return steps


Error = Callable[[torch.Tensor], torch.Tensor]
Squared = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def expected_omega(
    model: transformers.PreTrainedModel,
    tokens: torch.Tensor,
    squared_error: Error,
    squared_noise: Squared,
    scale: float,
) -> dict[str, float]:
    """The formula of relative_noise.py, token by token; tokens [sequences, length]. With a `scale`, that of the paper.

    `squared_error(weight)` [n, k] is that of each weight, `squared_noise(weight, x)` [t, n] that of each output.
    """
    model = model.double()
    llama = hasattr(model.model, "layers")
    layers = model.model.layers if llama else model.model.decoder.layers
    seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_hook(
                lambda m, i, o: seen.__setitem__(m, (i[0].flatten(0, -2), o.flatten(0, -2).clone()))
            )
    streams = []
    layers[0].register_forward_pre_hook(lambda m, i: streams.append(i[0].flatten(0, -2).clone()))
    for layer in layers:
        layer.register_forward_hook(
            lambda m, i, o: streams.append((o[0] if isinstance(o, tuple) else o).reshape(-1, i[0].shape[-1]).clone())
        )
    with torch.no_grad():
        model(tokens)
    table = model.get_input_embeddings().weight.detach()
    ids = tokens.flatten()
    rho = squared_error(table).mean(1)[ids] / table.square().mean(1)[ids]
    noises = [rho * streams[0].square().mean(1)]
    summed = [noises[0]]
    for layer in layers:
        relative, size = [], []
        summed.append(torch.zeros(tokens.numel()))
        for names in LLAMA_LINEARS if llama else OPT_LINEARS:
            linears = [layer.get_submodule(name) for name in names]
            weight = torch.cat([linear.weight.detach() for linear in linears])
            x, y = seen[linears[0]][0], torch.cat([seen[linear][1] for linear in linears], 1)
            size.append(y.square().mean(1))
            summed[-1] = summed[-1] + squared_noise(weight, x).mean(1)
            relative.append(squared_noise(weight, x).mean(1) / size[-1])
        factor = 2 if llama else 1
        noises.append((relative[0] + relative[1]) * size[1] + (factor * relative[2] + relative[3]) * size[3])
    head = model.lm_head.weight.detach()
    x = seen[model.lm_head][0]
    units = ["embedding", *(f"layer.{i}" for i in range(len(layers)))]
    if scale:
        omega = {unit: scale * float(noise.mean()) for unit, noise in zip(units, summed, strict=True)}
        return omega | {"head": scale * float(squared_noise(head, x).mean())}
    logit_variance = (x.square().mean(0) * head.var(0, unbiased=False)).sum()
    omega = {}
    for i, noise in enumerate(noises):
        relative = torch.stack([noise / stream.square().mean(1) for stream in streams[i:]])
        omega[units[i]] = float(logit_variance / 2 * relative.mean())
    omega["head"] = float(squared_noise(head, x).mean() / 2)
    return omega


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-tied", "opt"])
@pytest.mark.parametrize(
    "precision", [Precision(4, 32), Precision(3, 32, "asym"), Precision(4, 64, "offset"), Precision(8)], ids=str
)
@pytest.mark.parametrize("method", ["variance", "variance-deterministic", "variance-relative", "hessian"])
def test_omega_is_the_published_formula(
    method: str, kind: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relative_noise, "SEQUENCES", 2)
    monkeypatch.setattr(relative_noise, "SEQUENCE_LENGTH", 12)
    model = save_model(tmp_path, kind)
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    tokens = torch.randint(spec.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))

    def steps(weight: torch.Tensor) -> torch.Tensor:
        return squared_steps(weight, precision) / 12

    def error(weight: torch.Tensor) -> torch.Tensor:
        return quantize(weight.float(), precision).dequantize().double() - weight

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True) if method == "variance-deterministic" else x

    if method == "hessian":
        expected = expected_omega(model, tokens, lambda w: error(w).square(), lambda w, x: (x @ error(w).T).square(), 0)
    else:
        scale = {"variance": 12 / 6, "variance-deterministic": 12 / 4, "variance-relative": 0}[method]
        expected = expected_omega(model, tokens, steps, lambda w, x: centred(x).square() @ steps(w).T, scale)
    source, ids = open_weights(checkpoint, spec), tokens.flatten().tolist()
    if method == "hessian":
        omega = hessian(source, spec, [precision], ids)
    else:
        form = method.removeprefix("variance").lstrip("-")
        omega = variance(source, spec, [precision], ids, **({form: True} if form else {}))
    assert set(omega) == set(spec.units)
    for unit, value in expected.items():
        assert omega[unit] == {str(precision): pytest.approx(value, rel=0.02)}, unit


@pytest.mark.parametrize("method", [partial(variance, relative=True), variance, hessian])
def test_experts_that_are_alike_lose_what_an_mlp_does(method: Callable[..., Any], tmp_path: Path) -> None:
    """Whichever a token goes through, with what weight."""
    llama = save_model(tmp_path / "llama", "llama-gqa")
    experts = {"num_local_experts": 3, "num_experts_per_tok": 1, "rope_parameters": llama.config.rope_parameters}
    mixture = make_model("mixtral", **experts)
    for name, parameter in mixture.named_parameters():
        stem, _, part = name.rpartition(".experts.")
        if part == "gate_up_proj":
            rows = [llama.get_parameter(f"{stem}.{linear}_proj.weight") for linear in ("gate", "up")]
            parameter.data = torch.cat(rows).expand_as(parameter).clone()
        elif part == "down_proj":
            parameter.data = llama.get_parameter(f"{stem}.down_proj.weight").expand_as(parameter).clone()
        elif not name.endswith("gate.weight"):
            parameter.data = llama.get_parameter(name).data
    mixture.save_pretrained(tmp_path / "mixture")
    found = []
    for folder in ("llama", "mixture"):
        checkpoint = resolve(str(tmp_path / folder))
        spec = load_spec(checkpoint)
        found.append(method(open_weights(checkpoint, spec), spec, [Precision(4, 32)], list(range(2, 40))))
    for unit, omega in found[0].items():
        assert found[1][unit] == {key: pytest.approx(value, rel=1e-4) for key, value in omega.items()}, unit


def test_what_experts_write_counts_by_the_squares_of_their_weights() -> None:
    spec = tiny_model(layer_kinds=(LayerKind(experts=Experts(4, 2, 8, True, shared_size=8)),))
    nu = {name: torch.rand(1, 3).double() for name in ("qkv", "out", "shared_up", "shared_down")}
    nu |= {name: torch.rand(1, 6).double() for name in ("up", "down")}
    size = {name: torch.rand(values.shape[1]).double() for name, values in nu.items()}
    weights, gate = torch.rand(3, 2), torch.rand(3, 1)
    written = relative_noise._written(spec, nu, size, {"": weights, "shared_": gate})
    for token in range(3):
        expected = float((nu["qkv"] / size["qkv"] + nu["out"] / size["out"])[0, token] * size["out"][token])
        for prefix, shares in (("", weights), ("shared_", gate)):
            for j, share in enumerate(shares[token].tolist()):
                at = token * shares.shape[1] + j
                up, down = (float(nu[f"{prefix}{name}"][0, at]) for name in ("up", "down"))
                of_up, of_down = (float(size[f"{prefix}{name}"][at]) for name in ("up", "down"))
                expected += share**2 * (2 * up / of_up + down / of_down) * of_down
        assert float(written[0, token]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama-gqa", "opt-350m", "opt-no-final-norm"])
def test_fewer_bits_and_larger_groups_cost_more(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    precisions = [Precision(b, g) for g in (32, None) for b in (8, 4, 3)]
    omega = variance(open_weights(checkpoint, spec), spec, precisions, list(range(2, 40)))
    for unit in spec.units:
        fine, coarse = ([omega[unit][str(Precision(b, g))] for b in (8, 4, 3)] for g in (32, None))
        assert 0 < fine[0] < fine[1] < fine[2]
        assert all(f <= c for f, c in zip(fine, coarse, strict=True))


def test_every_token_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sequence is no less part of the mean than the last one."""
    monkeypatch.setattr(relative_noise, "SEQUENCE_LENGTH", 8)
    save_model(tmp_path, "llama-gqa")
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    source, first, last = open_weights(checkpoint, spec), list(range(2, 10)), list(range(100, 108))

    def omega(tokens: list[int]) -> float:
        return variance(source, spec, [Precision(4, 32)], tokens)["head"][str(Precision(4, 32))]

    assert omega(first + last) == pytest.approx((omega(first) + omega(last)) / 2, rel=1e-3)
    assert omega(first) != pytest.approx(omega(last), rel=1e-3)


def test_a_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path, "llama-gqa")
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    told: list[float | None] = []

    def notify(text: str, share: float | None = None, /) -> None:
        told.append(share)

    once = [Precision(4, 32)]

    def measure() -> Sensitivity:
        return sensitivity(
            checkpoint, spec, precisions=once, method="variance", text="some words to read", notify=notify
        )

    measured = measure()
    assert told == [None, *(i / len(spec.units) for i in range(len(spec.units) + 1))]
    monkeypatch.setattr(indicators, "METHODS", dict.fromkeys(indicators.METHODS))
    assert measure() == measured
    assert len(told) == len(spec.units) + 2
    assert measured.of("head", Precision(4, 32)) > 0
    assert measured.text == digest("some words to read")
    assert measured.of("head", W16) == 0.0
    with pytest.raises(UsageError, match="no sensitivity of head"):
        measured.of("head", Precision(3, 32))
