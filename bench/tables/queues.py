"""The table of queues of mixed lengths on unequal clusters."""

from __future__ import annotations

from typing import Any

from bench import markdown


def queues(results: dict[str, Any]) -> list[str]:
    """Of each cluster and size of chunks: tokens/s beside prompts in steps of their own, and the busiest stage."""
    own = {row["cluster"]: row["tokens_per_s"] for row in results["rows"] if row["chunk_tokens"] == 0}
    rows = []
    for row in results["rows"]:
        busy, chunk = f"{100 * row['busy']:.0f} %", str(row["chunk_tokens"] or "none")
        if row["chosen"]:
            busy = markdown.goal(busy, met=row["busy"] >= results["goal"])
        rows.append(
            [
                row["cluster"],
                f"{chunk}, the plan's" if row["chosen"] else chunk,
                f"{row['tokens_per_s']:.0f} ({100 * row['spread']:.0f} %)",
                f"{row['tokens_per_s'] / own[row['cluster']]:.2f}",
                f"{100 * (row['predicted_tokens_per_s'] / row['tokens_per_s'] - 1):+.0f} %",
                f"{busy} ({100 * row['predicted_busy']:.0f} %)",
                " / ".join(f"{1e3 * row['tpot_s'][str(percent)]:.0f}" for percent in (50, 95, 99)),
            ]
        )
    header = ["cluster", "chunks", "tokens/s (spread)", "of none", "predicted", "busy (predicted)", "TPOT, ms"]
    about = f"{len(results['lengths'])} requests, {results['slots']} at once, medians of {results['repetitions']} runs."
    return [f"{about} TPOT: p50 / p95 / p99.", "", *markdown.table(header, rows)]
