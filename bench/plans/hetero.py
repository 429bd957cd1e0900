"""The measured win: our plans against what others would do, on unequal emulated clusters, all in the same runtime.

    python -m bench.plans.hetero --json-out FILE [--resume] [--only CLUSTER ...] [--models NAME ...] [--repetitions 4]
    python -m bench.plans.hetero --dry-run        only predictions, from costs corrected by runs all the same

A cell is a cluster (hetero_clusters.py says how they were chosen), a model and a workload. Its contenders are our plan
and every baseline of planner/baselines/systems.py that is feasible under the same caps and the same budget of summed
sensitivity (hetero_plans.py); on clusters of three devices and more with SmolLM2 also our plan without one idea each.
All are planned from the same costs, corrected by a few other runs as `llmpq profile --calibrate` does. They are loaded
once and run in turn; plans that are the same run once. Runs that choose come before those that count: our plan is the
best in them of the planner's and the baselines that are predicted to be nearly as good, as `llmpq plan --rehearse`
chooses it; "as predicted" is the planner's. After them all run as often as `--repetitions` says, and then as often
again ours and the baselines that may be the best. Times are medians over these runs, spread is (max - min) / median,
and ratios are medians of those within a round: what else a machine does lasts for longer than one run. Everything is
measured on one machine that emulates the devices: the results say so.

The sensitivity of SmolLM2 is measured; the other model has random weights, for which it would mean nothing, so there it
is a synthetic one (analytic.py).

What was found is written after every cell. `--resume` keeps the cells of FILE if they are of this machine and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planner
from bench.machine import ROOT, describe, write_results
from bench.plans import analytic
from bench.plans.hetero_clusters import CLUSTERS, Emulated, needed_bytes
from bench.plans.hetero_plans import AS_PREDICTED, OURS, ablations, contenders, omega, same_as
from bench.plans.hetero_summary import summary
from llmpq.checkpoint.model_files import LoadFormat, Model, open_model
from llmpq.runtime.engine import Engine, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import BITS, Cluster, InfeasibleError, LlmpqError, Plan, Prediction, Sensitivity, Solved, Workload, busy
from llmpq.spec.formatting import format_split
from llmpq.spec.trace import Phase
from llmpq.tuning.calibration import calibration_runs
from llmpq.tuning.refitting import refit
from llmpq.tuning.trial_runs import REPETITIONS, near_ties, random_prompts, rank
from llmpq.workflow import measured_profile, measured_sensitivity

MODELS: dict[str, tuple[str, LoadFormat]] = {
    "SmolLM2-135M": ("demo", "auto"),
    "OPT-125M, random weights": (str(ROOT / "bench" / "models" / "opt-125m-like"), "dummy"),
}
WORKLOADS = {"prefill-heavy": Workload(8, 64, 8), "decode-heavy": Workload(8, 16, 40)}
LIMITS = planner.Constraints(bits=BITS, time_limit_s=10.0, gap=5e-3)
SYNTHETIC = "uneven"
FINALIST = 0.9  # of the fastest baseline's tokens/s: a baseline with as much may be the best
ABLATED_DEVICES = 3  # clusters of so many and more: there ablations are measured, too
ABLATED_MODEL = "SmolLM2-135M"
PHASES: tuple[Phase, ...] = ("prefill", "decode")

Row = dict[str, Any]


def sensitivity_of(model: Model) -> Sensitivity:
    """Measured, or synthetic where weights are random."""
    if model.checkpoint.format != "dummy":
        return measured_sensitivity(model, LIMITS)
    return analytic.sensitivity(model.spec, SYNTHETIC, LIMITS.precisions)


@dataclass(frozen=True)
class Cell:
    """A problem, and the cluster as it is: planned for is a little less memory than it has."""

    place: Row  # names of cluster, model and workload
    model: Model
    cluster: Cluster
    problem: planner.Problem

    @property
    def ablated(self) -> bool:
        """Whether our plan runs with ideas switched off, too."""
        return len(self.cluster.devices) >= ABLATED_DEVICES and self.place["model"] == ABLATED_MODEL


def cells(emulated: Emulated, name: str, model: Model) -> Iterator[Cell]:
    """A cell for each workload. All share one profile and the caps."""
    workloads = WORKLOADS.values()
    cluster = emulated.cluster(needed_bytes(model.spec, workloads, LIMITS.precision(4)))
    largest = Workload(*(max(getattr(w, f) for w in workloads) for f in ("batch_size", "prompt_len", "output_len")))
    costs = measured_profile(model, cluster, largest, LIMITS)
    profile = refit(costs, calibration_runs(model, cluster, costs, largest, LIMITS))
    sensitivity = sensitivity_of(model)
    for kind, workload in WORKLOADS.items():
        place = {"cluster": emulated.name, "model": name, "workload": kind}
        problem = planner.Problem(model.spec, cluster, workload, profile, sensitivity, LIMITS)
        yield Cell(place, model, cluster, problem)


def described(problem: planner.Problem, plan: Plan) -> Row:
    """What a plan is and what is expected of it."""
    workload, layers = problem.workload, problem.spec.num_layers
    lens = [workload.prompt_len] * workload.batch_size, [workload.output_len] * workload.batch_size
    predicted = planner.predict(plan, problem.spec, problem.profile, *lens)
    bits = [problem.spec.bits(unit, plan.precision(unit)) for unit in problem.spec.units]
    return {
        "split": format_split(plan),
        "mean_bits": sum(bits[1:-1]) / layers,
        "embedding_bits": bits[0],
        "head_bits": bits[-1],
        "omega": omega(problem, plan),
        "prefill_microbatch": plan.prefill_microbatch,
        "decode_microbatch": plan.decode_microbatch,
        "predicted": predicted.to_dict(),
    }


def busy_share(result: RunResult, stages: int, phase: Phase) -> float:
    """Of the stage with the most to do in a phase: the share of the time from its first step to its last."""
    found = [busy(result.spans, stage, phase) for stage in range(stages)]
    return max(found, key=lambda b: b.seconds).share


def measured(plan: Plan, predicted: Prediction, results: Sequence[RunResult]) -> Row:
    """Medians over repetitions; errors are (predicted - measured) / measured."""

    def median(field: str) -> float:
        return float(statistics.median(getattr(result.measured, field) for result in results))

    each = [result.measured.tokens_per_s for result in results]
    peaks = [max(of_stage) for of_stage in zip(*(result.measured.memory_bytes for result in results))]
    found = {field: median(field) for field in ("prefill_s", "decode_s", "tokens_per_s")}
    return found | {
        "each": each,  # in the order of rounds
        "spread": (max(each) - min(each)) / statistics.median(each),
        "throughput_error": predicted.tokens_per_s / found["tokens_per_s"] - 1,
        "busy": {p: statistics.median(busy_share(r, len(plan.stages), p) for r in results) for p in PHASES},
        "memory_bytes": peaks,
        "memory_errors": [p / m - 1 for p, m in zip(predicted.memory_bytes, peaks, strict=True)],
    }


class Contest:
    """Plans that are loaded once and run in turn. `results` are those of each, round by round; a plan that fails is
    out, has none, and `failed` says why.
    """

    def __init__(self, model: Model, workload: Workload, plans: Mapping[str, Plan]) -> None:
        self.results: dict[str, list[RunResult]] = {name: [] for name in plans}
        self.failed: dict[str, str] = {}
        self._model, self._plans = model, plans
        self._prompts = random_prompts([workload.prompt_len] * workload.batch_size, model.spec.vocab_size)
        # All contenders generate the same number of tokens, whatever their weights make of the prompts.
        self._sampling = SamplingParams(max_tokens=workload.output_len, ignore_eos=True)
        self._engines: dict[str, Engine] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Contest:
        warm_up = SamplingParams(max_tokens=2, ignore_eos=True)
        with ExitStack() as stack:
            for name, plan in self._plans.items():
                with self._failing(name):
                    engine = stack.enter_context(Engine(plan, self._model.checkpoint, self._model.spec))
                    engine.generate(self._prompts, warm_up)
                    self._engines[name] = engine
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Whoever fails in the block is out."""
        try:
            yield
        except LlmpqError as error:
            self.failed[name] = str(error)
            self.results.pop(name)

    def run(self, rounds: int, names: Collection[str]) -> None:
        """Let the plans of these names take turns."""
        for _ in range(rounds):
            for name in (name for name in self._engines if name in names and name not in self.failed):
                with self._failing(name):
                    result = self._engines[name].generate(self._prompts, self._sampling)
                    self.results[name].append(result)


