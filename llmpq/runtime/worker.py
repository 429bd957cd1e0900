"""One stage as a process: `python -m llmpq.runtime.worker --job JOB.json --rank R --control READ,WRITE`.

The job file holds plan, ModelSpec and checkpoint, where the stages meet, and the profile by which they wait instead of
computing, if they do. Events: "ready" once the stage is loaded; "progress" (generated) while generating; "result" after
each batch: the stage's spans (see StageRunner), and from the first stage the value that was asked for. Commands, to the
first stage: "generate" (prompts, params) and "score" (sequences).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

from llmpq import hardware
from llmpq.checkpoint.model_files import Checkpoint
from llmpq.checkpoint.weights import open_weights
from llmpq.models.arena import Arena, return_free_memory
from llmpq.models.decoder import DecoderStage, build_stage
from llmpq.runtime.communication import StageComm, join, open_store
from llmpq.runtime.control import Control
from llmpq.runtime.emulation import SimulatedStage
from llmpq.runtime.memory_watch import MemoryWatch
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.scheduler import BatchRunner
from llmpq.runtime.stage import StageRunner
from llmpq.spec import ModelSpec, Plan, Profile

_PROGRESS_S = 0.1


def _drive(driver: BatchRunner, control: Control) -> Any:
    """Carry out one command; what it gives, as JSON."""
    command = control.receive()
    if command["command"] == "score":
        return driver.score(command["sequences"])
    last_sent = 0.0

    def on_progress(generated: int) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if now - last_sent >= _PROGRESS_S:
            last_sent = now
            control.send("progress", generated=generated)

    result = driver.generate(command["prompts"], SamplingParams.from_dict(command["params"]), on_progress)
    return result.to_dict()


def run(job: dict[str, Any], rank: int, control: Control) -> None:
    """Load stage `rank` of a job, then serve it. Does not return."""
    plan, spec = Plan.from_dict(job["plan"]), ModelSpec.from_dict(job["spec"])
    checkpoint = Checkpoint(job["checkpoint"]["name"], Path(job["checkpoint"]["path"]), job["checkpoint"]["format"])
    device = plan.cluster.device(plan.stages[rank].device)
    place = hardware.use(device)
    control.doing = lambda: "meeting the other stages"
    if len(plan.stages) > 1:
        join(open_store(job["store"], len(plan.stages)), rank, len(plan.stages))
    # Made before memory is limited: the buffers of both count as far as they are used, not for their size.
    links, arena = StageComm(plan, spec, rank), Arena.of_stage(spec, plan, rank, place)
    memory = MemoryWatch(device, f"stage {rank} on {device.name}", control.fail)
    control.doing = lambda: memory.doing
    with control.reporting(memory.explain):
        memory.doing = "loading"
        if job["waits"] is not None:
            stage: DecoderStage | SimulatedStage = SimulatedStage(plan, spec, rank, Profile.from_dict(job["waits"]))
        else:
            stage = build_stage(spec, open_weights(checkpoint, spec), plan, rank, place, job["backend"], arena=arena)
        runner = StageRunner(plan, spec, rank, stage, links, memory)
        runner.warm_up()
        gc.collect()
        return_free_memory()
        gc.freeze()  # what is there now stays; looking through it again would hold up a step for tens of milliseconds
        control.send("ready", idle_bytes=memory.idle_bytes, memory_bytes=memory.sample())
        driver = BatchRunner(runner, spec.eos_token_ids) if rank == 0 else None
        while True:
            memory.doing = "waiting for work"
            runner.spans.clear()
            value = runner.serve() if driver is None else _drive(driver, control)
            control.send("result", value=value, spans=[span.to_dict() for span in runner.spans])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llmpq.runtime.worker")
    for name in ("--job", "--control"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rank", type=int, required=True)
    arguments = parser.parse_args()
    control = Control(arguments.control)
    with control.reporting():
        run(json.loads(Path(arguments.job).read_text(encoding="utf-8")), arguments.rank, control)


if __name__ == "__main__":
    main()
