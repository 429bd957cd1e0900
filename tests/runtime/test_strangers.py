"""Who connects and is not one of us: dropped and named, neither served nor fatal; and where we listen at all."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bench.faults.ports import listening
from llmpq.progress import warn_once
from llmpq.runtime import handshake
from llmpq.runtime.engine import Engine
from llmpq.runtime.handshake import SECRET, Door, introduce
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.torchrun import Rank
from llmpq.spec import UsageError, WorkerLostError
from tests.support.chain_of_stages import SPEC
from tests.support.pipelines import load_spec, make_plan, random_prompts, tiny_model

OURS = b"sixteen and more letters"
GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00" * 2000,
    b'{"rank": 1}\n',
    b"[" * 900 + b"\n",
    b'{"rank": 1, "host": "here", "number": "0", "proof": "' + b"0" * 64 + b'"}\n',
    b'{"rank": 1, "host": "x", "number": "y", "proof": "\\ud800"}\n',
    b"\xff\xfe\n",
    b"",
]


@pytest.fixture(autouse=True)
def said_anew() -> None:
    warn_once.cache_clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    monkeypatch.setattr(handshake, "HELLO_S", 1.0)
    with Door("127.0.0.1", OURS) as found:
        yield found


def knock(opened: Door) -> socket.socket:
    return socket.create_connection(("127.0.0.1", opened.port), timeout=5)


def come(opened: Door, rank: int, secret: bytes) -> threading.Thread:
    """A rank that wants in."""

    def enter() -> None:
        with suppress(WorkerLostError, OSError), knock(opened) as connection:
            introduce(connection, rank, "here", secret)

    thread = threading.Thread(target=enter)
    thread.start()
    return thread


def test_strangers_are_named_and_dropped_while_we_come_in(opened: Door, caplog: pytest.LogCaptureFixture) -> None:
    strangers = [knock(opened) for _ in GARBAGE]
    for stranger, said in zip(strangers, GARBAGE, strict=True):
        stranger.sendall(said)
    with caplog.at_level(logging.WARNING, "llmpq"):
        thread = come(opened, 3, OURS)
        guest = opened.receive(time.monotonic() + 5)
        assert guest is not None and (guest.rank, guest.host) == (3, socket.gethostname())
        thread.join()
        guest.connection.close()
        assert opened.receive(time.monotonic() + 2) is None  # who says nothing has its time
    for stranger in strangers:
        stranger.settimeout(5)
        with suppress(ConnectionResetError):  # or the end, after the number that the door has said
            assert b"proof" not in stranger.recv(1000) and stranger.recv(1000) == b""
        port = stranger.getsockname()[1]
        assert sum(f"a stranger at 127.0.0.1 port {port} said" in record.message for record in caplog.records) == 1
        stranger.close()
    assert "GET / HTTP" in caplog.text and "said nothing" in caplog.text


def test_more_strangers_than_are_listened_to_keep_nobody_out(opened: Door) -> None:
    strangers = [knock(opened) for _ in range(handshake._MOST + 20)]
    thread = come(opened, 1, OURS)
    guest = opened.receive(time.monotonic() + 5)
    assert guest is not None and guest.rank == 1
    thread.join()
    for each in (guest.connection, *strangers):
        each.close()


def test_both_ends_have_to_know_the_secret(opened: Door, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llmpq"):
        thread = come(opened, 1, b"another secret of some length")
        assert opened.receive(time.monotonic() + 2) is None
    thread.join()
    (stranger,) = (record.message for record in caplog.records)
    assert stranger.startswith("a stranger at 127.0.0.1 port ") and "rank" in stranger  # it did knock


@contextmanager
def impostor(answer: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """A connection to somebody who listens where the first rank should, says a number, and answers as given."""

    def pretend() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.sendall(b'{"number": "1"}\n')
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=pretend)
        thread.start()
        with socket.create_connection(server.getsockname()) as connection:
            yield connection
        thread.join()


@pytest.mark.parametrize("proof", [None, "\ud800", "é" * 64, 5], ids=ascii)
def test_who_listens_has_to_know_the_secret_too(proof: Any) -> None:
    def answer(connection: socket.socket) -> None:
        hello = json.loads(connection.recv(1000))
        said = hello["proof"] if proof is None else proof  # what it has just heard
        connection.sendall(json.dumps({"proof": said}).encode() + b"\n")

    with (
        impostor(answer) as connection,
        pytest.raises(WorkerLostError, match="who listens at there does not know this rank's secret"),
    ):
        introduce(connection, 1, "there", OURS)


def test_who_listens_has_one_limit_for_its_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each byte of it comes in time."""
    monkeypatch.setattr(handshake, "HELLO_S", 0.4)
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        for _ in range(20):
            if over.wait(0.1):
                return
            connection.sendall(b" ")
        connection.sendall(b"\n")

    with impostor(answer) as connection:
        try:
            with pytest.raises(TimeoutError):
                introduce(connection, 1, "there", OURS)
        finally:
            over.set()


