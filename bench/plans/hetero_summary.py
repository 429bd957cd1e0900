"""What the rows of bench/plans/hetero.py say together: our tokens/s over those of others, by cell and overall."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.plans.hetero_plans import AS_PREDICTED, EVEN, ONE_PHASE, ONE_SIZE, ONE_WIDTH, OURS

OVER_EVEN = 1.3  # wanted: the geometric mean of the cells
OVER_BEST = 0.98  # wanted: every cell

Row = dict[str, Any]


def ratio(row: Row, other: Row, source: str) -> float | None:
    """Tokens/s of one contender over those of another: predicted, or measured and then the median of their rounds."""
    if source == "predicted":
        return float(row[source]["tokens_per_s"] / other[source]["tokens_per_s"])
    if source not in row or source not in other:
        return None
    return float(statistics.median(a / b for a, b in zip(row[source]["each"], other[source]["each"])))


def by_cell(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows by cluster, model and workload, then by contender."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["cluster"], row["model"], row["workload"]), {})[row["contender"]] = row
    return found


def compared(contenders: dict[str, Row], source: str) -> Row | None:
    """In one cell: our tokens/s over those of an even split and of the best baseline, and which that is.

    None where ours are not known; no ratio to what is not.
    """
    ours = contenders[OURS]
    if source not in ours:
        return None
    baselines = {name: row for name, row in contenders.items() if name != OURS and not row["ablation"]}
    ratios = {name: found for name, row in baselines.items() if (found := ratio(ours, row, source)) is not None}
    best = min(ratios, key=ratios.__getitem__, default=None)
    return {"over_even": ratios.get(EVEN), "best": best, "over_best": None if best is None else ratios[best]}


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def ablation(cells: Sequence[dict[str, Row]], name: str, source: str, among: str | None = None) -> Row:
    """Tokens/s without one idea over those of the full plan: the mean over cells, and the least.

    With `among`, another source, only over cells where that has both, too.
    """
    ratios = []
    for contenders in cells:
        if among is not None and not ablation([contenders], name, among)["cells"]:
            continue
        if name in contenders and (found := ratio(contenders[name], contenders[OURS], source)) is not None:
            ratios.append(found)
    return {"cells": len(ratios), "mean": geometric_mean(ratios), "least": min(ratios, default=None)}


def summary(rows: Sequence[Row]) -> Row:
    """Both goals and how far they are reached, then what each idea brings; measured and predicted."""
    cells = by_cell(rows)
    found: Row = {"failed": sum("failed" in row for row in rows)}
    for source in ("measured", "predicted"):
        ratios = [ratio for contenders in cells.values() if (ratio := compared(contenders, source)) is not None]
        over_even = [r["over_even"] for r in ratios if r["over_even"] is not None]
        over_best = [r["over_best"] for r in ratios if r["over_best"] is not None]
        found[source] = {
            "cells": len(ratios),
            "over_even": {"cells": len(over_even), "mean": geometric_mean(over_even), "wanted": OVER_EVEN},
            "over_best": {
                "cells": len(over_best),
                "mean": geometric_mean(over_best),
                "least": min(over_best, default=None),
                "reached": sum(ratio >= OVER_BEST for ratio in over_best),
                "wanted": OVER_BEST,
            },
            "without": {
                name: ablation(list(cells.values()), name, source)
                for name in (ONE_PHASE, ONE_WIDTH, ONE_SIZE, AS_PREDICTED)
            },
        }
    return found
