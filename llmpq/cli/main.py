"""The command line: `llmpq run | profile | sensitivity | plan | explain | eval`, one file each.

Exit codes: 0 ok, 2 usage or bad input, 3 no feasible plan, 4 out of memory, 5 a worker was lost, 128 + N ended by
signal N.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from llmpq import __version__
from llmpq.cli import signals
from llmpq.spec import InfeasibleError, LlmpqError

if TYPE_CHECKING:
    from llmpq.cli.parser import Parser

# Imported once signals are handled. They import what is heavy when they are executed: torch takes more than a second,
# and --help should not.
_COMMANDS = ("run", "profile", "sensitivity", "plan", "explain", "evaluate")


def build_parser() -> Parser:
    """The whole command line."""
    from llmpq.cli.parser import Commands, Parser

    parser = Parser(
        prog="llmpq",
        usage="%(prog)s COMMAND [options]",
        description="Plans and runs LLM inference on mismatched devices.",
        epilog="exit codes: 0 ok, 2 usage or bad input, 3 no feasible plan, 4 out of memory, 5 a worker was lost",
    )
    parser.add_argument("--version", action="version", version=f"llmpq {__version__}")
    commands = Commands(parser)
    for command in _COMMANDS:
        import_module(f"llmpq.cli.{command}_command").add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        with signals.raised():
            arguments = build_parser().parse_args(argv)
            arguments.execute(arguments)
        return 0
    except LlmpqError as error:
        print(f"llmpq: {error}", file=sys.stderr)
        if isinstance(error, InfeasibleError):
            for relaxation in error.relaxations:
                print(f"  {relaxation}", file=sys.stderr)
        return error.exit_code
    except signals.Signalled as signalled:
        with suppress(OSError):  # of a terminal that is gone
            print(f"llmpq: {signalled}", file=sys.stderr)
        return signalled.exit_code
    except KeyboardInterrupt:
        print("llmpq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has closed it (`llmpq run | head`), so there is nobody to report to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
