"""The demo's plan against simpler ones, measured: same model, same two devices, same prompts.

    python -m bench.plans.demo_runs [--repetitions 3] [--json-out FILE]

The contenders are the planner's plan at the demo's quality budget, its plan at the default one, and the baselines that
fit at either (planner/baselines/systems.py says which there are). They run interleaved; every repetition is a fresh set
of workers. For each the prediction for the tokens that were generated stands beside the measurement.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import planner
from bench.machine import describe, write_results
from llmpq import demo
from llmpq.checkpoint.model_files import open_model
from llmpq.hardware import with_memory
from llmpq.kernels.backends import cpu
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Plan, Prediction
from llmpq.spec.formatting import format_split
from llmpq.workflow import make_plan, make_problem, workload_of


@dataclass(frozen=True)
class Row:
    """Medians over repetitions. Errors are (predicted - measured) / measured; spread is (max - min) / median."""

    contender: str
    split: str
    omega: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    spread: float
    prefill_error: float
    decode_error: float
    throughput_error: float
    memory_errors: list[float]


def _row(name: str, plan: Plan, omega: float, runs: Sequence[tuple[Prediction, Prediction]]) -> Row:
    def median(field: str) -> float:
        return float(statistics.median(getattr(measured, field) for _, measured in runs))

    def error(field: str) -> float:
        pairs = [(getattr(predicted, field), getattr(measured, field)) for predicted, measured in runs]
        return float(statistics.median((p - m) / m for p, m in pairs))

    speeds = [measured.tokens_per_s for _, measured in runs]
    memory = [
        statistics.median((p - m) / m for p, m in pairs)
        for pairs in zip(*(list(zip(p.memory_bytes, m.memory_bytes, strict=True)) for p, m in runs), strict=True)
    ]
    return Row(
        name,
        format_split(plan),
        omega,
        median("prefill_s"),
        median("decode_s"),
        median("tokens_per_s"),
        (max(speeds) - min(speeds)) / statistics.median(speeds),
        error("prefill_s"),
        error("decode_s"),
        error("tokens_per_s"),
        memory,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=demo.MAX_NEW_TOKENS)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model, cluster = open_model("demo"), with_memory(demo.cluster(cpu.isa()))
    prompts = [model.tokenizer.encode_chat(prompt) for prompt in demo.PROMPTS]
    # All contenders generate the same number of tokens, whatever their weights make of the prompts.
    sampling = SamplingParams(max_tokens=arguments.max_new_tokens, ignore_eos=True)
    workload = workload_of(model.spec, prompts, sampling.max_tokens, None)
    problem = make_problem(model, cluster, workload, planner.Constraints(omega_budget=demo.OMEGA_BUDGET))
    costs, omega = problem.profile, problem.sensitivity
    plans: dict[str, Plan] = {}
    for quality, budget in (("strict", demo.OMEGA_BUDGET), ("default", None)):
        at_quality = replace(problem, constraints=replace(problem.constraints, omega_budget=budget))
        plans[f"llmpq, {quality}"] = make_plan(model, at_quality).plan
        baselines = planner.baseline_plans(at_quality).items()
        plans |= {f"{kind}, {quality}": found.plan for kind, found in baselines}
    runs: dict[str, list[tuple[Prediction, Prediction]]] = {name: [] for name in plans}
    for _ in range(arguments.repetitions):
        for name, contender in plans.items():
            with Engine(contender, model.checkpoint, model.spec) as engine:
                result = engine.generate(prompts, sampling)
            lengths = [len(s.token_ids) for s in result.sequences]
            predicted = planner.predict(contender, model.spec, costs, [len(p) for p in prompts], lengths)
            runs[name].append((predicted, result.measured))
            print(f"{name:<20} {result.measured.tokens_per_s:8.1f} tokens/s, predicted {predicted.tokens_per_s:8.1f}")
    rows = [
        _row(name, p, sum(omega.of(unit, p.precision(unit)) for unit in model.spec.units), runs[name])
        for name, p in plans.items()
    ]
    for row in rows:
        print(row)
    if arguments.json_out:
        write_results(
            arguments.json_out, describe() | {"workload": workload.to_dict(), "rows": list(map(asdict, rows))}
        )


if __name__ == "__main__":
    main()
