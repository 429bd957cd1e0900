"""One process of bench.kernels.rivals_cpu: all contenders on one weight with one number of threads, in turn.

    python -m bench.kernels.rivals.measure TASK FILE

TASK is a Task as JSON. FILE gets a Measured as JSON, and while this runs the name of the rival at work, so that who
started this knows on whom it died.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench.kernels import ceilings
from bench.kernels.rivals import Problem, build, ours
from bench.kernels.rivals.rounds import PATIENCE, await_quiet, time_rounds
from bench.kernels.rivals.timing import Checked, Timing
from bench.reasons import reason
from llmpq.spec.precision import ZeroKind


@dataclass(frozen=True)
class Task:
    """What to time."""

    n: int
    k: int
    group_size: int
    rows: tuple[int, ...]
    threads: int
    rounds: int
    rotated_bytes: int  # that the copies of a weight have together at least; 0: one copy
    rivals: tuple[str, ...]
    weights: tuple[tuple[int, ZeroKind], ...] = ours.WEIGHTS  # bits and zeros of ours


@dataclass
class Measured:
    """What a task found."""

    ceilings: dict[str, float] = field(default_factory=dict)
    timings: dict[int, dict[str, Timing]] = field(default_factory=dict)  # m -> contender -> its timing
    missing: dict[str, str] = field(default_factory=dict)  # rival -> why
    disturbed: int = 0  # rounds
    rounds: int = 0
    paces: dict[int, float] = field(default_factory=dict)  # m -> operations per second in tiles at best; 0: has none

    @classmethod
    def from_json(cls, text: str) -> Measured:
        found = json.loads(text)
        timings = {m: {name: Timing(**one) for name, one in of.items()} for m, of in found.pop("timings").items()}
        paces = {int(m): pace for m, pace in found.pop("paces").items()}
        return cls(**found, paces=paces, timings={int(m): of for m, of in timings.items()})


def measure(task: Task, working_on: Path) -> Measured:
    found = Measured()
    await_quiet(PATIENCE)
    try:
        found.ceilings = ceilings.measure(task.threads)
    except ceilings.CeilingsMissingError as error:
        found.missing["ceilings"] = str(error)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(task.n, task.k, generator=generator) / task.k**0.5
    x = torch.randn(max(task.rows), task.k, generator=generator)
    problem = Problem(weight, task.group_size, task.threads, task.rotated_bytes)
    contenders: dict[str, Checked] = {}
    for bits, zero in task.weights:
        for name, contender in ours.contenders(problem, bits, zero).items():
            contenders[name] = Checked(contender, x)
    for name in task.rivals:
        working_on.write_text(name)
        try:
            checked = Checked(build(name, problem), x)
            for m in task.rows:
                checked.accept(checked.contender.bind(x[:m])())
            contenders[name] = checked
        except Exception as error:  # whatever it is, the others can be timed
            found.missing[name] = reason(error)
    working_on.write_text("the rounds")
    pace = ceilings.pace_of_tiles()
    for m in task.rows:
        print(f"  m = {m}", file=sys.stderr, flush=True)
        sweeps = {name: checked.contender.bind(x[:m]) for name, checked in contenders.items()}
        errors = {name: contenders[name].error(sweep()) for name, sweep in sweeps.items()}
        seconds, disturbed, found.paces[m] = time_rounds(sweeps, task.rounds, task.threads, pace)
        found.disturbed += disturbed
        found.rounds += task.rounds
        found.timings[m] = {}
        for name, taken in seconds.items():
            contender = contenders[name].contender
            each = [value / contender.copies for value in taken]
            found.timings[m][name] = Timing(each, errors[name], contender.nbytes)
    return found


def main() -> None:
    task, path = Task(**json.loads(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(task.threads)
    with torch.inference_mode():
        path.write_text(json.dumps(asdict(measure(task, path))))


if __name__ == "__main__":
    main()
