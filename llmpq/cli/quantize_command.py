"""`llmpq quantize`: write a model's quantized weights, to be loaded as any other model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from llmpq.cli.constraint_options import add_constraints, read_constraints
from llmpq.cli.options import add_model, read_model, read_plan
from llmpq.cli.parser import Commands
from llmpq.report.progress_bar import progress
from llmpq.report.streams import OUT
from llmpq.spec import UnitPrecision, UsageError
from llmpq.spec.files import TEMPORARY
from llmpq.spec.formatting import format_bytes, format_width


def add(commands: Commands) -> None:
    parser = commands.add_command("quantize", execute, "write a model's quantized weights, to be loaded as a model")
    add_model(parser)
    weights = parser.add_argument_group("weights (--plan or --bits is required)")
    weights.add_argument("--plan", metavar="FILE", help="each unit as in this plan")
    add_constraints(weights, only=("fixed_bits", "group_size", "quantizer"))
    parser.add_argument("--text", metavar="FILE", help="plain text (default: built in)")
    parser.add_argument(
        "--format",
        choices=["llmpq", "gptq"],
        default="llmpq",
        help="gptq: for other programs, as transformers reads it; 4 or 8 bits, the tables in 16 (default: llmpq)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, or to go on with (required)")


def execute(arguments: Namespace) -> None:
    from llmpq.checkpoint.gptq_form import gptq_options
    from llmpq.measure.quantized_model import write_quantized
    from llmpq.measure.text import read_text

    plan = None if arguments.plan is None else read_plan(arguments)[0]
    if plan is None and not hasattr(arguments, "fixed_bits"):
        raise UsageError("it is not said how many bits to quantize to; give --bits or --plan")
    text = None if arguments.text is None else read_text(arguments.text)
    folder = Path(arguments.out)
    with progress() as notify:
        model = read_model(arguments, notify)
        options: dict[str, UnitPrecision]
        if plan is not None:
            plan.check_model(model.spec)
            options = {unit: plan.precision(unit) for unit in model.spec.units}
        else:
            constraints = read_constraints(arguments, takes_minutes=True)
            constraints.check(model.spec, ["any"], 1)
            if model.spec.source_hash:
                raise UsageError(f"{model.spec.name} is quantized already; quantize the model that it was made from")
            width = constraints.fixed_bits
            assert width is not None
            option = constraints.option(width)
            options = dict.fromkeys(model.spec.units, option)
            if arguments.format == "gptq":
                options = gptq_options(model.spec, option)
        _make(folder, model.checkpoint.path)
        try:
            write_quantized(model, options, folder, text=text, form=arguments.format, notify=notify)
        except OSError as error:
            raise UsageError(f"cannot write {folder}: {error.strerror or error}") from None
    size = sum((folder / f"{unit}.safetensors").stat().st_size for unit in options)
    widths = sorted({format_width(option.width) for option in options.values()})
    OUT.print(f"{model.spec.name} at {', '.join(widths)}, {format_bytes(size)}: {folder}")


def _make(folder: Path, source: Path) -> None:
    """The folder, new, or with nothing in it but what an earlier attempt has written. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() == source.resolve():
            raise UsageError(f"{folder} is the model itself; choose another folder")
        for left in folder.glob(f"{TEMPORARY}*"):  # of an attempt that was killed
            left.unlink()
        if any(folder.iterdir()) and not (folder / "embedding.safetensors").is_file():
            raise UsageError(f"{folder} holds other files; choose an empty folder")
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from None
