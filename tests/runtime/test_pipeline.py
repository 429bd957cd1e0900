"""The pipeline: any plan gives, token for token, what one process gives, and one process what transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.checkpoint.weights import open_weights
from llmpq.models.decoder_stage import build_stage
from llmpq.models.step import Step
from llmpq.runtime.engine import Engine, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Plan, Span, UsageError
from tests.support.pipelines import UNIFORM, load_spec, make_plan, random_prompts, tiny_model

PROMPTS = random_prompts(3, 9, 1, 20, 7, 4, 5)  # more than the five slots of a plan
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, top_k=50, top_p=0.95, seed=3)
RULED = SamplingParams(
    max_tokens=12,
    temperature=0.8,
    min_p=0.01,
    typical_p=0.95,
    seed=4,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={7: 2.0},
    bad_words_ids=((9,), (7, 8)),
    stop_token_ids=tuple(range(40, 60)),
    min_tokens=6,
    logprobs=2,
    prompt_logprobs=1,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa")


def results(checkpoint: Checkpoint, plan: Plan) -> tuple[object, ...]:
    """All that a plan must not change: greedy tokens, those of sampling and rules, log-probabilities."""
    with Engine(plan, checkpoint, load_spec(checkpoint)) as engine:
        greedy = engine.generate(PROMPTS, GREEDY)
        scores = engine.score(PROMPTS)
        sampled = engine.generate(PROMPTS, [SAMPLED, RULED, replace(RULED, temperature=0), GREEDY, *[RULED] * 3])
    assert len(greedy.measured.memory_bytes) == len(plan.stages)
    check_spans(greedy, len(plan.stages))
    return greedy.sequences, scores, sampled.sequences


def check_spans(result: RunResult, stages: int) -> None:
    """Every step of generation is there, of every stage, one after the other and in the order of the pipeline."""
    assert [span.start_s for span in result.spans] == sorted(span.start_s for span in result.spans)
    assert result.spans[0].start_s == 0.0
    by_stage = [
        [span for span in result.spans if (span.kind, span.index) == ("stage", index)] for index in range(stages)
    ]
    for own in by_stage:
        assert all(before.end_s <= after.start_s for before, after in pairwise(own))
        for phase, tokens in (
            ("prefill", sum(map(len, PROMPTS))),
            ("decode", sum(len(s.token_ids) - 1 for s in result.sequences)),
        ):
            assert sum(span.tokens for span in own if span.phase == phase) == tokens
        assert sum(span.sequences for span in own if span.phase == "prefill") == len(PROMPTS)
    for before, after in pairwise(by_stage):
        for a, b in zip(before, after, strict=True):
            assert (a.phase, a.sequences, a.tokens) == (b.phase, b.sequences, b.tokens)
            assert a.start_s < b.start_s  # it may be there before sending it has ended
    check_links(result, by_stage)
    took = result.measured.prefill_s + result.measured.decode_s
    assert sum(span.seconds for span in by_stage[0]) <= took


def check_links(result: RunResult, by_stage: list[list[Span]]) -> None:
    """A message is on its way from when its stage sends it to when the next one has it, in the next one's idle time."""
    links = [span for span in result.spans if span.kind == "link"]
    assert bool(links) == (len(by_stage) > 1)
    for link in links:
        begun = [s for s in by_stage[link.index] if s.start_s <= link.start_s]
        assert (begun[-1].phase, begun[-1].sequences, begun[-1].tokens) == (link.phase, link.sequences, link.tokens)
        target = (link.index + 1) % len(by_stage)
        if target > 0:  # at the first stage a thread waits while another computes
            assert not any(s.start_s < link.end_s and link.start_s < s.end_s for s in by_stage[target])
            assert link.end_s in [s.start_s for s in by_stage[target]]


@pytest.fixture(scope="module")
def one_process(checkpoint: Checkpoint) -> tuple[object, ...]:
    return results(checkpoint, make_plan(load_spec(checkpoint), [3], 5, 5))


