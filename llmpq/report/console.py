"""Results as a person reads them on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmpq.report.text_tables import TextTable, explanation_tables, verdict
from llmpq.spec import Attained, Op, Output, Plan, Prediction, Profile, Quality, Solved, Span, busy
from llmpq.spec.demand import PERCENT, at_percent
from llmpq.spec.formatting import format_bytes, format_cache, format_cap, format_lengths, format_stage
from llmpq.spec.trace import Phase

if TYPE_CHECKING:
    import planner


def _modes(plan: Plan, index: int) -> str:
    """How the activations of a stage are rounded, if they are."""
    mode = plan.stages[index].activations
    quantized = any(plan.precision(unit).quantized for unit in plan.units_of(index))
    return f" in {mode}" if quantized and mode != "a16" else ""


def plan_table(plan: Plan, solved: Solved | None = None) -> RenderableType:
    """One row for each stage, then the prediction for the whole plan, if it is solved."""
    table = Table(box=SIMPLE_HEAD, title=f"Plan for {plan.model}", title_justify="left", pad_edge=False)
    for name in ("stage", "device", "layers", "bits", "memory / cap"):
        table.add_column(name, overflow="fold")
    for i, stage in enumerate(plan.stages):
        device = plan.cluster.device(stage.device)
        first, end = stage.layers
        used = format_bytes(solved.prediction.memory_bytes[i]) if solved else "?"
        bits = format_stage(plan, i) + _modes(plan, i) + format_cache(plan, i)
        memory = f"{used} / {format_cap(device.memory_bytes)}"
        what = f"{device.name} ({device.kind}{' ' + device.isa if device.isa else ''})"
        layers = f"{first}-{end - 1}" if end > first else "none"
        table.add_row(str(i), what, layers, bits, memory)
    work = plan.workload
    chunks = f", prompts beside decode in chunks of up to {plan.chunk_tokens} tokens" if plan.chunk_tokens else ""
    lines = [
        f"batch {work.batch_size}, {format_lengths(work)}; micro-batches of {plan.prefill_microbatch} (prefill) and "
        f"{plan.decode_microbatch} (decode) sequences{chunks}"
    ]
    if solved is not None:
        p, s = solved.prediction, solved.solution
        lines.append(
            f"predicted: prefill {p.prefill_s:.3f} s, decode {p.decode_s:.3f} s, {p.tokens_per_s:.1f} tokens/s"
        )
        if (cost := solved.cost_per_million_tokens) is not None:
            lines.append(f"a million tokens cost {cost:.4g}, in the currency of the devices' prices")
        budget = "" if s.omega_budget is None else f" of {s.omega_budget:.4g} allowed"
        known = "no bound" if solved.online is not None else f"gap {100 * s.gap:.2f} %"
        lines.append(f"sensitivity {s.omega:.4g}{budget}; {s.solver}, {s.seconds:.1f} s, {known}")
        if solved.online is not None:
            lines.append(_online(solved.online))
        if solved.quality is not None:
            lines.append(_quality(solved.quality))
    return Group(table, Text("\n".join(lines)))


def _online(found: Attained) -> str:
    """A line: what a plan does with requests that come at random."""

    def at_p95(values: tuple[float, ...] | None, limit: float | None) -> str:
        text = "none" if values is None else f"{at_percent(values):.3g} s"
        return text if limit is None else f"{text} of {limit:.3g} s"

    demand, latency = found.demand, found.latency
    rate = found.requests_per_s if demand.rate is None else demand.rate
    return (
        f"up to {found.requests_per_s:.3g} requests/s within the limits; at {rate:.3g}, p{PERCENT} of TTFT "
        f"{at_p95(latency.ttft_s, demand.max_ttft_s)}, of TPOT {at_p95(latency.tpot_s, demand.max_tpot_s)}"
    )


def _quality(quality: Quality) -> str:
    """A line: what a plan loses, as predicted and as measured."""

    def words(value: float) -> str:
        return f"{100 * value:+.2f} %" if quality.metric == "perplexity" else f"{value:.4f}"

    what = "perplexity" if quality.metric == "perplexity" else "mean KL, nats"
    return (
        f"{what} against 16 bits: predicted {words(quality.predicted)}, measured {words(quality.validation)} where the "
        f"plan was chosen and {words(quality.test)} (error {words(quality.test_error).lstrip('+')}) on other text, "
        f"{quality.tokens} tokens of each; {words(quality.limit)} allowed"
    )


def usual_ways(solved: Solved, ways: Sequence[planner.UsualWay]) -> RenderableType:
    """A line for each usual way to split the model: what it is predicted to reach, or why it does not fit."""
    lines = ["the usual ways, on the same devices and within the same quality:"]
    for way in ways:
        if way.solved is None:
            what = f"does not fit: {way.reason}"
        else:
            reached = way.solved.prediction.tokens_per_s
            what = f"{reached:.1f} tokens/s, {reached / solved.prediction.tokens_per_s:.2f} of this plan"
        lines.append(f"  {way.name:<28}{what}")
    return Text("\n".join([*lines, ""]))


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted - measured) / measured:+.1f} %" if measured else "-"


def comparison_table(
    plan: Plan, predicted: Prediction, measured: Prediction, expected: Sequence[Span], spans: Sequence[Span]
) -> RenderableType:
    """Predicted, for the tokens that were generated, against measured; the error in percent of what was measured.

    `expected` and `spans` are the steps of both. A stage counts as busy of the time from its first step of a phase to
    its last; rows are left out where it has one step alone, or none is known.
    """
    table = Table(box=SIMPLE_HEAD, title="Predicted and measured", title_justify="left", pad_edge=False)
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for name, field, digits in (
        ("prefill, s", "prefill_s", 3),
        ("decode, s", "decode_s", 3),
        ("tokens/s", "tokens_per_s", 1),
    ):
        p, m = getattr(predicted, field), getattr(measured, field)
        table.add_row(name, f"{p:.{digits}f}", f"{m:.{digits}f}", _error(p, m))
    for i, (p, m) in enumerate(zip(predicted.memory_bytes, measured.memory_bytes, strict=True)):
        table.add_row(f"peak memory, {plan.stages[i].device}", format_bytes(p), format_bytes(m), _error(p, m))
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase, (i, stage) in product(phases, enumerate(plan.stages)):
        e, b = busy(expected, i, phase), busy(spans, i, phase)
        if b.steps > 1:
            share = f"{100 * e.share:.0f} %" if e.steps else "-"
            error = _error(e.share, b.share) if e.steps else "-"
            table.add_row(f"busy in {phase}, {stage.device}", share, f"{100 * b.share:.0f} %", error)
    return Group(table, Text("The prediction is for the tokens that were generated."))


def refit_table(
    before: Profile, after: Profile, runs: Mapping[str, int], errors: Mapping[str, tuple[float, float]], least_runs: int
) -> RenderableType:
    """What runs changed in each device's costs, and the mean error of its stages' seconds before and after."""
    table = Table(box=SIMPLE_HEAD, title="Costs corrected by runs", title_justify="left", pad_edge=False)
    for name in ("device", "runs", "operations", "a step", "memory overhead", "mean error"):
        table.add_column(name, justify="left" if name == "device" else "right", overflow="fold")
    step, left = Op("step"), []
    for name, old in before.tables.items():
        new = after.tables[name]
        if runs[name] < least_runs:
            left.append(f"{name} is left as it was: it has {runs[name]} runs in the log, and {least_runs} are needed")
            continue
        table.add_row(
            name,
            str(runs[name]),
            f"x {new.scale / old.scale:.3f}",
            f"{1e6 * old.seconds(step):.0f} -> {1e6 * new.seconds(step):.0f} µs",
            f"{format_bytes(old.overhead_bytes)} -> {format_bytes(new.overhead_bytes)}",
            f"{100 * errors[name][0]:.1f} -> {100 * errors[name][1]:.1f} %",
        )
    return Group(*([table] if table.row_count else []), *map(Text, left))


def completion(output: Output) -> RenderableType:
    """A prompt, and its completion, or why there is none, below it."""
    answer = output.text.strip() if output.error is None else f"not answered: {output.error}"
    return Group(Text(f"> {output.prompt}", style="bold"), Text(answer), Text(""))


def explanation(solved: Solved, found: planner.Explanation) -> RenderableType:
    """What bounds the plan, then all tables."""
    parts: list[RenderableType] = [Text("\n".join(verdict(solved, found)))]
    for table in explanation_tables(solved, found).values():
        parts.append(_table(table))
        if table.note:
            parts.append(Text(table.note))
    return Group(*parts)


def _table(text: TextTable) -> Table:
    table = Table(box=SIMPLE_HEAD, title=text.title, title_justify="left", pad_edge=False)
    for i, name in enumerate(text.columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in text.rows:
        table.add_row(*row)
    return table
