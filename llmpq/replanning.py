"""A plan for what is left when a device is lost, or for what is back: within seconds, from costs and sensitivities that
are known.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import planner
from llmpq.checkpoint.model_files import Model
from llmpq.measure.quantized_model import as_served
from llmpq.runtime.pipeline import Served
from llmpq.spec import Cluster, InfeasibleError, LlmpqError, Mixed, NotMeasuredError, Plan, UsageError
from llmpq.workflow import make_plan

LIMIT_S = 10.0  # for all that is solved at once


class Replanner:
    """Plans `problem` again: without a device that is lost, or `on_return` of those that were; see runtime/recovery.py.

    A new plan has room for as long requests. If any plan can, it keeps the widths of all units and of the KV cache; if
    stages have caches of two widths, each may then have either, but all together lose no more than they did. Else it
    keeps the quality budget; it runs fewer requests at once if there is no room for as many. From any thread, of which
    one plans at a time.
    """

    def __init__(self, model: Model, problem: planner.Problem) -> None:
        self._model, self._problem = model, problem
        self._lock = threading.Lock()

    def __call__(self, device: str, plan: Plan, error: LlmpqError) -> Served:
        """Raises InfeasibleError, with what would make a plan possible, if there is none without the device."""
        left = [each.name for each in plan.cluster.devices if each.name != device]
        if not left:
            raise error
        problem = _as_wide(only(self._problem, left), plan)
        with self._lock:
            until = time.monotonic() + LIMIT_S
            found = self._solved(_tries(problem, plan), until)
            if found is None:
                try:
                    found = make_plan(self._model, _within(problem, until)).plan
                except InfeasibleError as none:
                    raise InfeasibleError(f"{error}; without {device}, {none}", none.relaxations) from None
        return self._served(found)

    def on_return(self, devices: Collection[str], plan: Plan, at_least: float) -> Served | None:
        """See OnReturn of runtime/device_watch.py. Runs as many requests at once as `problem` asks for, if it can."""
        whole = only(self._problem, devices)
        problem = _as_wide(whole, plan)
        more = whole if whole.workload.max_length == plan.max_length else problem
        with self._lock:
            tries = chain(_same_widths(more, plan), _tries(problem, plan))
            found = self._solved(tries, time.monotonic() + LIMIT_S)
        if found is None:
            raise InfeasibleError(f"no plan was found on {', '.join(sorted(devices))}")
        if at_least and self._rate(found, more) < at_least * self._rate(plan, more):
            return None
        return self._served(found)

    def _served(self, plan: Plan) -> Served:
        model, served = as_served(self._model, plan)
        return Served(served, model.checkpoint, model.spec)

    def _solved(self, problems: Iterable[planner.Problem], until: float) -> Plan | None:
        """The best plan for the first of the problems that has one."""
        for problem in problems:
            with suppress(InfeasibleError, NotMeasuredError, UsageError):  # raised again at the end
                return make_plan(self._model, _within(problem, until), advised=False).plan
        return None

    def _rate(self, plan: Plan, problem: planner.Problem) -> float:
        """Tokens per second that a plan is predicted to generate of a problem's batch."""
        prompt_lens, output_lens = zip(*problem.workload.batches[0], strict=True)
        return planner.predict(plan, problem.spec, problem.profile, prompt_lens, output_lens).tokens_per_s


def _tries(problem: planner.Problem, plan: Plan) -> Iterator[planner.Problem]:
    """The problem without and with other widths than a plan's, then for fewer requests at once."""
    yield from _same_widths(problem, plan)
    yield problem
    workload = problem.workload
    while workload.batch_size > 1:
        workload = replace(workload, batch_size=workload.batch_size // 2)
        yield replace(problem, workload=workload)


def _same_widths(problem: planner.Problem, plan: Plan) -> Iterator[planner.Problem]:
    """The problem with a plan's widths, if a problem can ask for them."""
    options = {unit: plan.precision(unit) for unit in problem.spec.units}
    widths = {unit: option.width for unit, option in options.items() if not isinstance(option, Mixed)}
    if len(widths) == len(options):
        caches = tuple({stage.kv_bits for stage in plan.stages})
        budget = math.inf if len(caches) == 1 else problem.omega(plan)  # it was good enough
        same = replace(problem.constraints, unit_bits=widths, kv_bits=caches, omega_budget=budget)
        yield replace(problem, constraints=same)


def _as_wide(problem: planner.Problem, plan: Plan) -> planner.Problem:
    """The problem with room for all that the plan has room for."""
    workload = problem.workload
    fits = workload.batch_size == plan.slots and workload.max_length == plan.max_length
    return problem if fits else replace(problem, workload=plan.reach())


def only(problem: planner.Problem, names: Collection[str]) -> planner.Problem:
    """The problem on devices of these names."""
    cluster, constraints = problem.cluster, problem.constraints
    devices = tuple(each for each in cluster.devices if each.name in names)
    links = tuple(link for link in cluster.links if link.source in names and link.target in names)
    return replace(
        problem,
        cluster=Cluster(devices, links),
        constraints=replace(
            constraints,
            all_devices=constraints.all_devices and devices == cluster.devices,
            required=tuple(name for name in constraints.required if name in names),
            excluded=tuple(name for name in constraints.excluded if name in names),
            pinned={unit: name for unit, name in constraints.pinned.items() if name in names},
            at_most=tuple(
                replace(rule, weights={name: weight for name, weight in rule.weights.items() if name in names})
                for rule in constraints.at_most
            ),
        ),
    )


def _within(problem: planner.Problem, until: float) -> planner.Problem:
    """The problem, to be solved by then."""
    left_s = max(1.0, until - time.monotonic())
    constraints = problem.constraints
    return replace(problem, constraints=replace(constraints, time_limit_s=min(constraints.time_limit_s, left_s)))
