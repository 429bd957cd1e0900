"""`llmpq export`: the flags and files by which another engine comes nearest to a plan."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq.cli.options import add_model, read_model
from llmpq.cli.parser import Commands
from llmpq.engines.targets import TARGETS
from llmpq.report.streams import OUT
from llmpq.spec import Plan, Solved, UsageError, load_either
from llmpq.spec.files import write_text

if TYPE_CHECKING:
    from llmpq.engines.export import Export


def add(commands: Commands) -> None:
    parser = commands.add_command("export", execute, "a plan as flags and files of another engine")
    parser.add_argument("plan", metavar="PLAN", help="a file of llmpq plan")
    parser.add_argument(
        "--to", required=True, choices=TARGETS, metavar="ENGINE", help=f"{', '.join(TARGETS)} (required)"
    )
    add_model(parser)
    parser.add_argument("--out", metavar="DIR", help="folder to write the files to (default: print them)")


def execute(arguments: Namespace) -> None:
    loaded = load_either(arguments.plan, Solved, Plan)
    plan = loaded.plan if isinstance(loaded, Solved) else loaded
    model = read_model(arguments)
    plan.check_model(model.spec)
    target = TARGETS[arguments.to]
    exported = target.export(plan, model)
    if arguments.out is None:
        for file, text in exported.files.items():
            OUT.print(f"--- {file}\n{text}", soft_wrap=True)
    else:
        _write(Path(arguments.out), exported)
    OUT.print(f"lost on the way to {target.name}:", *(f"- {what}" for what in exported.lost), sep="\n", soft_wrap=True)


def _write(folder: Path, exported: Export) -> None:
    """The files, scripts as such. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in exported.files.items():
            write_text(folder / file, text)
            if file.endswith(".sh"):
                (folder / file).chmod(0o755)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from None
    OUT.print(f"{', '.join(exported.files)}: {folder}\n", soft_wrap=True)
