"""The log of runs: what was predicted of every stage and what was measured, one JSON object to a line.

`llmpq run` appends to it, and `llmpq profile --refit` corrects cost tables by it (llmpq/tuning/refitting.py).
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import planner
from llmpq import cache
from llmpq.progress import warn_once
from llmpq.runtime.engine import RunResult
from llmpq.spec import InvalidField, Op, Plan, Prediction, Profile, Record, UsageError, busy
from llmpq.spec.formatting import format_split
from llmpq.spec.json_file import read_file
from llmpq.spec.ranges import Bytes, Duration, Factor, Index, Seconds, Total
from llmpq.spec.trace import Phase


@dataclass(frozen=True, slots=True)
class PhaseRun(Record):
    """A stage's steps in one phase, and the seconds they took."""

    steps: Index
    predicted_s: Duration
    measured_s: Duration


@dataclass(frozen=True, slots=True)
class StageRun(Record):
    """One stage of a run, and those numbers of its cost table that a refit changes."""

    name: str  # of the device, in the plan
    device: str  # what the device is: CostTable.device
    kernels: str
    scale: Factor  # CostTable.scale
    step_s: Seconds  # what a step costs besides its operations
    overhead_bytes: Bytes
    prefill: PhaseRun
    decode: PhaseRun
    predicted_bytes: Total  # peak, above the idle worker
    measured_bytes: Total


@dataclass(frozen=True, slots=True)
class RunRecord(Record):
    """One run of a plan: its prompts and outputs, the prediction for them, and the measurement."""

    SCHEMA = "llmpq.run/1"

    date: str
    model: str
    model_hash: str
    split: str  # format_split of the plan
    prompt_lens: tuple[Index, ...]
    output_lens: tuple[Index, ...]
    stages: tuple[StageRun, ...]
    predicted: Prediction
    measured: Prediction

    @classmethod
    def of(
        cls,
        plan: Plan,
        costs: Profile,
        prompt_lens: Sequence[int],
        simulation: planner.Simulation,
        result: RunResult,
    ) -> RunRecord:
        """`simulation` is that of these costs, prompts and the lengths that `result` has."""

        def phase(index: int, name: Phase) -> PhaseRun:
            predicted, measured = (busy(spans, index, name) for spans in (simulation.spans, result.spans))
            return PhaseRun(measured.steps, predicted.seconds, measured.seconds)

        tables = [costs.table(stage.device) for stage in plan.stages]
        stages = tuple(
            StageRun(
                name=stage.device,
                device=table.device,
                kernels=table.kernels,
                scale=table.scale,
                step_s=table.seconds(Op("step")),
                overhead_bytes=table.overhead_bytes,
                prefill=phase(i, "prefill"),
                decode=phase(i, "decode"),
                predicted_bytes=simulation.prediction.memory_bytes[i],
                measured_bytes=result.measured.memory_bytes[i],
            )
            for i, (stage, table) in enumerate(zip(plan.stages, tables, strict=True))
        )
        return cls(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            model=plan.model,
            model_hash=plan.model_hash,
            split=format_split(plan),
            prompt_lens=tuple(prompt_lens),
            output_lens=tuple(len(sequence.token_ids) for sequence in result.sequences),
            stages=stages,
            predicted=simulation.prediction,
            measured=result.measured,
        )


def default_log() -> Path | None:
    """The log that is used where none is named; None if there is no place for one."""
    folder = cache.folder()
    return None if folder is None else folder / "runs.jsonl"


def writable_default_log() -> Path | None:
    """The same, to add to: None, which is said once, if it cannot be written."""
    path = default_log()
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
    except OSError as error:
        warn_once(f"cannot write {path}: {error.strerror}; this run is not logged. Name another --log, or --no-log")
        return None
    return path


def append(record: RunRecord, path: Path) -> None:
    """Add a line; runs that end at the same time do not mix theirs. Raises UsageError if it cannot be written."""
    line = json.dumps(record.to_dict()).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another --log, or --no-log") from None
    if written < len(line):
        raise UsageError(f"cannot write {path}: its file system is full, and its last line is broken now; remove it")


def read(path: Path) -> tuple[RunRecord, ...]:
    """All runs of a log. Raises UsageError naming the file and, if one is broken, the line."""
    records = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(RunRecord.from_dict(json.loads(line)))
        except (ValueError, RecursionError) as error:
            what = f": {error}" if isinstance(error, InvalidField) else " is not JSON"
            raise UsageError(f"{path}: line {number}{what}; remove the line") from None
    return tuple(records)
