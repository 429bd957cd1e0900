"""A long queue of requests of mixed lengths on unequal emulated clusters: what chunks beside decode are worth.

    python -m bench.plans.queues --json-out FILE [--only CLUSTER ...] [--repetitions 3] [--requests 64]

Clusters are those of `bench.plans.hetero`, and two devices that are alike. For each the plan of SmolLM2 is made from
costs corrected by runs, and then runs with prompts in steps of their own (0), with whole prompts beside those who
decode, with the chunks that the plan has, and with half and twice as many tokens. They take turns, and answer the same
queue: all requests are there from the start, eight at a time have a place. Medians over repetitions.

The steady state is from the first answer's end until the last request has its first token. "Busy" is the share of that
time in which the busiest stage is at work. The goal is BUSY.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

import planner
from bench.machine import describe, write_results
from bench.plans.hetero import LIMITS, sensitivity_of
from bench.plans.hetero_clusters import CLUSTERS, Emulated, needed_bytes
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.runtime.engine import Engine, RunResult
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Device, Plan, Profile, RequestTimes, Span, Workload
from llmpq.spec.formatting import format_split
from llmpq.spec.latency import PERCENTS
from llmpq.tuning.calibration import calibration_runs
from llmpq.tuning.refitting import refit
from llmpq.tuning.trial_runs import random_prompts
from llmpq.workflow import make_plan, measured_profile

BUSY = 0.9
SLOTS, PROMPTS, OUTPUTS = 8, (16, 160), (8, 64)  # requests at once; tokens, log-uniform
ALIKE = Emulated("two alike", "Either can hold all.", tuple(Device(f"cpu{i}", "cpu") for i in range(2)), (1.5, 1.5))

Lengths = list[tuple[int, int]]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="CLUSTER", nargs="+", help="clusters whose names have one of these in them")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model, rows = open_model("demo"), []
    lengths = queue(arguments.requests)
    for cluster in (ALIKE, *CLUSTERS):
        if arguments.only is None or any(part in cluster.name for part in arguments.only):
            for row in rows_of(cluster, model, lengths, arguments.repetitions):
                rows.append(row)
                print(line(row), flush=True)
    if arguments.json_out:
        about = {"lengths": lengths, "slots": SLOTS, "repetitions": arguments.repetitions, "goal": BUSY}
        write_results(arguments.json_out, describe() | about | {"rows": rows})


def queue(count: int) -> Lengths:
    """Tokens of each prompt and answer."""
    rng = np.random.default_rng(0)
    prompts, outputs = (
        np.exp(rng.uniform(np.log(least), np.log(most), count)).astype(int) for least, most in (PROMPTS, OUTPUTS)
    )
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def rows_of(emulated: Emulated, model: Model, lengths: Lengths, repetitions: int) -> Iterator[Row]:
    """A row for each size of chunks."""
    workload = Workload.of_lengths(SLOTS, lengths)
    cluster = emulated.cluster(needed_bytes(model.spec, [workload], LIMITS.precision(4)))
    costs = measured_profile(model, cluster, workload, LIMITS)
    costs = refit(costs, calibration_runs(model, cluster, costs, workload, LIMITS))
    plan = make_plan(model, planner.Problem(model.spec, cluster, workload, costs, sensitivity_of(model), LIMITS)).plan
    plans = {tokens: replace(plan, chunk_tokens=tokens) for tokens in sizes(plan)}
    results = run(model, plans, lengths, repetitions)
    for tokens, each in plans.items():
        yield {"cluster": emulated.name, "split": format_split(plan), "stages": len(plan.stages)} | row_of(
            each, model, costs, lengths, results[tokens], chosen=tokens == plan.chunk_tokens
        )


def sizes(plan: Plan) -> list[int]:
    """Of chunks that are tried."""
    near = {plan.chunk_tokens // 2, plan.chunk_tokens, 2 * plan.chunk_tokens}
    return [0, *sorted(size for size in near | {plan.max_length} if 8 <= size <= plan.max_length)]


def run(model: Model, plans: dict[int, Plan], lengths: Lengths, repetitions: int) -> dict[int, list[RunResult]]:
    """The results of all, which take turns. All are asked for just so many tokens."""
    prompts = random_prompts([prompt for prompt, _ in lengths], model.spec.vocab_size)
    asked = [SamplingParams(max_tokens=output, ignore_eos=True) for _, output in lengths]
    results: dict[int, list[RunResult]] = {tokens: [] for tokens in plans}
    with ExitStack() as stack:
        engines = {t: stack.enter_context(Engine(p, model.checkpoint, model.spec)) for t, p in plans.items()}
        for engine in engines.values():
            engine.generate(prompts[:SLOTS], asked[:SLOTS])  # to warm up
        for _ in range(repetitions):
            for tokens, engine in engines.items():
                results[tokens].append(engine.generate(prompts, asked))
    return results


def row_of(
    plan: Plan, model: Model, costs: Profile, lengths: Lengths, results: Sequence[RunResult], *, chosen: bool
) -> Row:
    """What came of one plan."""
    prompts, outputs = zip(*lengths, strict=True)
    expected = planner.simulate(plan, model.spec, costs, prompts, outputs)
    speeds = [result.measured.tokens_per_s for result in results]
    latencies = [result.latency for result in results]
    stages = len(plan.stages)
    return {
        "chunk_tokens": plan.chunk_tokens,
        "chosen": chosen,
        "tokens_per_s": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "predicted_tokens_per_s": expected.prediction.tokens_per_s,
        "busy": statistics.median(busiest(result.spans, result.times, stages) for result in results),
        "predicted_busy": busiest(expected.spans, expected.times, stages),
        "tpot_s": {  # by percentile
            percent: statistics.median(column)
            for percent, column in zip(PERCENTS, zip(*(latency.tpot_s or () for latency in latencies)))
        },
    }


def busiest(spans: Sequence[Span], times: Sequence[RequestTimes], stages: int) -> float:
    """The share of the steady state in which the stage that is busiest then is at work."""
    start, end = min(time.ended_s for time in times), max(time.first_token_s or 0.0 for time in times)
    work = [0.0] * stages
    for span in spans:
        if span.kind == "stage":
            work[span.index] += max(0.0, min(span.end_s, end) - max(span.start_s, start))
    return max(work) / (end - start)


def line(row: Row) -> str:
    chunk = f"chunks of {row['chunk_tokens']}" if row["chunk_tokens"] else "own steps"
    return (
        f"{row['cluster']}, {chunk}{', chosen' if row['chosen'] else ''}: {row['tokens_per_s']:.1f} tokens/s "
        f"(spread {100 * row['spread']:.0f} %, predicted {row['predicted_tokens_per_s']:.1f}), busiest stage "
        f"{100 * row['busy']:.0f} % (predicted {100 * row['predicted_busy']:.0f} %)"
    )


if __name__ == "__main__":
    main()
