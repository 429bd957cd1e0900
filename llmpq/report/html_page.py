"""An explanation as one HTML file that needs nothing else: plots, the tables of the terminal, a line on each of them.

A pure function of a plan and its explanation; plotly's program is written into the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

import planner
from llmpq.report import figures
from llmpq.report.metric import COST, metrics
from llmpq.report.text_tables import TextTable, explanation_tables, verdict
from llmpq.spec import Plan, Solved
from llmpq.spec.formatting import format_bytes, format_lengths, format_seconds

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: #fff; color: #2b2f33;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 3rem 0 0.25rem; }
p { margin: 0.25rem 0 0.75rem; max-width: 48rem; }
.quiet { color: #68707a; }
dl { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0; }
dt { color: #68707a; font-size: 0.85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e8ebee; }
th { font-weight: 500; color: #68707a; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; color: #68707a; }
figure { margin: 0; }
"""


def page(solved: Solved, found: planner.Explanation) -> str:
    """The whole file. `plan` is one of the planner's, with its prediction and solution."""
    title = f"Plan for {solved.plan.model}"
    body = "\n".join([*_head(solved, found, title), *_sections(solved, found), *_foot(solved)])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
{body}
</body>
</html>
"""


def _head(solved: Solved, found: planner.Explanation, title: str) -> Iterator[str]:
    """What is expected of the plan as a whole, and what bounds it."""
    plan, work, expected, solution = solved.plan, solved.plan.workload, solved.prediction, solved.solution
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="quiet">{work.batch_size} sequences: {format_lengths(work)}; micro-batches of '
        f"{plan.prefill_microbatch} in prefill and {plan.decode_microbatch} in decode{_caches(plan)}.</p>"
    )
    budget = "" if solution.omega_budget is None else f" of {solution.omega_budget:.3g}"
    facts = {
        "throughput": f"{expected.tokens_per_s:.1f} tokens/s",
        "all first tokens after": format_seconds(expected.prefill_s),
        "each further token": format_seconds(expected.decode_s / max(1, work.rounds)),
        "summed sensitivity": f"{solution.omega:.3g}{budget}",
        "at most this far from the best": f"{100 * solution.gap:.2f} %",
    }
    if solved.cost_per_million_tokens is not None:
        facts["a million tokens cost"] = COST.text(solved)
    yield f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts.items())}</dl>"
    yield f"<p>{escape(' '.join(verdict(solved, found)))}</p>"


def _caches(plan: Plan) -> str:
    """What is said of KV caches, if they are not all of 16 bits."""
    bits = sorted({stage.kv_bits for stage in plan.stages})
    return "" if bits == [16] else f"; KV caches of {' and '.join(map(str, bits))} bits"


def _sections(solved: Solved, found: planner.Explanation) -> Iterator[str]:
    tables, metric = explanation_tables(solved, found), metrics(solved, found)[0]
    yield from _section(
        "What bounds each stage",
        "How long every stage and link works in one batch. One that reaches the line never rests; the others wait.",
        figures.work(solved, found),
    )
    yield from _section(
        "Memory", "What each stage will hold, and what it may.", figures.memory(found), tables["stages"]
    )
    yield from _section(
        "Against the baselines",
        "What other ways to split the model would reach here.",
        figures.baselines(solved, found),
        tables["baselines"],
    )
    yield from _section(
        "What more would buy",
        "Each bar is the best plan after one change, solved anew for the same objective. Bars to the "
        f"{'right' if metric.more_is_better else 'left'} are {metric.better}.",
        figures.changes(solved, found),
        tables["changes"],
    )
    if found.front:
        yield from _section(
            f"{metric.title} over quality",
            f"Each step is the {metric.best} plan known that loses no more than that.",
            figures.front(solved, found),
            tables["front"],
        )
    yield from _section(
        "Bits of each unit",
        "Above, the width each layer is stored in; below, what that loses: the bars below add up to the sensitivity.",
        figures.bits(found),
    )
    yield f"<details><summary>As a table</summary>{_table(_units(found))}</details>"
    yield from _section(
        "Timeline",
        f"What is expected to happen when: prefill, and {figures.ROUNDS} rounds of decode. Gaps are waiting.",
        figures.timeline(solved, found),
    )


def _section(title: str, line: str, figure: go.Figure, table: TextTable | None = None) -> Iterator[str]:
    """A figure under a line that says how to read it, and its numbers below."""
    name = title.lower().replace(" ", "-")
    yield f'<h2 id="{name}">{title}</h2><p class="quiet">{line}</p>'
    config = {"displaylogo": False, "displayModeBar": False, "responsive": True}
    plot = to_html(figure, config=config, full_html=False, include_plotlyjs=False, div_id=f"figure-{name}")
    yield f"<figure>{plot}</figure>"
    if table is not None:
        yield _table(table)


def _table(table: TextTable) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    note = f'<p class="quiet">{escape(table.note)}</p>' if table.note else ""
    header = row(table.columns, "th")
    return f'<div class="scroll"><table><thead>{header}</thead><tbody>\n{rows}\n</tbody></table></div>{note}'


def _units(found: planner.Explanation) -> TextTable:
    rows = [(v.unit, v.device, str(v.width), format_bytes(v.weight_bytes), f"{v.omega:.4g}") for v in found.units]
    return TextTable("Units", ("unit", "device", "bits", "weights", "sensitivity"), tuple(rows))


def _foot(solved: Solved) -> Iterator[str]:
    search = f"{escape(solved.solution.solver)} took {format_seconds(solved.solution.seconds)} for the plan"
    yield f'<p class="quiet">All numbers are predictions of one cost model; {search}.</p>'
