"""The command line: `llmpq run | profile | sensitivity | quantize | plan | explain | eval | export | serve | doctor`.

A file for each. Exit codes: 0 ok, 2 usage or bad input, 3 no feasible plan, 4 out of memory, 5 a worker was lost,
6 some prompts were not answered, 7 doctor has found what keeps runs from working, 128 + N ended by signal N.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from llmpq import __version__
from llmpq.cli import signals
from llmpq.spec import InfeasibleError, LlmpqError, UsageError

if TYPE_CHECKING:
    from llmpq.cli.parser import Parser

# Imported once signals are handled. They import what is heavy when they are executed: torch takes more than a second,
# and --help should not.
_COMMANDS = ("run", "profile", "sensitivity", "quantize", "plan", "explain", "evaluate", "export", "serve", "doctor")


def build_parser() -> Parser:
    """The whole command line."""
    from llmpq.cli.parser import Commands, Parser

    parser = Parser(
        prog="llmpq",
        usage="%(prog)s COMMAND [options]",
        description="Plans and runs LLM inference on mismatched devices.",
        epilog="exit codes: 0 ok, 2 usage or bad input, 3 no feasible plan, 4 out of memory, 5 a worker was lost, "
        "6 some prompts were not answered, 7 runs would not work here (doctor)",
    )
    parser.add_argument("--version", action="version", version=f"llmpq {__version__}")
    commands = Commands(parser)
    for command in _COMMANDS:
        import_module(f"llmpq.cli.{command}_command").add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""

    def execute() -> None:
        arguments = build_parser().parse_args(argv)
        arguments.execute(arguments)

    return carry_out(execute)


def carry_out(work: Callable[[], None]) -> int:
    """Do a command's work: what goes wrong is one line. Returns the exit code."""
    _open_standard_streams()
    try:
        code = _run(work)
    finally:
        problem = _flush()
    if problem is None or isinstance(problem, BrokenPipeError):
        return code  # a reader that has closed our output (`llmpq run | head`) has all that it wants
    _say(f"llmpq: cannot write to standard output: {problem.strerror}")
    return code or UsageError.exit_code


def _run(work: Callable[[], None]) -> int:
    try:
        with signals.raised():
            work()
        return 0
    except LlmpqError as error:
        _say(f"llmpq: {error}")
        if isinstance(error, InfeasibleError):
            for relaxation in error.relaxations:
                _say(f"  {relaxation}")
        return error.exit_code
    except signals.Signalled as signalled:
        _say(f"llmpq: {signalled}")
        return signalled.exit_code
    except KeyboardInterrupt:
        _say("llmpq: interrupted")
        return 130


def _say(line: str) -> None:
    from llmpq.report.streams import ERR

    ERR.print(line, soft_wrap=True)


def _flush() -> OSError | None:
    """Why not all of standard output could be written, if that is so."""
    from llmpq.report.streams import OUT

    OUT.flush()
    return OUT.problem


def _open_standard_streams() -> None:
    """Streams that were closed lead nowhere, so that no other file gets their number; what one cannot encode is "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
