"""`llmpq explain`: why a plan is as it is, in tables."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import planner
from llmpq import display
from llmpq.commands import as_planned, constraints_of
from llmpq.planning import measured_profile, measured_sensitivity, open_model, with_reserve
from llmpq.spec import Plan, Profile, Sensitivity


def explain(arguments: Namespace) -> None:
    """`llmpq explain PLAN`: what bounds it, what else was possible, and what more would buy."""
    plan = Plan.load(arguments.plan)
    costs = None if arguments.costs is None else Profile.load(arguments.costs)
    omega = None if arguments.sensitivity is None else Sensitivity.load(arguments.sensitivity)
    wishes, planned = constraints_of(arguments), as_planned(plan)
    constraints = replace(wishes, group_size=planned.group_size, activations=planned.activations)
    if plan.solution is not None and plan.solution.omega_budget is not None:
        constraints = replace(constraints, omega_budget=plan.solution.omega_budget)
    with display.status(False) as notify:
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
    display.OUT.print(display.plan_table(plan))
    display.OUT.print(explanation(plan, found))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def explanation(plan: Plan, found: planner.Explanation) -> RenderableType:
    """Stages, baselines, changes and the front, each against the plan."""
    assert plan.predicted is not None and plan.solution is not None
    reached = plan.predicted.tokens_per_s

    def against(tokens_per_s: float) -> str:
        return f"{100 * (tokens_per_s / reached - 1):+.1f} %"

    stages = _table("Stages, of one micro-batch", "device", "prefill, s", "decode, s", "link, s", "memory", "limit of")
    for view in found.stages:
        links = f"{view.prefill_link_s:.4f} / {view.decode_link_s:.4f}" if len(found.stages) > 1 else "-"
        memory = f"{display.mebibytes(view.memory_bytes)} / {display.mebibytes(view.cap_bytes)}"
        stages.add_row(
            view.device, f"{view.prefill_s:.4f}", f"{view.decode_s:.4f}", links, memory, ", ".join(view.bounds) or "-"
        )
    parts: list[RenderableType] = [stages]
    if found.round_trip:
        parts.append(Text("A token takes longer around all stages than the slowest stage takes for all micro-batches."))
    rows = [
        (f"{kind} baseline", other.predicted.tokens_per_s, other.solution.omega)
        for kind, other in found.baselines.items()
        if other.predicted is not None and other.solution is not None
    ]
    rows += [(change.what, change.tokens_per_s, change.omega) for change in found.changes]
    others = _table("Otherwise", "", "tokens/s", "against this plan", "sensitivity")
    others.add_row("this plan", f"{reached:.1f}", "", f"{plan.solution.omega:.4g}")
    for what, tokens_per_s, omega in rows:
        others.add_row(what, f"{tokens_per_s:.1f}", against(tokens_per_s), f"{omega:.4g}")
    parts.append(others)
    if found.front:
        front = _table("Throughput over quality", "", "tokens/s", "against this plan", "sensitivity")
        for change in found.front:
            front.add_row(
                change.what, f"{change.tokens_per_s:.1f}", against(change.tokens_per_s), f"{change.omega:.4g}"
            )
        parts.append(front)
    return Group(*parts)
