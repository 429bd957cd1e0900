"""`llmpq serve` as a process: it drains when it is asked to end, and ends by itself when a stage is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llmpq.checkpoint.model_files import open_model
from llmpq.cli.main import main
from llmpq.serve.server import bind
from tests.support.served import ROOM, plan_of, save_chat_model

pytestmark = pytest.mark.slow

SOON_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_chat_model(folder)
    plan_of(open_model(str(folder))).save(folder / "plan.json")
    return folder


@contextmanager
def server(folder: Path, *options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of its own, and its URL; killed at the end if it still runs."""
    command = ["serve", "--model", str(folder), "--plan", str(folder / "plan.json"), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200", **variables}
    with subprocess.Popen(
        [sys.executable, "-m", "llmpq", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # who runs tests may ignore it
    ) as process:
        assert process.stderr is not None
        try:
            line = next((line for line in process.stderr if ": serving " in line), None)
            assert line is not None, "it did not start"
            yield process, line.split()[-1]
        finally:
            process.kill()


def workers(pid: int) -> list[int]:
    """Its children, in the order they were started."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_lets_what_runs_end(folder: Path, number: signal.Signals) -> None:
    longest = ROOM - 20
    body = {"prompt": "a", "max_tokens": longest, "stream": True, "stream_options": {"include_usage": True}}
    key, limits = {"Authorization": "Bearer secret"}, ("--max-answer", str(longest), "--max-queue", "1")
    with server(folder, *limits, LLMPQ_API_KEY="secret") as (process, url), httpx.Client(headers=key) as client:
        children = workers(process.pid)
        assert httpx.post(f"{url}/completions", json=body).status_code == 401
        refused = client.post(f"{url}/completions", json=body | {"max_tokens": longest + 1}).json()
        told = f"max_tokens is {longest + 1}, and an answer may have {longest} tokens here"
        assert told in refused["error"]["message"]
        refused = client.post(f"{url}/completions", json=body | {"prompt": ["a"] * 6}).json()
        assert "there are 6 prompts, and at most 5" in refused["error"]["message"]  # 4 slots
        with client.stream("POST", f"{url}/completions", json=body, timeout=SOON_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            generated = 0.0
            while not generated:  # told while it runs
                told = client.get(url.replace("/v1", "/metrics")).text
                assert "\nllmpq_running 1\n" in told
                generated = float(re.findall(r"\nllmpq_generated_tokens_total (.*)\n", told)[0])
            process.send_signal(number)
            *_, usage, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == longest
        assert process.wait(SOON_S) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")
    assert len(children) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.full
def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    body = {"prompt": ["a"] * 30, "max_tokens": ROOM - 20, "stream": True}
    with server(folder) as (process, url):
        children = workers(process.pid)
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=SOON_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        _, said = process.communicate(timeout=SOON_S)
    assert process.returncode == 128 + signal.SIGTERM and said.strip() == "llmpq: ended by SIGTERM"
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_lost_stage_is_told_and_ends_the_server(folder: Path) -> None:
    body = {"prompt": "a", "max_tokens": ROOM - 20, "stream": True}
    with server(folder) as (process, url):
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=SOON_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(workers(process.pid)[1], signal.SIGKILL)
            *_, last = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "stage 1 on cpu1" in error["message"]
        health = httpx.get(url.replace("/v1", "/health"))
        assert health.status_code == 503 and "stage 1 on cpu1" in health.json()["problem"]
        assert httpx.post(f"{url}/completions", json={"prompt": "a"}).status_code == 503
        asked_s = time.monotonic()
        _, said = process.communicate(timeout=SOON_S)
        assert time.monotonic() - asked_s < SOON_S
    assert process.returncode == 5
    assert said.splitlines()[-1].startswith("llmpq: stage 1 on cpu1") and "Traceback" not in said


def test_what_keeps_it_from_serving_is_said_before_the_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def problem(*options: str) -> str:
        assert main(["serve", "--model", str(folder), "--plan", str(folder / "plan.json"), *options]) == 2
        return capsys.readouterr().err

    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = str(bound.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in problem("--port", port)
    assert "cannot listen on 203.0.113.1" in problem("--host", "203.0.113.1")
    assert "'65536' is no port from 0 to 65535" in problem("--port", "65536")
    assert "cannot listen on .." in problem("--host", "..")
    assert "the API key is empty" in problem("--api-key", "")
    assert "the API key is not of printable ASCII" in problem("--api-key", "schl\u00fcssel")
    assert "the API key is not of printable ASCII" in problem("--api-key", "key ")
    assert "--plan already decides --batch-size" in problem("--batch-size", "4")
    assert "--max-length is 1; a prompt and an answer have at least 2 tokens" in problem("--max-length", "1")
    assert "--plan already decides --max-length" in problem("--max-length", "64")
    monkeypatch.setattr("llmpq.cli.serve_command.find_spec", lambda name: None)
    assert "pip install 'llmpq[serve]'" in problem()
