"""Perplexity of the demo model at each width, in each activation mode, and of the demo's plan, as served.

python -m bench.quality.perplexity_by_width [--max-tokens 4096] [--json-out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import planner
from bench.machine import describe, write_results
from llmpq import demo
from llmpq.checkpoint.model_files import open_model
from llmpq.kernels.backends import cpu
from llmpq.measure.perplexity import measure_perplexity, windows_of
from llmpq.measure.text import evaluation_text
from llmpq.runtime.engine import Engine
from llmpq.spec import ACTIVATION_MODES, NATIVE, ActivationMode, Device, Plan, Width
from llmpq.workflow import make_plan, make_problem, workload_of

WINDOW = 512


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model = open_model("demo")
    windows = windows_of(model.tokenizer.encode(evaluation_text()), WINDOW, arguments.max_tokens)
    prompts = [model.tokenizer.encode_chat(prompt) for prompt in demo.PROMPTS]
    workload = workload_of(model.spec, prompts, demo.MAX_NEW_TOKENS, None)
    constraints = planner.Constraints(omega_budget=demo.OMEGA_BUDGET, all_devices=True)
    problem = make_problem(model, demo.cluster(cpu.isa()), workload, constraints)
    solved, omega = make_plan(model, problem), problem.sensitivity

    def single(width: Width, mode: ActivationMode) -> Plan:
        device, precision = Device("cpu0", "cpu", threads=2), constraints.option(width)
        return Plan.single(model.spec, device, precision, slots=1, max_length=WINDOW, activations=mode)

    plans = {("16 bits", "a16"): single(16, "a16")}
    plans |= {("native", mode): single(NATIVE, mode) for mode in ACTIVATION_MODES}
    plans |= {(f"{bits} bits", mode): single(bits, mode) for bits in (8, 4, 3) for mode in ACTIVATION_MODES}
    # The demo's own plan, put on one device: its slots are too short for the windows, and its weights are the same.
    mixed = single(4, constraints.activations).with_precisions(
        [solved.plan.precision(unit) for unit in model.spec.units]
    )
    plans["the demo's plan", constraints.activations] = mixed
    rows = []
    for (name, mode), contender in plans.items():
        with Engine(contender, model.checkpoint, model.spec) as engine:
            found = measure_perplexity(engine.score, windows)
        total = sum(omega.of(unit, contender.precision(unit)) for unit in model.spec.units)
        rows.append({"weights": name, "activations": mode, "omega": total, **found.to_dict()})
        print(rows[-1], flush=True)
    if arguments.json_out:
        write_results(arguments.json_out, describe() | {"group_size": constraints.group_size, "rows": rows})


if __name__ == "__main__":
    main()
