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

A worker of a CPU may take part in several pipelines, one after the other: upon "leave" (see runtime/control.py) it says
"left", and upon "join" (arguments: as on its command line) it loads what it does not hold yet; see Units.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmpq import hardware
from llmpq.checkpoint.model_files import Checkpoint
from llmpq.checkpoint.weights import open_weights
from llmpq.models.arena import Arena, return_free_memory
from llmpq.models.decoder_stage import build_stage
from llmpq.models.units import Units, forms_of
from llmpq.runtime.communication import StageComm
from llmpq.runtime.control import Control
from llmpq.runtime.emulation import SimulatedStage, SlowedStage, emulated
from llmpq.runtime.loaded_stage import LoadedStage
from llmpq.runtime.meeting import join, open_store, taking_part
from llmpq.runtime.memory_watch import MemoryWatch
from llmpq.runtime.request import Generated
from llmpq.runtime.scheduler import Scheduler
from llmpq.runtime.stage import StageModel, StageRunner
from llmpq.runtime.unread import LatestTokens
from llmpq.spec import Device, DeviceMemoryError, ModelSpec, Plan, Profile, RequestTimes

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


class Held:
    """What a worker keeps from one pipeline to the next."""

    def __init__(self, control: Control) -> None:
        self.units = Units(control.check_leaving)
        self.memory: MemoryWatch | None = None
        self._model: tuple[Any, ...] = ()

    def begin(self, job: dict[str, Any], plan: Plan, spec: ModelSpec, rank: int) -> int:
        """Let go of what a stage does not need; how many units it need not load."""
        model = (job["checkpoint"], job["spec"])
        kept = self.units.keep(forms_of(spec, plan, rank) if model == self._model else {})
        self._model = model
        return_free_memory()
        return kept

    def explain(self, error: BaseException) -> DeviceMemoryError | None:
        """See MemoryWatch."""
        return None if self.memory is None else self.memory.explain(error)

    def watch(self, device: Device, name: str, control: Control, *, alone: bool) -> MemoryWatch:
        """The memory of a worker that holds nothing else yet."""
        if self.memory is None:
            self.memory = MemoryWatch(device, name, control.status, control.fail, alone=alone)
        else:
            self.memory.renew(device, name, self.units.nbytes)
        return self.memory


def run(job: dict[str, Any], rank: int, name: str, control: Control, held: Held, at_end: ExitStack) -> None:
    """Load stage `rank` of a job, then serve it. It has a name in messages. Returns only by an exception.

    Raises Left and LinkLostError; `at_end` is what is to be done once the links are cut. Ends the process otherwise.
    """
    plan, spec = Plan.from_dict(job["plan"]), ModelSpec.from_dict(job["spec"])
    checkpoint = Checkpoint(job["checkpoint"]["name"], Path(job["checkpoint"]["path"]), job["checkpoint"]["format"])
    device = plan.cluster.device(plan.stages[rank].device)
    place = hardware.use(device)
    kept = held.begin(job, plan, spec, rank)
    status = control.status
    status.doing = "meeting the other stages"
    if len(plan.stages) > 1:
        join(open_store(job["store"], len(plan.stages)), rank, len(plan.stages), control.leaving)
    control.started()
    # Made before memory is limited: only the used part of the buffers of both counts.
    comm, arena = StageComm(plan, spec, rank), Arena.of_stage(spec, plan, rank, place)
    places = [plan.cluster.device(stage.device) for stage in plan.stages]
    alone = sum((d.kind, d.host, d.index) == (device.kind, device.host, device.index) for d in places) == 1
    memory = held.watch(device, name, control, alone=alone)
    status.doing = "loading"
    model: StageModel
    if job["waits"] is not None:
        model = SimulatedStage(plan, spec, rank, Profile.from_dict(job["waits"]))
    else:
        source = open_weights(checkpoint, spec)
        stage = build_stage(
            spec, source, plan, rank, place, job["backend"], arena=arena, units=held.units, eager=job["eager"]
        )
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
    control.send("ready", idle_bytes=memory.idle_bytes, memory_bytes=memory.sample(), kept_units=kept)
    runner = StageRunner(plan, rank, model, emulated(comm, plan, rank), memory, status)
    if rank == 0:
        _lead(runner, spec, control, at_end)
    else:
        while runner.serve():
            _report(runner, control, None)
    control.send("closed")
    control.receive()  # until the commands end


def _lead(runner: StageRunner, spec: ModelSpec, control: Control, at_end: ExitStack) -> None:
    """On the first stage: carry out commands until "close"."""
    reports = _Reports(control)
    scheduler = Scheduler(runner, control.inbox, spec, reports.tokens, reports.ended)
    at_end.callback(scheduler.stop)
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
    held = Held(control)
    with control.reporting(held.explain):
        while True:
            at_end = ExitStack()
            with taking_part(control):
                told, argv = parser.parse_args(argv or control.receive()["arguments"]), []
                job = json.loads(told.job.read_text(encoding="utf-8"))
                run(job, told.rank, told.name, control, held, at_end)
            at_end.close()
            _let_go(held)
            control.status.busy_s, control.status.doing = 0.0, "waiting for another plan"
            control.left()


def _let_go(held: Held) -> None:
    """Of all but what is held."""
    gc.unfreeze()
    gc.collect()
    return_free_memory()
    if held.memory is not None:
        held.memory.lift()
