"""The load is the same for all, the client loses nothing and counts what is lost, and rates are compared by rounds."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.serving import client, command, predictions
from bench.serving.ladder import FURTHEST, highest, rate_of, step_below
from bench.serving.load import Asked, Load, Loads
from bench.serving.results import Trial, rows_of
from bench.tables.serving import serving
from llmpq.checkpoint.model_files import open_model
from llmpq.measure.text import evaluation_text
from llmpq.spec import Latency, RequestTimes


@pytest.mark.parametrize("start", [-3, 5])
def test_the_ladder_finds_the_last_step_that_passes(start: int) -> None:
    for limit in range(start - FURTHEST // 2, start + FURTHEST // 2):
        asked: list[int] = []

        def passes(step: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(step)
            return step <= limit

        assert highest(start, passes) == limit
        assert len(asked) == len(set(asked)) <= 2 + 2 * FURTHEST.bit_length()
    assert highest(start, lambda step: False) is None
    assert step_below(rate_of(start)) == start and step_below(rate_of(start) * 1.01) == start


def test_loads_are_the_same_for_a_seed_and_come_at_their_rate() -> None:
    loads = Loads(open_model("demo").tokenizer, evaluation_text())
    slow, fast = loads.poisson(2.0, 100.0, seed=[3]), loads.poisson(4.0, 50.0, seed=[3])
    assert slow.requests == fast.requests and slow.requests != loads.at_once(200, seed=[4]).requests
    assert slow.arrivals_s == pytest.approx([2 * at for at in fast.arrivals_s])
    assert slow.arrivals_s[0] == 0.0 and slow.arrivals_s == sorted(slow.arrivals_s)
    assert 80 < slow.arrivals_s[-1] < 120
    tokenizer = open_model("demo").tokenizer
    assert slow.prompt_lens == [len(tokenizer.encode(one.prompt)) for one in slow.requests]
    assert max(slow.prompt_lens) > 6 * min(slow.prompt_lens) and max(slow.output_lens) > 4 * min(slow.output_lens)


def _answer(prompt: str, tokens: int) -> list[bytes]:
    """What the server below writes for a prompt, piece by piece."""

    def event(value: object) -> bytes:
        return f": a comment\r\n\r\ndata: {json.dumps(value)}\r\n\r\n".encode()

    def choice(text: str, reason: str | None = None) -> bytes:
        return event({"choices": [{"text": text, "finish_reason": reason}]})

    usage = event({"choices": [], "usage": {"completion_tokens": tokens - (prompt == "fewer")}})
    whole = b"".join([choice(""), *(choice("word ") for _ in range(tokens)), choice("", "length"), usage])
    end = b"data: [DONE]\r\n\r\n"
    if prompt == "breaks off":
        return [whole[: len(whole) // 2]]
    if prompt == "stops":
        return [choice("word", "stop"), end]
    if prompt == "error":
        return [event({"error": {"message": "no room"}}), end]
    return [whole[:7], whole[7:-5], whole[-5:] + end]


@contextmanager
def _server() -> Iterator[int]:
    """Its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(length))
        if body["prompt"] == "refused":
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in _answer(body["prompt"], body["max_tokens"]):
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(handle, "127.0.0.1", 0), loop).result()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_the_client_tells_times_and_what_is_lost() -> None:
    prompts = ["well", "refused", "breaks off", "stops", "error", "fewer", "well"]
    load = Load([Asked(prompt, 1, 5) for prompt in prompts], [0.01 * i for i in range(len(prompts))])
    with _server() as port:
        outcome = client.send(port, load, lambda output_len: {"ignore_eos": True}, patience_s=10.0)
    assert [one.arrived_s for one in outcome.times] == [load.arrivals_s[0], load.arrivals_s[-1]]
    assert all(one.tokens == 5 and one.ttft_s is not None and one.ttft_s > 0 for one in outcome.times)
    assert [text.partition(": ")[2] for text in outcome.lost] == [
        "the status was 429",
        "the stream broke off",
        "the answer ended with 'stop', and some text",
        "it was told {'message': 'no room'}",
        "the answer had 4 tokens of 5",
    ]


def _trial(name: str, number: int, step: int, ttft_s: float, lost: tuple[str, ...] = ()) -> Trial:
    times = tuple(RequestTimes(0.0, ttft_s, ttft_s + 0.4, 5) for _ in range(4))
    return Trial(name, number, step, client.Outcome(times, lost))


