"""Options that several commands have: each is declared here once, beside what reads it."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq import demo
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.cli.constraint_options import given_constraints
from llmpq.cli.parser import Parser, positive, rate
from llmpq.cli.prompts import read_lengths
from llmpq.progress import Notify, silent
from llmpq.report.streams import ERR
from llmpq.spec import (
    Cluster,
    Demand,
    Mixed,
    Plan,
    Precision,
    Profile,
    Sensitivity,
    Solved,
    UnitPrecision,
    UsageError,
    Workload,
    load_either,
    parse_devices,
)

if TYPE_CHECKING:
    import planner

_LENGTH = 64  # tokens of prompt and answer by default
_BATCH_SIZE = 8
_SLOTS = 32  # the most sequences at once, where requests come at random


def add_model(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        metavar="M",
        default="demo",
        help="folder with safetensors, .gguf file or hub id (default: demo)",
    )
    parser.add_argument(
        "--load-format",
        choices=["auto", "dummy"],
        default="auto",
        metavar="auto|dummy",
        help="dummy: random weights of the model's shapes",
    )


def read_model(arguments: Namespace, notify: Notify = silent) -> Model:
    """The model of --model, whose weights are not read yet. Raises UsageError."""
    notify("opening the model")
    model = open_model(arguments.model, arguments.load_format)
    for note in model.notes:
        ERR.print(f"llmpq: {note}", soft_wrap=True)
    return model


def add_devices(group: argparse._ActionsContainer, *, required: bool = False) -> argparse._ActionsContainer:
    """Two options, of which one may be given. Returns their group, for others that exclude them."""
    either = group.add_mutually_exclusive_group(required=required)
    either.add_argument("--devices", metavar="SPEC", help="such as 'cpu:threads=2,memory=4GiB;cuda:0,memory=9GiB'")
    either.add_argument("--cluster", metavar="FILE", help="devices and links as JSON")
    return either


def names_devices(arguments: Namespace) -> bool:
    """Whether --devices or --cluster is given."""
    return arguments.devices is not None or arguments.cluster is not None


def read_cluster(arguments: Namespace) -> Cluster:
    """The devices of --devices or --cluster, or the demo's. Raises UsageError."""
    if arguments.devices is not None:
        return parse_devices(arguments.devices)
    if arguments.cluster is None:
        from llmpq.kernels.backends import cpu

        return demo.cluster(cpu.isa())
    cluster = Cluster.load(arguments.cluster)
    for device in cluster.devices:
        if device.members > 1:
            raise UsageError(
                f"{arguments.cluster}: {device.name} stands for {device.members} devices; list each of them by itself"
            )
    return cluster


def add_costs(group: argparse._ActionsContainer) -> None:
    group.add_argument("--costs", metavar="FILE", help="of llmpq profile (default: measure now)")


def read_costs(arguments: Namespace) -> Profile | None:
    return None if arguments.costs is None else Profile.load(arguments.costs)


def add_sensitivity(group: argparse._ActionsContainer) -> None:
    group.add_argument("--sensitivity", metavar="FILE", help="of llmpq sensitivity (default: measure now)")


def read_sensitivity(arguments: Namespace) -> Sensitivity | None:
    return None if arguments.sensitivity is None else Sensitivity.load(arguments.sensitivity)


def add_workload(parser: Parser, *, online: bool = False) -> None:
    """`online`: also of requests that come at random."""
    group = parser.add_argument_group("workload")
    default = f"{_BATCH_SIZE}; {_SLOTS} with --rate" if online else f"{_BATCH_SIZE}"
    group.add_argument("--batch-size", type=positive, metavar="N", help=f"sequences at once (default: {default})")
    group.add_argument("--prompt-len", type=positive, metavar="N", help="tokens (default: 64)")
    group.add_argument("--output-len", type=positive, metavar="N", help="tokens (default: 64)")
    group.add_argument(
        "--lengths", metavar="FILE", help="instead: JSONL of prompts and answers, or their lengths; - for stdin"
    )
    if online:
        group.add_argument(
            "--rate", type=rate, metavar="R|max", help="requests a second, at random; --max-ttft and -tpot at p95 then"
        )


def read_demand(arguments: Namespace) -> Demand | None:
    """The demand of --rate, --max-ttft and --max-tpot; None without --rate. Raises UsageError."""
    if arguments.rate is None:
        return None
    limits = {option.field: option.value(arguments) for option in given_constraints(arguments)}
    if "max_ttft_s" not in limits:
        raise UsageError("--rate takes --max-ttft as well: the seconds that requests may wait for their first token")
    return Demand(
        limits["max_ttft_s"],
        rate=None if arguments.rate == math.inf else arguments.rate,
        max_tpot_s=limits.get("max_tpot_s"),
    )


