"""How a process leaves a pipeline, and what it tells of the end of a link."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from llmpq.runtime import meeting
from llmpq.runtime.control import Control, Left


class Told(Control):
    """Told to leave at once, or as soon as it has said something."""

    def __init__(self, *, leaves: bool) -> None:
        self.leaving, self.said = threading.Event(), list[dict[str, Any]]()
        if leaves:
            self.leaving.set()

    def send(self, event: str, **fields: Any) -> None:
        self.said.append({"event": event, **fields})
        self.leaving.set()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sockets that are cut; none is, of this process."""
    descriptors = list[int]()
    monkeypatch.setattr(meeting, "_cut", descriptors.append)
    return descriptors


def test_links_are_cut_though_nothing_keeps_who_leaves(cut: list[int]) -> None:
    """Another thread may wait for a message."""
    with socket.socket() as link:
        with meeting.taking_part(Told(leaves=True)):
            raise Left
        assert link.fileno() in cut


def test_a_lack_of_memory_is_no_end_of_a_link() -> None:
    with pytest.raises(meeting.LinkLostError, match="reset"), meeting.links_may_end():
        raise RuntimeError("Connection reset by peer")
    with pytest.raises(RuntimeError, match="allocate"), meeting.links_may_end():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")
    with pytest.raises(torch.OutOfMemoryError), meeting.links_may_end():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_where_a_link_failed_is_in_the_log(cut: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    control = Told(leaves=False)
    with meeting.taking_part(control), meeting.links_may_end():
        raise RuntimeError("sizes differ")
    assert control.said == [{"event": "defect", "message": "LinkLostError: sizes differ"}]
    assert f'File "{__file__}"' in capsys.readouterr().err
