"""`llmpq explain`: why a plan is as it is, in tables, and as a page of plots."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import planner
from llmpq.checkpoint.model_files import open_model
from llmpq.cli.arguments import constraints_of_plan, read_constraints
from llmpq.cli.output_files import check_writable, write_text
from llmpq.hardware import with_reserve
from llmpq.report import console
from llmpq.report.page import page
from llmpq.report.sheets import TextTable, sheets, verdict
from llmpq.spec import Plan, Profile, Sensitivity, UsageError
from llmpq.workflow import measured_profile, measured_sensitivity


def explain(arguments: Namespace) -> None:
    """`llmpq explain PLAN`: what bounds it, what else was possible, and what more would buy."""
    check_writable(arguments.html)
    plan = Plan.load(arguments.plan)
    if plan.predicted is None or plan.solution is None:
        raise UsageError(
            f"{arguments.plan} predicts nothing, so there is nothing to explain; make it with `llmpq plan`"
        )
    costs = None if arguments.costs is None else Profile.load(arguments.costs)
    omega = None if arguments.sensitivity is None else Sensitivity.load(arguments.sensitivity)
    wishes, planned = read_constraints(arguments), constraints_of_plan(plan)
    constraints = replace(wishes, group_size=planned.group_size, activations=planned.activations)
    if plan.solution.omega_budget is not None:
        constraints = replace(constraints, omega_budget=plan.solution.omega_budget)
    with console.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        plan.check_model(model.spec)
        if costs is None:
            costs = measured_profile(model, plan.cluster, plan.workload, constraints, notify)
        if omega is None:
            omega = measured_sensitivity(model, constraints.group_size, notify)
        notify("solving again with more and with less of everything")
        cluster = with_reserve(plan.cluster)
        problem = planner.Problem(model.spec, cluster, plan.workload, costs, omega, constraints)
        found = planner.explain(plan, problem)
    if arguments.html is not None:
        write_text(arguments.html, page(plan, found))
    console.OUT.print(console.plan_table(plan))
    console.OUT.print(explanation(plan, found))


def explanation(plan: Plan, found: planner.Explanation) -> RenderableType:
    """What bounds the plan, then all tables."""
    parts: list[RenderableType] = [Text("\n".join(verdict(plan, found)))]
    for sheet in sheets(plan, found).values():
        parts += [_table(sheet), *([Text(sheet.note)] if sheet.note else [])]
    return Group(*parts)


def _table(sheet: TextTable) -> Table:
    table = Table(box=SIMPLE_HEAD, title=sheet.title, title_justify="left", pad_edge=False)
    for i, name in enumerate(sheet.columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table