def read_workload(arguments: Namespace, model: Model) -> Workload:
    """The workload of --prompt-len and --output-len or of --lengths. Raises UsageError if the context is shorter."""
    usual = _BATCH_SIZE if getattr(arguments, "rate", None) is None else _SLOTS
    batch_size = arguments.batch_size or usual
    if arguments.lengths is not None:
        if arguments.prompt_len is not None or arguments.output_len is not None:
            raise UsageError("--lengths replaces --prompt-len and --output-len; leave them out")

        def tokens(prompt: str, answer: str) -> tuple[int, int]:
            return len(model.tokenizer.encode_chat(prompt)), len(model.tokenizer.encode(answer))

        lengths = read_lengths(arguments.lengths, tokens, model.spec.max_positions)
        return Workload.of_lengths(batch_size, lengths)
    prompt_len, output_len = arguments.prompt_len or _LENGTH, arguments.output_len or _LENGTH
    length = prompt_len + output_len
    if length > model.spec.max_positions:
        raise UsageError(
            f"--prompt-len and --output-len add up to {length} tokens; the context of {model.spec.name} is "
            f"{model.spec.max_positions}"
        )
    return Workload(batch_size, prompt_len, output_len)


def read_plan(arguments: Namespace) -> tuple[Plan, Solved | None]:
    """The plan of --plan, and all that its file holds if that is a solved one.

    Raises UsageError if other options contradict it.
    """
    contradicting = [option.flag for option in given_constraints(arguments)]
    if getattr(arguments, "batch_size", None) is not None:
        contradicting.append("--batch-size")
    if contradicting:
        raise UsageError(f"--plan already decides {', '.join(contradicting)}; leave one of them out")
    loaded = load_either(arguments.plan, Solved, Plan)
    return (loaded.plan, loaded) if isinstance(loaded, Solved) else (loaded, None)


def constraints_of_plan(plan: Plan) -> planner.Constraints:
    """How a plan's units are quantized, the mode of its CPU stages, and its KV cache; defaults if there are none."""
    import planner

    units = ("embedding", "head", *(f"layer.{i}" for i in range(plan.num_layers)))
    options = list(map(plan.precision, units))
    quantized = [p for option in options for p in _precisions(option) if p.quantized]
    kv_bits = tuple({stage.kv_bits for stage in plan.stages})
    if not quantized:
        return planner.Constraints(kv_bits=kv_bits)
    return planner.Constraints(
        kv_bits=kv_bits,
        group_size=quantized[0].group_size,
        per_linear=any(isinstance(option, Mixed) for option in options),
        quantizer="gptq" if quantized[0].quantizer == "gptq" else "rtn",
        activations=next((stage.activations for stage in plan.stages if stage.activations != "a16"), "a16"),
    )


def _precisions(option: UnitPrecision) -> list[Precision]:
    """Of a unit's linears; none of native ones."""
    found = [precision for _, precision in option.linears] if isinstance(option, Mixed) else [option]
    return [precision for precision in found if isinstance(precision, Precision)]


def add_log(group: argparse._ActionsContainer) -> None:
    group.add_argument("--log", metavar="FILE", help="log of runs (default: runs.jsonl in the cache)")


def read_log_path(arguments: Namespace) -> Path:
    """The log to read. Raises UsageError if there is no place for one."""
    from llmpq.tuning import run_log

    path = run_log.default_log() if arguments.log is None else Path(arguments.log)
    if path is None:
        raise UsageError("there is no home folder that would hold the log; name it with --log")
    return path


def written_log_path(arguments: Namespace) -> Path | None:
    """The log to add to; None if there is to be none, or no place for one."""
    from llmpq.tuning import run_log

    if arguments.no_log or arguments.dry_run:
        return None
    return run_log.writable_default_log() if arguments.log is None else Path(arguments.log)


def add_out(group: argparse._ActionsContainer, what: str) -> None:
    group.add_argument("--out", required=True, metavar="FILE", help=f"where to write the {what}, as JSON (required)")


def add_on_loss(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--on-loss",
        choices=["end", "replan"],
        default="end",
        metavar="end|replan",
        help="replan: go on without a lost device, and take it back (default: end)",
    )
