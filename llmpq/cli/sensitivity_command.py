"""`llmpq sensitivity`: measure how sensitive each layer is to quantization."""

from __future__ import annotations

from argparse import Namespace

from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import add_model, add_out, read_model
from llmpq.cli.output_files import check_files
from llmpq.cli.parser import Commands
from llmpq.report.progress_bar import progress
from llmpq.report.streams import OUT


def add(commands: Commands) -> None:
    parser = commands.add_command("sensitivity", execute, "measure how sensitive each layer is to quantization")
    add_model(parser)
    add_constraints(parser, only=("group_size",))
    add_out(parser, "sensitivities")


def execute(arguments: Namespace) -> None:
    from llmpq.workflow import measured_sensitivity

    check_files(arguments)
    with progress() as notify:
        model = read_model(arguments, notify)
        omega = measured_sensitivity(model, read_constraints(arguments).group_size, notify)
    omega.save(arguments.out)
    OUT.print(f"sensitivities of {len(omega.omega)} units: {arguments.out}")
