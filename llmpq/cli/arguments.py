"""From parsed arguments to what they stand for: devices, wishes, a workload, a plan, the run log."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

import planner
from llmpq import demo
from llmpq.checkpoint.model_files import Model
from llmpq.cli.prompts import read_lengths
from llmpq.kernels.backends import cpu
from llmpq.spec import Cluster, Plan, UsageError, Workload, parse_devices
from llmpq.tuning import run_log

_CONSTRAINTS = {  # name in the arguments -> option
    "group_size": "--group-size",
    "activations": "--activations",
    "objective": "--objective",
    "theta": "--theta",
    "min_bits": "--min-bits",
    "fixed_bits": "--bits",
    "all_devices": "--all-devices",
    "required": "--use",
    "excluded": "--without",
    "pinned": "--pin",
    "unit_bits": "--unit-bits",
    "prefill_microbatch": "--prefill-microbatch",
    "decode_microbatch": "--decode-microbatch",
    "max_ttft_s": "--max-ttft",
    "max_tpot_s": "--max-tpot",
}
_LENGTH = 64  # tokens of prompt and answer, if nothing is said


def read_cluster(arguments: Namespace) -> Cluster:
    """The devices of --devices or --cluster, or the demo's."""
    if arguments.devices is not None:
        return parse_devices(arguments.devices)
    if arguments.cluster is None:
        return demo.cluster(cpu.isa())
    cluster = Cluster.load(arguments.cluster)
    for device in cluster.devices:
        if device.members > 1:
            raise UsageError(
                f"{arguments.cluster}: {device.name} stands for {device.members} devices; list each of them by itself"
            )
    return cluster


def read_constraints(arguments: Namespace) -> planner.Constraints:
    """The wishes that are given; defaults are the planner's. Raises UsageError."""
    given = {name: getattr(arguments, name) for name in _CONSTRAINTS if hasattr(arguments, name)}
    given |= {name: tuple(given[name]) for name in ("required", "excluded") if name in given}
    given |= {name: dict(given[name]) for name in ("pinned", "unit_bits") if name in given}
    try:
        given |= {"unit_bits": {unit: int(bits) for unit, bits in given.get("unit_bits", {}).items()}}
    except ValueError:
        raise UsageError("--unit-bits wants a width in bits, such as head=8") from None
    constraints = planner.Constraints(**given)
    if constraints.fixed_bits is not None and constraints.fixed_bits < constraints.min_bits:
        raise UsageError(f"--bits {constraints.fixed_bits} is below --min-bits {constraints.min_bits}")
    if not (math.isfinite(constraints.theta) and constraints.theta >= 0):
        raise UsageError(f"--theta is {constraints.theta:g}; it is the price of sensitivity in seconds, 0 or more")
    return constraints


def planned_workload(arguments: Namespace, model: Model) -> Workload:
    """The workload of --prompt-len and --output-len or of --lengths, checked against the model's context."""
    if arguments.lengths is not None:
        if arguments.prompt_len is not None or arguments.output_len is not None:
            raise UsageError("--lengths says what --prompt-len and --output-len would; leave them out")

        def tokens(prompt: str, answer: str) -> tuple[int, int]:
            return len(model.tokenizer.encode_chat(prompt)), len(model.tokenizer.encode(answer))

        lengths = read_lengths(arguments.lengths, tokens, model.spec.max_positions)
        return Workload.of_lengths(arguments.batch_size, lengths)
    prompt_len, output_len = arguments.prompt_len or _LENGTH, arguments.output_len or _LENGTH
    length = prompt_len + output_len
    if length > model.spec.max_positions:
        raise UsageError(
            f"--prompt-len and --output-len add up to {length} tokens; the context of {model.spec.name} is "
            f"{model.spec.max_positions}"
        )
    return Workload(arguments.batch_size, prompt_len, output_len)


def load_plan(arguments: Namespace) -> Plan:
    """The plan of --plan. Raises UsageError if other options contradict it."""
    contradicting = [option for name, option in _CONSTRAINTS.items() if hasattr(arguments, name)]
    contradicting += ["--batch-size"] * (getattr(arguments, "batch_size", None) is not None)
    if contradicting:
        raise UsageError(f"--plan decides what {', '.join(contradicting)} would; leave one of them out")
    return Plan.load(arguments.plan)


def constraints_of_plan(plan: Plan) -> planner.Constraints:
    """The group size of a plan's quantized units, and the activations of those on CPUs; if there is none, the usual."""
    units = ("embedding", "head", *(f"layer.{i}" for i in range(plan.num_layers)))
    quantized = [p for p in map(plan.precision, units) if p.quantized]
    if not quantized:
        return planner.Constraints()
    return planner.Constraints(
        group_size=quantized[0].group_size,
        activations=next((p.activations for p in quantized if p.activations != "a16"), "a16"),
    )


def run_log_path(arguments: Namespace) -> Path:
    """The file of the run log."""
    return run_log.default_log() if arguments.log is None else Path(arguments.log)
