"""The table of sensitivity methods."""

from __future__ import annotations

from typing import Any

from bench import markdown


def indicators(results: dict[str, Any]) -> list[str]:
    """For each method: rank correlation with what units do alone, what its plans do, and the seconds of a processor."""
    methods = results["methods"]
    precisions, plans = list(methods[0]["spearman"]), [plan["average_bits"] for plan in methods[0]["plans"]]
    header = ["method"]
    header += [f"{name}, {p}" for p in precisions for name in ("rank KL", "rank loss")]
    header += [f"plan's KL at {bits:g} bits" for bits in plans]
    cells = []
    for row in methods:
        ranks = [f"{row['spearman'][p][name]:.2f}" for p in precisions for name in ("kl", "loss")]
        kls = [f"{plan['kl']:.3f}" for plan in row["plans"]]
        cells.append([row["method"], *ranks, *kls, f"{row['cpu_seconds']:.0f}"])
    return [
        f"Bed {results['form']}, {results['tokens']} tokens of validation text.",
        "",
        *markdown.table([*header, "processor seconds"], cells),
    ]
