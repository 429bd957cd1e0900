"""The parser of every command: errors are one line, help has one line for each option where the terminal is wide."""

from __future__ import annotations

import argparse
import math
import textwrap
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NoReturn

from llmpq.spec import GROUP_SIZES, WIDTHS, KvBits, UsageError, Width


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and end the process."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=_Formatter, add_help=False, **keywords)
        # Whoever reads of it has just used it, and the help is to fit a screen.
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def format_help(self) -> str:
        return super().format_help().replace("\n\n", "\n", 1)  # the usage and what the command does together

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


class Commands:
    """The subcommands of a parser."""

    def __init__(self, parser: Parser) -> None:
        self._parsers = parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND", title="commands", prog=parser.prog
        )

    def add_command(self, name: str, execute: Callable[[Namespace], None], summary: str) -> Parser:
        """A new subcommand, which `execute` carries out."""
        description = f"{summary[0].upper()}{summary[1:]}."
        parser = self._parsers.add_parser(name, help=summary, usage="%(prog)s [options]", description=description)
        parser.set_defaults(execute=execute)
        return parser


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)
        self._action_max_length = 26  # the same column in every command

    def _format_text(self, text: str) -> str:
        """The description of a group stands right above its options."""
        return super()._format_text(text).rstrip("\n") + ("\n" if self._current_indent else "\n\n")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """A description; options in it stay whole."""
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    """A number above 0."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def nonnegative(text: str) -> float:
    """A finite number, 0 or more."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or more")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def rate(text: str) -> float:
    """A finite number above 0; inf for "max"."""
    if text == "max":
        return math.inf
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor max")
    return value


def group_size(text: str) -> int | None:
    """Weights in a group; None for "row"."""
    if text not in ("row", *map(str, GROUP_SIZES)):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, GROUP_SIZES))} or row")
    return None if text == "row" else int(text)


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def width(text: str) -> Width:
    """Bits, or native."""
    found = {str(width): width for width in WIDTHS}.get(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, WIDTHS))}")
    return found


def kv_bits(text: str) -> tuple[KvBits, ...]:
    """The widths that the KV cache may have: one, or both for "auto"."""
    choices: dict[str, tuple[KvBits, ...]] = {"16": (16,), "8": (8,), "auto": (16, 8)}
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
    return choices[text]


def unit_width(text: str) -> tuple[str, Width]:
    """NAME=WIDTH."""
    name, value = pair(text)
    return name, width(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
