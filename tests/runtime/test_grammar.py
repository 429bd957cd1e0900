"""Structured output: what may come next against all texts of small languages, and answers of a pipeline."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.tokenizer import ByteTokenizer
from llmpq.runtime import answer_grammar, grammar
from llmpq.runtime.answer_grammar import GrammarHost
from llmpq.runtime.completion import Completion, Completions
from llmpq.runtime.engine import Engine
from llmpq.runtime.grammar import Grammars, Next, packed
from llmpq.runtime.request import Request
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import UsageError, WorkerLostError
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model, with_eos
from tests.support.tiny_models import VOCAB_SIZE

TOKENIZER = ByteTokenizer(VOCAB_SIZE)
EOS = 1


def matching(regex: str, characters: str, longest: int) -> set[bytes]:
    """All texts of at most so many of these characters that a regular expression matches."""
    texts = ("".join(each) for n in range(longest + 1) for each in itertools.product(characters, repeat=n))
    return {text.encode() for text in texts if re.fullmatch(regex, text)}


def json_texts(*values: Any) -> set[bytes]:
    """The texts of these lists of JSON with a space or none wherever there may be one."""
    found: set[str] = set()
    for value in values:
        tokens = ["[", *(token for each in value for token in (",", json.dumps(each))), "]"]
        del tokens[1]
        for spaces in itertools.product(("", " "), repeat=len(tokens) - 1):
            found.add("".join(map("".join, itertools.zip_longest(tokens, spaces, fillvalue=""))))
    return {text.encode() for text in found}


def allowed(found: Next) -> list[int]:
    return [8 * i + bit for i, byte in enumerate(found.tokens) for bit in range(8) if byte >> bit & 1]


LIST = {"type": "array", "items": {"enum": [1, "a"]}, "minItems": 1, "maxItems": 2}
LISTS = [[*each] for n in (1, 2) for each in itertools.product((1, "a"), repeat=n)]


@pytest.mark.parametrize(
    ("params", "texts", "vocabulary"),
    [
        (
            {"regex": "(ab|a[/1]|é)?c{1,2}"},
            matching("(ab|a[/1]|é)?c{1,2}", "ab/1éc", 4),
            ["", "a", "b", "ab", "/", "1", "c", "cc", "a1c", "d", b"\xc3", b"\xa9", b"\xa9c", "bc"],
        ),
        (
            {"choices": ["yes", "yesterday", 'n"o', "n.*/é\n[", "\\d"]},
            {b"yes", b"yesterday", b'n"o', "n.*/é\n[".encode(), b"\\d"},
            ["", *'yestno".[/\\d*1\n', "es", "terday", "da", "yes", '"o', "no", "*/", b"\xc3", b"\xa9\n"],
        ),
        (
            {"json_schema": LIST},
            json_texts(*LISTS),
            ["[", "]", ",", " ", "1", '"', "a", '"a"', ", ", '["', "", '",', "[[", "  ", " ]", "1]"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_may_come_next_is_what_some_text_goes_on_with(
    params: dict[str, Any], texts: set[bytes], vocabulary: Sequence[str | bytes]
) -> None:
    """After every row of tokens that may come."""
    tokens = [token if isinstance(token, bytes) else token.encode() for token in vocabulary]
    beginnings = {text[:n] for text in texts for n in range(len(text) + 1)}
    grammars, asked = Grammars(tokens), SamplingParams(**params)
    end = len(tokens)
    rows: list[tuple[int, ...]] = [()]
    for row in rows:
        found, before = grammars.start(asked), b"".join(tokens[token] for token in row)
        for token in row:
            assert found.next.ended is None
            found.add(token)
        expected = [bool(token) and before + token in beginnings for token in tokens]
        assert allowed(found.next)[:end] == [token for token in range(end) if expected[token]], before
        assert found.next.may_end == (before in texts)
        assert found.next.ended == (None if any(expected) else "stop" if before in texts else "length")
        rows += [(*row, token) for token in range(end) if expected[token]]
    assert len(rows) > len(texts) > 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "(a"}, "regex: unclosed group"),
        ({"regex": "(?=a)b"}, "regex: look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": "()"}, "regex: no token of the model begins or continues an answer that keeps to it"),
        ({"json_schema": "{"}, "json_schema: is no JSON"),
        ({"json_schema": "5"}, "json_schema: the schema is no object"),
        ({"json_schema": {"type": "text"}}, "json_schema: Invalid type: text"),
        ({"json_schema": {"not": {}}}, r"json_schema: Unimplemented keys: \[.*not.*\]"),
        ({"json_schema": {"$ref": "http://a.b/c"}}, "json_schema: Resource 'http://a.b/c' is not present"),
        ({"json_schema": {"enum": []}}, "json_schema: Unsatisfiable schema"),
        ({"json_schema": {"a": float("nan")}}, "json_schema: is no JSON"),
        ({"json_schema": {}, "regex": "a"}, "regex: is given beside json_schema; leave out one of them"),
        ({"choices": ["a", ""]}, r"choices\[1\]: is empty"),
        ({"regex": "a", "bad_words": ["a"]}, "bad_words: may forbid all that regex asks for"),
        ({"regex": "a", "stop_token_ids": [98]}, "stop_token_ids has 98, the text 'b', which regex may ask for"),
    ],
    ids=str,
)
def test_what_no_answer_can_keep_to_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        Completions(TOKENIZER, [[5]], SamplingParams(**params), [True])
    assert "\n" not in str(raised.value)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"takes the package llguidance; install it with `pip install 'llmpq\[struct"):
        Grammars([b"a"])


TOO_MANY = "too many expressions"  # as the library says it
BEYOND = SamplingParams(regex="((a{0,300}){0,300}){0,300}")  # the library's limits, but not at once


def test_a_grammar_beyond_the_limits_of_the_library_ends_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    """And why is told, by the process that takes its tokens."""
    found = Grammars(TOKENIZER.vocabulary).start(BEYOND)
    for _ in range(300):
        found.add(ord("a"))
    assert found.next.ended == "length" and TOO_MANY in found.next.problem
    with closing(GrammarHost(packed(TOKENIZER.vocabulary))) as host, caplog.at_level(logging.WARNING, "llmpq"):
        answer = host.start(0, BEYOND)
        for _ in range(300):
            answer.add(ord("a"))
    assert answer.ended == "length"
    (record,) = caplog.records
    assert record.message == f"an answer ends before it keeps to its regex: {found.next.problem}"


def test_a_limit_that_is_met_at_once_is_told_for_what_it_is() -> None:
    with pytest.raises(UsageError, match=f"^regex: .*{TOO_MANY}"):
        Grammars([b"a" * 300]).check(BEYOND)


def test_an_answer_that_the_vocabulary_cannot_go_on_with_says_so() -> None:
    found = Grammars([b"a", b"b"]).start(SamplingParams(choices=("ac",)))
    expected = (False, "length", "no token of the model begins or continues an answer that keeps to it")
    assert found.next.ended is None and found.add(0)[1:] == expected and not any(found.next.tokens)


def test_an_answer_may_be_one_of_very_many_texts() -> None:
    """As many as a grammar could not have as alternatives."""
    texts = [f"w{i} {i * 7919 % 5003:x}" for i in range(4500)]
    grammars, generator = Grammars(TOKENIZER.vocabulary), random.Random(3)
    for _ in range(8):
        found, row = grammars.start(SamplingParams(choices=tuple(texts))), list[int]()
        while found.next.ended is None:
            row.append(generator.choice(allowed(found.next)))
            found.add(row[-1])
        assert found.next.ended == "stop" and TOKENIZER.decode(row) in texts


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    checkpoint = tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa", max_position_embeddings=2048)
    spec = with_eos(load_spec(checkpoint), EOS)
    with Engine(make_plan(spec, [2, 1], 2, 2, max_length=400), checkpoint, spec) as engine:
        yield engine


PROMPTS = random_prompts(4, 9, 6)
POINT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "at": {
            "type": "array",
            "items": {"type": "integer", "minimum": -9, "maximum": 120},
            "minItems": 2,
            "maxItems": 2,
        },
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "at"],
    "additionalProperties": False,
}
SEEDS = range(4)


def check_point(text: str) -> None:
    value = json.loads(text)
    assert {"name", "at"} <= set(value) <= {"name", "at", "kind"} and len(value["name"]) <= 6
    assert len(value["at"]) == 2 and all(type(n) is int and -9 <= n <= 120 for n in value["at"])
    assert value.get("kind") in (None, "a", "b")


def complete(engine: Engine, sampling: Sequence[SamplingParams]) -> tuple[list[list[Completion]], list[str]]:
    """The completions of a prompt for each, and what was streamed of each request."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))]
    found: dict[int, list[Completion]] = {}
    asked = Completions(TOKENIZER, prompts, sampling, [True] * len(prompts))
    streamed = [""] * len(asked.sampling)

    def on_text(request: int, text: str) -> None:
        streamed[request] += text

    asked.generate(engine, on_end=found.__setitem__, on_text=on_text)
    return [found[i] for i in range(len(prompts))], streamed


