"""A plan for what is left when a device is lost: within seconds, from costs and sensitivities that are known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import planner
from llmpq.checkpoint.model_files import Model
from llmpq.measure.quantized_model import as_served
from llmpq.runtime.pipeline import Served
from llmpq.spec import Cluster, InfeasibleError, LlmpqError, Mixed, NotMeasuredError, Plan, UsageError
from llmpq.workflow import make_plan

LIMIT_S = 10.0  # for all that is solved after one loss


class Replanner:
    """Plans `problem` again without the devices that are lost; see runtime/recovery.py.

    The new plan has room for as long requests. If any plan can, it keeps the widths of all units and of the KV cache;
    if stages have caches of two widths, each may then have either, but all together lose no more than they did. Else it
    keeps the quality budget; it runs fewer requests at once if there is no room for as many. `on_plan` is told of each.
    """

    def __init__(
        self,
        model: Model,
        problem: planner.Problem,
        *,
        on_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        self._model, self._problem, self._on_plan = model, problem, on_plan

    def __call__(self, device: str, plan: Plan, error: LlmpqError) -> Served:
        """Raises InfeasibleError, with what would make a plan possible, if there is none without the device."""
        until = time.monotonic() + LIMIT_S
        left = [each for each in self._problem.cluster.devices if each.name != device]
        if not left:
            raise error
        self._problem = without(self._problem, device)
        found = self._solved(plan, until)
        if found is None:
            try:
                found = make_plan(self._model, _within(self._as_wide(plan), until)).plan
            except InfeasibleError as none:
                raise InfeasibleError(f"{error}; without {device}, {none}", none.relaxations) from None
        self._on_plan(found)
        model, served = as_served(self._model, found)
        return Served(served, model.checkpoint, model.spec)

    def _solved(self, plan: Plan, until: float) -> Plan | None:
        """The first that there is, of the best without and with other widths, then for fewer requests at once."""
        for problem in self._tries(plan):
            with suppress(InfeasibleError, NotMeasuredError, UsageError):  # raised again at the end
                return make_plan(self._model, _within(problem, until), advised=False).plan
        return None

    def _tries(self, plan: Plan) -> Iterator[planner.Problem]:
        problem = self._as_wide(plan)
        options = {unit: plan.precision(unit) for unit in problem.spec.units}
        widths = {unit: option.width for unit, option in options.items() if not isinstance(option, Mixed)}
        if len(widths) == len(options):
            caches = tuple({stage.kv_bits for stage in plan.stages})
            budget = math.inf if len(caches) == 1 else problem.omega(plan)  # it was good enough
            same = replace(problem.constraints, unit_bits=widths, kv_bits=caches, omega_budget=budget)
            yield replace(problem, constraints=same)
        yield problem
        workload = problem.workload
        while workload.batch_size > 1:
            workload = replace(workload, batch_size=workload.batch_size // 2)
            yield replace(problem, workload=workload)

    def _as_wide(self, plan: Plan) -> planner.Problem:
        """The problem with room for all that the plan has room for."""
        workload = self._problem.workload
        fits = workload.batch_size == plan.slots and workload.max_length == plan.max_length
        return self._problem if fits else replace(self._problem, workload=plan.reach())


def without(problem: planner.Problem, device: str) -> planner.Problem:
    """The problem on the other devices."""
    cluster, constraints = problem.cluster, problem.constraints
    devices = tuple(each for each in cluster.devices if each.name != device)
    links = tuple(link for link in cluster.links if device not in (link.source, link.target))
    return replace(
        problem,
        cluster=Cluster(devices, links),
        constraints=replace(
            constraints,
            all_devices=False,
            required=tuple(name for name in constraints.required if name != device),
            excluded=tuple(name for name in constraints.excluded if name != device),
            pinned={unit: name for unit, name in constraints.pinned.items() if name != device},
            at_most=tuple(
                replace(rule, weights={name: weight for name, weight in rule.weights.items() if name != device})
                for rule in constraints.at_most
            ),
        ),
    )


def _within(problem: planner.Problem, until: float) -> planner.Problem:
    """The problem, to be solved by then."""
    left_s = max(1.0, until - time.monotonic())
    constraints = problem.constraints
    return replace(problem, constraints=replace(constraints, time_limit_s=min(constraints.time_limit_s, left_s)))
