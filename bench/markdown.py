"""Pieces of a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def goal(text: str, *, met: bool) -> str:
    """Bold where a goal is missed."""
    return text if met else f"**{text}**"


def ratios(rows: Sequence[dict[str, Any]]) -> str:
    """The range over the shapes, and the goal; bold where the worst shape misses it."""
    if not rows:
        return ""
    found = sorted(row["ratio"] for row in rows)
    text = f"{found[0]:.2f}" if len(found) == 1 else f"{found[0]:.2f}–{found[-1]:.2f}"
    wanted = rows[0]["goal"]
    return text if wanted is None else f"{goal(text, met=found[0] >= wanted)} (≥ {wanted:g})"


def product(row: dict[str, Any]) -> str:
    """What of ours a row is about. Symmetric weights go without saying."""
    zero = row.get("zero", "sym")
    return f"int{row['bits']} {'' if zero == 'sym' else f'{zero} '}{row['activations']}"


def seconds(row: dict[str, Any]) -> str:
    """Our own time, and the share of the ceiling in parentheses."""
    percent = row["percent_of_ceiling"]
    share = "" if percent is None else f" ({percent:.0f} %)"
    return f"{1e6 * row['seconds']:.0f} µs{share}"
