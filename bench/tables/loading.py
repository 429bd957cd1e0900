"""The table of how long quantizing a model takes, and what loading the result saves."""

from __future__ import annotations

from typing import Any

from bench import markdown
from llmpq.spec.formatting import format_bytes

FASTER = 5  # than quantizing, at least
QUANTIZE_S = 120  # at most


def loading(results: dict[str, Any]) -> list[str]:
    """Seconds of quantizing, its memory, seconds of loading what it made, and how much faster that is."""
    rows = []
    for row in results["rows"]:
        seconds, ratio = row["quantize_s"], row["quantize_s"] / row["load_s"]
        quantizing = markdown.goal(f"{seconds:.1f} s", met=seconds <= QUANTIZE_S)
        faster = markdown.goal(f"{ratio:.0f}x", met=ratio >= FASTER)
        peak = format_bytes(row["peak_bytes"])
        rows.append([row["quantizer"], str(row["bits"]), quantizing, peak, f"{row['load_s']:.2f} s", faster])
    header = ["quantizer", "bits", f"quantizing (≤ {QUANTIZE_S} s)", "peak memory", "loading", f"faster (≥ {FASTER}x)"]
    return [f"Groups of {results['group_size']}, threads: {results['threads']}.", "", *markdown.table(header, rows)]
