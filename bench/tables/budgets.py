"""The table of plans for quality budgets."""

from __future__ import annotations

from typing import Any

from bench import markdown

ALLOWED, WANTED = 1.25, 0.95  # of the budget, for every plan; of plans, within it


def budgets(results: dict[str, Any]) -> list[str]:
    """How many keep to their budget, then every plan; bold where the test text says that it loses more."""
    rows = results["rows"]
    plans = [row for row in rows if "test" in row]
    within = sum(row["test"] <= row["budget"] for row in plans)
    worst = max(row["test"] / row["budget"] for row in plans)
    weights = {tuple(row[name] for name in ("model", "quantizer", "validation", "test")) for row in plans}
    share = markdown.goal(f"{within} of {len(plans)}", met=within >= WANTED * len(plans))
    most = markdown.goal(f"{worst:.2f}", met=worst <= ALLOWED)
    lines = [
        f"{share} plans, which have {len(weights)} different weights, are within their budget on the test text "
        f"(wanted: {100 * WANTED:g} %); the largest rise is "
        f"{most} of its budget (≤ {ALLOWED:g}). In {len(rows) - len(plans)} cases no plan keeps to it. Sensitivities "
        f"from the cache and a plan for another budget take {max(row['again_s'] for row in plans):.1f} s at most.",
        "",
    ]
    header = ["model", "quantizer", "cluster", "budget", "predicted", "validation", "test", "rounds", "bits"]
    places = list(dict.fromkeys((row["model"], row["quantizer"], row["cluster"]) for row in rows))
    rows = sorted(rows, key=lambda row: (places.index((row["model"], row["quantizer"], row["cluster"])), row["budget"]))
    return lines + markdown.table([*header, "tokens/s"], [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    head = [row["model"], row["quantizer"], row["cluster"], f"{100 * row['budget']:g} %"]
    if "test" not in row:
        return [*head, "none", *[""] * 5]
    found = [_percent(row[name]) for name in ("predicted", "validation", "test")]
    found[-1] = markdown.goal(found[-1], met=row["test"] <= row["budget"])
    found[-1] += f" (± {100 * row['test_standard_error']:.2f})"
    return [*head, *found, str(row["rounds"]), f"{row['mean_bits']:.2f}", f"{row['tokens_per_s']:.0f}"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