def rehearsed(plans: Mapping[str, Solved], ran: Mapping[str, Sequence[RunResult]], limits: planner.Constraints) -> str:
    """Which of our plan and the baselines that are predicted to be nearly as good was the fastest in rehearsal.

    Ours, if it failed there: that has to be told.
    """
    if OURS not in ran:
        return OURS
    near = {solved.plan for solved in near_ties(plans[OURS], plans.values())}
    tried = [name for name, solved in plans.items() if name in ran and solved.plan in near]

    def best_run(name: str) -> float:
        return min(rank(plans[name], result, limits) for result in ran[name][:REPETITIONS])

    return min(tried, key=best_run)


def finalists(ours: str, baselines: Collection[str], ran: Mapping[str, Sequence[RunResult]]) -> set[str]:
    """Those that run more often: ours, and the baselines that may be the best. None where that is one plan."""

    def speed(name: str) -> float:
        return statistics.median(result.measured.tokens_per_s for result in ran[name][REPETITIONS:])

    speeds = {name: speed(name) for name in baselines if name in ran}
    found = {name for name in speeds if speeds[name] >= FINALIST * max(speeds.values())} | ({ours} & ran.keys())
    return found if len(found) > 1 else set()


def rows_of(cell: Cell, repetitions: int) -> list[Row]:
    """A row for each contender of a cell; nothing is run without repetitions. Raises InfeasibleError."""
    problem, budget_bits, plans = contenders(cell.problem)
    solution = plans[OURS].solution
    every = {name: solved.plan for name, solved in plans.items()} | ablations(problem, plans[OURS].plan)
    first = same_as(every)
    to_run = [name for name in every if first[name] == name and (name in plans or cell.ablated)]
    best = OURS
    with Contest(cell.model, problem.workload, {name: every[name] for name in to_run if repetitions}) as contest:
        if repetitions:
            contest.run(REPETITIONS, to_run)
            ran = {name: contest.results[first[name]] for name in plans if first[name] in contest.results}
            best = rehearsed(plans, ran, problem.constraints)
            contest.run(repetitions, to_run)
            baselines = {first[name] for name in plans if name != OURS}
            contest.run(repetitions, finalists(first[best], baselines, contest.results))
    ran_as = first | {OURS: first[best], AS_PREDICTED: first[OURS]}
    every |= {OURS: every[best], AS_PREDICTED: every[OURS]}
    first = same_as(every)
    rows = []
    for name, plan in every.items():
        ablation = name not in plans or name == AS_PREDICTED
        row = cell.place | {"contender": name, "same_as": first[name], "ablation": ablation, "emulated": True}
        row |= {"budget_bits": budget_bits} | described(problem, plan)
        if name == OURS:
            row |= {"gap": solution.gap, "solve_s": solution.seconds}
        if ran_as[name] in contest.results:
            counted = contest.results[ran_as[name]][REPETITIONS:]
            row["measured"] = measured(plan, Prediction.from_dict(row["predicted"]), counted)
        elif ran_as[name] in contest.failed:
            row["failed"] = contest.failed[ran_as[name]]
        rows.append(row)
    return rows


