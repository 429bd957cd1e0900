"""Rules for logits against transformers' own processors, and all of them together against plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from transformers.generation import logits_process as theirs

from llmpq.runtime.logits_rules import LogitsRules, weights
from llmpq.runtime.sampler import Admitted, Sampler, sample
from llmpq.runtime.sampling import SamplingParams

VOCAB, EOS = 40, (3, 5)
PROMPT, OUTPUT = [7, 1, 9, 7, 22], [9, 30, 11, 9, 2]
INF = math.inf


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ruled(params: SamplingParams, logits: torch.Tensor, output: Sequence[int] = OUTPUT) -> torch.Tensor:
    """What the rules make of logits once the output has come, token by token."""
    rules = LogitsRules(params, PROMPT if params.reads_prompt else (), {*EOS, *params.stop_token_ids})
    for token in output:
        rules.add(token)
    changed = logits.clone()
    rules.apply(changed)
    return changed


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        ({"repetition_penalty": 1.3}, theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.7}, theirs.RepetitionPenaltyLogitsProcessor(0.7)),
        (
            {"logit_bias": {4: -2.5, 30: 1.0, 9: 100.0}},
            theirs.SequenceBiasLogitsProcessor({(4,): -2.5, (30,): 1.0, (9,): 100.0}),
        ),
        *(
            ({"bad_words_ids": rows}, theirs.NoBadWordsLogitsProcessor([list(row) for row in rows]))
            for rows in (
                ((4,), (9, 2, 8), (2, 6), (9, 6)),  # the second and third follow the output, the last does not
                ((22, 9, 30, 11, 9, 2, 1), tuple(range(20))),  # through the prompt's end; longer than all
            )
        ),
        *(
            ({"min_tokens": n}, theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), n, list(EOS), device="cpu"))
            for n in (4, 5, 6)
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_a_rule_is_that_of_transformers(params: dict[str, object], processor: theirs.LogitsProcessor) -> None:
    for seed in range(3):
        logits = logits_of(seed)
        expected = processor(torch.tensor([PROMPT + OUTPUT]), logits[None].clone())[0]
        found = ruled(SamplingParams(**params), logits)
        torch.testing.assert_close(found, expected.double(), rtol=1e-12, atol=0)
        if params.get("min_tokens") not in (4, 5):  # so many are there
            assert not torch.equal(found, logits)


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 5}, theirs.TopKLogitsWarper(5)),
        ({"top_p": 0.8}, theirs.TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, theirs.MinPLogitsWarper(0.1)),
        ({"min_p": 1.0}, theirs.MinPLogitsWarper(1.0)),
        *(({"typical_p": p}, theirs.TypicalLogitsWarper(p)) for p in (0.05, 0.5, 0.9)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_what_may_be_chosen_is_what_transformers_leaves(
    temperature: float, params: dict[str, float], warper: theirs.LogitsProcessor
) -> None:
    for seed in range(5):
        logits = logits_of(seed)
        left = warper(None, theirs.TemperatureLogitsWarper(temperature)(None, logits[None].clone()))[0]
        found, tokens = weights(logits, SamplingParams(temperature=temperature, **params))
        shares = torch.zeros(VOCAB, dtype=torch.float64)
        shares[torch.arange(VOCAB) if tokens is None else tokens[: len(found)]] = found / found.sum()
        torch.testing.assert_close(shares, left.softmax(0), rtol=1e-9, atol=0)
        assert torch.equal(shares > 0, left > -INF) and (left == -INF).any()


def test_penalties_of_the_answer_count_its_tokens_alone() -> None:
    logits = logits_of(0)
    found = ruled(SamplingParams(presence_penalty=0.5, frequency_penalty=-0.2), logits)
    counts = Counter(OUTPUT)
    expected = [x - (0.5 - 0.2 * counts[i] if i in counts else 0) for i, x in enumerate(logits.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_tokens_that_end_nothing_may_come_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=9, stop_token_ids=[8], ignore_eos=True, temperature=1)
    sampler = Sampler(Admitted.of(0, params, PROMPT), EOS)
    logits = torch.full((VOCAB,), -INF)
    logits[[3, 8]] = torch.tensor([0.0, 50.0])
    assert sampler.next_token(8, logits, len(PROMPT)) == 3


def brute_force(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> dict[int, float]:
    """Token -> probability, by the definitions."""
    x = [value + params.logit_bias.get(i, 0) for i, value in enumerate(logits)]
    for i in {*prompt, *output}:
        x[i] = x[i] * params.repetition_penalty if x[i] < 0 else x[i] / params.repetition_penalty
    for i in set(output):
        x[i] -= params.presence_penalty + params.frequency_penalty * output.count(i)
    for *before, last in params.bad_words_ids:
        if (prompt + output)[len(prompt + output) - len(before) :] == before:
            x[last] = -INF
    if len(output) < params.min_tokens:
        for i in {*params.stop_token_ids, *EOS}:
            x[i] = -INF
    most = max(x)
    p = normal({i: math.exp((value - most) / params.temperature) for i, value in enumerate(x) if value > -INF})
    likeliest = sorted(p, key=lambda i: -p[i])[: params.top_k or None]
    p = normal({i: p[i] for i in likeliest})
    kept, reached = [], 0.0
    for i in likeliest:
        kept.append(i)
        reached += p[i]
        if reached >= params.top_p:
            break
    p = normal({i: p[i] for i in kept})
    p = normal({i: p[i] for i in p if p[i] >= params.min_p * max(p.values())})
    if params.typical_p < 1:
        entropy = -sum(q * math.log(q) for q in p.values())
        kept, reached = [], 0.0
        for i in sorted(p, key=lambda i: abs(-math.log(p[i]) - entropy)):
            kept.append(i)
            reached += p[i]
            if reached >= params.typical_p:
                break
        p = normal({i: p[i] for i in kept})
    return p


def normal(p: dict[int, float]) -> dict[int, float]:
    return {i: value / sum(p.values()) for i, value in p.items()}


def random_params(choose: random.Random) -> SamplingParams:
    def maybe(value: object, neutral: object) -> object:
        return value if choose.random() < 0.5 else neutral

    row = OUTPUT[len(OUTPUT) - choose.randrange(3) :]
    return SamplingParams(
        temperature=choose.uniform(0.3, 3),
        top_k=maybe(choose.randrange(1, 30), 0),
        top_p=maybe(choose.uniform(0.2, 1), 1.0),
        min_p=maybe(choose.uniform(0, 0.3), 0.0),
        typical_p=maybe(choose.uniform(0.2, 1), 1.0),
        repetition_penalty=maybe(choose.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(choose.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(choose.uniform(-2, 2), 0.0),
        logit_bias=maybe({choose.randrange(VOCAB): choose.uniform(-5, 5) for _ in range(4)}, {}),
        bad_words_ids=maybe(((*row, choose.randrange(VOCAB)), (choose.randrange(VOCAB),)), ()),
        stop_token_ids=maybe((choose.randrange(VOCAB),), ()),
        min_tokens=maybe(choose.randrange(8), 0),
    )


def test_all_rules_together_are_their_definitions() -> None:
    choose = random.Random(0)
    kinds = set()
    for seed in range(150):
        params, logits = random_params(choose), logits_of(seed).float()
        expected = brute_force(logits.tolist(), params, PROMPT, OUTPUT)
        changed = ruled(params, logits.double())
        found, tokens = weights(changed, params)
        shares = {int(i): float(p) for i, p in zip(range(VOCAB) if tokens is None else tokens, found / found.sum())}
        assert {i: p for i, p in shares.items() if p} == pytest.approx(expected, rel=1e-9), params
        chosen = Counter(sample(changed, params, (i + 0.5) / 200) for i in range(200))
        assert all(abs(chosen[i] / 200 - p) < 1.01 / 200 for i, p in expected.items()) and set(chosen) <= set(expected)
        kinds.add(len(expected))
        greedy = SamplingParams.from_dict(params.to_dict() | {"temperature": 0})
        sampler = Sampler(Admitted.of(0, greedy, PROMPT), EOS)
        answer: list[int] = []
        for position in range(len(PROMPT), len(PROMPT) + 3) if sampler.is_needed else ():
            best = int(ruled(params, logits.double(), answer).argmax())
            answer.append(sampler.next_token(-1, logits, position))
            assert answer[-1] == best
    assert len(kinds) > 15  # from one token to many


@pytest.mark.parametrize("params", [{"logit_bias": {2: 1.7e308, 9: 1e3}}, {"frequency_penalty": -1e308}], ids=str)
def test_biases_and_penalties_of_any_size_leave_a_token_to_choose(params: dict[str, object]) -> None:
    """Twice 1e308 is more than float64 holds; so is 1.7e308 / 0.01, of a token that was seen."""
    params = SamplingParams(temperature=1, repetition_penalty=0.01, top_p=0.9, **params)
    changed = ruled(params, logits_of(0), [2, 2])
    assert changed.isfinite().all() and changed.argmax() == 2
    found, _ = weights(changed, params)
    assert (found / found.sum()).tolist() == [1.0]


def test_end_tokens_that_the_model_has_not_are_no_concern_of_rules() -> None:
    rules = LogitsRules(SamplingParams(min_tokens=3), (), {-1, 3, VOCAB, 10**6})
    changed = torch.zeros(VOCAB, dtype=torch.float64)
    rules.apply(changed)
    assert (changed == -INF).nonzero().tolist() == [[3]]
