"""What an explanation says in words and tables, the same ones for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpq.report.metric import metrics
from llmpq.spec import Plan, Solved
from llmpq.spec.formatting import format_bytes, format_cap, format_layers, format_seconds

if TYPE_CHECKING:
    import planner

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class TextTable:
    """A table of text. The first column is left-aligned, the others hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def omega(solved: Solved) -> float:
    """Summed sensitivity of a plan of the planner's."""
    return solved.solution.omega


def verdict(solved: Solved, found: planner.Explanation) -> Iterator[str]:
    """What bounds the plan, in sentences."""
    for phase in ("prefill", "decode"):
        for i, view in enumerate(found.stages):
            if phase in view.bounds:
                stage_s, link_s = getattr(view, f"{phase}_s"), getattr(view, f"{phase}_link_s")
                where = view.device if stage_s >= link_s else link(solved.plan, i)
                yield f"{phase.capitalize()} waits for {where}."
    if found.round_trip and found.decode_steps:
        yield "Decode takes as long as a token takes around all stages, which is longer than any of them works."
    for view in found.stages:
        if "memory" in view.bounds:
            yield f"The memory of {view.device} is full: not one more layer fits."


def link(plan: Plan, index: int) -> str:
    """The link behind a stage; the last one's leads the tokens back."""
    return f"{plan.stages[index].device} → {plan.stages[(index + 1) % len(plan.stages)].device}"


def explanation_tables(solved: Solved, found: planner.Explanation) -> dict[str, TextTable]:
    """By what they are about; all but the stages against the plan."""
    tables = {"stages": _stages(found), "baselines": _baselines(solved, found), "changes": _changes(solved, found)}
    return {**tables, "front": _front(solved, found)} if found.front else tables


def _stages(found: planner.Explanation) -> TextTable:
    rows = []
    for view in found.stages:
        links = (format_seconds(s) if len(found.stages) > 1 else "-" for s in (view.prefill_link_s, view.decode_link_s))
        seconds = (format_seconds(view.prefill_s), format_seconds(view.decode_s), *links)
        memory = (format_bytes(view.memory_bytes), format_cap(view.cap_bytes))
        rows.append((view.device, *seconds, *memory, ", ".join(view.bounds) or "-"))
    columns = ("device", "prefill", "decode", "link, prefill", "link, decode", "memory", "cap", "limit of")
    return TextTable("Stages, of one micro-batch", columns, tuple(rows))


def _row(solved: Solved, found: planner.Explanation, what: str, other: Solved) -> tuple[str, ...]:
    """A plan against this one, by what plans are compared by."""
    metric, *others = metrics(solved, found)
    against = "" if other is solved else f"{metric.percent(solved, other):+.1f} %"
    return what, metric.text(other), against, *(m.text(other) for m in others), f"{omega(other):.4g}"


def _columns(solved: Solved, found: planner.Explanation) -> tuple[str, ...]:
    metric, *others = metrics(solved, found)
    return "", metric.unit, "against", *(m.unit for m in others), "sensitivity"


def _baselines(solved: Solved, found: planner.Explanation) -> TextTable:
    rows = [(*_row(solved, found, "this plan", solved), format_layers(solved.plan))]
    rows += [(*_row(solved, found, kind, other), format_layers(other.plan)) for kind, other in found.baselines.items()]
    note = "Each baseline is the best of its kind under the same caps, budget and constraints, in the same cost model."
    return TextTable("Against the baselines", (*_columns(solved, found), "layers"), tuple(rows), note)


def _changes(solved: Solved, found: planner.Explanation) -> TextTable:
    columns = (*_columns(solved, found), f"{metrics(solved, found)[0].unit} more")
    note = "Each change alone, solved anew for the same objective."
    rows = [
        (*_row(solved, found, change.what, change.solved), _rate(solved, found, change)) for change in found.changes
    ]
    rows += [(what, "no plan found", *[""] * (len(columns) - 2)) for what in found.unmet]
    return TextTable("What would change it", columns, tuple(rows), note)


def _rate(solved: Solved, found: planner.Explanation, change: planner.Change) -> str:
    """What one more of it buys."""
    if not change.amount or change.kind == "device":
        return "-"
    metric = metrics(solved, found)[0]
    gain = metric.value(change.solved) - metric.value(solved)
    memory = (_GIB, "GiB") if change.amount >= 0.1 * _GIB else (_MIB, "MiB")
    unit, name = {"memory": memory, "quality": (0.01, "%"), "bits": (1, "bit")}[change.kind]
    return f"{gain / change.amount * unit + 0.0:+.3g} per {name}"  # no -0


def _front(solved: Solved, found: planner.Explanation) -> TextTable:
    rows = []
    for point in found.front:
        budget = point.solution.omega if point.solution.omega_budget is None else point.solution.omega_budget
        rows.append(_row(solved, found, f"sensitivity of at most {budget:.3g}", point))
    return TextTable(f"{metrics(solved, found)[0].title} over quality", _columns(solved, found), tuple(rows))
