"""The server's answers are those of a run, whoever asks beside; what it refuses, it refuses in OpenAI's form."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import transformers

from llmpq.checkpoint.tokenizer import Tokenizer
from llmpq.serve import answer_forms, app
from llmpq.serve.app import MOST_BYTES
from llmpq.serve.metrics import Live, Metrics
from llmpq.spec import LogProb
from llmpq.spec.layers import KV_BLOCK, blocks_for
from tests.support.served import CHAT, KEY, MIXED, ROOM, SAMPLED, SOON_S, TEXT, USER, Served, serving


def ask(served: Served, body: dict[str, Any]) -> tuple[str, str, int, int]:
    """Text, reason, and tokens of prompt and answer, by the client of OpenAI."""
    known = ("messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "stream", "logit_bias")
    extra = {key: body[key] for key in body if key not in (*known, "frequency_penalty", "stop")}
    given: dict[str, Any] = {key: body[key] for key in body if key not in extra} | {"model": served.name}
    if body.get("stream"):
        given["stream_options"] = {"include_usage": True}
    chat = "messages" in body
    create: Any = served.client.chat.completions.create if chat else served.client.completions.create
    answer = create(**given, extra_body=extra)
    if not body.get("stream"):
        (choice,) = answer.choices
        text = choice.message.content if chat else choice.text
        return text, choice.finish_reason, answer.usage.prompt_tokens, answer.usage.completion_tokens
    *chunks, last = list(answer)
    pieces = [(chunk.choices[0].delta.content if chat else chunk.choices[0].text) or "" for chunk in chunks]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert last.choices == [] and len(pieces) > 1
    reason = chunks[-1].choices[0].finish_reason
    return "".join(pieces), reason, last.usage.prompt_tokens, last.usage.completion_tokens


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.full)])
def test_forty_at_once_get_what_a_run_answers(served: Served, times: int) -> None:
    with ThreadPoolExecutor(len(MIXED) * times) as pool:
        found = list(pool.map(lambda body: ask(served, body), MIXED * times))
    for body, answer, (offline,) in zip(MIXED * times, found, served.mixed * times, strict=True):
        tokenizer = served.model.tokenizer
        prompt = tokenizer.encode_chat(body["messages"]) if "messages" in body else tokenizer.encode(body["prompt"])
        assert answer == (offline.text, offline.finish_reason, len(prompt), len(offline.token_ids)), body
    texts = "".join(offline.text for (offline,) in served.mixed)
    assert "é" in texts and "\ufffd" in texts  # characters of two bytes, and bytes that are none


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_an_answer(served: Served, stream: bool) -> None:
    whole = served.long.text
    stop = whole[20:23]
    wait_until_free(served)
    before = served.metrics()
    text, reason, _, tokens = ask(served, TEXT | {"max_tokens": 60, "stop": ["never comes", stop], "stream": stream})
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    assert 0 < tokens < len(served.long.token_ids)
    wait_until_free(served)
    counted = 'llmpq_sequences_total{reason="stop"}'
    assert served.metrics()[counted] == before.get(counted, 0) + 1


def test_answers_with_a_seed_and_log_probabilities(served: Served) -> None:
    several = served.post("/v1/chat/completions", SAMPLED[0]).json()
    assert [choice["message"]["content"] for choice in several["choices"]] == [o.text for o in served.sampled[0]]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert several["usage"]["completion_tokens"] == sum(len(o.token_ids) for o in served.sampled[0])
    told = served.client.chat.completions.create(model=served.name, **SAMPLED[1])
    expected = served.sampled[1][0].log_probs or ()
    found = told.choices[0].logprobs.content
    assert [p.logprob for p in found] == pytest.approx([p.log_prob for p in expected], abs=1e-4)
    assert [[q.logprob for q in p.top_logprobs] for p in found] == [list(p.top_log_probs) for p in expected]
    assert all(p.bytes is None or bytes(p.bytes).decode() == p.token for p in found)
    *_, end = list(served.client.chat.completions.create(model=served.name, stream=True, **SAMPLED[1]))
    assert end.choices[0].logprobs.model_dump() == told.choices[0].logprobs.model_dump()
    plain = served.client.completions.create(model=served.name, **SAMPLED[2]).choices[0]
    assert plain.text == served.sampled[2][0].text and len(plain.logprobs.token_logprobs) == 12
    assert plain.logprobs.text_offset[:2] == [0, len(plain.logprobs.tokens[0])]


def test_tokens_of_log_probabilities_have_the_text_that_they_bring() -> None:
    """Also where a tokenizer leaves out the space that a text begins with."""
    vocab = {"<s>": 0, **{f"\u2581{word}": i for i, word in enumerate(("Hello", "big", "world"), 1)}, "!": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<s>"))
    words.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=words), "words")
    found = [LogProb(-1.0, (token, 2), (-1.0, -2.0)) for token in (1, 3, 4)]
    text = answer_forms.TEXT.log_probs([1, 3, 4], found, tokenizer, ())
    assert text is not None and text["tokens"] == ["Hello", " world", "!"] and text["text_offset"] == [0, 5, 11]
    assert text["top_logprobs"] == [{"Hello": -1, "big": -2}, {" world": -1, " big": -2}, {"!": -1, " big": -2}]
    chat = answer_forms.CHAT.log_probs([3], found[1:2], tokenizer, [1])
    assert chat is not None and bytes(chat["content"][0]["bytes"]) == b" world"


def test_several_prompts_and_answers_are_told_apart_in_a_stream(served: Served) -> None:
    body = {"prompt": ["Once upon", [5, 6, 7]], "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 8}
    whole = served.post("/v1/completions", body).json()["choices"]
    pieces, ended = ["", "", "", ""], []
    for line in served.post("/v1/completions", body | {"stream": True}).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                pieces[choice["index"]] += choice["text"]
                ended += [choice["index"]] if choice["finish_reason"] else []
    assert pieces == [choice["text"] for choice in whole] and len(set(pieces)) == 4
    assert sorted(ended) == [0, 1, 2, 3]


def test_models_and_tokens(served: Served) -> None:
    (found,) = served.client.models.list().data
    assert found.id == served.name and served.client.models.retrieve(served.name).id == served.name
    tokens = served.post("/tokenize", {"messages": [USER]}).json()
    assert tokens == {"tokens": served.model.tokenizer.encode_chat([USER]), "count": tokens["count"]} | {
        "max_model_len": ROOM
    }
    assert served.post("/tokenize", {"prompt": "hé"}).json()["count"] == 3
    assert httpx.get(f"{served.root}/health").json() == {"status": "ok"}
    assert httpx.head(f"{served.root}/health").status_code == 200


def test_the_page_needs_nothing_else_and_draws_the_plan(served: Served) -> None:
    page = httpx.get(served.root)
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'") and "//" not in re.sub(
        "// .*", "", page.text
    )
    assert set(re.findall(r'at\("([\w-]+)"\)', page.text)) <= set(re.findall(r'id="([\w-]+)"', page.text))
    plan = httpx.get(f"{served.root}/plan", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert [stage["device"] for stage in plan["stages"]] == ["cpu0", "cpu1"] and plan["max_length"] == ROOM
    units = [unit["name"] for stage in plan["stages"] for unit in stage["units"]]
    assert units == ["embedding", "layer.0", "layer.1", "layer.2", "head"]


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "text"}}}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (TEXTS, b"{", 400, "the body is no JSON"),
        (TEXTS, b"[]", 400, "the body is no JSON object"),
        (TEXTS, b" " * (MOST_BYTES + 1), 413, f"the body has {MOST_BYTES + 1} bytes"),
        (TEXTS, {}, 400, "expected a prompt"),
        (TEXTS, {"prompt": []}, 400, "expected a prompt"),
        (TEXTS, {"prompt": [""] * 221}, 400, "there are 221 prompts, and at most 220"),
        (TEXTS, {"prompt": [[272]]}, 400, "the prompt has the token 272, and the model's table has 272"),
        (TEXTS, TEXT | {"model": "gpt-4"}, 404, "there is no model 'gpt-4' here; it serves"),
        (TEXTS, TEXT | {"max_tokens": ROOM}, 400, "the prompt has 9 tokens, which leaves no room for 2000 more"),
        (TEXTS, {"prompt": "x" * ROOM}, 400, "the prompt has 2000 tokens, which leaves no room"),
        (TEXTS, {"prompt": "x" * 100_000}, 400, "the prompt has 100000 characters, far more than the context"),
        (TEXTS, TEXT | {"temperature": "hot"}, 400, "temperature: is 'hot'"),
        (TEXTS, TEXT | {"temperature": -1}, 400, "temperature: is -1"),
        (TEXTS, TEXT | {"echo": True}, 400, "echo is not supported"),
        (TEXTS, TEXT | {"logprobs": 21}, 400, "log-probabilities of at most 20 tokens"),
        (TEXTS, TEXT | {"stream": True, "best_of": 2, "temperature": 1}, 400, "leave out stream or best_of"),
        (TEXTS, TEXT | {"stream": 3}, 400, "stream is true or false"),
        (TEXTS, {"n": 100, "prompt": ["a"] * 3}, 400, "300 answers are asked for, and at most 220"),
        (TEXTS, {"n": 220, "prompt": ["a"] * 220}, 400, "48400 answers are asked for, and at most 220"),
        (TEXTS, TEXT | {"bad_words_ids": [[1]] * 513}, 400, "have more than 1024 entries and characters together"),
        (TEXTS, TEXT | {"bad_words": ["x" * 1024]}, 400, "have more than 1024 entries and characters together"),
        (TEXTS, TEXT | {"stop": ["x" * 600], "stop_token_ids": [*range(424)]}, 400, "have more than 1024 entries"),
        (CHATS, {"messages": []}, 400, 'expected {"messages": [{"role": "user", "content": "some text"}]}'),
        (CHATS, {"messages": [USER, {"role": "user", "content": " "}]}, 400, "the last message is empty"),
        (CHATS, {"messages": [{"role": "bot", "content": "a"}]}, 400, "there is no role 'bot'"),
        (CHATS, CHAT | {"response_format": {"type": "xml"}}, 400, 'response_format is one of {"type": "text"}'),
        (CHATS, CHAT | {"response_format": SCHEMA | {"json_schema": 3}}, 400, "response_format is one of"),
        (CHATS, CHAT | {"response_format": SCHEMA, "regex": "a"}, 400, "regex: is given beside json_schema"),
        (TEXTS, TEXT | {"regex": "("}, 400, "regex: unclosed group"),
        (TEXTS, TEXT | {"json_schema": {"not": {}}}, 400, "json_schema: Unimplemented keys"),
        (TEXTS, TEXT | {"choices": ["a" * 2**15] * 3}, 400, "choices has more than 65536 characters"),
        (CHATS, CHAT | {"messages": [USER | {"content": "abcd"}] * 9999}, 400, "the conversation has 39996 characters"),
        ("/v1/embeddings", {"input": "a"}, 501, "embeddings are not served"),
        ("/v1/other", {}, 404, "POST /v1/other: Not Found"),
        ("/health", {}, 405, "POST /health: Method Not Allowed"),
    ],
    ids=lambda value: None if isinstance(value, (bytes, dict)) else str(value)[:40],
)
def test_what_cannot_be_done_is_refused_in_openais_form(
    served: Served, path: str, body: Any, status: int, message: str
) -> None:
    response = served.post(path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status > 500 else "invalid_request_error")
    assert ("Allow" in response.headers) == (status == 405)


def test_the_key_is_asked_for(served: Served) -> None:
    for key in ("another", KEY + "x"):
        assert served.post(TEXTS, TEXT, key).status_code == 401
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        served.client.with_options(api_key="another").models.list()
    assert httpx.get(f"{served.root}/metrics").status_code == 401


CANCELLED = 'llmpq_sequences_total{reason="cancelled"}'


def wait_until_free(served: Served, cancelled: float = 0) -> None:
    """And until so many have been cancelled."""
    until = time.monotonic() + SOON_S
    while (found := served.metrics())["llmpq_running"] or found.get(CANCELLED, 0) < cancelled:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_who_leaves_leaves_the_slot(served: Served) -> None:
    wait_until_free(served)
    before = served.metrics()
    long = TEXT | {"max_tokens": ROOM - 20}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", served.url + "/completions", json=long | {"stream": True}, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert served.metrics()["llmpq_running"] == 1
    cancelled = before.get(CANCELLED, 0)
    wait_until_free(served, cancelled + 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + "/completions", json=long, headers=headers, timeout=0.1)
    wait_until_free(served, cancelled + 2)
    after = served.metrics()
    assert after["llmpq_generated_tokens_total"] - before["llmpq_generated_tokens_total"] < 2 * (ROOM - 20)


def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    with serving(served.session, served.model, capacity=2) as url:
        two = TEXT | {"prompt": ["a", "b"], "max_tokens": ROOM - 20, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=two) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = httpx.post(f"{url}/completions", json=TEXT)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=5, timeout=SOON_S)
        answer = client.completions.create(model=served.name, prompt="Once upon", max_tokens=60, temperature=0)
        assert answer.choices[0].text == served.long.text


def test_no_more_bodies_are_read_at_once_than_sequences_may_wait(served: Served) -> None:
    with serving(served.session, served.model, capacity=2) as url, ExitStack() as stack:
        address = httpx.URL(url)
        for _ in range(2):
            client = stack.enter_context(socket.create_connection((address.host, address.port)))
            client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        until = time.monotonic() + SOON_S
        while httpx.post(url.replace("/v1", "/tokenize"), json={"prompt": "a"}).status_code != 429:
            assert time.monotonic() < until
        stack.close()
        while httpx.post(url.replace("/v1", "/tokenize"), json={"prompt": "a"}).status_code != 200:
            assert time.monotonic() < until


def test_a_body_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.1)
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port), SOON_S) as client:
        head = f"POST /tokenize HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n{{"
        client.sendall(head.encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_what_does_not_end_in_time_is_told_so(served: Served) -> None:
    body = TEXT | {"max_tokens": ROOM - 20, "stream": True}
    with ExitStack() as stack:
        url = stack.enter_context(serving(served.session, served.model, drain_s=0.1))
        with httpx.stream("POST", f"{url}/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            stack.close()
            *_, last = [line for line in lines if line]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"


def test_metrics_count_what_was_done(served: Served) -> None:
    wait_until_free(served)
    before = served.metrics()
    served.post(TEXTS, TEXT | {"n": 2, "temperature": 1.0})
    wait_until_free(served)
    after = served.metrics()

    def more(name: str) -> float:
        return after[f"llmpq_{name}"] - before.get(f"llmpq_{name}", 0)

    assert more('sequences_total{reason="length"}') == more("ttft_seconds_count") == more("tpot_seconds_count") == 2
    assert (more("generated_tokens_total"), more("prompt_tokens_total")) == (24, 18)
    assert after['llmpq_ttft_seconds_bucket{le="+Inf"}'] == after["llmpq_ttft_seconds_count"]
    assert (after["llmpq_waiting"], after["llmpq_slots"]) == (0, 4) and after["llmpq_tokens_per_second"] > 0
    assert all(re.fullmatch(r'llmpq_\w+(\{\w+="[^"]+"\})?', name) for name in after)


def test_what_stages_and_cache_do_is_told_while_they_do_it(served: Served) -> None:
    wait_until_free(served)
    assert served.metrics()["llmpq_kv_tokens"] == 0
    before = served.metrics()
    headers = {"Authorization": f"Bearer {KEY}"}
    body = TEXT | {"prompt": "x" * 100, "max_tokens": ROOM - 200, "stream": True}
    with httpx.stream("POST", served.url + "/completions", json=body, headers=headers) as stream:
        lines = stream.iter_lines()
        for _ in range(300):
            next(lines)
        found = served.metrics()
        while found['llmpq_stage_busy_seconds_total{stage="1"}'] == before['llmpq_stage_busy_seconds_total{stage="1"}']:
            found = served.metrics()  # it is told each half second
        assert 100 < found["llmpq_kv_tokens"] < found["llmpq_kv_room_tokens"] == 4 * KV_BLOCK * blocks_for(ROOM)
    for stage in "01":
        busy, bubble = (found[f'llmpq_stage_{name}_seconds_total{{stage="{stage}"}}'] for name in ("busy", "bubble"))
        assert busy > 0 and 0 <= bubble < found["llmpq_active_seconds_total"]
        assert found[f'llmpq_stage_memory_bytes{{stage="{stage}"}}'] > 0
    wait_until_free(served)
    assert served.metrics()["llmpq_kv_tokens"] == 0


def test_tokens_are_counted_as_they_come() -> None:
    metrics = Metrics(1, None)
    metrics.begin(3)
    metrics.progress(7)
    assert "\nllmpq_generated_tokens_total 7\n" in metrics.text(Live(0, 8, ()))
