"""What the comparisons with rivals read from their command lines, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.kernels.rivals.pairing import met

VERDICTS = {None: "", True: "met", False: "MISSED"}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",") if shape]


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
