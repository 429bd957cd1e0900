"""Requests of a batch: each by its own parameters, handed over as it comes, ended where it must be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.runtime.engine import Engine, Generated, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model, with_eos
from tests.support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts(3, 9, 1, 20, 7, 4, 5)  # more than the five slots of a plan
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, top_k=50, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa")


def test_a_request_has_sampling_parameters_of_its_own_and_depends_on_no_other(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    sampling = [GREEDY, SAMPLED, *(replace(SAMPLED, temperature=t, max_tokens=n) for t, n in ((2.0, 3), (0.3, 12)))]
    prompts = [PROMPTS[1]] * 4
    with Engine(make_plan(spec, [2, 1], 2, 3, slots=3), checkpoint, spec) as engine:
        together = engine.generate(prompts, sampling).sequences
        alone = [engine.generate([prompt], [params]).sequences[0] for prompt, params in zip(prompts, sampling)]
        backwards = engine.generate(prompts, sampling[::-1]).sequences
        shared = engine.generate(prompts, SAMPLED).sequences
        with pytest.raises(UsageError, match="4 prompts, but sampling parameters for 1"):
            engine.generate(prompts, [GREEDY])
    assert list(together) == alone == list(backwards[::-1])
    assert [len(generated.token_ids) for generated in together] == [12, 12, 3, 12]
    assert together[0] != together[1]
    assert shared[0] == together[1]
    assert len(set(shared)) == 4  # equal prompts, seeds that count up


def test_without_a_seed_every_sample_is_another_and_can_be_repeated(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    free = replace(SAMPLED, seed=None, temperature=1.5)
    prompts = [PROMPTS[1]] * 2
    with Engine(make_plan(spec, [3], 2, 2), checkpoint, spec) as engine:
        samples = [*engine.generate(prompts, free).sequences, *engine.generate(prompts, [free, free]).sequences]
        again = engine.generate([PROMPTS[1]] * 4, [replace(free, seed=s.seed) for s in samples]).sequences
        greedy = engine.generate(prompts, replace(free, temperature=0.0)).sequences
    assert len({s.token_ids for s in samples}) == 4
    assert list(again) == samples
    assert greedy[0] == greedy[1] and greedy[0].seed is None


def test_each_request_is_handed_over_as_soon_as_it_has_ended(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    limits = [9, 2, 5, 2]
    sampling = [replace(GREEDY, max_tokens=limit) for limit in limits]
    heard: list[tuple[int, Generated]] = []
    done: list[int] = []

    def on_end(request: int, generated: Generated) -> None:
        heard.append((request, generated))
        if request == 0:
            raise KeyboardInterrupt  # whoever breaks off has the rest

    with Engine(make_plan(spec, [2, 1], 4, 4), checkpoint, spec) as engine:
        result = engine.generate(PROMPTS[:4], sampling, on_end=lambda request, _: done.append(request))
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS[:4], sampling, on_end=on_end)
    assert done == [1, 3, 2, 0]  # the shorter ones first
    assert heard == [(i, result.sequences[i]) for i in done]


def test_tokens_are_handed_over_as_they_come_until_all_is_stopped(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa", max_position_embeddings=2048)
    spec = load_spec(checkpoint)
    heard: list[list[int]] = [[], []]
    with Engine(make_plan(spec, [2, 1], 1, 1, slots=2, max_length=2000), checkpoint, spec) as engine:
        result = engine.generate(PROMPTS[:2], GREEDY, on_tokens=lambda request, token: heard[request].append(token))
        long = replace(GREEDY, max_tokens=1900)
        stopped = engine.generate(PROMPTS[:2], long, on_tokens=lambda request, token: engine.stop())
        again = engine.generate(PROMPTS[:2], GREEDY)
    assert heard == [list(sequence.token_ids) for sequence in result.sequences]
    for whole, part in zip(result.sequences, stopped.sequences, strict=True):
        assert part.finish_reason == "cancelled" and 1 <= len(part.token_ids) < 1900
        assert all(a == b for a, b in zip(whole.token_ids, part.token_ids, strict=False))
    assert again.sequences == result.sequences


def test_a_sequence_ends_with_its_end_token_or_its_limit(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    plan = make_plan(spec, [2, 1], 2, 2)
    with Engine(plan, checkpoint, spec) as engine:
        free = engine.generate(PROMPTS, GREEDY)
    eos = free.sequences[0].token_ids[4]
    with Engine(plan, checkpoint, with_eos(spec, eos)) as engine:
        result = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
        ignoring = engine.generate(PROMPTS, GREEDY)
    assert ignoring.sequences == free.sequences
    for ended, unlimited in zip(result.sequences, free.sequences, strict=True):
        tokens = unlimited.token_ids
        stops = eos in tokens
        assert ended.token_ids == (tokens[: tokens.index(eos) + 1] if stops else tokens)
        assert ended.finish_reason == ("stop" if stops else "length")
    assert result.sequences[0].finish_reason == "stop"
    assert any(s.finish_reason == "length" for s in result.sequences)


def test_a_full_slot_ends_a_sequence(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    prompts = random_prompts(21, 4)
    with Engine(make_plan(spec, [3], 2, 2, max_length=22), checkpoint, spec) as engine:
        result = engine.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    assert [len(s.token_ids) for s in result.sequences] == [1, 12]
    assert {s.finish_reason for s in result.sequences} == {"length"}


def test_progress_counts_tokens_and_measures_add_up(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    heard: list[int] = []
    with Engine(make_plan(spec, [2, 1], 2, 2), checkpoint, spec) as engine:
        result = engine.generate(PROMPTS, GREEDY, heard.append)
    tokens = sum(len(s.token_ids) for s in result.sequences)
    assert heard and heard == sorted(heard) and heard[-1] <= tokens
    m = result.measured
    assert m.prefill_s > 0 and m.decode_s > 0
    assert m.tokens_per_s == pytest.approx(tokens / (m.prefill_s + m.decode_s))
    assert all(0 < size < 2**30 for size in m.memory_bytes)
    assert RunResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[5], []], "prompt 2 is empty"),
        ([[5], [VOCAB_SIZE]], f"prompt 2 has the token {VOCAB_SIZE}, and the model's table has {VOCAB_SIZE}"),
        ([[-1, 3]], "prompt 1 has the token -1, "),
        ([[5] * 40], "prompt 1 has 40 tokens, .* no room for 1 more in the plan's slots of 40"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: list[list[int]], message: str, checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    with Engine(make_plan(spec, [3], 2, 2), checkpoint, spec) as engine:
        with pytest.raises(UsageError, match=message):
            engine.generate(prompts, GREEDY)
        assert engine.generate([[5] * 39], GREEDY) is not None