@pytest.mark.parametrize("secret, problem", [("", "is missing"), ("short", "is too short")])
def test_ranks_of_several_hosts_need_a_secret(secret: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, secret)
    rank = Rank(0, 2, "127.0.0.1", 29500, one_host=False, prefix="")
    with pytest.raises(UsageError, match=f"{SECRET} {problem}; set it"):
        rank.meet()


@pytest.mark.slow
def test_a_stage_with_another_secret_is_not_listened_to(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(make_plan(SPEC, [1, 1], 2, 2).to_dict()))
    module = [sys.executable, "-m", "tests.support.chain_of_stages"]
    ranks = [
        subprocess.Popen(
            [*module, str(rank), tmp_path / "plan.json", tmp_path / "store"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, SECRET: f"secret {rank}"},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[1] for process in ranks]
    assert all(process.returncode for process in ranks)
    assert any("WorkerLostError: a stranger has come to stage" in each for each in said)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_listens_on_the_loopback_alone_and_answers_nobody_else(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa")
    spec, prompts = load_spec(checkpoint), random_prompts(5, 6, 7)
    plan, greedy = make_plan(spec, [2, 1], 2, 2), SamplingParams(max_tokens=12, ignore_eos=True)
    with Engine(plan, checkpoint, spec) as engine:
        undisturbed = engine.generate(prompts, greedy).sequences
    loaded, greeted, over = threading.Event(), threading.Event(), threading.Event()
    seen = {False: set[tuple[str, int]](), True: set[tuple[str, int]]()}  # before it had loaded, and after
    strangers = deque[socket.socket]()
    foreign = [said for said in GARBAGE if said[:8] != bytes(8)]  # gloo takes zeros for a peer's greeting: see README

    def disturb() -> None:
        while not over.wait(0.02):
            met = loaded.is_set()
            children = Path(f"/proc/{os.getpid()}/task/{main}/children").read_text().split()
            for place in listening([os.getpid(), *map(int, children)]):
                for said in foreign[:1] if place in seen[met] else GARBAGE if met else foreign:
                    with suppress(OSError):
                        strangers.append(socket.create_connection(place, timeout=1))
                        strangers[-1].sendall(said)
                seen[met].add(place)
            if met:
                greeted.set()
            while len(strangers) > 64:
                strangers.popleft().close()

    main = threading.get_native_id()
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with Engine(plan, checkpoint, spec) as engine:
            loaded.set()
            disturbed = engine.generate(prompts, greedy).sequences
            assert greeted.wait(20)
            assert engine.generate(prompts, greedy).sequences == undisturbed
    finally:
        over.set()
        thread.join()
        for stranger in strangers:
            stranger.close()
    assert disturbed == undisturbed
    assert len(seen[False]) >= 2 and seen[True]
    assert {ip_address(address).is_loopback for address, _ in seen[False] | seen[True]} == {True}
