"""`llmpq profile`: measure what a model's operations cost on each device, or correct what was measured by runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import (
    add_devices,
    add_log,
    add_model,
    add_out,
    add_workload,
    read_cluster,
    read_log_path,
    read_model,
    read_workload,
)
from llmpq.cli.output_files import check_files
from llmpq.cli.parser import Commands
from llmpq.report import console
from llmpq.report.progress_bar import progress
from llmpq.report.streams import OUT
from llmpq.spec import Profile, UsageError

if TYPE_CHECKING:
    from llmpq.tuning.run_log import RunRecord


def add(commands: Commands) -> None:
    parser = commands.add_command("profile", execute, "measure what a model's operations cost on each device")
    add_model(parser)
    add_constraints(parser, only=("group_size", "quantizer", "activations", "kv_bits"))
    devices = parser.add_argument_group("devices (one is required)")
    instead = add_devices(devices, required=True)
    instead.add_argument("--refit", metavar="COSTS", help="measure nothing; correct these costs by the log of runs")
    add_workload(parser)
    output = parser.add_argument_group("output")
    add_log(output)
    output.add_argument("--calibrate", action="store_true", help="correct what is measured by a few short runs")
    add_out(output, "costs")


def execute(arguments: Namespace) -> None:
    check_files(arguments)
    if arguments.refit is not None:
        _refit(arguments)
    else:
        _measure(arguments)


def _measure(arguments: Namespace) -> None:
    from llmpq.tuning.calibration import calibration_runs
    from llmpq.workflow import measured_profile

    if arguments.log is not None:
        raise UsageError("--log is for --refit; leave it out")
    cluster, constraints = read_cluster(arguments), read_constraints(arguments)
    with progress() as notify:
        model = read_model(arguments, notify)
        workload = read_workload(arguments, model)
        costs = measured_profile(model, cluster, workload, constraints, notify)
        records = []
        if arguments.calibrate:
            records = calibration_runs(model, cluster, costs, workload, constraints, notify)
    if arguments.calibrate:
        costs = _corrected(costs, records, arguments.out)
    else:
        costs.save(arguments.out)
    rows = sum(len(table.rows) for table in costs.tables.values())
    OUT.print(f"{rows} costs of {len(costs.tables)} devices: {arguments.out}")


def _refit(arguments: Namespace) -> None:
    from llmpq.tuning import run_log

    for name in ("prompt_len", "output_len", "lengths", "calibrate"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is for measuring, which --refit does not do; leave it out")
    _corrected(Profile.load(arguments.refit), run_log.read(read_log_path(arguments)), arguments.out)


def _corrected(before: Profile, records: Sequence[RunRecord], out: str) -> Profile:
    """The costs corrected by runs; writes them, then prints what that changed."""
    from llmpq.tuning import refitting

    after = refitting.refit(before, records)
    after.save(out)
    runs = {name: refitting.runs_of(table, records) for name, table in before.tables.items()}
    errors = {
        name: (refitting.mean_error(before.tables[name], of), refitting.mean_error(after.tables[name], of))
        for name, of in runs.items()
    }
    counts = {name: len(of) for name, of in runs.items()}
    OUT.print(console.refit_table(before, after, counts, errors, refitting.LEAST_RUNS))
    return after
