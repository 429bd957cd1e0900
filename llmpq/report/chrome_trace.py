"""Spans as a trace in Chrome's format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The JSON object form of "Trace Event Format": complete events (ph "X", ts and dur in microseconds), and metadata events
(ph "M") that name processes and tracks. A process for each list of spans, in it a track for each stage and each link.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmpq.spec import SPANS_KEPT, Plan, Span


def trace(plan: Plan, runs: Mapping[str, Iterable[Span]]) -> dict[str, Any]:
    """A trace of spans by the name of what they are, such as "predicted" and "measured": JSON for one file."""
    names = [stage.device for stage in plan.stages]
    following = (*names[1:], names[0])
    tracks = {("stage", i): f"stage {i} on {name}" for i, name in enumerate(names)}
    if len(names) > 1:
        tracks |= {("link", i): f"{a} to {b}" for i, (a, b) in enumerate(zip(names, following, strict=True))}
    # In the order of a step's way: a stage, and the link behind it.
    order = sorted(tracks, key=lambda track: (track[1], track[0] == "link"))
    events: list[dict[str, Any]] = []
    for pid, (run, spans) in enumerate(runs.items(), 1):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": run}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        spans = list(spans)
        seen = {(span.kind, span.index) for span in spans}
        for tid, track in enumerate(order, 1):
            if track in seen:
                where = {"ph": "M", "pid": pid, "tid": tid}
                events.append({**where, "name": "thread_name", "args": {"name": tracks[track]}})
                events.append({**where, "name": "thread_sort_index", "args": {"sort_index": tid}})
        events += [_event(span, pid, 1 + order.index((span.kind, span.index))) for span in spans]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"steps": f"the first {SPANS_KEPT} of each"}}


def _event(span: Span, pid: int, tid: int) -> dict[str, Any]:
    each, rest = divmod(span.tokens, span.sequences)
    tokens = f"{span.tokens} tokens of {span.sequences}" if rest else f"{span.sequences} x {each} tokens"
    return {
        "ph": "X",
        "name": f"{span.phase} {tokens}",
        "cat": f"{span.kind},{span.phase}",
        "ts": 1e6 * span.start_s,
        "dur": 1e6 * span.seconds,
        "pid": pid,
        "tid": tid,
        "args": {"sequences": span.sequences, "tokens": span.tokens},
    }
