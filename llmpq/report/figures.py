"""An explanation as plots. Each is made of the plan and its explanation alone, and says one thing."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

import planner
from llmpq.report.metric import Metric, metrics
from llmpq.report.text_tables import link, omega
from llmpq.spec import Solved
from llmpq.spec.formatting import format_bytes, format_cap, format_seconds, format_width

PREFILL, DECODE = "#4c78a8", "#e0944f"
PLAN, OTHER, WORSE = "#2f6f4f", "#b9c0c8", "#b5555a"
DEVICES = ("#4c78a8", "#e0944f", "#5f9e6e", "#8c6bb1", "#c7596b", "#7a8793", "#c2a83e", "#4aa3a2")
ROUNDS = 3  # of decode in the timeline, which repeats itself from then on
_ROW, _FRAME = 34, 110  # pixels


def _figure(rows: int | None = None, **layout: object) -> go.Figure:
    """An empty figure in the page's style; `rows` bars are as thick in every one."""
    figure = go.Figure()
    style = {
        "template": "plotly_white",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#333"},
        "margin": {"l": 10, "r": 20, "t": 30, "b": 40},
        "height": 320 if rows is None else _FRAME + _ROW * rows,
        "legend": {"orientation": "h", "traceorder": "normal", "y": 1.02, "yanchor": "bottom", "x": 0},
        "bargap": 0.35,
    }
    return figure.update_layout(**{**style, **layout})


def _from_the_top(figure: go.Figure) -> go.Figure:
    """With the first bar at the top."""
    return figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)


def _seconds_axis(figure: go.Figure, **axis: object) -> go.Figure:
    return figure.update_xaxes(tickformat="~s", ticksuffix="s", rangemode="tozero", **axis)


def work(solved: Solved, found: planner.Explanation) -> go.Figure:
    """Seconds that each stage and link works in one batch, by phase, and when the batch is done."""
    times = {"prefill": found.prefill_steps, "decode": found.decode_steps}
    rows = []  # (what, its seconds for one micro-batch by phase)
    for i, view in enumerate(found.stages):
        rows.append((view.device, {"prefill": view.prefill_s, "decode": view.decode_s}))
        if len(found.stages) > 1:
            rows.append((link(solved.plan, i), {"prefill": view.prefill_link_s, "decode": view.decode_link_s}))
    figure = _figure(len(rows), barmode="stack")
    for phase, color in (("prefill", PREFILL), ("decode", DECODE)):
        seconds = [times[phase] * each[phase] for _, each in rows]
        figure.add_bar(
            name=phase,
            orientation="h",
            y=[what for what, _ in rows],
            x=seconds,
            marker_color=color,
            customdata=[format_seconds(s) for s in seconds],
            hovertemplate="%{y}: %{customdata} of " + phase + "<extra></extra>",
        )
    done = solved.prediction.prefill_s + solved.prediction.decode_s
    figure.add_vline(x=done, line={"dash": "dot", "color": "#555"}, annotation_text=f"done: {format_seconds(done)}")
    return _from_the_top(_seconds_axis(figure))


