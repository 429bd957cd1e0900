"""The tables of what quantizers leave of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench import markdown

GOAL, SMALLEST, LARGEST = 0.6, 3.1, 5.0  # our divergence over the rivals', at these bits per weight
OURS = "llmpq gptq"
_OWN = "llmpq "


def quality_rivals(results: dict[str, Any]) -> list[str]:
    """For each bed: all methods by size, and for ours the divergence over that of the rivals' front at no more bits."""
    tokens, predictions = results["calibration_tokens"], results["predictions"]
    other = f", {predictions['other']} of the other text" if "other" in predictions else ""
    lines = [f"{tokens} tokens of calibration text, {predictions['test']} predictions of the test text{other}.", ""]
    header = ["bed", "bits per weight", "method", "bits", "group", "perplexity", "KL", "top-1", "KL, other text"]
    cells = []
    for bed in sorted({row["bed"] for row in results["rows"]}):
        rows = sorted((row for row in results["rows"] if row["bed"] == bed), key=lambda row: row["bits_per_weight"])
        rivals = [(row["bits_per_weight"], row["kl"]) for row in rows if not row["method"].startswith((_OWN, "16"))]
        for row in rows:
            cells.append([bed, *_cells(row, rivals)])
    lines += markdown.table([*header, "against rivals", "CPU seconds"], cells)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["", f"Rivals: {versions}."]
    lines += [f"Not measured: {name} ({why})." for name, why in results["missing"].items()]
    return lines


def _cells(row: dict[str, Any], rivals: Sequence[tuple[float, float]]) -> list[str]:
    size, kl = row["bits_per_weight"], row["kl"]
    ratio = front_ratio(size, kl, rivals) if row["method"].startswith(_OWN) else None
    against = "" if ratio is None else f"{ratio:.2f}x"
    if ratio is not None and row["method"] == OURS and SMALLEST <= size <= LARGEST:
        against = f"{markdown.goal(against, met=ratio <= GOAL)} (≤ {GOAL:g})"
    group = "" if row["group_size"] is None else str(row["group_size"])
    found = [f"{row['perplexity']:.2f}", f"{kl:.4f}", f"{row['top1']:.3f}"]
    other = f"{row['other_kl']:.4f}" if "other_kl" in row else ""
    seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
    return [f"{size:.3f}", row["method"], str(row["bits"]), group, *found, other, against, seconds]


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
