"""The table of servers under a load."""

from __future__ import annotations

from typing import Any

from bench import markdown


def serving(results: dict[str, Any]) -> list[str]:
    """Of each server: the rate that it keeps up with, ours beside llama.cpp's, and what requests wait then."""
    rows = []
    for row in results["rows"]:
        ratio, wanted = row.get("ratio"), row.get("goal")
        text = "" if ratio is None else f"{ratio:.2f}"
        if ratio is not None and wanted is not None:
            text = f"{markdown.goal(text, met=ratio >= wanted)} (≥ {wanted:g})"
        rows.append(
            [
                row["contender"],
                f"{row['rate']:.2f} ({100 * row['spread']:.0f} %)",
                text,
                _percentiles(row["ttft_s"], 1.0, ".2f"),
                _percentiles(row["tpot_s"], 1e3, ".0f"),
                f"{row['answered']} of {row['answered'] + row['lost']}",
            ]
        )
    (first, last), (shortest, longest) = results["prompt_tokens"], results["output_tokens"]
    header = ["server", "requests/s (spread)", "ratio", "TTFT, s", "TPOT, ms", "answered"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"Model: {results['model']}, threads: {results['threads']}, slots: {results['slots']}. Prompts of {first} to "
        f"{last} tokens, answers of {shortest} to {longest}, {results['seconds']:g} s of arrivals in a trial. TTFT and "
        "TPOT are p50 / p95 / p99 over the requests, at the rate of the row.",
        "",
        *markdown.table(header, rows),
        "",
        f"Versions: {versions}. {results['disturbed']} of {len(results['trials'])} trials were disturbed.",
        *(f"Missing: {name} ({why})." for name, why in results["missing"].items()),
    ]


def _percentiles(found: list[float] | None, factor: float, form: str) -> str:
    """Of those that are measured, the median, the 95th and the 99th."""
    if found is None:
        return ""
    p50, _, p95, p99 = found
    return " / ".join(f"{factor * value:{form}}" for value in (p50, p95, p99))
