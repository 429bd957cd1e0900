"""What counts as a link's time and what as its ends', on a clock and links made for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmpq.measure import timing_worker
from llmpq.measure.profiling import connection
from llmpq.runtime.communication import Message
from llmpq.spec import Device

MS = 10**6  # nanoseconds
HERE, THERE, ONWARD, BACK = 5 * MS, 7 * MS, 3 * MS, 2 * MS  # computing at both ends, and both ways
SENDING, RECEIVING = 1 * MS, 4 * MS  # at work on a message, besides


class Data:
    """Takes its time to be read, on a device that is not here."""

    device = torch.device("meta")

    def __init__(self, clock: Any, takes: int) -> None:
        self._clock, self._takes = clock, takes

    def sum(self) -> torch.Tensor:
        self._clock.now += self._takes
        return torch.zeros(())


class OneEnd:
    """The links of one end; the other one is as long at work and on its way as the constants say."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.arrived_ns = 0
        self.sent: list[Message] = []
        self.given_back: list[list[int]] = []

    def expect(self, count: int) -> None:
        assert count == 1

    def send(self, message: Message) -> None:
        self.sent.append(message)
        self._clock.now += SENDING

    def receive_tokens(self) -> torch.Tensor:
        self._clock.now += ONWARD + RECEIVING + THERE + SENDING + BACK
        self.arrived_ns = self._clock.now
        return torch.tensor([THERE])

    def receive(self) -> Message:
        self._clock.now += 100 * MS  # however long it slept
        self.arrived_ns = self._clock.now
        self._clock.now += RECEIVING
        return SimpleNamespace(hidden_states=torch.zeros(3, 8))  # type: ignore[return-value]

    def return_tokens(self, values: torch.Tensor) -> None:
        self.given_back.append(values.tolist())
        self._clock.now += SENDING


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = SimpleNamespace(now=0)
    fake.monotonic_ns = lambda: fake.now
    monkeypatch.setattr(timing_worker, "time", fake)
    return fake


def test_the_source_times_a_message_and_its_answer_without_what_both_ends_compute(clock: Any) -> None:
    links = OneEnd(clock)
    seconds, handling = timing_worker.exchange(links, 0, 3, 8, Data(clock, HERE))  # type: ignore[arg-type]
    assert seconds == pytest.approx((2 * SENDING + ONWARD + RECEIVING + BACK) / 1e9)
    assert handling == pytest.approx(SENDING / 1e9)
    for message in links.sent:
        assert message.hidden_states is not None and message.hidden_states.shape == (3, 8)
        assert (
            message.hidden_states.device == Data.device
        )  # NCCL takes what is on a GPU, and a stage's results are there


def test_the_target_says_how_long_it_computed_and_does_not_count_its_sleep(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Data, "device", torch.device("cpu"))
    links = OneEnd(clock)
    seconds, handling = timing_worker.exchange(links, 1, 3, 8, Data(clock, THERE))  # type: ignore[arg-type]
    assert seconds == 0.0
    assert handling == pytest.approx((RECEIVING + SENDING) / 1e9)
    assert links.given_back and set(map(tuple, links.given_back)) == {(THERE,)}


def test_both_ways_and_both_ends_add_up_to_a_message_and_its_answer() -> None:
    ends, whole = (Device("a", "cpu"), Device("b", "cpu")), [(x, 900e-6 + x * 1e-9) for x in (32.0, 1e3, 1e5, 1e6)]
    found = connection(ends, whole, 300e-6, 200e-6)
    assert (found.source_s, found.target_s) == (300e-6, 200e-6)
    for size, seconds in whole:
        ways = found.link.seconds(size) + found.link.seconds(0)
        assert ways + found.source_s + found.target_s == pytest.approx(seconds)
    assert connection(ends, whole, 700e-6, 300e-6).link.latency_s == 0.0  # ends that are at work at the same time
