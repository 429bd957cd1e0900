"""Blocks of the KV cache: where they are too few, who came last gives its own back; prompts that begin alike share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmpq.runtime.engine import Engine, RunResult
from llmpq.runtime.sampling import SamplingParams
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model

PROMPTS = random_prompts(60, 3, 62, 130, 20)
GREEDY = SamplingParams(max_tokens=75, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.2, seed=5, logprobs=1)
RULES = replace(SAMPLED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, bad_words_ids=((5, 6),))
ASKED = (GREEDY, SAMPLED, RULES, replace(RULES, prompt_logprobs=1), replace(RULES, ignore_eos=False, min_tokens=70))


def computed(result: RunResult, stage: int = 0) -> int:
    """Tokens of the prefill steps of a stage."""
    steps = [span for span in result.spans if (span.kind, span.index, span.phase) == ("stage", stage, "prefill")]
    return sum(span.tokens for span in steps)


@pytest.mark.parametrize(("kind", "split"), [("llama-gqa", [3]), ("llama-gqa", [2, 1]), ("mistral-window", [3])])
def test_what_is_generated_does_not_depend_on_how_many_blocks_there_are(
    kind: str, split: list[int], tmp_path: Path
) -> None:
    """Nor where no layer keeps more than a window."""
    checkpoint = tiny_model(tmp_path, kind, max_position_embeddings=256)
    spec = load_spec(checkpoint)
    plan = replace(make_plan(spec, split, 2, 2, slots=4, max_length=210), max_prompt_len=130)
    runs = []
    for blocks in (0, 5):
        with Engine(replace(plan, kv_blocks=blocks), checkpoint, spec) as engine:
            runs.append((engine.generate(PROMPTS, ASKED), engine.score(PROMPTS)))
    (enough, scores), (few, same_scores) = runs
    assert few.sequences == enough.sequences and same_scores == scores
    assert computed(enough) == sum(map(len, PROMPTS)) < computed(few)


def test_what_prompts_have_in_common_is_computed_once(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa", max_position_embeddings=256)
    spec = load_spec(checkpoint)
    plan = make_plan(spec, [2, 1], 2, 2, slots=3, max_length=230)
    begun, *ends = random_prompts(140, 5, 9, 70, 30)
    prompts = [*(begun + end for end in ends[:3]), begun[:128], ends[3], begun]
    params = replace(GREEDY, max_tokens=6)
    with Engine(plan, checkpoint, spec) as engine:
        alone = [engine.generate([prompt], params).sequences[0] for prompt in prompts]
        runs = [engine.generate(prompts, params) for _ in range(2)]
        asked = engine.generate(prompts, replace(params, prompt_logprobs=0))
        rests = engine.generate([[*begun[:128], i] for i in range(3)], params)
    for run in runs:  # the second does not know what the first has computed
        assert list(run.sequences) == alone
        assert [times.reused for times in run.times] == [0, 128, 128, 64, 0, 128]
        assert computed(run) == sum(map(len, prompts)) - 448
    assert [generated.token_ids for generated in asked.sequences] == [generated.token_ids for generated in alone]
    assert not any(times.reused for times in asked.times)
    assert [len(generated.prompt_log_probs or ()) for generated in asked.sequences] == [len(p) - 1 for p in prompts]
    assert [computed(rests, stage) for stage in (0, 1)] == [131] * 2  # the last is alone, and has one token left
