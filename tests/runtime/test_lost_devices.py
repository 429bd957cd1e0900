"""When a lost device is tried again, and when it is not any more."""

from __future__ import annotations

import math

import pytest

from llmpq.runtime.lost_devices import RETRY_S, LostDevices


def test_the_pause_is_doubled_with_each_further_loss_and_try_in_vain() -> None:
    lost = LostDevices()
    lost.lose("b", 0.0)
    assert lost.due(0.9 * RETRY_S) == [] and lost.due(RETRY_S) == ["b"] and lost.next_s == RETRY_S
    lost.fail("b", RETRY_S)
    assert lost.next_s == 3 * RETRY_S
    lost.lose("c", RETRY_S)
    assert lost.next_s == 2 * RETRY_S and lost.out == ["b", "c"] and lost.due(3 * RETRY_S) == ["b", "c"]
    lost.bring_back(["b"])
    lost.loaded(4 * RETRY_S)
    lost.bring_back(["c"])
    assert lost.out == [] and lost.next_s == math.inf
    lost.lose("b", 5 * RETRY_S)  # what it was tried in vain before does not count any more
    assert lost.next_s == 7 * RETRY_S


@pytest.mark.parametrize("loaded_s", [10.0, None])
def test_who_is_lost_again_soon_is_gone(loaded_s: float | None) -> None:
    """However long it took to load; others come back as before."""
    lost = LostDevices()
    lost.lose("b", 0.0)
    lost.lose("c", 0.0)
    lost.bring_back(["b"])
    if loaded_s is not None:
        lost.loaded(loaded_s)
    lost.lose("b", 10.0 + 0.9 * RETRY_S if loaded_s is not None else 1e9)
    assert lost.gone == {"b"} and lost.out == ["c"]


@pytest.mark.parametrize("runs_s", [0.5, 1.5, 60.0, 3600.0, 86400.0])
def test_a_device_that_is_lost_again_and_again_is_gone_in_the_end(runs_s: float) -> None:
    """Though it comes back at once, as where no plan fits without it."""
    lost, now_s, losses = LostDevices(), 0.0, 0
    while not lost.gone:
        lost.lose("b", now_s)
        losses += 1
        if not lost.gone:
            lost.bring_back(["b"])
            lost.loaded(now_s)
            now_s += runs_s
    assert losses == 2 + max(0, math.floor(math.log2(runs_s / RETRY_S) + 1))
