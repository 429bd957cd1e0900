"""How busy each stage and link was, from the trace that `llmpq run --trace TRACE.json` writes.

Usage: read_trace.py [TRACE.json]. Without one, the plan of plan_by_hand.py is simulated.
"""

import json
import sys
from pathlib import Path
from typing import Any

from plan_by_hand import COSTS, MODEL, PROBLEM, WORK

import planner
from llmpq.report.chrome_trace import trace


def simulated() -> dict[str, Any]:
    plan = planner.solve(PROBLEM)
    prompts, outputs = [WORK.prompt_len] * WORK.batch_size, [WORK.output_len] * WORK.batch_size
    return trace(plan.plan, {"predicted": planner.simulate(plan.plan, MODEL, COSTS, prompts, outputs).spans})


content = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else simulated()
names: dict[Any, str] = {}  # of processes, by number, and of tracks, by both numbers
steps: dict[tuple[int, int], list[dict[str, Any]]] = {}
for event in content["traceEvents"]:
    if event["ph"] == "X":
        steps.setdefault((event["pid"], event["tid"]), []).append(event)
    elif event["name"] == "process_name":
        names[event["pid"]] = event["args"]["name"]
    elif event["name"] == "thread_name":
        names[event["pid"], event["tid"]] = event["args"]["name"]

for run, track in sorted(steps):
    line = f"{names[run]}, {names[run, track]}:"
    for phase in ("prefill", "decode"):
        own = [event for event in steps[run, track] if phase in event["cat"]]
        if own:
            wall = max(event["ts"] + event["dur"] for event in own) - min(event["ts"] for event in own)
            busy = sum(event["dur"] for event in own)
            line += f" {phase} {busy / 1e3:.2f} ms in {len(own)} steps, busy {100 * busy / wall:.0f} %;"
    print(line.removesuffix(";"))
