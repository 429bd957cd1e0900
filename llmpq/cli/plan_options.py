"""The plan of a run, from its options: given as --plan, or made for what is to be run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from llmpq import demo
from llmpq.checkpoint.model_files import Model
from llmpq.cli.constraint_options import read_constraints, read_quality
from llmpq.cli.options import constraints_of_plan, names_devices, read_cluster, read_costs, read_plan
from llmpq.progress import Notify
from llmpq.spec import (
    InfeasibleError,
    NotMeasuredError,
    Plan,
    Prediction,
    Profile,
    Solved,
    UsageError,
    Workload,
)

if TYPE_CHECKING:
    import planner
    from llmpq.replanning import Replanner
    from llmpq.runtime.engine import Engine
    from llmpq.runtime.torchrun import Rank

_SHORTEST = 2
LENGTHS = (2048, 1024, 512, 256)  # tokens of a conversation: the most that fits


class PlanOptions:
    """`given` is the plan of --plan with all that its file holds, if that is a solved one. Raises UsageError."""

    def __init__(self, arguments: Namespace) -> None:
        self._arguments = arguments
        self.given = None if arguments.plan is None else _given_plan(arguments)
        self._quality = read_quality(arguments)
        if self.given is not None and self._quality is not None:
            raise UsageError("--plan already decides the quality; leave out --max-ppl-increase and --max-kl")
        self.max_length: int | None = getattr(arguments, "max_length", None)  # tokens of a prompt and its answer
        if self.max_length is not None and self.max_length < _SHORTEST:
            raise UsageError(
                f"--max-length is {self.max_length}; a prompt and an answer have at least {_SHORTEST} tokens"
            )
        if self.given is not None and self.max_length is not None:
            raise UsageError("--plan already decides --max-length; leave one of them out")
        self._cluster, self._costs = read_cluster(arguments), read_costs(arguments)
        constraints = read_constraints(arguments)
        if not names_devices(arguments) and constraints.omega_budget is None and constraints.fixed_bits is None:
            constraints = replace(constraints, omega_budget=demo.OMEGA_BUDGET)
        self._constraints = constraints
        self._problem: planner.Problem | None = None  # of the plan that was made

    def check(self, model: Model) -> None:
        """Raise UsageError if the plan, the quality budget or --max-length is not for this model."""
        context = model.spec.max_positions
        if self.max_length is not None and self.max_length > context:
            raise UsageError(f"--max-length is {self.max_length}; the context of {model.spec.name} is {context}")
        if self._quality is not None:
            self._quality.check(model.spec)
        if self.given is not None:
            self.given[0].check_model(model.spec)

    def problem(self, model: Model, workload: Workload, notify: Notify) -> planner.Problem:
        """What the planner is to solve where no plan is given; what it needs to know is measured."""
        from llmpq.workflow import make_problem

        return make_problem(model, self._cluster, workload, self._constraints, costs=self._costs, notify=notify)

    def solve(
        self, model: Model, problem: planner.Problem, notify: Notify, *, advised: bool = True
    ) -> tuple[Solved, planner.Problem]:
        """The plan, and the problem that it solves, in which a quality budget has become one of omega.

        Raises InfeasibleError, if `advised` with what would make a plan possible.
        """
        from llmpq.workflow import make_plan, make_plan_within

        if self._quality is None:
            solved = make_plan(model, problem, advised=advised, notify=notify)
        else:
            solved, problem = make_plan_within(model, problem, self._quality, notify=notify)
        self._problem = problem
        return solved, problem

    def engine(
        self,
        model: Model,
        plan: Plan,
        notify: Notify,
        *,
        rank: Rank | None = None,
        on_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> Engine:
        """An Engine for a plan, whose weights are made first. `on_plan` is told of each other plan, as Engine says."""
        from llmpq.measure.quantized_model import as_served
        from llmpq.runtime.engine import Engine

        replanner = self._replanner(model, plan, notify)
        served, plan = as_served(model, plan, notify)
        eager = getattr(self._arguments, "eager", False)
        return Engine(
            plan,
            served.checkpoint,
            served.spec,
            rank=rank,
            eager=eager,
            on_loss=replanner,
            on_return=None if replanner is None else replanner.on_return,
            on_plan=on_plan,
            notify=notify,
        )

    def _replanner(self, model: Model, plan: Plan, notify: Notify) -> Replanner | None:
        """What plans again, if --on-loss asks for it. For a plan of --plan, costs are measured."""
        if self._arguments.on_loss == "end":
            return None
        from llmpq.replanning import Replanner
        from llmpq.workflow import make_problem

        problem = self._problem
        if problem is None:
            constraints = constraints_of_plan(plan)
            if self.given is not None and self.given[1] is not None:
                constraints = replace(constraints, omega_budget=self.given[1].solution.omega_budget)
            problem = make_problem(model, plan.cluster, plan.reach(), constraints, costs=self._costs, notify=notify)
        return Replanner(model, problem)

    def solve_longest(
        self,
        model: Model,
        batch_sizes: Sequence[int],
        answer_len: int | None,
        notify: Notify,
        lengths: Sequence[int] = LENGTHS,
    ) -> tuple[Plan, Solved]:
        """A plan for conversations of the first of `lengths`, in tokens, that the model and the devices have room for.

        There may be as many at once as the first of `batch_sizes` that fits says. A quarter of the length is for the
        answer, if that is not given; at most half. Raises InfeasibleError.
        """
        lengths = [length for length in lengths if length <= model.spec.max_positions] or [model.spec.max_positions]

        def workload(length: int, batch_size: int) -> Workload:
            output_len = max(1, min(answer_len or length // 4, length // 2))
            return Workload(batch_size, length - output_len, output_len)

        *larger, least = [workload(length, batch_size) for length in lengths for batch_size in batch_sizes]
        problem = self.problem(model, workload(lengths[0], batch_sizes[0]), notify)
        for each in larger:
            with suppress(InfeasibleError, NotMeasuredError):
                solved, _ = self.solve(model, replace(problem, workload=each), notify, advised=False)
                return solved.plan, solved
        solved, _ = self.solve(model, replace(problem, workload=least), notify)
        return solved.plan, solved

    def basis_of_given(self, model: Model, workload: Workload, notify: Notify) -> Profile | Prediction:
        """What the run of a given plan is compared with: costs to simulate it by, or its own prediction.

        Raises UsageError if nothing predicts it.
        """
        from llmpq.workflow import measured_profile

        assert self.given is not None
        plan, solved = self.given
        local = all(device.host == "localhost" for device in plan.cluster.devices)
        if self._costs is None and local and not self._arguments.dry_run:
            reach = plan.reach(workload.longest_prompt)
            return measured_profile(model, plan.cluster, reach, constraints_of_plan(plan), notify)
        if self._costs is not None:
            return self._costs
        if solved is None:
            raise UsageError(f"{self._arguments.plan} predicts nothing; give --costs from `llmpq profile`")
        return solved.prediction


def _given_plan(arguments: Namespace) -> tuple[Plan, Solved | None]:
    """The plan of --plan. Raises UsageError if devices are described beside it that are not the plan's."""
    from llmpq.hardware import same_devices

    plan, solved = read_plan(arguments)
    if names_devices(arguments) and not same_devices(read_cluster(arguments), plan.cluster):
        raise UsageError(f"{arguments.plan} was made for other devices; leave out --devices and --cluster")
    return plan, solved
