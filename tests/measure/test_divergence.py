"""What is served against the model in 16 bits: as transformers' own model in float64 finds it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmpq.checkpoint.weights import open_weights
from llmpq.measure.divergence import measure_divergence
from llmpq.measure.perplexity import windows_of
from llmpq.measure.reference_model import ReferenceModel
from llmpq.quant import quantize
from llmpq.runtime.engine import Engine
from llmpq.spec import Precision, UsageError
from tests.support.pipelines import UNIFORM, load_spec, make_plan, tiny_model
from tests.support.tiny_models import VOCAB_SIZE

WINDOW = 32
TOKENS = torch.randint(2, VOCAB_SIZE, (83,), generator=torch.Generator().manual_seed(3)).tolist()
WINDOWS = windows_of(TOKENS, WINDOW)
COARSE = Precision(4, 32)


def float64(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def log_probabilities(model: transformers.PreTrainedModel) -> torch.Tensor:
    """float64 [predicted tokens of all windows, vocab_size]."""
    return torch.cat([model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in WINDOWS])


def error_by_windows(values: torch.Tensor) -> float:
    """The jackknife's: the mean with each window left out in turn."""
    windows = values.split([len(ids) - 1 for ids in WINDOWS])
    rest = [torch.cat([*windows[:i], *windows[i + 1 :]]).mean() for i in range(len(windows))]
    weights = torch.tensor([(len(values) - len(window)) / len(values) for window in windows])
    deviations = (torch.stack(rest) - values.mean()) * weights
    return float((deviations.square().sum() * len(windows) / (len(windows) - 1)).sqrt())


def test_a_quantized_pipeline_is_compared_as_in_float64(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa", max_position_embeddings=WINDOW)
    spec = load_spec(checkpoint)
    reference = ReferenceModel(spec, open_weights(checkpoint, spec), WINDOWS)
    with Engine(
        make_plan(spec, [1, 2], 1, 1, precisions=(COARSE,), max_length=WINDOW), checkpoint, spec, logits=True
    ) as e:
        perplexity, divergence = measure_divergence(e.logits, reference)

    p = log_probabilities(float64(tmp_path))
    quantized = float64(tmp_path)
    with torch.no_grad():
        for parameter in quantized.parameters():
            if parameter.dim() == 2:
                rows = parameter.to(torch.bfloat16)
                parameter.copy_(quantize(rows, COARSE, scale_dtype=torch.bfloat16).dequantize())
    q = log_probabilities(quantized)
    targets = torch.tensor([token for ids in WINDOWS for token in ids[1:]])[:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    losses, increases = -q.gather(1, targets)[:, 0], (p - q).gather(1, targets)[:, 0]
    count = len(losses)
    assert (perplexity.tokens, perplexity.window) == (count, WINDOW)
    assert perplexity.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert divergence.reference_perplexity == pytest.approx(math.exp((losses - increases).mean()), rel=1e-4)
    assert divergence.perplexity_increase == pytest.approx(math.exp(increases.mean()) - 1, abs=1e-4)
    # From here on it shows that the pipeline keeps keys and values in 16 bits.
    assert perplexity.perplexity_error == pytest.approx(math.exp(losses.mean()) * error_by_windows(losses), rel=5e-3)
    assert divergence.perplexity_increase_error == pytest.approx(
        math.exp(increases.mean()) * error_by_windows(increases), rel=5e-3
    )
    assert kl.mean() > 0.01
    assert divergence.kl == pytest.approx(float(kl.mean()), rel=5e-3)
    assert divergence.kl_error == pytest.approx(error_by_windows(kl), rel=5e-3)
    assert divergence.kl_999 == pytest.approx(float(np.quantile(kl.numpy(), 0.999)), rel=5e-3)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert divergence.top1_agreement == pytest.approx(agreement) and agreement < 1


@pytest.mark.parametrize("kind", ["llama-tied", "opt", "opt-350m", "opt-no-final-norm", "llama-rope-llama3"])
def test_the_reference_is_the_model_itself_and_16_bits_are_not_far_from_it(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, kind)
    spec = load_spec(checkpoint)
    reference = ReferenceModel(spec, open_weights(checkpoint, spec), WINDOWS)
    found = torch.cat([reference.logits(i, 0, len(ids) - 1) for i, ids in enumerate(WINDOWS)])
    expected = log_probabilities(float64(tmp_path))
    assert (found.double().log_softmax(-1) - expected).abs().max() < 1e-4
    with Engine(make_plan(spec, [2, 1], 1, 1, precisions=UNIFORM), checkpoint, spec, logits=True) as engine:
        _, divergence = measure_divergence(engine.logits, reference)
    # The pipeline keeps keys and values in 16 bits, the reference does not.
    assert 0 < divergence.kl < 1e-6
    assert 0 < divergence.kl_999 < 1e-5
    assert abs(divergence.perplexity_increase) < 5e-4
    assert divergence.top1_agreement > 0.98


def test_windows_that_the_model_cannot_read_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa", max_position_embeddings=WINDOW)
    spec = load_spec(checkpoint)
    source = open_weights(checkpoint, spec)
    for window, problem in (([1] * (WINDOW + 1), "shorten it"), ([VOCAB_SIZE], "tokenizer"), ([], "empty")):
        with pytest.raises(UsageError, match=problem):
            ReferenceModel(spec, source, [window])


def test_logits_are_kept_where_that_was_asked_for(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa")
    spec = load_spec(checkpoint)
    with Engine(make_plan(spec, [3], 1, 1), checkpoint, spec) as engine, pytest.raises(ValueError, match="logits=True"):
        engine.logits([1, 2])
