"""The table of what loading a quantized model saves."""

from __future__ import annotations

from typing import Any

from bench import markdown

FASTER = 5  # than quantizing, at least


def loading(results: dict[str, Any]) -> list[str]:
    """Seconds of quantizing and of loading what it made, and how much faster that is."""
    rows = []
    for row in results["rows"]:
        ratio = row["quantize_s"] / row["load_s"]
        times = [f"{row['quantize_s']:.1f} s", f"{row['load_s']:.2f} s"]
        faster = f"{markdown.goal(f'{ratio:.0f}x', met=ratio >= FASTER)} (≥ {FASTER}x)"
        rows.append([row["quantizer"], str(row["bits"]), *times, faster])
    header = ["quantizer", "bits", "quantizing", "loading", "faster"]
    return [f"Groups of {results['group_size']}, threads: {results['threads']}.", "", *markdown.table(header, rows)]
