"""`llmpq sensitivity`: measure how sensitive each layer is to quantization."""

from __future__ import annotations

from argparse import Namespace
from typing import get_args

from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import add_model, add_out, read_model
from llmpq.cli.output_files import check_files
from llmpq.cli.parser import Commands
from llmpq.report.progress_bar import progress
from llmpq.report.streams import OUT
from llmpq.spec import SensitivityMethod


def add(commands: Commands) -> None:
    parser = commands.add_command("sensitivity", execute, "measure how sensitive each layer is to quantization")
    add_model(parser)
    parser.add_argument(
        "--method",
        choices=get_args(SensitivityMethod),
        metavar="METHOD",
        help=f"{', '.join(get_args(SensitivityMethod))} (default: kl for gptq, else fisher)",
    )
    parser.add_argument("--text", metavar="FILE", help="plain text (default: built in)")
    add_constraints(parser, only=("group_size", "quantizer", "per_linear", "kv_bits"))
    add_out(parser, "sensitivities")


def execute(arguments: Namespace) -> None:
    from llmpq.measure.text import read_text
    from llmpq.workflow import measured_sensitivity

    check_files(arguments)
    text = None if arguments.text is None else read_text(arguments.text)
    with progress() as notify:
        model, constraints = read_model(arguments, notify), read_constraints(arguments)
        omega = measured_sensitivity(model, constraints, notify, method=arguments.method, text=text)
    omega.save(arguments.out)
    OUT.print(f"sensitivities of {len(model.spec.units)} units: {arguments.out}")
