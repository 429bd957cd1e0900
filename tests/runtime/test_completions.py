"""Completions: stop strings, bad words, several answers to a prompt, and log-probabilities, on a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from llmpq.checkpoint.tokenizer import ByteTokenizer
from llmpq.runtime.completion import Completion, Completions, outputs
from llmpq.runtime.engine import Engine
from llmpq.runtime.request import RunResult
from llmpq.runtime.sampling import SamplingParams, choice_seed
from llmpq.spec import UsageError
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model, with_eos
from tests.support.tiny_models import VOCAB_SIZE

PROMPTS = random_prompts(4, 9, 6)
SAMPLED = SamplingParams(max_tokens=14, temperature=1.5, seed=8)
TOKENIZER = ByteTokenizer(VOCAB_SIZE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    checkpoint = tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa", max_position_embeddings=2048)
    spec = with_eos(load_spec(checkpoint), 1)
    with Engine(make_plan(spec, [2, 1], 2, 2, max_length=1200), checkpoint, spec) as engine:
        yield engine


def complete(
    engine: Engine, prompts: list[list[int]], sampling: list[SamplingParams]
) -> tuple[list[list[Completion]], RunResult]:
    found: dict[int, list[Completion]] = {}
    asked = Completions(TOKENIZER, prompts, sampling, [True] * len(prompts))
    result = asked.generate(engine, on_end=found.__setitem__)
    return [found[i] for i in range(len(prompts))], result


def test_a_stop_string_ends_an_answer_and_no_other(engine: Engine) -> None:
    # Bytes below 128 alone, so that each token is a character.
    plain = replace(
        SAMPLED, max_tokens=1000, ignore_eos=True, logprobs=0, logit_bias=dict.fromkeys(range(128, 272), -1e9)
    )
    ((whole,), (other,)), _ = complete(engine, PROMPTS[:2], [replace(plain, max_tokens=20), replace(plain, seed=9)])
    stop = whole.text[9:12]  # of three tokens
    where = whole.text.index(stop)
    ((cut,), (beside,)), computed = complete(
        engine, PROMPTS[:2], [replace(plain, stop=["never comes", stop]), replace(plain, seed=9)]
    )
    assert (cut.text, cut.generated.finish_reason) == (whole.text[:where], "stop")
    assert cut.generated.token_ids == whole.generated.token_ids[: where + 3]
    assert cut.generated.log_probs == (whole.generated.log_probs or ())[: where + 3]
    assert beside == other and len(other.generated.token_ids) == 1000
    assert len(computed.sequences[0].token_ids) < 1000  # it was not computed to its end
    late = replace(plain, max_tokens=20, stop=stop, min_tokens=where + 3)
    ((unstopped,),), _ = complete(engine, PROMPTS[:1], [late])
    assert unstopped.text == whole.text and unstopped.generated.finish_reason == "length"


def test_text_is_shown_as_it_comes_up_to_the_stop_string(engine: Engine) -> None:
    plain = replace(SAMPLED, ignore_eos=True)
    ((whole,),), _ = complete(engine, PROMPTS[:1], [plain])
    stop = whole.text[4:6]
    shown = ["", ""]

    def on_text(request: int, piece: str) -> None:
        shown[request] += piece

    asked = Completions(TOKENIZER, [PROMPTS[0]] * 2, [plain, replace(plain, stop=stop)], [True] * 2)
    asked.generate(engine, on_text=on_text)
    assert shown == [whole.text, whole.text[: whole.text.index(stop)]]


def test_completions_of_a_session_are_those_of_a_batch(engine: Engine) -> None:
    plain = replace(SAMPLED, ignore_eos=True)
    ((whole,),), _ = complete(engine, PROMPTS[:1], [plain])
    sampling = [replace(plain, stop=whole.text[4:6]), replace(plain, n=2, best_of=3), plain]
    expected, _ = complete(engine, PROMPTS, sampling)
    found: dict[int, list[Completion]] = {}
    shown: dict[int, str] = {}
    with engine.session() as session:
        asked = Completions(TOKENIZER, PROMPTS, sampling, [True] * 3)
        handles = asked.submit(session, found.__setitem__, lambda i, text: shown.update({i: shown.get(i, "") + text}))
        assert len(handles) == 5
    assert [found[i] for i in range(3)] == expected
    assert (shown[0], shown[4]) == (expected[0][0].text, expected[2][0].text)


def test_answers_to_a_prompt_are_those_of_requests_with_their_seeds(engine: Engine) -> None:
    (three, alone), _ = complete(engine, PROMPTS[:2], [replace(SAMPLED, n=3), SAMPLED])
    assert [each.generated.seed for each in three] == [choice_seed(8, i) for i in range(3)]
    single = [replace(SAMPLED, seed=each.generated.seed) for each in three]
    assert [[each] for each in three] == complete(engine, [PROMPTS[0]] * 3, single)[0]
    assert len({each.text for each in three}) == 3 and len(alone) == 1
    found = outputs(three, "a prompt", 5, "its id")
    assert [(o.index, o.choice, o.custom_id, o.text) for o in found] == [
        (5, i, "its id", each.text) for i, each in enumerate(three)
    ]


def test_the_best_are_those_of_the_largest_mean_log_probability(engine: Engine) -> None:
    told = replace(SAMPLED, n=5, logprobs=1)
    (all_five,), _ = complete(engine, PROMPTS[:1], [told])

    def mean(completion: Completion) -> float:
        return sum(p.log_prob for p in completion.generated.log_probs or ()) / len(completion.generated.token_ids)

    expected = sorted(all_five, key=mean, reverse=True)[:2]
    assert expected != all_five[:2]
    (best,), _ = complete(engine, PROMPTS[:1], [replace(told, n=2, best_of=5)])
    assert best == expected
    (silent,), _ = complete(engine, PROMPTS[:1], [replace(SAMPLED, n=2, best_of=5)])
    assert [each.text for each in silent] == [each.text for each in expected]
    assert silent[0].generated.log_probs is None


def test_log_probabilities_are_those_that_scoring_finds(engine: Engine) -> None:
    """Whatever the rules: scoring has none."""
    ruled = replace(SAMPLED, repetition_penalty=1.5, logprobs=3, prompt_logprobs=2)
    answers, _ = complete(engine, PROMPTS, [ruled, replace(ruled, temperature=0), replace(ruled, prompt_logprobs=None)])
    scores = engine.score([[*prompt, *a.generated.token_ids] for prompt, (a,) in zip(PROMPTS, answers, strict=True)])
    for prompt, (answer,), score in zip(PROMPTS, answers, scores, strict=True):
        told, of_prompt = answer.generated.log_probs, answer.generated.prompt_log_probs
        start = len(prompt) - 1
        assert told is not None and [p.log_prob for p in told] == pytest.approx(score.log_probs[start:], abs=1e-4)
        assert [p.top_ids[0] for p in told] == score.likeliest[start:]
        assert all(len(p.top_ids) == 3 for p in told)
        assert (of_prompt is None) == (prompt is PROMPTS[2])
        if of_prompt is not None:
            assert [p.log_prob for p in of_prompt] == score.log_probs[:start]
            assert [p.top_ids[0] for p in of_prompt] == score.likeliest[:start]
            assert all(len(p.top_ids) == 2 for p in of_prompt)


def test_bad_words_and_tokens_that_end_an_answer(engine: Engine) -> None:
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    ((free,),), _ = complete(engine, PROMPTS[:1], [greedy])
    first, second, third = free.generated.token_ids[:3]
    ((kept,), (ended,), (late,)), _ = complete(
        engine,
        [PROMPTS[0]] * 3,
        [
            replace(greedy, bad_words_ids=((first, second),)),
            replace(greedy, stop_token_ids=(third,)),
            replace(greedy, stop_token_ids=(first,), min_tokens=2),
        ],
    )
    assert kept.generated.token_ids[0] == first and kept.generated.token_ids[1] != second
    where = free.generated.token_ids.index(third) + 1
    assert ended.generated.token_ids == free.generated.token_ids[:where] and ended.generated.finish_reason == "stop"
    assert first not in late.generated.token_ids[:2]
    word = bytes([100, 101]).decode()
    asked = Completions(TOKENIZER, PROMPTS[:1], [replace(greedy, bad_words=(word,))], [True])
    assert asked.sampling[0].bad_words_ids == ((100, 101), (32, 100, 101)) and asked.sampling[0].bad_words == ()


def test_what_an_engine_cannot_do_is_refused(engine: Engine) -> None:
    for params in (replace(SAMPLED, n=2), replace(SAMPLED, stop="x"), replace(SAMPLED, bad_words="x")):
        with pytest.raises(ValueError, match="are for Completions"):
            engine.generate(PROMPTS[:1], [params])
    with pytest.raises(UsageError, match="logit_bias has the token 272, and the model's table has 272, from 0"):
        engine.generate(PROMPTS[:1], [replace(SAMPLED, logit_bias={272: 1})])
    assert not engine.closed