@pytest.mark.parametrize(
    "split, prefill_microbatch, decode_microbatch",
    [([3], 1, 2), ([2, 1], 2, 3), ([1, 2], 5, 1), ([1, 1, 1], 1, 2), ([2, 0, 1], 3, 5)],
    ids=str,
)
def test_pipelines_equal_one_process(
    split: list[int],
    prefill_microbatch: int,
    decode_microbatch: int,
    checkpoint: Checkpoint,
    one_process: tuple[object, ...],
) -> None:
    plan = make_plan(load_spec(checkpoint), split, prefill_microbatch, decode_microbatch)
    assert results(checkpoint, plan) == one_process


def test_one_process_equals_a_loop_without_cache(checkpoint: Checkpoint, one_process: tuple[object, ...]) -> None:
    spec = load_spec(checkpoint)
    plan = make_plan(spec, [3], 5, 5)
    stage = build_stage(spec, open_weights(checkpoint, spec), plan, 0, torch.device("cpu"))
    for prompt, generated in zip(PROMPTS, one_process[0], strict=True):
        tokens = list(prompt)
        for _ in range(GREEDY.max_tokens):
            hidden_states = stage(Step.of([0], [len(tokens)], [0], tokens))
            tokens.append(int(stage.logits(hidden_states[-1:]).argmax()))
        assert tokens[len(prompt) :] == list(generated.token_ids)


def test_chunks_of_a_prompt_give_what_it_gives_whole(tmp_path: Path) -> None:
    """Where layers attend within a window, and keep no more than its tokens and those of a chunk."""
    checkpoint = tiny_model(tmp_path, "gemma2", max_position_embeddings=512)
    spec = load_spec(checkpoint)
    results = []
    for planned in (50, 220):
        plan = make_plan(spec, [spec.num_layers - 1, 1], 2, 2, max_length=300)
        plan = replace(plan, max_prompt_len=planned)
        assert plan.longest_query(spec) == planned
        with Engine(plan, checkpoint, spec) as engine:
            asking = replace(GREEDY, logprobs=0, prompt_logprobs=0)
            result = engine.generate(random_prompts(3, 200, 60, 7), asking)
        results.append(result.sequences)
        steps = [span for span in result.spans if (span.kind, span.index, span.phase) == ("stage", 1, "prefill")]
        assert max(span.tokens for span in steps) == (50 if planned == 50 else 203)
    assert results[0] == results[1]
    assert [len(generated.prompt_log_probs or ()) for generated in results[0]] == [2, 199, 59, 6]


@pytest.mark.parametrize("kind", ["llama-gqa", "opt-350m"])
def test_unquantized_pipelines_equal_transformers(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    spec = load_spec(checkpoint)
    with Engine(make_plan(spec, [1, 2], 2, 2, precisions=UNIFORM), checkpoint, spec) as engine:
        result = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
        scores = engine.score(PROMPTS)
    for prompt, generated, score in zip(PROMPTS, result.sequences, scores, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(generated.token_ids) == expected[0, len(prompt) :].tolist()
        with torch.no_grad():
            log_probabilities = model(ids).logits.double().log_softmax(-1)[0, :-1]
        # Keys and values are kept in 16 bits.
        assert score.log_probs == pytest.approx(log_probabilities.gather(1, ids.T[1:])[:, 0].tolist(), abs=2e-3)
        assert score.likeliest == log_probabilities.argmax(-1).tolist()


def test_a_workers_usage_error_is_raised_here_and_no_worker_is_left(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa")
    spec = load_spec(checkpoint)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        Engine(make_plan(spec, [2, 1], 2, 2), checkpoint, spec)


def test_the_same_under_torchrun_with_a_rank_too_many(
    checkpoint: Checkpoint, one_process: tuple[object, ...], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    make_plan(load_spec(checkpoint), [2, 1], 2, 3).save(plan)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    out = tmp_path / "result.json"
    script = Path(__file__).parents[1] / "support" / "torchrun_script.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    subprocess.run([*command, script, checkpoint.path, plan, prompts, out], check=True, timeout=120)
    result = RunResult.load(out)
    assert result.sequences == one_process[0]
    # A rank has its own alone, and what it received.
    assert {(span.kind, span.index) for span in result.spans} == {("stage", 0), ("link", 1)}
