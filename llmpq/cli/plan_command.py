"""`llmpq plan`: solve for layer split, bits and micro-batches."""

from __future__ import annotations

import math
import shlex
from argparse import Namespace
from dataclasses import replace

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
    read_demand,
    read_model,
    read_sensitivity,
    read_workload,
)
from llmpq.cli.output_files import check_files
from llmpq.cli.parser import Commands, positive
from llmpq.report import console
from llmpq.report.progress_bar import progress
from llmpq.report.starting import is_on_one_host, start_commands
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
    add_workload(parser, online=True)
    keep = parser.add_argument_group("what the plan must keep to")
    add_constraints(keep)
    add_quality(keep)


def execute(arguments: Namespace) -> None:
    import planner
    from llmpq.workflow import make_online_plan, make_plan, make_plan_within, make_problem

    check_files(arguments)
    cluster, constraints, quality = read_cluster(arguments), read_constraints(arguments), read_quality(arguments)
    demand = read_demand(arguments)
    if quality is not None and arguments.rehearse > 1:
        raise UsageError("--rehearse compares plans whose quality was not measured; leave it out")
    if demand is not None:
        if quality is not None or arguments.rehearse > 1:
            raise UsageError("--rate goes neither with a measured quality budget nor with --rehearse; leave them out")
        constraints = replace(constraints, max_ttft_s=math.inf, max_tpot_s=math.inf)  # they are the demand's
    costs, omega = read_costs(arguments), read_sensitivity(arguments)
    with progress() as notify:
        model = read_model(arguments, notify)
        if quality is not None:
            quality.check(model.spec)
        workload = read_workload(arguments, model)
        problem = make_problem(model, cluster, workload, constraints, costs=costs, omega=omega, notify=notify)
        if demand is not None:
            solved = make_online_plan(problem, demand, notify)
        elif quality is None:
            solved = make_plan(model, problem, rehearsed=arguments.rehearse, notify=notify)
        else:
            solved, problem = make_plan_within(model, problem, quality, notify=notify)
        ways = None if demand is not None else planner.find_usual_ways(problem)
    solved.save(arguments.out)
    OUT.print(console.plan_table(solved.plan, solved))
    if ways is not None:
        OUT.print(console.usual_ways(solved, ways), soft_wrap=True)
    options = ["--model", arguments.model, "--plan", arguments.out]
    if arguments.load_format != "auto":
        options += ["--load-format", arguments.load_format]
    lines = ["to run it, with --prompt or --prompts FILE --output FILE:", *start_commands(solved.plan, options)]
    if demand is not None and is_on_one_host(solved.plan):
        lines = ["to serve it:", shlex.join(["llmpq", "serve", *options])]
    for line in lines:
        OUT.print(line, soft_wrap=True)