def test_rows_compare_the_same_weights_and_a_lost_request_fails_a_trial() -> None:
    assert _trial("llmpq int4 a8", 0, 0, 2.0).passes and not _trial("llmpq int4 a8", 0, 0, 2.1).passes
    assert not _trial("llmpq int4 a8", 0, 0, 0.1, ("gone",)).passes
    steps: dict[str, list[int | None]] = {
        "llmpq int4 a8": [12, 6, 12],
        "llama-server Q4_0": [6, 6, 0],
        "llama-server as stored": [0, None, 0],
    }
    trials = [_trial("llmpq int4 a8", i, 12, ttft_s) for i, ttft_s in enumerate([1.0, 3.0, 1.5])]
    trials += [_trial("llmpq int4 a8", 0, 13, 0.1), _trial("llama-server Q4_0", 0, 6, 1.6)]
    ours, rival, stored = rows_of(steps, trials, threads=2)
    assert (ours["rate"], ours["rates"], ours["spread"]) == (4.0, [4.0, 2.0, 4.0], 0.5)
    assert (ours["rival"], ours["ratio"], ours["goal"]) == ("llama-server Q4_0", 2.0, 1.5)
    assert ours["ttft_s"] == [1.5] * 4 and ours["tpot_s"] == pytest.approx([0.1] * 4)
    assert (stored["rate"], rival["rate"], rival.get("ratio")) == (1.0, 2.0, None)
    assert rows_of(steps, trials, threads=1)[0]["goal"] is None
    results: dict[str, Any] = {
        "model": "qwen",
        "threads": 2,
        "slots": 16,
        "prompt_tokens": (32, 384),
        "output_tokens": (16, 96),
        "seconds": 15.0,
        "disturbed": 1,
        "missing": {},
        "versions": {"a": "1"},
        "rows": [ours, rival, stored],
    }
    results["trials"] = [trial.to_dict() for trial in trials]
    lines = serving(json.loads(json.dumps(results)))
    rates = "4.00 (50 %) | 2.00 (≥ 1.5) | 2.11 (8.00) | 1.05"
    assert f"| llmpq int4 a8 | {rates} | 1.50 / 1.50 / 1.50 | 100 / 100 / 100 | 16 of 16 |" in lines


def test_predictions_may_be_off_by_as_much_as_runs_are_apart() -> None:
    def latency(requests_per_s: float, ttft_s: float) -> Latency:
        return Latency(9, requests_per_s, 10 * requests_per_s, (ttft_s,) * 4, None)

    predicted = [latency(2.2, 2.4), latency(4.4, 2.4), latency(1.1, 2.4)]  # of requests that differ
    measured = [latency(2.0, 0.5), latency(4.04, 1.0), latency(0.99, 1.5)]
    rows = {row.what: row for row in predictions.rows_of(2.5, list(zip(predicted, measured)))}
    assert set(rows) == {"requests/s", "tokens/s", "TTFT p50", "TTFT p95", "TTFT p99"}
    throughput, ttft = rows["requests/s"], rows["TTFT p95"]
    assert (throughput.measured, throughput.error) == (pytest.approx(2.0), pytest.approx(0.1))
    assert throughput.spread == pytest.approx(0.02) and throughput.limit == 0.05 and not throughput.met
    assert (ttft.error, ttft.limit, ttft.met) == (pytest.approx(1.4), pytest.approx(1.5), True)


def test_no_load_has_prompts_that_a_server_has_seen() -> None:
    loads = Loads(open_model("demo").tokenizer, evaluation_text())
    seen = [one.prompt for one in loads.at_once(20, seed=[0]).requests]
    for share in (0, 1):
        for load in itertools.islice(predictions.new_loads(loads, 2.0, 10.0, share), 3):
            seen += [one.prompt for one in load.requests]
    assert len(seen) == 20 + 2 * 3 * 20 and len({prompt[:32] for prompt in seen}) > 0.95 * len(seen)


def test_the_better_of_llama_cpps_servers_is_the_rival() -> None:
    assert {name.split()[0] for name in command.chosen(None, "llama-server")} == {"llmpq", "llama-server"}
    assert {name.split()[0] for name in command.chosen(None, None)} == {"llmpq", "llama-cpp-python"}
