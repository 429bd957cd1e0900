"""The table of servers under a load."""

from __future__ import annotations

import statistics
from typing import Any

from bench import markdown

Row = dict[str, Any]


def serving(results: dict[str, Any]) -> list[str]:
    """Of each server: the rate that it keeps up with, ours beside llama.cpp's, what it answers then, and how soon."""
    rows = []
    answered = {row["contender"]: _answered(row, results["trials"]) for row in results["rows"]}
    for row in results["rows"]:
        ratio, wanted = row.get("ratio"), row.get("goal")
        text = "" if ratio is None else f"{ratio:.2f}"
        if ratio is not None and wanted is not None:
            text = f"{markdown.goal(text, met=ratio >= wanted)} (≥ {wanted:g})"
        mine, theirs = answered[row["contender"]], answered.get(row.get("rival"))
        rows.append(
            [
                row["contender"],
                f"{row['rate']:.2f} ({100 * row['spread']:.0f} %)",
                text,
                "" if mine is None else f"{mine:.2f} ({_most(row, results['trials']):.2f})",
                f"{mine / theirs:.2f}" if mine and theirs else "",
                _percentiles(row["ttft_s"], 1.0, ".2f"),
                _percentiles(row["tpot_s"], 1e3, ".0f"),
                f"{row['answered']} of {row['answered'] + row['lost']}",
            ]
        )
    (first, last), (shortest, longest) = results["prompt_tokens"], results["output_tokens"]
    header = [
        "server",
        "requests/s (spread)",
        "ratio",
        "answered/s (most)",
        "ratio",
        "TTFT, s",
        "TPOT, ms",
        "requests answered",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"Model: {results['model']}, threads: {results['threads']}, slots: {results['slots']}. Prompts of {first} to "
        f"{last} tokens, answers of {shortest} to {longest}, {results['seconds']:g} s of arrivals in a trial. "
        "Answered/s, and TTFT and TPOT as p50 / p95 / p99 over the requests, are at the rate of the row; most is that "
        "of any trial. Requests answered are those of all trials, warm-up included.",
        "",
        *markdown.table(header, rows),
        "",
        f"Versions: {versions}. {results['disturbed']} of {len(results['trials'])} trials were disturbed.",
        *(f"Missing: {name} ({why})." for name, why in results["missing"].items()),
    ]


def _answered(row: Row, trials: list[Row]) -> float | None:
    """Requests/s at the rate of the row, from the first arrival to the last end: the median over its trials."""
    key = row["contender"], row["rate"]
    at_rate = [trial["requests_per_s"] for trial in trials if (trial["contender"], trial["rate"]) == key]
    found = [value for value in at_rate if value is not None]
    return statistics.median(found) if found else None


def _most(row: Row, trials: list[Row]) -> float:
    """Requests/s of the trial in which most were answered a second, at whatever rate they came."""
    return max(trial["requests_per_s"] or 0.0 for trial in trials if trial["contender"] == row["contender"])


def _percentiles(found: list[float] | None, factor: float, form: str) -> str:
    """Of those that are measured, the median, the 95th and the 99th."""
    if found is None:
        return ""
    p50, _, p95, p99 = found
    return " / ".join(f"{factor * value:{form}}" for value in (p50, p95, p99))
