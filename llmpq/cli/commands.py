"""What each command does, from parsed arguments to files and text. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from llmpq.checkpoint.model_files import open_model
from llmpq.cli.arguments import (
    load_plan,
    planned_workload,
    read_cluster,
    read_constraints,
    run_log_path,
)
from llmpq.cli.output_files import check_writable
from llmpq.measure.perplexity import perplexity
from llmpq.measure.text import evaluation_text, read_text
from llmpq.report import console
from llmpq.runtime.engine import Engine
from llmpq.spec import (
    Device,
    Plan,
    Profile,
    Sensitivity,
    UsageError,
    Workload,
)
from llmpq.tuning import refitting, run_log
from llmpq.tuning.calibration import calibration_runs
from llmpq.tuning.run_log import RunRecord
from llmpq.workflow import make_plan, measured_profile, measured_sensitivity


def profile(arguments: Namespace) -> None:
    """`llmpq profile`: measure what a model's operations cost on each device, or correct what was measured by runs."""
    check_writable(arguments.out)
    if arguments.refit is not None:
        _refit(arguments)
        return
    if arguments.log is not None:
        raise UsageError("--log is for --refit; leave it out")
    cluster = read_cluster(arguments)
    with console.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        workload, constraints = planned_workload(arguments, model), read_constraints(arguments)
        costs = measured_profile(model, cluster, workload, constraints, notify)
        if arguments.calibrate:
            costs = _refitted(costs, calibration_runs(model, cluster, costs, workload, constraints, notify))
    costs.save(arguments.out)
    rows = sum(len(table.rows) for table in costs.tables.values())
    console.OUT.print(f"{rows} costs of {len(costs.tables)} devices: {arguments.out}")


def _refit(arguments: Namespace) -> None:
    for name in ("prompt_len", "output_len", "lengths", "calibrate"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is for measuring, which --refit does not; leave it out")
    _refitted(Profile.load(arguments.refit), run_log.read(run_log_path(arguments))).save(arguments.out)


def _refitted(before: Profile, records: Sequence[RunRecord]) -> Profile:
    """The costs corrected by runs; prints what that changed."""
    after = refitting.refit(before, records)
    runs = {name: refitting.runs_of(table, records) for name, table in before.tables.items()}
    errors = {
        name: (refitting.mean_error(before.tables[name], of), refitting.mean_error(after.tables[name], of))
        for name, of in runs.items()
    }
    counts = {name: len(of) for name, of in runs.items()}
    console.OUT.print(console.refit_table(before, after, counts, errors, refitting.LEAST_RUNS))
    return after


def sensitivity(arguments: Namespace) -> None:
    """`llmpq sensitivity`: measure how much each layer minds being quantized."""
    check_writable(arguments.out)
    with console.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        omega = measured_sensitivity(model, read_constraints(arguments).group_size, notify)
    omega.save(arguments.out)
    console.OUT.print(f"sensitivities of {len(omega.omega)} units: {arguments.out}")


def plan(arguments: Namespace) -> None:
    """`llmpq plan`: solve for layer split, bits and micro-batches."""
    check_writable(arguments.out)
    cluster, constraints = read_cluster(arguments), read_constraints(arguments)
    costs = None if arguments.costs is None else Profile.load(arguments.costs)
    omega = None if arguments.sensitivity is None else Sensitivity.load(arguments.sensitivity)
    with console.status(False) as notify:
        model = open_model(arguments.model, arguments.load_format)
        workload = planned_workload(arguments, model)
        solved, _ = make_plan(
            model,
            cluster,
            workload,
            constraints,
            costs=costs,
            omega=omega,
            rehearsed=arguments.rehearse,
            notify=notify,
        )
    solved.save(arguments.out)
    console.OUT.print(console.plan_table(solved))


_EVALUATED_WINDOW = 512  # tokens


def evaluate(arguments: Namespace) -> None:
    """`llmpq eval`: perplexity of the weights as they are served, through the pipeline that serves them."""
    text = evaluation_text() if arguments.text is None else read_text(arguments.text)
    given = None if arguments.plan is None else load_plan(arguments)
    model = open_model(arguments.model, arguments.load_format)
    window = min(_EVALUATED_WINDOW, model.spec.max_positions)
    if given is not None:
        given.check_model(model.spec)
        plan = _for_evaluation(given, window)
    else:
        device, constraints = Device("cpu0", "cpu", threads=os.cpu_count() or 1), read_constraints(arguments)
        precision = constraints.precision(arguments.bits).on(device.kind, constraints.activations)
        plan = Plan.single(model.spec, device, precision, slots=1, max_length=window)
    token_ids = model.tokenizer.encode(text)[: arguments.max_tokens]
    with Engine(plan, model.checkpoint, model.spec) as engine:
        result = perplexity(engine.score, token_ids, window=window)
    served = {"plan": arguments.plan} if given else {"bits": precision.bits, "activations": precision.activations}
    print(json.dumps({"model": model.spec.name, **served, **result.to_dict()}))


def _for_evaluation(plan: Plan, window: int) -> Plan:
    """The same stages and weights with one long slot, and without the caps, which were not planned for that."""
    devices = tuple(replace(device, memory_bytes=None) for device in plan.cluster.devices)
    return replace(
        plan,
        cluster=replace(plan.cluster, devices=devices),
        workload=Workload(1, max(1, window - 1), 1),
        slots=1,
        max_length=window,
        prefill_microbatch=1,
        decode_microbatch=1,
    )
