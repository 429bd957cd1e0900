"""The links between stages: which are NCCL's; each is used before the first step, and what it carries arrives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmpq.runtime import communication
from llmpq.spec import Device
from tests.support.chain_of_stages import SPEC, STEPS
from tests.support.pipelines import make_plan

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("way", ["gloo", "nccl"])
def test_every_link_is_used_before_the_first_step_and_carries_what_is_sent(way: str, tmp_path: Path) -> None:
    plan = make_plan(SPEC, [1, 1, 1], 2, 2)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    module = [sys.executable, "-m", "tests.support.chain_of_stages"]
    ranks = [
        subprocess.Popen(
            [*module, str(rank), tmp_path / "plan.json", tmp_path / "store", way], stdout=subprocess.PIPE, cwd=ROOT
        )
        for rank in range(3)
    ]
    found = [json.loads(process.communicate(timeout=100)[0]) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0]
    hidden = [" nccl"] if way == "nccl" else []
    first, second, last = (each["first"] for each in found)
    assert first == ["irecv 2", "isend 1", *(f"isend 1{end}" for end in hidden)]
    # Each is ready for the next message before it does what came with this one.
    assert second == [
        "irecv 0",
        *(f"irecv 0{end}" for end in hidden),
        "irecv 0",
        "isend 2",
        *(f"isend 2{end}" for end in hidden),
    ]
    assert last == ["irecv 1", *(f"irecv 1{end}" for end in hidden), "irecv 1", "isend 0"]
    for rank, each in enumerate(found):
        assert each["sums"] == [i + 1.0 + rank for i in range(len(STEPS))]
        assert each["timeouts"] == ([365 * 86400.0] * 2 if way == "nccl" else [])


def test_only_a_link_between_different_gpus_is_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication.dist, "is_nccl_available", lambda: True)
    cpu, gpu0, gpu1 = Device("cpu0", "cpu"), Device("a", "cuda"), Device("b", "cuda", index=1)
    away = Device("c", "cuda", host="elsewhere")
    assert communication.transport(gpu0, gpu1) == communication.transport(gpu0, away) == "nccl"
    assert communication.transport(gpu0, Device("d", "cuda")) == "gloo"
    assert (
        communication.transport(cpu, gpu0)
        == communication.transport(gpu0, cpu)
        == communication.transport(cpu, cpu)
        == "gloo"
    )
