"""One stage as a process: `--job JOB.json --rank R --name NAME` (see runtime/control.py for how a worker is started).

The job file holds plan, ModelSpec and checkpoint, where the stages meet, the file for logits if they are to be kept,
and, for a simulated run, the profile whose seconds replace computing.

Commands, to the first stage: any number of "submit" (requests: pairs of a number and a Request; arrived_s of
`time.monotonic`; whether to stream their tokens; with the first that have a grammar, the vocabulary, see Admission) and
"cancel" (requests: their numbers), then "finish", which is done when all of them have ended; "score" (sequences); and
"close". Events: "ready" once the stage is loaded; "progress" (generated, and tokens for which the blocks in use have
room), "tokens" (pairs of a request's number and its next token), "ended" (request, generated, times); "result" after
"finish" and "score", with the stage's spans (see StageRunner) and, from the first stage, a value; "closed" when no
command follows.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmpq import hardware
from llmpq.checkpoint.model_files import Checkpoint
from llmpq.checkpoint.weights import open_weights
from llmpq.models.arena import Arena, return_free_memory
from llmpq.models.decoder_stage import build_stage
from llmpq.runtime.communication import StageComm
from llmpq.runtime.control import Control
from llmpq.runtime.emulation import SimulatedStage, SlowedStage, emulated
from llmpq.runtime.loaded_stage import LoadedStage
from llmpq.runtime.meeting import join, open_store
from llmpq.runtime.memory_watch import MemoryWatch
from llmpq.runtime.request import Generated
from llmpq.runtime.scheduler import Scheduler
from llmpq.runtime.stage import StageModel, StageRunner
from llmpq.runtime.unread import LatestTokens
from llmpq.spec import ModelSpec, Plan, Profile, RequestTimes

_PROGRESS_S = 0.1


class _Reports:
    """Tells the process that started this one what becomes of requests."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._last_sent = 0.0

    def tokens(self, generated: int, kv_tokens: int, streamed: Sequence[tuple[int, int]]) -> None:
        if streamed:
            self._control.send("tokens", tokens=streamed)
        now = time.monotonic()
        if now - self._last_sent >= _PROGRESS_S:
            self._last_sent = now
            self._control.send("progress", generated=generated, kv_tokens=kv_tokens)

    def ended(self, request: int, generated: Generated, times: RequestTimes) -> None:
        self._control.send("ended", request=request, generated=generated.to_dict(), times=times.to_dict())


def run(job: dict[str, Any], rank: int, name: str, control: Control) -> None:
    """Load stage `rank` of a job, then serve it. It has a name in messages. Does not return."""
    plan, spec = Plan.from_dict(job["plan"]), ModelSpec.from_dict(job["spec"])
    checkpoint = Checkpoint(job["checkpoint"]["name"], Path(job["checkpoint"]["path"]), job["checkpoint"]["format"])
    device = plan.cluster.device(plan.stages[rank].device)
    place = hardware.use(device)
    status = control.status
    status.doing = "meeting the other stages"
    if len(plan.stages) > 1:
        join(open_store(job["store"], len(plan.stages)), rank, len(plan.stages))
    control.started()
    # Made before memory is limited: only the used part of the buffers of both counts.
    comm, arena = StageComm(plan, spec, rank), Arena.of_stage(spec, plan, rank, place)
    places = [plan.cluster.device(stage.device) for stage in plan.stages]
    alone = sum((d.kind, d.host, d.index) == (device.kind, device.host, device.index) for d in places) == 1
    memory = MemoryWatch(device, name, status, control.fail, alone=alone)
    with control.reporting(memory.explain):
        status.doing = "loading"
        model: StageModel
        if job["waits"] is not None:
            model = SimulatedStage(plan, spec, rank, Profile.from_dict(job["waits"]))
        else:
            source = open_weights(checkpoint, spec)
            stage = build_stage(spec, source, plan, rank, place, job["backend"], arena=arena, eager=job["eager"])
            runs_ahead = len(places) == 1 and place.type == "cuda" and device.slowdown == 1
            logits = None if job["logits"] is None else Path(job["logits"])
            loaded = LoadedStage(stage, spec, logits, LatestTokens(plan.slots, place) if runs_ahead else None)
            loaded.warm_up()
            model = loaded if device.slowdown == 1 else SlowedStage(loaded, device)
        status.doing = "waiting for the other stages to be loaded"
        comm.warm_up()
        gc.collect()
        return_free_memory()
        gc.freeze()  # what is there now stays; looking through it again would hold up a step for tens of milliseconds
        control.send("ready", idle_bytes=memory.idle_bytes, memory_bytes=memory.sample())
        runner = StageRunner(plan, rank, model, emulated(comm, plan, rank), memory, status)
        if rank == 0:
            _lead(runner, spec, control)
        else:
            while runner.serve():
                _report(runner, control, None)
        control.send("closed")
        control.receive()  # until the commands end


def _lead(runner: StageRunner, spec: ModelSpec, control: Control) -> None:
    """On the first stage: carry out commands until "close"."""
    reports = _Reports(control)
    scheduler = Scheduler(runner, control.inbox, spec, reports.tokens, reports.ended)
    while True:
        control.status.doing = "waiting for work"
        command = control.receive()
        if command["command"] == "close":
            scheduler.close()
            return
        if command["command"] == "score":
            _report(runner, control, scheduler.score(command["sequences"]))
        elif command["command"] != "cancel":  # one that comes late is for requests that have ended
            _report(runner, control, scheduler.run(command).to_dict())


def _report(runner: StageRunner, control: Control, value: Any) -> None:
    """A command is done."""
    control.send("result", value=value, spans=[span.to_dict() for span in runner.spans.take()])


def main(control: Control, argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args(argv)
    run(json.loads(arguments.job.read_text(encoding="utf-8")), arguments.rank, arguments.name, control)
