"""The command line: `llmpq run | profile | sensitivity | plan | explain | eval`. It parses; run_command.py,
explain_command.py and commands.py do.

Exit codes: 0 ok, 2 usage or bad input, 3 no feasible plan, 4 out of memory, 5 a worker was lost, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial

from llmpq import __version__
from llmpq.spec import ACTIVATION_MODES, BITS, DEFAULT_ACTIVATIONS, GROUP_SIZES, LlmpqError


def _group_size(text: str) -> int | None:
    if text not in ("row", *map(str, GROUP_SIZES)):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, GROUP_SIZES))} or row")
    return None if text == "row" else int(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _add_model(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--model",
        metavar="M",
        required=required,
        default="demo",
        help="demo (SmolLM2-135M-Instruct, the default), a folder with safetensors, a .gguf file, or a hub id",
    )
    parser.add_argument(
        "--load-format",
        choices=["auto", "dummy"],
        default="auto",
        help="dummy: random weights made on the spot for the model's configuration",
    )


def _add_devices(parser: argparse.ArgumentParser, *, required: bool = False) -> argparse._ActionsContainer:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--devices", metavar="SPEC", help="for example 'cpu:threads=1,isa=avx2,memory=90MiB;cuda:0,memory=4GiB'"
    )
    group.add_argument("--cluster", metavar="FILE", help="the devices as a JSON file")
    return group


def _add_group_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-size",
        type=_group_size,
        default=argparse.SUPPRESS,
        metavar="32|64|128|256|row",
        help="weights that share a scale (default: 32)",
    )


def _add_activations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=ACTIVATION_MODES,
        default=argparse.SUPPRESS,
        help="how CPUs multiply quantized layers: exactly, or with activations rounded to two int8 terms or to one "
        f"(default: {DEFAULT_ACTIVATIONS})",
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _add_constraints(parser: argparse.ArgumentParser) -> None:
    """What is not given is left out of the namespace: the defaults are those of planner.Constraints."""
    _add_group_size(parser)
    _add_activations(parser)
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--objective", choices=["time", "cost"], help="of a batch; cost needs price= for each device (default: time)")
    add("--theta", type=float, metavar="X", help="seconds that a unit of sensitivity is worth (default: 0)")
    add("--min-bits", type=int, choices=BITS, help="no layer goes below (default: 3)")
    add("--bits", dest="fixed_bits", type=int, choices=BITS, help="one width for all layers; sets no quality budget")
    add("--all-devices", action="store_true", help="use every device, even one that slows things down")
    add("--use", dest="required", action="append", metavar="DEVICE", help="use this device; may be given several times")
    add("--without", dest="excluded", action="append", metavar="DEVICE", help="do not use this device; likewise")
    add(
        "--pin",
        dest="pinned",
        action="append",
        type=_pair,
        metavar="UNIT=DEVICE",
        help="such as layer.3=cuda0; likewise",
    )
    add("--unit-bits", action="append", type=_pair, metavar="UNIT=BITS", help="such as head=8; likewise")
    add("--prefill-microbatch", type=_positive, metavar="N", help="sequences in a step of prefill (default: searched)")
    add("--decode-microbatch", type=_positive, metavar="N", help="sequences in a step of decode (default: searched)")
    add("--max-ttft", dest="max_ttft_s", type=_seconds, metavar="S", help="until all of a batch have a first token")
    add("--max-tpot", dest="max_tpot_s", type=_seconds, metavar="S", help="from one token of a sequence to its next")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="llmpq",
        description="Plans and runs LLM inference on mismatched devices.",
        epilog="exit codes: 0 ok, 2 usage or bad input, 3 no feasible plan, 4 out of memory, 5 a worker was lost",
    )
    parser.add_argument("--version", action="version", version=f"llmpq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|profile|sensitivity|plan|explain|eval")

    run = commands.add_parser("run", help="plan, load, generate, and compare what was predicted with what was measured")
    run.set_defaults(function="run", module="run_command")
    _add_model(run)
    run.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    run.add_argument("--prompts", metavar="FILE", help='JSONL, one {"prompt": ...} to a line; - is standard input')
    _add_devices(run)
    run.add_argument("--plan", metavar="FILE", help="run this plan instead of making one")
    run.add_argument("--costs", metavar="FILE", help="from llmpq profile; measured if absent")
    run.add_argument("--max-new-tokens", type=_positive, metavar="N", help="per prompt (default: 64)")
    run.add_argument("--batch-size", type=_positive, metavar="N", help="sequences at once (default: all, at most 32)")
    _add_constraints(run)
    run.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (the default)")
    run.add_argument("--top-k", type=int, default=0, metavar="N", help="0: no limit")
    run.add_argument("--top-p", type=float, default=1.0, metavar="X")
    run.add_argument("--seed", type=int, default=0, metavar="N")
    run.add_argument("--output", metavar="OUT.jsonl", help="write the completions, one JSON object to a line")
    run.add_argument("--json-out", metavar="REPORT.json", help="write plan, prediction, measurement and completions")
    run.add_argument("--trace", metavar="TRACE.json", help="write all steps, predicted and measured, for Perfetto")
    logged = run.add_mutually_exclusive_group()
    _add_log(logged)
    logged.add_argument("--no-log", action="store_true", help="do not add this run to the log")
    run.add_argument("--dry-run", action="store_true", help="stop after the plan")
    run.add_argument("--quiet", action="store_true", help="print the completions only")

    profile = commands.add_parser("profile", help="measure what a model's operations cost on each device")
    profile.set_defaults(function="profile")
    _add_model(profile)
    instead = _add_devices(profile, required=True)
    instead.add_argument("--refit", metavar="COSTS.json", help="measure nothing, correct these by the log of runs")
    _add_log(profile)
    profile.add_argument("--calibrate", action="store_true", help="correct what is measured by a few short runs")
    _add_group_size(profile)
    _add_activations(profile)
    _add_workload(profile)
    profile.add_argument("--out", required=True, metavar="COSTS.json")

    sensitivity = commands.add_parser("sensitivity", help="measure how much each layer minds being quantized")
    sensitivity.set_defaults(function="sensitivity")
    _add_model(sensitivity)
    sensitivity.add_argument("--method", choices=["variance"], default="variance")
    _add_group_size(sensitivity)
    sensitivity.add_argument("--out", required=True, metavar="SENS.json")

    plan = commands.add_parser("plan", help="solve for layer split, bits and micro-batches")
    plan.set_defaults(function="plan")
    _add_model(plan)
    _add_devices(plan, required=True)
    plan.add_argument("--costs", metavar="FILE", help="from llmpq profile; measured if absent")
    plan.add_argument("--sensitivity", metavar="FILE", help="from llmpq sensitivity; measured if absent")
    _add_workload(plan)
    _add_constraints(plan)
    plan.add_argument(
        "--rehearse",
        type=_positive,
        default=1,
        metavar="N",
        help="of plans that look nearly as good as the best run N, and take the fastest (default: 1, none is run)",
    )
    plan.add_argument("--out", required=True, metavar="PLAN.json")

    explain = commands.add_parser("explain", help="why a plan is as it is, and what more would buy")
    explain.set_defaults(function="explain", module="explain_command")
    _add_model(explain)
    explain.add_argument("plan", metavar="PLAN.json")
    explain.add_argument("--costs", metavar="FILE", help="from llmpq profile; measured if absent")
    explain.add_argument("--sensitivity", metavar="FILE", help="from llmpq sensitivity; measured if absent")
    explain.add_argument("--html", metavar="FILE.html", help="write all of it as one page with plots, too")
    _add_constraints(explain)

    evaluate = commands.add_parser("eval", help="perplexity of the weights as they are served, as JSON")
    evaluate.set_defaults(function="evaluate")
    _add_model(evaluate)
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument("--plan", metavar="FILE", help="evaluate this plan's weights in its own pipeline")
    which.add_argument("--bits", type=int, choices=BITS, default=16, help="one width for all units (default: 16)")
    _add_group_size(evaluate)
    _add_activations(evaluate)
    evaluate.add_argument("--text", metavar="FILE", help="plain text; the default is built in")
    evaluate.add_argument("--max-tokens", type=_positive, default=4096, metavar="N", help="of the text (default: 4096)")
    return parser


def _add_log(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--log", metavar="FILE", help="of runs, for profile --refit (default: runs.jsonl in the cache)")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt-len", type=_positive, metavar="S", help="tokens (default: 64)")
    parser.add_argument("--output-len", type=_positive, metavar="N", help="tokens (default: 64)")
    parser.add_argument(
        "--lengths",
        metavar="FILE",
        help="instead of both: JSONL of prompts with answers, or their lengths; or - for stdin",
    )
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="B", help="sequences (default: 8)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad usage leaves through SystemExit(2), as argparse does."""
    arguments = build_parser().parse_args(argv)
    try:
        # Only now: it takes a second, and --help should not.
        module = importlib.import_module(f"llmpq.cli.{getattr(arguments, 'module', 'commands')}")
        getattr(module, arguments.function)(arguments)
        return 0
    except LlmpqError as error:
        print(f"llmpq: {error}", *getattr(error, "relaxations", ()), sep="\n  ", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmpq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`llmpq run | head`): not an error of ours, and nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
