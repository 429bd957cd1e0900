"""How a process leaves a pipeline, and what it tells of the end of a link."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmpq.runtime import meeting
from llmpq.runtime.control import Control, Left
from llmpq.runtime.handshake import SECRET


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


@pytest.mark.parametrize("here", [["here/0"], ["here/0", "here/1"]], ids=["has not come", "came and is gone"])
def test_who_leaves_waits_for_nobody(here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though torch would for a year."""
    monkeypatch.setenv(SECRET, "5e")
    leaving = threading.Event()
    left = threading.Timer(0.2, leaving.set)
    left.start()
    store = meeting.open_store(f"file:{tmp_path / 'store'}", 2)
    for key in here:
        store.set(key, "")
    with pytest.raises(meeting.LinkLostError):
        meeting.join(store, 0, 2, leaving)
    assert leaving.is_set() and not dist.is_initialized()


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
