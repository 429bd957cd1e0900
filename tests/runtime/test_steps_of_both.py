"""Steps in which some decode beside the prompts of others: what comes of them is what comes of each request alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model

PROMPTS = random_prompts(60, 3, 25, 50, 20, 41, 9)
GREEDY = SamplingParams(max_tokens=9, ignore_eos=True)
SAMPLED = replace(GREEDY, max_tokens=14, temperature=1.2, seed=5, logprobs=1)
RULES = replace(SAMPLED, max_tokens=30, repetition_penalty=1.3, bad_words_ids=((5, 6),), prompt_logprobs=2)
ASKED = [(GREEDY, SAMPLED, RULES)[i % 3] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=[("llama-gqa", [3]), ("llama-gqa", [2, 1]), ("mistral-window", [3])], ids=str)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Of three slots, where chunks of prompts have 16 tokens while others decode."""
    kind, split = request.param
    checkpoint = tiny_model(tmp_path_factory.mktemp("model"), kind, max_position_embeddings=96)
    spec = load_spec(checkpoint)
    plan = make_plan(spec, split, 2, 3, slots=3, max_length=92)
    with Engine(replace(plan, max_prompt_len=60, chunk_tokens=16), checkpoint, spec) as engine:
        yield engine


def test_what_is_generated_beside_prompts_is_what_is_generated_alone(engine: Engine) -> None:
    alone = [engine.generate([prompt], params).sequences[0] for prompt, params in zip(PROMPTS, ASKED)]
    found = engine.generate(PROMPTS, ASKED)
    assert list(found.sequences) == alone
    steps = [span for span in found.spans if (span.kind, span.index, span.phase) == ("stage", 0, "prefill")]
    assert sum(span.tokens for span in steps) > sum(map(len, PROMPTS))  # and the tokens of those who decode
    assert sum(span.sequences > 1 and span.tokens > 3 for span in steps) > 3
    assert len(steps) > len(PROMPTS)  # chunks
