"""The table of predictions beside runs."""

from __future__ import annotations

from typing import Any

from bench import markdown


def predictions(results: dict[str, Any]) -> list[str]:
    """What is asked for and reached, bold where it is not, then every run, then those that failed."""
    rows = results["rows"]
    if not rows:
        return ["No run ended well."]
    prefill, decode, spread = (
        sum(abs(row[field]) for row in rows) / len(rows) for field in ("prefill_error", "decode_error", "spread")
    )
    uncorrected = [abs(row["uncorrected_error"]) for row in rows]
    lines = [
        f"{len(rows)} runs, {results['repetitions']} times each. On average, tokens/s of one run spread by "
        f"{100 * spread:.1f} %, and predictions are off by {100 * prefill:.1f} % in prefill and by "
        f"{100 * decode:.1f} % in decode. From tables as they were measured, without correction, those of tokens/s are "
        f"off by {100 * sum(uncorrected) / len(rows):.1f} % on average and by {100 * max(uncorrected):.1f} % at worst.",
        "",
        *markdown.table(["error of", "reached", "wanted"], [_goal(goal) for goal in results["goals"]]),
        "",
        *markdown.table(_HEADER, [_run(row) for row in rows]),
    ]
    failed = [f"Failed: {name} ({error})." for name, error in results["failures"].items()]
    return [*lines, "", *failed] if failed else lines


def _goal(goal: dict[str, Any]) -> list[str]:
    reached = f"{100 * goal['reached']:.1f} %"
    return [
        goal["what"],
        reached if goal["reached"] <= goal["limit"] else f"**{reached}**",
        f"≤ {100 * goal['limit']:.1f} %",
    ]


_HEADER = [
    "model, cluster, batch, prompt, output",
    "bits",
    "micro-batches",
    "tokens/s",
    "spread",
    "error",
    "prefill",
    "decode",
    "peak memory",
    "simulated",
    "replayed",
    "waits",
]


def _run(row: dict[str, Any]) -> list[str]:
    def percent(field: str) -> str:
        return "" if row[field] is None else f"{100 * row[field]:+.1f} %"

    return [
        row["name"],
        row["split"],
        f"{row['prefill_microbatch']}, {row['decode_microbatch']}",
        f"{row['tokens_per_s']:.1f}",
        f"{100 * row['spread']:.1f} %",
        *map(percent, ("throughput_error", "prefill_error", "decode_error")),
        ", ".join(f"{100 * error:+.1f} %" for error in row["memory_errors"]),
        *map(percent, ("simulator_error", "replay_error", "waits_error")),
    ]
