"""`RANK PLAN STORE [nccl]`: the links of one of several stages; prints, as JSON, what went through them.

With `nccl`, links are as between GPUs, but for what NCCL would be and the tensors it moves: these are gloo's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmpq.models.step import Step
from llmpq.runtime import communication, link_ends
from llmpq.runtime.communication import StageComm
from llmpq.runtime.handshake import SECRET
from llmpq.runtime.meeting import join, open_store
from llmpq.runtime.message import Close, StepMessage
from llmpq.spec import Plan
from tests.support.planner_instances import model

SPEC = model()
STEPS = (5, 1, 8, 3)  # tokens


def main() -> None:
    rank, plan, store = int(sys.argv[1]), Plan.from_dict(json.loads(Path(sys.argv[2]).read_text())), sys.argv[3]
    moved: list[str] = []
    timeouts: list[float] = []
    started = link_ends.started

    def noted(call: Any, other: int, part: link_ends.Part) -> dist.Work:
        moved.append(f"{call.__name__} {other}{'' if part[2] is None else ' nccl'}")
        return started(call, other, part)

    link_ends.started = noted
    if "nccl" in sys.argv:
        new_group = dist.new_group

        def group_of(ranks: list[int], timeout: timedelta, backend: str) -> Any:
            timeouts.append(timeout.total_seconds())
            assert backend == "nccl"
            return new_group(ranks, timeout=timeout, backend="gloo")

        dist.new_group = group_of
        communication.transport = lambda source, target: "nccl"
    world = len(plan.stages)
    os.environ.setdefault(SECRET, "that of this test")
    join(open_store(f"file:{store}", world), rank, world)
    comm = StageComm(plan, SPEC, rank)
    comm.warm_up()
    first = list(moved)
    sums = []
    for i, tokens in enumerate(STEPS):
        step = Step.of([0], [tokens], [0], [i] * tokens)
        hidden_states = torch.full((tokens, SPEC.hidden_size), float(i + 1))
        if rank > 0:
            content = comm.receive().content
            assert isinstance(content, StepMessage) and content.hidden_states is not None
            step, hidden_states = content.step, content.hidden_states
            assert step.num_tokens == tokens
            await_next(moved, rank, i)
        sums.append(float(hidden_states.float().mean()))
        if rank == world - 1:
            comm.return_tokens(torch.tensor([100 + i]))
        else:
            comm.expect(1) if rank == 0 else None
            comm.send(StepMessage(step, hidden_states + 1))
    if rank == 0:
        for i in range(len(STEPS)):
            assert comm.receive_tokens().content.tolist() == [100 + i]
    if rank > 0:
        assert isinstance(comm.receive().content, Close)
    if rank < world - 1:
        comm.send(Close())
    comm.flush()
    print(json.dumps({"first": first, "sums": sums, "timeouts": timeouts}))
    dist.barrier()


def await_next(moved: list[str], rank: int, step: int) -> None:
    """While a stage computes a step: until the hidden states of the next one arrive, by NCCL."""
    begun = f"irecv {rank - 1} nccl"
    deadline = time.monotonic() + 30
    while "nccl" in sys.argv and step + 1 < len(STEPS) and moved.count(begun) < step + 3:  # one was the warm-up's
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step + 1} waits until step {step} has been computed")
        time.sleep(1e-3)


if __name__ == "__main__":
    main()
