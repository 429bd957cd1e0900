"""The tables of the measured win: every cell, and what each idea brings."""

from __future__ import annotations

from typing import Any

from bench import markdown
from bench.plans.hetero_plans import AS_PREDICTED, EVEN, ONE_PHASE, ONE_SIZE, ONE_WIDTH, OURS
from bench.plans.hetero_summary import OVER_BEST, ablation, by_cell, compared, geometric_mean

IDEAS = {
    ONE_PHASE: "awareness of both phases",
    ONE_WIDTH: "mixed bits",
    ONE_SIZE: "search of micro-batches",
    AS_PREDICTED: "rehearsal",
}

Row = dict[str, Any]


def hetero(results: Row) -> list[str]:
    """Both goals, what was found in every cell, and our plans without one idea each."""
    found = results["summary"]
    over_even, over_best = (found["measured"][key] for key in ("over_even", "over_best"))
    lines = [
        f"Emulated devices. Over uniform bits with an even split: {_ratio(over_even['mean'])} (wanted: ≥ "
        f"{over_even['wanted']:g}), the geometric mean of {over_even['cells']} cells. Over the best baseline: "
        f"{_ratio(over_best['mean'])}, at least {over_best['wanted']:g} in {over_best['reached']} of "
        f"{over_best['cells']} cells (wanted: all), {_ratio(over_best['least'])} in the worst. "
        f"{found['failed']} plans failed.",
        "",
    ]
    cells = by_cell(results["rows"])
    other = [ratios for of in cells.values() if not _is_baseline(of) and (ratios := compared(of, "measured"))]
    if len(other) < len(cells):
        even, best = (geometric_mean([r[key] for r in other if r[key]]) for key in ("over_even", "over_best"))
        lines += [
            f"In {len(cells) - len(other)} cells our plan is the best baseline itself; in the others it is "
            f"{_ratio(even)} and {_ratio(best)}.",
            "",
        ]
    header = ["cluster", "model", "workload", "budget", "ours", "predicted", "busy", "even split", "best baseline"]
    lines += markdown.table([*header, "over even", "over best"], [[*key, *_cell(of)] for key, of in cells.items()])
    body = []
    for name, idea in IDEAS.items():
        of = list(cells.values())
        both = (ablation(of, name, "measured"), ablation(of, name, "predicted", among="measured"))
        body.append([idea, *map(_without, (*both, ablation(of, name, "predicted")))])
    columns = ["without", "measured", "predicted for the same cells", "predicted for all"]
    lines += ["", "Tokens/s without one idea over those of the full plan, geometric means:", ""]
    lines += [*markdown.table(columns, body), ""]
    lines += [f"{row['cluster']}, {row['model']}, {row['workload']}: {row['why']}." for row in results["infeasible"]]
    sensitivities = "; ".join(f"{model}: {kind}" for model, kind in results["sensitivities"].items())
    repetitions = f"Repetitions: {results['repetitions']}, and as many again of ours and baselines that may be best."
    return [*lines, f"Sensitivities: {sensitivities}. {repetitions}"]


def _is_baseline(contenders: dict[str, Row]) -> bool:
    """Whether the best baseline is our very plan, which then ran once for both."""
    ratios = compared(contenders, "measured")
    return ratios is not None and ratios["best"] is not None and contenders[ratios["best"]].get("same_as") == OURS


def _cell(contenders: dict[str, Row]) -> list[str]:
    """Columns from the budget on; bold where a goal is missed."""
    ours, ratios = contenders[OURS], compared(contenders, "measured")
    budget, expected = f"{ours['budget_bits']} bit", f"{ours['predicted']['tokens_per_s']:.0f}"
    if ratios is None:
        return [budget, f"failed: {ours['failed']}" if "failed" in ours else "", expected, *[""] * 5]
    busy = ", ".join(f"{100 * share:.0f} %" for share in ours["measured"]["busy"].values())
    best = "" if ratios["best"] is None else f"{ratios['best']} {_speed(contenders[ratios['best']])}"
    missed = ratios["over_best"] is not None and ratios["over_best"] < OVER_BEST
    over_best = markdown.goal(_ratio(ratios["over_best"]), met=not missed)
    even = _speed(contenders[EVEN]) if EVEN in contenders else ""
    return [budget, _speed(ours), expected, busy, even, best, _ratio(ratios["over_even"]), over_best]


def _speed(row: Row) -> str:
    """Tokens/s with its spread, or that the plan failed."""
    if "measured" not in row:
        return "failed" if "failed" in row else ""
    return f"{row['measured']['tokens_per_s']:.0f} (± {50 * row['measured']['spread']:.0f} %)"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _without(found: Row) -> str:
    return f"{_ratio(found['mean'])} ({found['cells']} cells, least {_ratio(found['least'])})" if found["cells"] else ""