def test_answers_of_a_pipeline_keep_to_their_grammars(engine: Engine) -> None:
    """Greedy, sampled, several to a prompt, beside others that have none; each ends where its grammar does."""
    sampled = [SamplingParams(max_tokens=300, temperature=1.0, seed=seed) for seed in SEEDS]
    schema = [replace(each, json_schema=POINT, n=2) for each in sampled]
    word = r"[a-z]{2,4}(-\d|é)"
    regex = [replace(each, regex=word, min_tokens=8, logprobs=1) for each in (*sampled, SamplingParams(max_tokens=300))]
    chosen = [replace(each, choices=("yes", "no", "maybe")) for each in sampled]
    greedy = [SamplingParams(max_tokens=300, json_schema=POINT, ignore_eos=eos) for eos in (False, True)]
    plain = [SamplingParams(max_tokens=9)]
    found, streamed = complete(engine, [*schema, *regex, *chosen, *greedy, *plain])
    *formed, (unruled,) = found
    assert streamed == [each.text for completions in found for each in completions]
    assert {each.generated.finish_reason for each in itertools.chain(*formed)} == {"stop"}
    for each in itertools.chain(*formed[: len(SEEDS)], *formed[-2:]):
        check_point(each.text)
    for (each,) in formed[len(SEEDS) : 2 * len(SEEDS) + 1]:
        assert re.fullmatch(word, each.text)
        assert len(each.generated.log_probs or ()) == len(each.generated.token_ids) == len(each.text.encode())
    assert {each.text for (each,) in formed[-2 - len(SEEDS) : -2]} <= {"yes", "no", "maybe"}
    assert len({each.text for each in itertools.chain(*formed[: len(SEEDS)])}) > len(SEEDS)
    (alone,) = engine.generate([PROMPTS[(len(found) - 1) % len(PROMPTS)]], plain).sequences
    assert alone.token_ids == unruled.generated.token_ids


