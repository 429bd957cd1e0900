"""From a model and a description of devices to a plan: measures what is not known yet, then solves.

The command line and `LLM` both come through here; it is the only place that joins measuring, planning and the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import planner
from llmpq.checkpoint.model_files import Model
from llmpq.hardware import with_memory
from llmpq.measure.expert_routing import measured_shares
from llmpq.measure.indicators import sensitivity, with_cache
from llmpq.measure.profiling import profile
from llmpq.measure.served_quality import TextQuality
from llmpq.measure.text import evaluation_text, validation_text
from llmpq.progress import Notify, silent
from llmpq.runtime.request import check_prompts
from llmpq.spec import (
    BITS,
    Cluster,
    CostTable,
    Demand,
    Device,
    InfeasibleError,
    ModelSpec,
    Plan,
    Precision,
    Profile,
    Quality,
    Sensitivity,
    SensitivityMethod,
    Solved,
    UsageError,
    Workload,
)
from llmpq.tuning.quality_budget import ROUNDS, Loss, QualityBudget, plan_within
from llmpq.tuning.trial_runs import fastest_measured, near_ties

QUALITY_TOKENS = 8192  # of each text that quality is measured on
BATCH_SIZE = 32  # sequences at once, if there are more prompts and nothing is said


def workload_of(spec: ModelSpec, prompts: Sequence[Sequence[int]], output_len: int, batch_size: int | None) -> Workload:
    """What these prompts ask for. Raises UsageError as `check_prompts`."""
    check_prompts(prompts, spec.vocab_size, spec.max_positions, f"the context of {spec.name}")
    output_len = min(output_len, spec.max_positions - max(map(len, prompts)))
    lengths = [(len(prompt), output_len) for prompt in prompts]
    return Workload.of_lengths(min(len(prompts), batch_size or BATCH_SIZE), lengths)


def measured_profile(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: planner.Constraints,
    notify: Notify = silent,
) -> Profile:
    """The costs of the model's operations on every device, in the constraints' groups and mode of activations.

    Of attention, over KV caches of the widths that the constraints allow.
    """
    return profile(
        model.spec,
        cluster,
        workload,
        group_size=constraints.group_size,
        zero=constraints.zero,
        activations=constraints.activations,
        kv_bits=constraints.kv_bits,
        shares=measured_shares(model.checkpoint, model.spec, notify),
        notify=notify,
    )


def measured_sensitivity(
    model: Model,
    constraints: planner.Constraints,
    notify: Notify = silent,
    *,
    method: SensitivityMethod | None = None,
    text: str | None = None,
) -> Sensitivity:
    """The sensitivity of each unit to each precision by a method of measure.indicators; measured, or from the cache.

    The default is that of `spec.default_method`. With that of a KV cache of 8 bits, if the constraints allow it.
    """
    precisions = tuple(map(constraints.precision, (bits for bits in BITS if bits < 16)))
    found = sensitivity(
        model.checkpoint,
        model.spec,
        precisions=precisions,
        method=method,
        text=text,
        per_linear=constraints.per_linear,
        notify=notify,
    )
    return with_caches(model, found, constraints, notify, text=text)


def with_caches(
    model: Model,
    omega: Sensitivity,
    constraints: planner.Constraints,
    notify: Notify = silent,
    *,
    text: str | None = None,
) -> Sensitivity:
    """Sensitivities with those of all KV caches that the constraints allow; what is missing is measured.

    Raises UsageError for those of a method by which that cannot be.
    """
    return with_cache(omega, model.checkpoint, model.spec, text, notify) if 8 in constraints.kv_bits else omega


def _check_table(device: Device, table: CostTable) -> None:
    """Raise UsageError if the costs given for a device are those of another kind of device."""

    def words(threads: int, isa: str | None, slowdown: float) -> str:
        return f"{threads} threads, {isa or 'the widest instructions'} and a slowdown of {slowdown:g}"

    had = table.threads, table.isa, table.slowdown
    has = device.threads, device.isa or table.isa, device.slowdown
    if had != has:
        raise UsageError(
            f"the costs of {device.name} were measured with {words(*had)}, but it has "
            f"{words(device.threads, device.isa, device.slowdown)}; measure them with `llmpq profile`"
        )


def make_problem(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: planner.Constraints,
    *,
    costs: Profile | None = None,
    omega: Sensitivity | None = None,
    notify: Notify = silent,
) -> planner.Problem:
    """All that the planner needs. Costs and sensitivities that are not given are measured. Raises UsageError."""
    if costs is None:
        costs = measured_profile(model, cluster, workload, constraints, notify)
    for device in cluster.devices:
        _check_table(device, costs.table(device.name))
    if omega is None:
        omega = measured_sensitivity(model, constraints, notify)
    omega = with_caches(model, omega, constraints, notify)
    return planner.Problem(model.spec, with_memory(cluster), workload, costs, omega, constraints)


def make_plan(
    model: Model, problem: planner.Problem, *, rehearsed: int = 1, advised: bool = True, notify: Notify = silent
) -> Solved:
    """The best plan found.

    With `rehearsed` > 1, at most that many plans whose predictions are nearly the best are run, baselines among them,
    and the fastest is returned. Raises InfeasibleError, if `advised` with what would make a plan possible, or
    UsageError; if a run fails, what it raises. But for these runs, the constraints' time limit holds for all of it.
    """
    constraints = problem.constraints
    clock = planner.Clock.of(constraints.time_limit_s)
    notify("solving for layer split, bits and micro-batches")
    try:
        solved = planner.solve(problem, clock)
    except InfeasibleError as error:
        if not advised:
            raise
        notify("looking for what would make a plan possible")
        raise InfeasibleError(str(error), tuple(map(_in_words, planner.relaxations(problem, clock)))) from None
    if rehearsed > 1:
        plans = near_ties(solved, planner.baseline_plans(problem).values())[:rehearsed]
        solved = fastest_measured(plans, model.checkpoint, model.spec, constraints, notify)
    return planner.with_chunks(solved, problem, clock)


def make_online_plan(problem: planner.Problem, demand: Demand, notify: Notify = silent) -> Solved:
    """The plan found that answers most requests of a demand within its limits. Raises as `planner.solve_online`."""
    notify("looking for the plan that answers most requests")
    return planner.solve_online(problem, demand)


def make_plan_within(
    model: Model,
    problem: planner.Problem,
    budget: QualityBudget,
    *,
    validation: TextQuality | None = None,
    test: TextQuality | None = None,
    notify: Notify = silent,
) -> tuple[Solved, planner.Problem]:
    """The best plan found whose weights keep to a quality budget, as measured; and the problem that it solves.

    Widths everywhere are measured first, for the fit from sensitivities to losses (tuning/quality_budget.py). Plans are
    chosen by `validation` and judged by `test`: by default QUALITY_TOKENS of these texts. Raises InfeasibleError,
    UsageError, and what `Engine` raises.
    """
    spec, constraints = model.spec, problem.constraints
    budget.check(spec)
    rounds = replace(constraints, time_limit_s=constraints.time_limit_s / ROUNDS)  # the limit is that of all of them

    def least() -> float | None:
        free = replace(problem, constraints=replace(constraints, omega_budget=math.inf))
        found = [planner.baseline_plans(each, kinds=["adabits"]) for each in free.by_cache()]
        return min((solved.solution.omega for of in found for solved in of.values()), default=None)

    if least() is None:  # said now, and not after minutes of measuring
        make_plan(model, replace(problem, constraints=replace(rounds, omega_budget=math.inf)), notify=notify)
    chosen_by = validation or TextQuality(model, validation_text(), QUALITY_TOKENS, notify)

    def loss(plan: Plan) -> Loss:
        found = chosen_by.of(plan)
        if budget.metric == "kl":
            return Loss(found.kl, found.kl_error, found.kl)
        ratio = 1 + found.perplexity_increase
        return Loss(math.log(ratio), found.perplexity_increase_error / ratio, found.kl)

    sensitive, kv_bits = problem.sensitivity, constraints.kv_bits[0]

    def of_width(precision: Precision) -> tuple[float, Loss]:
        device, mode = Device("cpu0", "cpu"), constraints.activations
        everywhere = Plan.single(spec, device, precision, slots=1, max_length=2, activations=mode, kv_bits=kv_bits)
        omega = sum(sensitive.of(unit, precision) + sensitive.of_cache(spec, unit, kv_bits) for unit in spec.units)
        return omega, loss(everywhere)

    def solve(omega: float) -> Solved:
        return make_plan(model, replace(problem, constraints=replace(rounds, omega_budget=omega)), notify=notify)

    widths = map(of_width, [precision for precision in constraints.precisions if precision.bits < 8])
    points = sorted(widths, key=lambda point: point[0])
    found = plan_within(budget, points, solve, lambda solved: loss(solved.plan), least)
    test = test or TextQuality(model, evaluation_text(), QUALITY_TOKENS, notify)
    measured = test.of(found.solved.plan)
    is_kl = budget.metric == "kl"
    quality = Quality(
        metric=budget.metric,
        limit=budget.limit,
        predicted=budget.of(found.predicted),
        validation=budget.of(found.measured),
        test=measured.kl if is_kl else measured.perplexity_increase,
        test_error=measured.kl_error if is_kl else measured.perplexity_increase_error,
        tokens=test.tokens,
        rounds=found.rounds,
    )
    solved = replace(found.solved, quality=quality)
    return solved, replace(problem, constraints=replace(constraints, omega_budget=solved.solution.omega_budget))


def _in_words(relaxation: planner.Relaxation) -> str:
    return f"{relaxation.change} would do ({relaxation.solved.prediction.tokens_per_s:.3g} tokens/s)"
