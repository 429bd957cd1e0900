"""Layers of experts: quantized, split into stages, loaded, recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmpq.models.arena import Arena
from llmpq.models.decoder_stage import build_stage
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.quant import quantize
from llmpq.spec import Experts, LayerKind, Precision, UsageError
from tests.support.decoding import (
    CPU,
    WIDE_CACHE,
    all_logits,
    open_model,
    random_sequences,
    single_plan,
    split_plan,
    transformers_logits,
)
from tests.support.specs import tiny_model
from tests.support.tiny_models import save_model

W4 = Precision(4, 32, "asym")


def rounded(name: str, weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """As transformers has a weight of one or of all experts; a router stays in 16 bits."""
    if name.endswith(("_bias", "sinks")) or weight.dim() < 2:
        return weight
    if name.endswith(("router.weight", "mlp.gate.weight", "shared_expert_gate.weight")):
        return weight.half().float()
    columns = weight.dim() == 3 and name.startswith("gpt_oss.")
    rows = weight.transpose(1, 2) if columns else weight
    result = quantize(rows.flatten(0, -2).contiguous(), precision).dequantize().view(rows.shape)
    return result.transpose(1, 2) if columns else result


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_quantized_experts_equal_transformers_with_dequantized_weights(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec, W4), 0, CPU, **WIDE_CACHE)
    for name, parameter in model.named_parameters():
        parameter.data = rounded(f"{kind}.{name}", parameter.data, W4)
    sequences = random_sequences()
    for slot, logits in all_logits([stage], sequences, portions=[4, 3]).items():
        torch.testing.assert_close(logits, transformers_logits(model, sequences[slot]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_chained_stages_equal_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    plan = split_plan(spec, (1, spec.num_layers - 1), W4)
    chain = [build_stage(spec, source, plan, i, CPU) for i in range(2)]
    one = [build_stage(spec, source, single_plan(spec, W4), 0, CPU)]
    expected = all_logits(one, random_sequences(), portions=[6, 6])
    for slot, logits in all_logits(chain, random_sequences(), portions=[6, 6]).items():
        assert torch.equal(logits, expected[slot])


def test_each_expert_is_a_weight_of_its_own(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2_moe")
    spec, source = open_model(tmp_path)
    kinds = [spec.layer_kind(i).experts for i in range(3)]
    experts = Experts(count=6, per_token=2, intermediate_size=40, normalized=False, shared_size=56)
    assert kinds == [experts, None, experts]
    stage = build_stage(spec, source, single_plan(spec, W4), 0, CPU, "reference")
    linears = [module for module in stage.modules() if isinstance(module, ExpertLinear)]
    assert len(linears) == 4
    for linear in linears:
        assert len({w.data[0].data_ptr() for w in linear.weights}) == 6
        held = sum(w.nbytes for w in linear.weights)
        shape = spec.linears("layer.0")["up" if linear.in_features == spec.hidden_size else "down"]
        assert held == shape.weight_bytes(W4) == 6 * W4.weight_bytes(shape.n, shape.k)


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_a_layer_holds_what_the_planner_counts(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec, W4), 0, CPU, "reference")
    for i, layer in enumerate(stage.layers):
        held = sum(buffer.nbytes for buffer in layer.buffers())
        for module in layer.modules():
            weights = [module.weight] if isinstance(module, QuantLinear) else getattr(module, "weights", [])
            held += sum(weight.nbytes for weight in weights)
        assert held == spec.unit_bytes(f"layer.{i}", W4)


def test_a_mixture_fits_its_arena_and_no_smaller_one(tmp_path: Path) -> None:
    """In 16 bits numbers and weights of experts take two places each; of a CPU's arena less is left over."""
    save_model(tmp_path, "qwen2_moe")
    spec, source = open_model(tmp_path)
    layer = build_stage(spec, source, single_plan(spec, W4), 0, CPU, "reference").layers[0]
    x = torch.randn(3, spec.hidden_size)
    for dtype in (torch.bfloat16, torch.float32):
        arena = Arena(spec, 3, dtype, CPU)
        out, residual = arena.hidden_states(3), arena.hidden_states(3)
        layer.mlp(x.to(dtype), arena, residual.zero_(), out)
        unused = len(arena._room) - arena._used
        assert unused == (0 if dtype == torch.bfloat16 else 3 * 2 * (2 + 1))


def test_what_a_mixture_cannot_be_is_refused() -> None:
    experts = Experts(count=4, per_token=2, intermediate_size=8, normalized=True)
    spec = tiny_model(layer_kinds=(LayerKind(experts=experts),))
    with pytest.raises(UsageError, match="cannot be split into 2 parts, as it has layers of experts"):
        spec.part(2)
    with pytest.raises(ValueError, match="experts: is not supported in blocks of form 'sandwich'"):
        tiny_model(layer_kinds=(LayerKind(experts=experts),), block="sandwich")
    with pytest.raises(ValueError, match="per_token: is 5, but there are 4 experts"):
        Experts(count=4, per_token=5, intermediate_size=8, normalized=True)
    with pytest.raises(ValueError, match="activation: is 'swiglu_clamped', which needs gated_mlp"):
        tiny_model(activation="swiglu_clamped", gated_mlp=False)
