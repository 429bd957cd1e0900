"""Predictions against runs: the committed list of prediction_runs.json, each run several times.

    python -m bench.predictions [--only PART ...] [--repetitions 5] [--together 5] [--json-out FILE]

First the cost tables of each cluster and model are measured, or taken from the cache, and corrected by runs that are
not in the list, as `llmpq profile --calibrate` does ("uncorrected" are the errors without that). Then runs take turns,
a few of them open at the same time, clusters and models mixed. What they take is compared with the simulation of the
pipeline from these tables ("predicted"), from tables fitted to the run itself ("simulated"), and with every step as
long as it was ("replayed"): what is wrong then is not the costs of stages but the simulation. Last, every third plan
runs with timed waits in place of its stages. A run that fails is reported and left out, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

import planner
from bench.machine import describe, write_results
from bench.predictions.cases import GROUP_SIZE, PATH, Case, Listed
from llmpq.checkpoint.model_files import Model
from llmpq.measure.profiling import profile
from llmpq.runtime.engine import Engine, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Plan, Profile, Span, busy
from llmpq.spec.formatting import format_split
from llmpq.tuning.calibration import calibration_runs
from llmpq.tuning.refitting import refit
from llmpq.tuning.run_log import RunRecord

# The goals: shares of what was measured, but for SPREADS and WORST, which are factors.
THROUGHPUT, SPREADS, WORST = 0.05, 1.5, 3.0  # mean: at most the larger of 5 % and 1.5 spreads; worst: 3 times that
MEMORY, UNDER = 0.03, 0.02  # mean, the most that is predicted too little
WAITS, SIMULATOR = 0.02, 0.05


@dataclass
class Trial:
    """A case with what its prediction needs, and what its runs gave."""

    case: Case
    model: Model
    costs: Profile
    plan: Plan
    uncorrected: Profile  # costs as they were measured
    results: list[RunResult] = field(default_factory=list)
    waited: list[RunResult] = field(default_factory=list)
    error: str | None = None

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        return [self.case.prompt] * self.case.batch, [self.case.output] * self.case.batch

    @property
    def prompts(self) -> list[list[int]]:
        generator = np.random.default_rng(0)
        return [generator.integers(100, 4000, n).tolist() for n in self.lengths[0]]

    def simulate(self, costs: Profile) -> planner.Simulation:
        return planner.simulate(self.plan, self.model.spec, costs, *self.lengths)

    def replay_error(self, result: RunResult) -> float:
        """Of tokens/s, if what stages take is known for each step."""
        replayed = planner.replay(self.plan, self.model.spec, self.costs, *self.lengths, result.spans)
        return _error(replayed.prediction.tokens_per_s, result.measured.tokens_per_s)

    def records(self, simulation: planner.Simulation) -> list[RunRecord]:
        """Of all results, as predicted from `costs`."""
        prompts = self.lengths[0]
        return [RunRecord.of(self.plan, self.costs, prompts, simulation, result) for result in self.results]


@dataclass(frozen=True)
class Row:
    """What came of one run. Medians over repetitions; errors are (predicted - measured) / measured."""

    name: str
    split: str
    prefill_microbatch: int
    decode_microbatch: int
    tokens_per_s: float
    predicted_tokens_per_s: float
    spread: float  # (max - min) / median of tokens/s
    throughput_error: float
    uncorrected_error: float  # of tokens/s, from the tables as they were measured
    prefill_error: float
    decode_error: float
    stage_errors: list[float]  # of the seconds at work of each stage, both phases together
    memory_errors: list[float]  # of each stage's peak above idle
    simulator_error: float  # of tokens/s, with stages as fast as they were in the run on average
    replay_error: float  # of tokens/s, with each step as long as it was in the run
    waits_error: float | None  # of tokens/s, where stages only wait


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART", nargs="+", help="runs whose name has one of these in it")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--together", type=int, default=5, help="runs that take turns (default: 5)")
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    listed = Listed.load(PATH)
    cases = [c for c in listed.runs if arguments.only is None or any(part in c.name for part in arguments.only)]
    trials, failures = prepare(listed, cases)
    for chunk in mixed(trials, arguments.together):
        take_turns(chunk, arguments.repetitions, waits=False)
    waiting = [trial for trial in trials[::3] if trial.error is None]
    for chunk in mixed(waiting, arguments.together):
        take_turns(chunk, arguments.repetitions, waits=True)
    rows = [row_of(trial) for trial in trials if trial.error is None]
    failures |= {trial.case.name: trial.error for trial in trials if trial.error is not None}
    found = goals(rows) if rows else []
    for row in rows:
        print(line(row))
    for goal in found:
        verdict = "met" if goal.met else "missed"
        print(f"{goal.what}: {100 * goal.reached:.1f} % of at most {100 * goal.limit:.1f} %, {verdict}")
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if arguments.json_out:
        results = {"repetitions": arguments.repetitions, "goals": list(map(asdict, found)), "failures": failures}
        write_results(arguments.json_out, describe() | results | {"rows": list(map(asdict, rows))})
    return 1 if failures else 0


def prepare(listed: Listed, cases: Sequence[Case]) -> tuple[list[Trial], dict[str, str]]:
    """Trials with their models and costs; for those that cannot be had, why."""
    trials: list[Trial] = []
    failures: dict[str, str] = {}
    for key in dict.fromkeys(case.key for case in cases):
        mine = [case for case in cases if case.key == key]
        place, bits = listed.clusters[key[1]], set().union(*(run.bits for run in listed.runs if run.key == key))
        print(f"measuring what {key[0]} costs on {key[1]}", flush=True)
        try:
            model = listed.models[key[0]].open()
            widths = planner.Constraints(bits=tuple(sorted(bits)), group_size=GROUP_SIZE)
            costs = profile(model.spec, place.cluster, place.reach, group_size=GROUP_SIZE, bits=sorted(bits))
            corrected = refit(costs, calibration_runs(model, place.cluster, costs, place.reach, widths))
            trials += [Trial(case, model, corrected, case.plan(model.spec, place.cluster), costs) for case in mine]
        except Exception as error:  # whatever it is, the other clusters and models are still worth it
            failures |= {case.name: _in_words(error) for case in mine}
    return trials, failures


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def mixed(trials: Sequence[Trial], together: int) -> Iterator[Sequence[Trial]]:
    """All of them in groups of at most `together`, each from all over the list."""
    groups = -(-len(trials) // together)
    return (trials[first::groups] for first in range(groups))


def take_turns(trials: Sequence[Trial], repetitions: int, *, waits: bool) -> None:
    """Keep the engines of all open, and run one after the other, several times round. Sets `error` where one fails."""
    with ExitStack() as stack:
        engines: list[Engine | None] = [None] * len(trials)
        for i, trial in enumerate(trials):
            with keeping_error(trial):
                engines[i] = stack.enter_context(
                    Engine(
                        trial.plan,
                        trial.model.checkpoint,
                        trial.model.spec,
                        waits=trial.costs if waits else None,
                    )
                )
        for repetition in range(repetitions):
            for trial, engine in zip(trials, engines, strict=True):
                if engine is None or trial.error is not None:
                    continue
                with keeping_error(trial):
                    sampling = SamplingParams(max_tokens=trial.case.output, ignore_eos=True)
                    result = engine.generate(trial.prompts, sampling)
                    (trial.waited if waits else trial.results).append(result)
                    what = "waits" if waits else "run"
                    speed = result.measured.tokens_per_s
                    print(f"{trial.case.name:<24} {what} {repetition + 1}: {speed:7.1f} tokens/s", flush=True)


@contextmanager
def keeping_error(trial: Trial) -> Iterator[None]:
    """What goes wrong in the block is kept with the trial; the others go on."""
    try:
        yield
    except Exception as error:
        trial.error = _in_words(error)
        print(f"{trial.case.name}: {trial.error}", file=sys.stderr, flush=True)


def row_of(trial: Trial) -> Row:
    """Errors and spread of a trial that has run."""
    simulation, plan = trial.simulate(trial.costs), trial.plan
    speeds = [result.measured.tokens_per_s for result in trial.results]
    fitted = trial.simulate(refit(trial.costs, trial.records(simulation), least_runs=1)).prediction
    measured = trial.simulate(trial.uncorrected).prediction

    def error(what: str) -> float:
        measured = statistics.median(getattr(result.measured, what) for result in trial.results)
        return _error(getattr(simulation.prediction, what), measured)

    def work(spans: Sequence[Span], stage: int) -> float:
        return busy(spans, stage, "prefill").seconds + busy(spans, stage, "decode").seconds

    stages = range(len(plan.stages))
    measured_work = [statistics.median(work(result.spans, i) for result in trial.results) for i in stages]
    # A peak is that of all runs of an engine so far.
    peaks = [max(result.measured.memory_bytes[i] for result in trial.results) for i in stages]
    waited = [result.measured.tokens_per_s for result in trial.waited]
    return Row(
        name=trial.case.name,
        split=format_split(plan),
        prefill_microbatch=plan.prefill_microbatch,
        decode_microbatch=plan.decode_microbatch,
        tokens_per_s=statistics.median(speeds),
        predicted_tokens_per_s=simulation.prediction.tokens_per_s,
        spread=(max(speeds) - min(speeds)) / statistics.median(speeds),
        throughput_error=error("tokens_per_s"),
        uncorrected_error=_error(measured.tokens_per_s, statistics.median(speeds)),
        prefill_error=error("prefill_s"),
        decode_error=error("decode_s"),
        stage_errors=[_error(work(simulation.spans, i), measured_work[i]) for i in stages],
        memory_errors=[_error(simulation.prediction.memory_bytes[i], peaks[i]) for i in stages],
        simulator_error=_error(fitted.tokens_per_s, statistics.median(speeds)),
        replay_error=statistics.median(map(trial.replay_error, trial.results)),
        waits_error=_error(simulation.prediction.tokens_per_s, statistics.median(waited)) if waited else None,
    )


def _error(predicted: float, measured: float) -> float:
    return (predicted - measured) / measured


@dataclass(frozen=True)
class Goal:
    """What is asked of predictions: a share of what was measured that must not be exceeded."""

    what: str
    reached: float
    limit: float

    @property
    def met(self) -> bool:
        return self.reached <= self.limit


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All of them, for at least one row. Absolute errors; the limit of throughput grows with the runs' own spread."""
    throughput = [abs(row.throughput_error) for row in rows]
    memory = [error for row in rows for error in row.memory_errors]
    waits = [abs(row.waits_error) for row in rows if row.waits_error is not None]
    limit = max(THROUGHPUT, SPREADS * statistics.mean(row.spread for row in rows))
    found = [
        Goal("throughput, mean", statistics.mean(throughput), limit),
        Goal("throughput, worst", max(throughput), WORST * limit),
        Goal("peak memory, mean", statistics.mean(map(abs, memory)), MEMORY),
        Goal("peak memory, most that is missing in a prediction", max(0.0, -min(memory)), UNDER),
        Goal("the simulator, worst, from stages' mean times", max(abs(r.simulator_error) for r in rows), SIMULATOR),
        Goal("the simulator, worst, from each step's own time", max(abs(r.replay_error) for r in rows), SIMULATOR),
    ]
    return found + ([Goal("timed waits, worst", max(waits), WAITS)] if waits else [])


def line(row: Row) -> str:
    """A row to read while the list runs."""
    memory = ", ".join(f"{100 * error:+.1f}" for error in row.memory_errors)
    waits = "" if row.waits_error is None else f", waits {100 * row.waits_error:+.1f} %"
    errors = {"uncorrected": row.uncorrected_error, "prefill": row.prefill_error, "decode": row.decode_error}
    parts = ", ".join(f"{what} {100 * error:+.1f}" for what, error in errors.items())
    return (
        f"{row.name:<24} {row.tokens_per_s:7.1f} tokens/s (spread {100 * row.spread:.1f} %), "
        f"{100 * row.throughput_error:+.1f} % ({parts}), memory {memory} %, "
        f"simulated {100 * row.simulator_error:+.1f} %, replayed {100 * row.replay_error:+.1f} %{waits}"
    )


if __name__ == "__main__":
    sys.exit(main())