def test_what_else_ends_an_answer_ends_it_within_its_grammar(engine: Engine) -> None:
    letters = SamplingParams(max_tokens=40, temperature=1.0, seed=3, regex="[a-c]+", ignore_eos=True)
    likely = dict.fromkeys([EOS], 1e9)
    cases = [letters, replace(letters, stop="b"), replace(letters, ignore_eos=False, logit_bias=likely, min_tokens=7)]
    ((long,), (stopped,), (ended,)), _ = complete(engine, cases)
    assert re.fullmatch("[a-c]{40}", long.text) and long.generated.finish_reason == "length"
    assert stopped.generated.finish_reason == "stop" and re.fullmatch("[ac]*", stopped.text)
    assert ended.generated.token_ids[-1] == EOS and len(ended.generated.token_ids) == 8
    assert re.fullmatch("[a-c]{7}.", ended.text, re.DOTALL) and ended.generated.finish_reason == "stop"


def test_a_table_beyond_the_vocabulary_is_masked_too() -> None:
    """And tokens that end an answer come where it may end, whatever they are."""
    with closing(GrammarHost(packed([b"a", b"b", b"", b"ab"]))) as host:
        found = host.start(3, SamplingParams(regex="a?b"))
        other = host.start(5, SamplingParams(choices=("a",)))
        assert found.allowed(6, [2, 9]).tolist() == [True, True, False, True, False, False]
        assert other.allowed(2, []).tolist() == [True, False]
        found.add(3)
        assert found.allowed(6, [1, 5]).tolist() == [False, True, False, False, False, True]
        assert (found.ended, other.ended) == ("stop", None)
        host._process.kill()
        with pytest.raises(WorkerLostError, match=r"that follows grammars \(pid \d+\) has ended with status -9"):
            other.add(0)


def test_a_process_that_is_stopped_is_lost_and_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_grammar, "ANSWER_S", 0.5)
    with closing(GrammarHost(packed([b"a"]))) as host:
        answer, process = host.start(0, SamplingParams(regex="a+")), host._process
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerLostError, match=rf"grammars \(pid {process.pid}\) has not answered for 0 s"):
            answer.add(0)
        assert process.returncode == -signal.SIGKILL


def test_a_vocabulary_that_is_not_taken_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is more than a pipe takes."""
    monkeypatch.setattr(answer_grammar, "START_S", 0.5)
    monkeypatch.setattr(answer_grammar, "_PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(WorkerLostError, match="has not answered for"):
        GrammarHost("a" * 2**21)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it there")
def test_a_process_that_is_stopped_ends_with_the_one_that_has_started_it() -> None:
    program = (
        "import os, signal\n"
        "from llmpq.runtime.answer_grammar import GrammarHost\n"
        "from llmpq.runtime.grammar import packed\n"
        "process = GrammarHost(packed([b'a']))._process\n"
        "process.send_signal(signal.SIGSTOP)\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    started = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert started.returncode == -signal.SIGKILL
    until, status = time.monotonic() + 5, Path(f"/proc/{int(started.stdout)}/stat")
    while _is_there(status) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _is_there(status)


def _is_there(status: Path) -> bool:
    """Whether a process is, and is more than a status that nobody has asked for."""
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_grammar_without_a_tokenizer_is_a_defect(engine: Engine) -> None:
    with engine.session() as session:
        engine._group.knows_vocabulary = False
        with pytest.raises(ValueError, match="are for Completions, which has a tokenizer"):
            session.submit(Request((5,), SamplingParams(regex="a")))


def test_the_demos_tokenizer_spells_what_a_grammar_asks_for() -> None:
    """Texts of tokens at random, where many are more than a character."""
    tokenizer = open_model("demo").tokenizer
    grammars, generator = Grammars(tokenizer.vocabulary), random.Random(3)

    def text(asked: SamplingParams) -> str:
        found, row = grammars.start(asked), list[int]()
        while found.next.ended is None:
            row.append(generator.choice(allowed(found.next)))
            found.add(row[-1])
        assert found.next.ended == "stop"
        return tokenizer.decode(row)

    for _ in range(8):
        check_point(text(SamplingParams(json_schema=POINT)))
        assert re.fullmatch("[Α-Ω]{2,9}( the| of)?!", text(SamplingParams(regex="[Α-Ω]{2,9}( the| of)?!")))
