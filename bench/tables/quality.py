"""The tables of what quantizers leave of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import markdown

OURS, SERVED = "llmpq gptq", "llmpq gptq by default"  # on the text that all get, and on as much as users' models get
THIRDS = "A, thirds"  # what goals for a single size are of
SMALLEST, LARGEST = 3.1, 5.0  # bits per weight between which ours are held against rivals
_OWN, _GPTQ = "llmpq ", "gptqmodel"
Rows = Sequence[dict[str, Any]]


def quality_rivals(results: dict[str, Any]) -> list[str]:
    """What was wanted and what was measured; then, for each bed, all methods by size."""
    rows = sorted(results["rows"], key=lambda row: row["bits_per_weight"])
    beds = {bed: [row for row in rows if row["bed"] == bed] for bed in sorted({row["bed"] for row in rows})}
    table = [[goal.text, f"≤ {goal.form.format(goal.most)}", *map(goal.cell, beds, beds.values())] for goal in GOALS]
    lines = [*markdown.table([f"{OURS}", "goal", *(f"bed {bed}" for bed in beds)], table), ""]
    for name, read in results["texts"].items():
        counts = ", ".join(f"{count} of the {text} text" for text, count in read["predictions"].items())
        lines.append(f"{name}: {read['calibration_tokens']} tokens of calibration text; predictions: {counts}.")
    header = ["bed", "bits per weight", "method", "bits", "group", "perplexity", "KL", "top-1", "KL, other text"]
    header += ["against rivals", "other text against gptqmodel", "CPU seconds"]
    lines += ["", *markdown.table(header, [[bed, *_cells(row, mine)] for bed, mine in beds.items() for row in mine])]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["", f"Rivals: {versions}."]
    lines += [f"Not measured: {name} ({why})." for name, why in results["missing"].items()]
    return lines


def _cells(row: dict[str, Any], rows: Rows) -> list[str]:
    group = "" if row["group_size"] is None else str(row["group_size"])
    found = [f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.3f}"]
    other = f"{row['other_kl']:.4f}" if "other_kl" in row else ""
    seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
    ratios = [(goal, goal.value(row, rows)) for goal in GOALS[:2]]
    against = ["" if r is None else markdown.goal(goal.form.format(r), met=r <= goal.most) for goal, r in ratios]
    return [f"{row['bits_per_weight']:.3f}", row["method"], str(row["bits"]), group, *found, other, *against, seconds]


def against_rivals(row: dict[str, Any], rows: Rows) -> float | None:
    """KL of one of ours over that of the rivals' front; None: it is not to be compared."""
    rivals = [(each["bits_per_weight"], each["kl"]) for each in rows if not each["method"].startswith((_OWN, "16"))]
    return front_ratio(row["bits_per_weight"], row["kl"], rivals) if _is_compared(row) else None


def against_gptq(row: dict[str, Any], rows: Rows) -> float | None:
    """The same on the other text, and of gptqmodel alone."""
    gptq = [each for each in rows if each["method"] == _GPTQ and "other_kl" in each]
    if not _is_compared(row) or "other_kl" not in row:
        return None
    return front_ratio(
        row["bits_per_weight"], row["other_kl"], [(each["bits_per_weight"], each["other_kl"]) for each in gptq]
    )


def _is_compared(row: dict[str, Any]) -> bool:
    return row["method"] == OURS and SMALLEST <= float(row["bits_per_weight"]) <= LARGEST


def front_ratio(size: float, kl: float, rivals: Sequence[tuple[float, float]]) -> float | None:
    """A divergence over that of the rivals' front (bits per weight, divergence) at a size; None: all are larger.

    Between two rivals of the front the logarithm of the divergence is a line; beyond the largest it is as there.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(rivals):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    before = [point for point in front if point[0] <= size]
    after = [point for point in front if point[0] > size]
    if not before:
        return None
    (x0, y0), (x1, y1) = before[-1], (after or before[-1:])[0]
    share = (size - x0) / (x1 - x0) if after else 0.0
    return kl / math.exp(math.log(y0) * (1 - share) + math.log(y1) * share)


@dataclass(frozen=True)
class Goal:
    """What is wanted of some of our rows: `value` at most `most`. It is None for rows that the goal is not about."""

    text: str
    most: float
    value: Callable[[dict[str, Any], Rows], float | None]
    form: str  # for str.format
    bed: str = ""  # that it is about, or all

    def cell(self, bed: str, rows: Rows) -> str:
        """Of the smallest and the largest value in a bed, in bold if the goal is missed; empty if it is of another."""
        if self.bed not in ("", bed):
            return ""
        found = [value for row in rows if (value := self.value(row, rows)) is not None]
        if not found:
            return ""
        shown = dict.fromkeys(self.form.format(value) for value in (min(found), max(found)))
        return markdown.goal(" to ".join(shown), met=max(found) <= self.most)


def _seconds_over_gptq(row: dict[str, Any], rows: Rows) -> float | None:
    size = row["bits"], row["group_size"]
    gptq = next((r for r in rows if (r["method"], r["bits"], r["group_size"]) == (_GPTQ, *size)), None)
    return row["cpu_seconds"] / gptq["cpu_seconds"] if row["method"] == OURS and gptq else None


def _of_bits(bits: int, field: str) -> Callable[[dict[str, Any], Rows], float | None]:
    """A field of our row in groups of 64, as users get it; of the perplexity, the percent that it rises by."""

    def value(row: dict[str, Any], rows: Rows) -> float | None:
        if (row["method"], row["bits"], row["group_size"]) != (SERVED, bits, 64):
            return None
        plain = next(r for r in rows if r["method"] == "16 bits")
        return 100 * (row[field] / plain[field] - 1) if field == "perplexity" else float(row[field])

    return value


GOALS = (
    Goal(
        f"KL over that of the rivals' front, {SMALLEST:g} to {LARGEST:g} bits per weight",
        0.6,
        against_rivals,
        "{:.2f}x",
    ),
    Goal("KL on the other text over gptqmodel's at that size", 0.9, against_gptq, "{:.2f}x"),
    Goal("CPU seconds over gptqmodel's", 2, _seconds_over_gptq, "{:.2f}x"),
    Goal("KL, 3 bits, groups of 64, by default", 0.12, _of_bits(3, "kl"), "{:.3f}", THIRDS),
    Goal("perplexity, 3 bits, groups of 64, by default", 10, _of_bits(3, "perplexity"), "{:+.1f} %", THIRDS),
    Goal("KL, 4 bits, groups of 64, by default", 0.033, _of_bits(4, "kl"), "{:.4f}", THIRDS),
    Goal("perplexity, 4 bits, groups of 64, by default", 2.5, _of_bits(4, "perplexity"), "{:+.2f} %", THIRDS),
    Goal("perplexity, 8 bits, groups of 64, by default", 0.1, _of_bits(8, "perplexity"), "{:+.3f} %"),
)
