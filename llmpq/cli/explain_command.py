"""`llmpq explain`: why a plan is as it is, in tables, and as a page of plots."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import (
    add_costs,
    add_model,
    add_sensitivity,
    constraints_of_plan,
    read_costs,
    read_model,
    read_sensitivity,
)
from llmpq.cli.output_files import check_files
from llmpq.cli.parser import Commands
from llmpq.report import console
from llmpq.report.progress_bar import progress
from llmpq.report.streams import OUT
from llmpq.spec import Plan, Solved, UsageError, load_either
from llmpq.spec.files import write_text


def add(commands: Commands) -> None:
    parser = commands.add_command("explain", execute, "why a plan is as it is, and what more would buy")
    parser.add_argument("plan", metavar="PLAN", help="a file of llmpq plan")
    add_model(parser)
    parser.add_argument("--html", metavar="FILE", help="also write it as one page with plots")
    add_costs(parser)
    add_sensitivity(parser)
    others = parser.add_argument_group("what other plans must keep to")
    add_constraints(others, without=("group_size", "quantizer", "activations", "kv_bits"))  # those are the plan's


def execute(arguments: Namespace) -> None:
    import planner
    from llmpq.report.html_page import page
    from llmpq.workflow import measured_profile, measured_sensitivity, with_caches

    check_files(arguments)
    solved = load_either(arguments.plan, Solved, Plan)
    if isinstance(solved, Plan):
        raise UsageError(
            f"{arguments.plan} predicts nothing, so there is nothing to explain; make it with `llmpq plan`"
        )
    plan = solved.plan
    costs, omega = read_costs(arguments), read_sensitivity(arguments)
    planned = constraints_of_plan(plan)
    constraints = read_constraints(arguments)
    constraints = replace(
        constraints,
        per_linear=constraints.per_linear or planned.per_linear,
        group_size=planned.group_size,
        quantizer=planned.quantizer,
        activations=planned.activations,
        kv_bits=planned.kv_bits,
    )
    if constraints.omega_budget is None and constraints.fixed_bits is None:
        constraints = replace(constraints, omega_budget=solved.solution.omega_budget)
    with progress() as notify:
        model = read_model(arguments, notify)
        plan.check_model(model.spec)
        if costs is None:
            costs = measured_profile(model, plan.cluster, plan.workload, constraints, notify)
        if omega is None:
            omega = measured_sensitivity(model, constraints, notify)
        omega = with_caches(model, omega, constraints, notify)
        notify("solving again with more and with less of everything")
        problem = planner.Problem(model.spec, plan.cluster, plan.workload, costs, omega, constraints)
        found = planner.explain(solved, problem)
    if arguments.html is not None:
        write_text(arguments.html, page(solved, found))
    OUT.print(console.plan_table(plan, solved))
    OUT.print(console.explanation(solved, found))
