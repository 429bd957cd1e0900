"""The table of how long stages take to have their weights ready."""

from __future__ import annotations

from typing import Any

from bench import markdown

READ = 1.05  # of a stage's own bytes, at most
LAYERS = 2  # of memory beyond the weights, at most


def start(results: dict[str, Any]) -> list[str]:
    """Of each stage: seconds warm and cold beside those of reading alone, bytes read, and memory beyond the weights."""
    rows = []
    for row in results["rows"]:
        read = row["read_bytes"] / row["own_bytes"]
        layers = (row["peak_bytes"] - row["weight_bytes"]) / row["layer_bytes"]
        rows.append(
            [
                f"{row['stage'] + 1} of {row['stages']}",
                *(f"{row[f'{kind}_load_s']:.2f} s ({row[f'{kind}_read_s']:.2f} s)" for kind in ("warm", "cold")),
                markdown.goal(f"{read:.3f}", met=read <= READ),
                markdown.goal(f"{layers:.1f}", met=layers <= LAYERS),
            ]
        )
    header = ["stage", "warm (reading)", "cold (reading)", f"read / own (≤ {READ})", f"beyond, in layers (≤ {LAYERS})"]
    return [f"Model: {results['model']}, threads: {results['threads']}.", "", *markdown.table(header, rows)]
