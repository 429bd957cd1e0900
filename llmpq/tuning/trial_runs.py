"""Trial runs: short runs of plans with random prompts, on the devices they are for.

Predictions are off by some percent; runs decide between plans whose predictions are closer than that.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import planner
from llmpq.checkpoint.model_files import Checkpoint
from llmpq.progress import Notify, counted, silent
from llmpq.runtime.engine import Engine, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import ModelSpec, Plan, Solved

CLOSE = 0.25  # of the objective: the error that the predictions of two plans may have together (bench/README.md)
REPETITIONS = 3


def random_prompts(prompt_lens: Iterable[int], vocab_size: int) -> list[list[int]]:
    """Prompts of these lengths, always the same."""
    drawn = random.Random(0)
    return [[drawn.randrange(vocab_size) for _ in range(prompt_len)] for prompt_len in prompt_lens]


def run_trial(plan: Plan, checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[RunResult]:
    """Runs of a batch of the plan's workload, after one to warm up. Raises what `Engine` raises.

    Its weights are rounded to nearest, whatever its quantizer: that takes the same time, and no preparation.
    """
    plan = plan.with_precisions([plan.precision(unit).layout for unit in spec.units])
    lengths, *_ = plan.workload.batches
    prompts = random_prompts([prompt_len for prompt_len, _ in lengths], spec.vocab_size)
    output_len = max(1, round(sum(output_len for _, output_len in lengths) / len(lengths)))
    with Engine(plan, checkpoint, spec) as engine:
        engine.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
        for _ in range(REPETITIONS):
            result = engine.generate(prompts, SamplingParams(max_tokens=output_len, ignore_eos=True))
            yield result


def near_ties(best: Solved, others: Iterable[Solved]) -> list[Solved]:
    """The best plan, then those that are predicted to be at most CLOSE worse, best first; each once.

    All have a solution of the same problem. They get the bound of the best one, which holds for all.
    """
    found = {best.plan: best}
    for other in sorted(others, key=lambda other: other.solution.objective):
        if other.solution.objective <= best.solution.objective * (1 + CLOSE):
            solution = replace(other.solution, bound=best.solution.bound)
            found.setdefault(other.plan, replace(other, solution=solution))
    return list(found.values())


def rank(solved: Solved, result: RunResult, constraints: planner.Constraints) -> float:
    """What is minimised, by the time that was measured: less is better."""
    seconds = result.measured.prefill_s + result.measured.decode_s + constraints.theta * solved.solution.omega
    if constraints.objective == "time":
        return seconds
    return seconds * sum(solved.plan.cluster.device(stage.device).price_per_hour for stage in solved.plan.stages)


def fastest_measured(
    plans: Sequence[Solved],
    checkpoint: Checkpoint,
    spec: ModelSpec,
    constraints: planner.Constraints,
    notify: Notify = silent,
) -> Solved:
    """The plan with the best run. Raises what `Engine` raises. Nothing runs if there is one plan only."""
    if len(plans) == 1:
        return plans[0]
    best = []
    for i, solved in enumerate(plans, 1):
        run_done = counted(notify, f"rehearsing plan {i} of {len(plans)}", REPETITIONS)
        ranks = []
        for result in run_trial(solved.plan, checkpoint, spec):
            run_done()
            ranks.append(rank(solved, result, constraints))
        best.append(min(ranks))
    return plans[best.index(min(best))]
