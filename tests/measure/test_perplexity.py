"""Perplexity against transformers' own loss on the same windows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.perplexity import measure_perplexity, windows_of
from llmpq.models.decoder_stage import build_stage
from llmpq.models.step import Step
from llmpq.runtime.request import Scores
from llmpq.spec import W16, Device, Plan, UsageError
from tests.support.decoding import EXACT
from tests.support.tiny_models import make_model, save_model

WINDOW = 16
TOKENS = torch.randint(2, 258, (50,), generator=torch.Generator().manual_seed(0)).tolist()


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-gqa")
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    plan = Plan.single(spec, Device("cpu0", "cpu"), W16, slots=1, max_length=WINDOW)
    source, cpu = open_weights(checkpoint, spec), torch.device("cpu")
    stage = build_stage(spec, source, plan, 0, cpu, "reference", **EXACT)

    def score(sequences: list[list[int]]) -> list[Scores]:
        scores = []
        for ids in sequences:
            step = Step.of([0], [len(ids)], [0], ids)
            log_probs = stage.logits(stage(step)).log_softmax(-1)
            scores.append(Scores(log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), []))
        return scores

    total, count = 0.0, 0
    for start in range(0, len(TOKENS), WINDOW):
        ids = torch.tensor([TOKENS[start : start + WINDOW]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    measured = measure_perplexity(score, windows_of(TOKENS, WINDOW))
    assert measured.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (measured.tokens, measured.window) == (count, WINDOW)


def test_windows_are_disjoint_and_a_single_token_is_left_out() -> None:
    asked: list[list[int]] = []

    def score(sequences: list[list[int]]) -> list[Scores]:
        asked.extend(sequences)
        return [Scores([-math.log(7)] * (len(ids) - 1), []) for ids in sequences]

    result = measure_perplexity(score, windows_of(list(range(9)), 4))
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert result.perplexity == pytest.approx(7)
    assert result.tokens == 6
    assert result.perplexity_error == 0


def test_windows_of_a_long_text_come_from_all_over_it() -> None:
    assert windows_of(list(range(40)), 4, max_tokens=12) == [[0, 1, 2, 3], [12, 13, 14, 15], [24, 25, 26, 27]]
    assert windows_of(list(range(5)), 4, max_tokens=3) == [[0, 1, 2]]


def test_the_standard_error_is_that_of_the_mean_loss_carried_over_to_its_exponential() -> None:
    losses = [0.5, 1.5, 4.0]
    result = measure_perplexity(lambda sequences: [Scores([-loss for loss in losses], [])], [[1, 2, 3, 4]])
    error = (sum((loss - 2) ** 2 for loss in losses) / 2 / 3) ** 0.5
    assert (result.perplexity, result.perplexity_error) == pytest.approx((math.exp(2), math.exp(2) * error))


def test_an_untrained_model_is_not_better_than_chance() -> None:
    model = make_model("opt")

    def score(sequences: list[list[int]]) -> list[Scores]:
        with torch.no_grad():
            losses = [float(model(torch.tensor([s]), labels=torch.tensor([s])).loss) for s in sequences]
        return [Scores([-loss] * (len(s) - 1), []) for loss, s in zip(losses, sequences, strict=True)]

    assert measure_perplexity(score, windows_of(TOKENS, WINDOW)).perplexity > 100


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(UsageError, match="at least two"):
        windows_of([5], 4)
    with pytest.raises(UsageError, match="at least 2"):
        windows_of([5, 6, 7], window=1)
