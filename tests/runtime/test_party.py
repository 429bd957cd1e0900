"""When a process counts as lost: by what was heard of it while somebody listened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from llmpq.runtime.launch import signal_name
from llmpq.runtime.party import START_S, Party
from llmpq.spec import UsageError

LIMIT_S = 10.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def say(pipe: tuple[int, int], event: str, **fields: str) -> None:
    os.write(pipe[1], json.dumps({"event": event, **fields}).encode() + b"\n")


def test_silence_counts_once_it_has_started_and_while_somebody_listens(pipe: tuple[int, int]) -> None:
    party = Party(0, pipe[0], LIMIT_S)
    party.listened(2 * LIMIT_S)
    assert party.failure() == 0
    say(pipe, "started")
    assert party.read() == []
    party.listened(LIMIT_S)
    assert party.failure() == 0
    party.listened(0.1)
    assert party.failure() > 0
    say(pipe, "heartbeat", doing="computing")
    assert party.read() == []
    assert party.failure() == 0 and party.doing == "computing"


def test_signs_of_life_do_not_lengthen_the_time_to_start(pipe: tuple[int, int]) -> None:
    party = Party(0, pipe[0], LIMIT_S)
    party.listened(START_S)
    say(pipe, "heartbeat", doing="importing")
    party.read()
    assert party.failure() == 0
    party.listened(0.1)
    assert party.failure() > 0


def test_an_event_in_pieces_is_one_event_and_a_reported_error_is_raised_as_it_was(pipe: tuple[int, int]) -> None:
    party = Party(0, pipe[0], LIMIT_S)
    os.write(pipe[1], b'{"event": "res')
    assert party.read() == []
    os.write(pipe[1], b'ult"}\n{"event": "error", "kind": "UsageError", "message": "broken"}\n')
    assert party.read() == [{"event": "result"}]
    assert isinstance(party.error, UsageError) and str(party.error) == "broken"


def test_every_signal_has_a_name() -> None:
    assert [signal_name(number) for number in (9, 15, 35)] == ["SIGKILL", "SIGTERM", "signal 35"]
