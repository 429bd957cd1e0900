"""Tables of a whole step's parts, and of attention beside the processor's ceilings."""

from __future__ import annotations

from typing import Any

from bench import markdown

OVERHEAD = 0.08  # share of a step at most that neither linears nor attention take
_PARTS = ("linears", "attention", "activation", "rms_norm", "python")


def step_times(results: dict[str, Any]) -> list[str]:
    """Milliseconds of each step and of its parts, by processor; bold where the overhead exceeds its goal."""
    lines: list[str] = []
    for run in results["runs"]:
        eager = {_key(row): row["seconds"] for row in run["rows"] if row["eager"]}
        body = []
        for row in run["rows"]:
            if row["eager"]:
                continue
            overhead = markdown.goal(f"{100 * row['overhead']:.1f} %", met=row["overhead"] <= OVERHEAD)
            parts = [f"{1e3 * row['parts'][part]:.2f}" for part in _PARTS]
            before = f"{1e3 * eager[_key(row)]:.2f}" if _key(row) in eager else ""
            seconds = f"{1e3 * row['seconds']:.2f}"
            body.append([row["step"], row["activations"], str(row["threads"]), seconds, before, *parts, overhead])
        header = ["step", "mode", "threads", "ms", "eager, ms", *_PARTS, "overhead"]
        lines += [f"**{run['device']}**", "", *markdown.table(header, body), ""]
        for threads, seconds in run.get("hand_over_seconds", {}).items():
            lines += [f"Handing an operation to {threads} threads and back takes {1e6 * seconds:.2f} µs (median).", ""]
    return lines[:-1]


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["step"], row["activations"], row["threads"]


def attention(results: dict[str, Any]) -> list[str]:
    """Shares of the ceilings; bold where the goal is missed."""
    body = []
    for row in results["rows"]:
        share = f"{100 * row['share']:.0f} %"
        if row["goal"] is not None:
            share = f"{markdown.goal(share, met=row['share'] >= row['goal'])} (≥ {100 * row['goal']:.0f} %)"
        what = f"{row['phase']}, {row['batch']} x {row['tokens'] if row['phase'] == 'prefill' else row['context']}"
        rate, unit = ("flop_per_s", "GFLOP/s") if row["phase"] == "prefill" else ("bytes_per_s", "GB/s")
        speed = f"{row[rate] / 1e9:.0f} of {row['ceiling_per_s'] / 1e9:.0f} {unit}"
        cells = [row["shape"], str(row["threads"]), what, str(row["kv_bits"])]
        body.append([*cells, f"{1e6 * row['seconds']:.0f} µs", speed, share])
    return markdown.table(["shape", "threads", "sequences x tokens", "KV bits", "time", "reached", "share"], body)
