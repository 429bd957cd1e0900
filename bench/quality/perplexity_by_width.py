"""Perplexity of a model at each width, in each activation mode, as served; for the demo also omega and its plan.

python -m bench.quality.perplexity_by_width [--model demo] [--activations a16 a8x2 a8] [--max-tokens 4096]
    [--json-out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import planner
from bench.machine import describe, write_results
from llmpq import demo
from llmpq.checkpoint.model_files import DEMO, Model, open_model
from llmpq.kernels.backends import cpu
from llmpq.measure.perplexity import measure_perplexity, windows_of
from llmpq.measure.text import evaluation_text
from llmpq.runtime.engine import Engine
from llmpq.spec import ACTIVATION_MODES, NATIVE, ActivationMode, Device, Plan, Sensitivity, UnitPrecision, Width
from llmpq.workflow import make_plan, make_problem, workload_of

WINDOW = 512


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, metavar="MODEL")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATION_MODES, default=list(ACTIVATION_MODES))
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model, modes = open_model(arguments.model), arguments.activations
    windows = windows_of(model.tokenizer.encode(evaluation_text()), WINDOW, arguments.max_tokens)
    constraints = planner.Constraints(omega_budget=demo.OMEGA_BUDGET, all_devices=True)

    def single(width: Width, mode: ActivationMode) -> Plan:
        device, precision = Device("cpu0", "cpu", threads=2), constraints.option(width)
        return Plan.single(model.spec, device, precision, slots=1, max_length=WINDOW, activations=mode)

    plans = {("16 bits", "a16"): single(16, "a16")}
    plans |= {("native", mode): single(NATIVE, mode) for mode in modes}
    plans |= {(f"{bits} bits", mode): single(bits, mode) for bits in (8, 4, 3) for mode in modes}
    omega: Sensitivity | None = None
    if arguments.model == DEMO:
        precisions, omega = demo_plan(model, constraints)
        # The demo's own plan, put on one device: its slots are too short for the windows; its weights are the same.
        plans["the demo's plan", constraints.activations] = single(4, constraints.activations).with_precisions(
            precisions
        )
    rows = []
    for (name, mode), contender in plans.items():
        with Engine(contender, model.checkpoint, model.spec) as engine:
            found = measure_perplexity(engine.score, windows)
        row = {"weights": name, "activations": mode, **found.to_dict()}
        if omega is not None:
            row["omega"] = sum(omega.of(unit, contender.precision(unit)) for unit in model.spec.units)
        rows.append(row)
        print(row, flush=True)
    if arguments.json_out:
        header = {"model": model.spec.name, "group_size": constraints.group_size}
        write_results(arguments.json_out, describe() | header | {"rows": rows})


def demo_plan(model: Model, constraints: planner.Constraints) -> tuple[list[UnitPrecision], Sensitivity]:
    """What the demo's plan gives each unit, and the sensitivities that it is made from."""
    prompts = [model.tokenizer.encode_chat(prompt) for prompt in demo.PROMPTS]
    workload = workload_of(model.spec, prompts, demo.MAX_NEW_TOKENS, None)
    problem = make_problem(model, demo.cluster(cpu.isa()), workload, constraints)
    plan = make_plan(model, problem).plan
    return [plan.precision(unit) for unit in model.spec.units], problem.sensitivity


if __name__ == "__main__":
    main()
