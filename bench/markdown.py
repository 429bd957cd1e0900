"""Pieces of a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def ratios(rows: Sequence[dict[str, Any]]) -> str:
    """The range over the shapes, and the goal; bold where the worst shape misses it."""
    if not rows:
        return ""
    found = sorted(row["ratio"] for row in rows)
    text = f"{found[0]:.2f}" if len(found) == 1 else f"{found[0]:.2f}–{found[-1]:.2f}"
    goal = rows[0]["goal"]
    if goal is None:
        return text
    return f"{text} (≥ {goal:g})" if found[0] >= goal else f"**{text}** (≥ {goal:g})"


def seconds(row: dict[str, Any]) -> str:
    """Our own time, and the share of the ceiling in parentheses."""
    percent = row["percent_of_ceiling"]
    share = "" if percent is None else f" ({percent:.0f} %)"
    return f"{1e6 * row['seconds']:.0f} µs{share}"
