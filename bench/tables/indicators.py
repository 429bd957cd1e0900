"""The table of sensitivity methods."""

from __future__ import annotations

from typing import Any, get_args

from bench import markdown
from llmpq.spec import Precision, SensitivityMethod, default_method

RANK_GOAL, RANKED = 0.9, ("fisher", "kl")  # what one of these is to reach
TIE = 1.02  # over the least divergence of all plans at a size: no worse, to what a text of this length can tell


def indicators(results: dict[str, Any]) -> list[str]:
    """What was wanted; for each method, its rank correlation with what units do alone, its plans and its seconds."""
    methods = sorted(results["methods"], key=lambda row: get_args(SensitivityMethod).index(row["method"]))
    precisions, plans = list(methods[0]["spearman"]), [plan["average_bits"] for plan in methods[0]["plans"]]
    header = ["method"]
    header += [f"{name}, {p}" for p in precisions for name in ("rank KL", "rank loss")]
    header += [f"plan at {bits:g} bits" for bits in plans]
    cells = []
    for row in methods:
        ranks = [f"{row['spearman'][p][name]:.2f}" for p in precisions for name in ("kl", "loss")]
        found = [f"{plan['perplexity']:.2f} ({plan['kl']:.3f})" for plan in row["plans"]]
        cells.append([row["method"], *ranks, *found, f"{row['cpu_seconds']:.0f}"])
    read = f"{results['tokens']} tokens of validation text"
    return [
        f"Bed {results['form']}, {read}, perplexity {results['perplexity']:.2f}.",
        "",
        *markdown.table([*header, "processor seconds"], cells),
        "",
        *_goals(results, precisions),
    ]


def _goals(results: dict[str, Any], precisions: list[str]) -> list[str]:
    methods = {row["method"]: row for row in results["methods"]}
    ranking = [name for name in RANKED if name in methods]
    best = [max(methods[name]["spearman"][p]["kl"] for name in ranking) for p in precisions]
    least = [min(plan["kl"] for plan in plans) for plans in zip(*(row["plans"] for row in methods.values()))]
    default = default_method(map(Precision.parse, results["precisions"]))
    ratios = [plan["kl"] / kl for plan, kl in zip(methods[default]["plans"], least, strict=True)]
    ranked = ", ".join(markdown.goal(f"{rank:.2f}", met=rank >= RANK_GOAL) for rank in best)
    reached = ", ".join(markdown.goal(f"{ratio:.2f}x", met=ratio <= TIE) for ratio in ratios)
    cells = [
        [f"rank KL of {' or '.join(ranking)}", f"≥ {RANK_GOAL:g}", ranked],
        [f"KL of plans by {default}, the default, over the least of all methods' plans", f"≤ {TIE:g}x", reached],
    ]
    return markdown.table(["", "goal", "measured"], cells)
