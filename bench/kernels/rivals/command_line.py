"""What the comparisons with rivals read from their command lines, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.kernels.rivals.pairing import met

VERDICTS = {None: "", True: "met", False: "MISSED"}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",") if shape]


def one_of(known: Sequence[Any], convert: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """For argparse: values with commas between them, each of those that are known."""

    def values(text: str) -> list[Any]:
        found = [convert(each) for each in text.split(",") if each]
        if wrong := [each for each in found if each not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]} is not one of {', '.join(map(str, known))}")
        return found

    return values


def report(
    rows: Iterable[dict[str, Any]],
    missing: Mapping[str, str],
    line: Callable[[dict[str, Any]], str],
    met: Callable[[dict[str, Any]], bool | None] = met,
) -> None:
    """Print how many goals were met, the rows that missed theirs, and what could not be timed."""
    judged = [row for row in rows if met(row) is not None]
    missed = [row for row in judged if not met(row)]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} goals met" + (", missed:" if missed else ""))
    for row in missed:
        print(line(row))
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
