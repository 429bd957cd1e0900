"""`llmpq plan`: solve for layer split, bits and micro-batches."""

from __future__ import annotations

from argparse import Namespace

from llmpq.cli.constraint_options import add_constraints, add_quality, read_constraints, read_quality
from llmpq.cli.options import (
    add_costs,
    add_devices,
    add_model,
    add_out,
    add_sensitivity,
    add_workload,
    read_cluster,
    read_costs,
    read_model,
    read_sensitivity,
    read_workload,
)
from llmpq.cli.output_files import check_files
from llmpq.cli.parser import Commands, positive
from llmpq.report import console
from llmpq.report.progress_bar import progress
from llmpq.report.starting import start_commands
from llmpq.report.streams import OUT
from llmpq.spec import UsageError


def add(commands: Commands) -> None:
    parser = commands.add_command("plan", execute, "solve for layer split, bits and micro-batches")
    add_model(parser)
    parser.add_argument(
        "--rehearse",
        type=positive,
        default=1,
        metavar="N",
        help="run up to N nearly equal plans, take the fastest (default: 1)",
    )
    add_out(parser, "plan")
    devices = parser.add_argument_group("devices (one is required) and what was measured")
    add_devices(devices, required=True)
    add_costs(devices)
    add_sensitivity(devices)
    add_workload(parser)
    keep = parser.add_argument_group("what the plan must keep to")
    add_constraints(keep)
    add_quality(keep)


def execute(arguments: Namespace) -> None:
    import planner
    from llmpq.workflow import make_plan, make_plan_within, make_problem

    check_files(arguments)
    cluster, constraints, quality = read_cluster(arguments), read_constraints(arguments), read_quality(arguments)
    if quality is not None and arguments.rehearse > 1:
        raise UsageError("--rehearse compares plans whose quality was not measured; leave it out")
    costs, omega = read_costs(arguments), read_sensitivity(arguments)
    with progress() as notify:
        model = read_model(arguments, notify)
        if quality is not None:
            quality.check(model.spec)
        workload = read_workload(arguments, model)
        problem = make_problem(model, cluster, workload, constraints, costs=costs, omega=omega, notify=notify)
        if quality is None:
            solved = make_plan(model, problem, rehearsed=arguments.rehearse, notify=notify)
        else:
            solved, problem = make_plan_within(model, problem, quality, notify=notify)
        ways = planner.find_usual_ways(problem)
    solved.save(arguments.out)
    OUT.print(console.plan_table(solved.plan, solved))
    OUT.print(console.usual_ways(solved, ways), soft_wrap=True)
    options = ["--model", arguments.model, "--plan", arguments.out]
    if arguments.load_format != "auto":
        options += ["--load-format", arguments.load_format]
    for line in ("to run it, with --prompt or --prompts FILE --output FILE:", *start_commands(solved.plan, options)):
        OUT.print(line, soft_wrap=True)
