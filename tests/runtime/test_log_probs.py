"""Log-probabilities against torch's own, and their way from the last stage to the first."""

from __future__ import annotations

import pytest
import torch

from llmpq.models.step import Step
from llmpq.runtime.log_probs import LEAST, Asked, num_values, read, take, told
from llmpq.runtime.sampling import SamplingParams

VOCAB = 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 4, VOCAB])
def test_what_is_told_is_the_logarithm_of_the_models_probability(count: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = logits.double().log_softmax(-1)
    found = read(told(logits, [2, 0, 7], count), count)
    assert [each.log_prob for each in found] == pytest.approx([float(expected[i, t]) for i, t in enumerate((2, 0, 7))])
    for each, row in zip(found, expected, strict=True):
        assert list(each.top_log_probs) == pytest.approx(sorted(row.tolist(), reverse=True)[:count])
        assert [float(row[i]) for i in each.top_ids] == pytest.approx(list(each.top_log_probs))
        assert len(set(each.top_ids)) == count


def test_what_cannot_be_has_the_least() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    (each,) = read(told(logits, [1], 3), 3)
    assert each.log_prob == LEAST and each.top_log_probs[2] == LEAST


@pytest.mark.parametrize("parts", [[7], [3, 4], [1, 5, 1], [6, 1]], ids=str)
def test_prompts_in_parts_get_what_is_theirs_and_tokens_with_the_last(parts: list[int]) -> None:
    """A prompt of 7 tokens: all parts but the last are by themselves, that is beside tokens of two other requests."""
    asked = [
        Asked(SamplingParams(logprobs=1, prompt_logprobs=2), 7),
        None,
        Asked(SamplingParams(logprobs=0), 3),
    ]
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(2))
    prompt = list(range(7))
    start = 0
    for part in [*parts, 1]:  # then a token of the answer
        prefix = start + part < 7
        here = asked[:1] if prefix else asked
        lengths, starts = [part, 1, 1][: len(here)], [start, 9, 9][: len(here)]
        step = Step.of(range(len(here)), lengths, starts, [0] * sum(lengths))
        rows = range(start, min(start + part, 6))
        values = [told(logits[start : start + len(rows)], [prompt[i + 1] for i in rows], 2)]
        if not prefix:
            values += [told(logits[:1], [start], 1), told(logits[1:2], [start], 0)]
        assert num_values(step, here, prefix) == sum(map(len, values))
        take(torch.cat(values), step, here)
        start += part
    first, _, last = asked
    assert first is not None and last is not None
    assert first.prompt == tuple(read(told(logits[:6], prompt[1:], 2), 2))
    assert first.tokens == tuple(read(told(logits[[0, 0]], [7 - parts[-1], 7], 1), 1))
    assert last.prompt is None and last.tokens == tuple(read(told(logits[[1, 1]], [7 - parts[-1], 7], 0), 0))
    assert num_values(step, [None, None, None]) == 0