def show(rows: Sequence[Row]) -> None:
    """A line for each contender of a cell."""
    for row in rows:
        of_run = row.get("measured")
        speed = f"{of_run['tokens_per_s']:8.1f} (±{50 * of_run['spread']:.0f} %)" if of_run else " " * 14
        busy_of = ", ".join(f"{phase} {100 * of_run['busy'][phase]:.0f} %" for phase in PHASES) if of_run else ""
        same = f"as {row['same_as']}" if row["same_as"] != row["contender"] else row["split"]
        sizes = f"{row['prefill_microbatch']}/{row['decode_microbatch']}"
        expected = f"{row['predicted']['tokens_per_s']:8.1f}"
        print(f"  {row['contender']:<13}{expected}{speed}  {sizes:<6} {same}  {busy_of} {row.get('failed', '')}")


def start(path: Path | None, repetitions: int, *, resume: bool) -> Row:
    """What the result file is to hold: its head and, to be resumed, the rows of an earlier run of the same code."""
    sensitivities = {name: "synthetic" if form == "dummy" else "measured" for name, (_, form) in MODELS.items()}
    workloads = {name: workload.to_dict() for name, workload in WORKLOADS.items()}
    about = {c.name: {"about": c.about, "shares": list(c.shares), **c.cluster(0).to_dict()} for c in CLUSTERS}
    head = describe() | {"emulated": True, "clusters": about, "workloads": workloads, "sensitivities": sensitivities}
    head |= {"repetitions": repetitions}
    if resume and path is not None and path.exists():
        old = json.loads(path.read_text())
        if all(old.get(key) == head[key] for key in ("device", "commit", "workloads", "repetitions")):
            return head | {key: old[key] for key in ("infeasible", "summary", "rows")}
        print(f"{path} is of another machine, commit or number of repetitions: starting anew")
    return head | {"infeasible": [], "summary": {}, "rows": []}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--only", nargs="+", metavar="CLUSTER", choices=[c.name for c in CLUSTERS])
    parser.add_argument("--models", nargs="+", metavar="NAME", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dry-run", action="store_true", help="run no contender, predict only")
    parser.add_argument("--resume", action="store_true", help="leave out the cells that FILE has")
    parser.add_argument("--json-out", metavar="FILE", type=Path)
    arguments = parser.parse_args(argv)
    repetitions, path = 0 if arguments.dry_run else arguments.repetitions, arguments.json_out
    results, began = start(path, repetitions, resume=arguments.resume), time.monotonic()
    for emulated in CLUSTERS:
        for name in arguments.models:
            places = [{"cluster": emulated.name, "model": name, "workload": kind} for kind in WORKLOADS]
            done = [{key: row[key] for key in places[0]} for row in (*results["rows"], *results["infeasible"])]
            if (arguments.only and emulated.name not in arguments.only) or all(place in done for place in places):
                continue
            for cell in cells(emulated, name, open_model(*MODELS[name])):
                if cell.place in done:
                    continue
                print(f"{', '.join(cell.place.values())} ({time.monotonic() - began:.0f} s)", flush=True)
                try:
                    rows = rows_of(cell, repetitions)
                except InfeasibleError as error:
                    results["infeasible"].append(cell.place | {"why": str(error)})
                    print(f"  {error}")
                else:
                    show(rows)
                    results["rows"] += rows
                    results["summary"] = summary(results["rows"])
                if path is not None:
                    write_results(path, results)
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