def memory(found: planner.Explanation) -> go.Figure:
    """What each stage holds, and its cap, each bar labelled with both."""
    figure = _figure(len(found.stages), barmode="overlay", showlegend=False)
    names = [view.device for view in found.stages]
    unit = 2**30 if max(view.memory_bytes for view in found.stages) >= 2**30 else 2**20
    figure.add_bar(
        orientation="h",
        y=names,
        x=[(view.cap_bytes or 0) / unit for view in found.stages],
        marker={"color": "#f1f3f5", "line": {"color": "#9aa3ab", "width": 1}},
        hoverinfo="skip",
    )
    figure.add_bar(
        orientation="h",
        y=names,
        x=[view.memory_bytes / unit for view in found.stages],
        marker_color=[WORSE if "memory" in view.bounds else PREFILL for view in found.stages],
        text=[f"{format_bytes(view.memory_bytes)} / {format_cap(view.cap_bytes)}" for view in found.stages],
        textposition="auto",
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    return _from_the_top(figure.update_xaxes(title="GiB" if unit == 2**30 else "MiB", rangemode="tozero"))


def baselines(solved: Solved, found: planner.Explanation) -> go.Figure:
    """What the plan and each baseline reach, the best first."""
    metric = metrics(solved, found)[0]
    known = {"this plan": solved, **{str(name): other for name, other in found.baselines.items()}}
    order = sorted(known, key=lambda name: (metric.rank(known[name]), name != "this plan"))
    figure = _figure(len(order), showlegend=False)
    figure.add_bar(
        orientation="h",
        y=order,
        x=[metric.value(known[name]) for name in order],
        marker_color=[PLAN if name == "this plan" else OTHER for name in order],
        text=[metric.text(known[name]) for name in order],
        customdata=[metric.said(known[name]) for name in order],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )
    return _from_the_top(figure.update_xaxes(title=metric.unit, rangemode="tozero"))


def changes(solved: Solved, found: planner.Explanation) -> go.Figure:
    """By how many percent each change makes the plan better or worse."""
    metric = metrics(solved, found)[0]
    gains = [metric.percent(solved, change.solved) for change in found.changes]
    worse = [metric.rank(change.solved) > metric.rank(solved) for change in found.changes]
    figure = _figure(len(gains), showlegend=False)
    figure.add_bar(
        orientation="h",
        y=[change.what for change in found.changes],
        x=gains,
        marker_color=[WORSE if is_worse else PLAN for is_worse in worse],
        text=[f"{gain:+.1f} %" for gain in gains],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    widest = max([1.0, *map(abs, gains)]) * 1.25
    axis = {"title": f"{metric.unit}, against this plan, %", "range": [-widest, widest], "zerolinecolor": "#777"}
    return _from_the_top(figure.update_xaxes(**axis))


def front(solved: Solved, found: planner.Explanation) -> go.Figure:
    """The best plan within each budget of sensitivity, with the plan and the baselines among them."""
    metric = metrics(solved, found)[0]
    figure = _figure(height=400)

    def points(name: str, plans: Sequence[Solved], labels: Sequence[str], **style: object) -> None:
        figure.add_scatter(
            name=name,
            x=[omega(point) for point in plans],
            y=[metric.value(point) for point in plans],
            customdata=[f"{label}: {metric.said(point)}" for label, point in zip(labels, plans, strict=True)],
            hovertemplate="%{customdata} at sensitivity %{x:.3g}<extra></extra>",
            **style,
        )

    lossy = {kind: other for kind, other in found.baselines.items() if omega(other) > 0}
    points("baselines", [*lossy.values()], [*lossy], mode="markers", marker={"color": OTHER, "size": 9})
    line = {"color": PREFILL, "shape": "hv"}
    known = _undominated([*found.front, solved, *found.baselines.values()], metric)
    points("best known", known, ["best"] * len(known), mode="lines+markers", line=line)
    if omega(solved) > 0:
        star = {"symbol": "star", "size": 16, "color": PLAN}
        points("this plan", [solved], ["this plan"], mode="markers", marker=star)
    figure.update_xaxes(type="log", title="summed sensitivity: further right is lower quality", dtick="D2")
    return figure.update_yaxes(title=metric.unit, rangemode="tozero")


def _undominated(plans: Sequence[Solved], metric: Metric) -> list[Solved]:
    """Those no better than one of higher quality left out, from the highest quality on; logarithms need some loss."""
    best: list[Solved] = []
    for solved in sorted(plans, key=lambda solved: (omega(solved), metric.rank(solved))):
        if omega(solved) > 0 and (not best or metric.rank(solved) < metric.rank(best[-1])):
            best.append(solved)
    return best


def bits(found: planner.Explanation) -> go.Figure:
    """The width of each unit, and below it what that costs in quality; colours are devices."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    devices = list(dict.fromkeys(view.device for view in found.units))
    for device, color in zip(devices, DEVICES * len(devices)):
        units = [view for view in found.units if view.device == device]
        labels = [
            f"{v.unit} on {device}: {format_width(v.width)}, {format_bytes(v.weight_bytes)}, sensitivity {v.omega:.3g}"
            for v in units
        ]
        for row, heights in ((1, [view.bits for view in units]), (2, [view.omega for view in units])):
            figure.add_bar(
                name=device,
                legendgroup=device,
                showlegend=row == 1,
                x=[view.unit.removeprefix("layer.") for view in units],
                y=heights,
                marker_color=color,
                customdata=labels,
                hovertemplate="%{customdata}<extra></extra>",
                row=row,
                col=1,
            )
    figure.update_layout(_figure(height=460, bargap=0.15).layout)
    figure.update_xaxes(type="category", categoryarray=[v.unit.removeprefix("layer.") for v in found.units])
    figure.update_yaxes(title="bits", row=1, col=1)
    return figure.update_yaxes(title="sensitivity", row=2, col=1)


def timeline(solved: Solved, found: planner.Explanation) -> go.Figure:
    """What stages and links are expected to do when: all of prefill, and the first rounds of decode."""
    plan = solved.plan
    count = 2 * len(plan.stages) if len(plan.stages) > 1 else 1
    names = [name for i, stage in enumerate(plan.stages) for name in (stage.device, link(plan, i))][:count]
    prefill_end = max(span.end_s for span in found.spans if span.phase == "prefill")
    end = prefill_end + ROUNDS * solved.prediction.decode_s / max(1, plan.workload.rounds)
    figure = _figure(count, barmode="overlay")
    for phase, color in (("prefill", PREFILL), ("decode", DECODE)):
        own = [span for span in found.spans if span.phase == phase and span.start_s < end]
        figure.add_bar(
            name=phase,
            orientation="h",
            y=[names[2 * span.index + (span.kind == "link")] for span in own],
            base=[span.start_s for span in own],
            x=[span.seconds for span in own],
            marker={"color": color, "line": {"color": "white", "width": 0.5}},
            customdata=[
                f"{span.sequences} sequences, {span.tokens} tokens, {format_seconds(span.seconds)}" for span in own
            ],
            hovertemplate="%{y}: %{customdata}<extra>" + phase + "</extra>",
        )
    figure.update_yaxes(categoryorder="array", categoryarray=names)
    return _from_the_top(_seconds_axis(figure))
