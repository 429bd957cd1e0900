"""Devices that are not here: their costs from public figures, in the file that `llmpq plan --costs` reads.

Whatever knows how long an operation takes can make a cost table: a data sheet (as here), a simulator, other software.
Usage: custom_cost_table.py [COSTS.json]
"""

import sys

import planner
from llmpq import spec
from llmpq.checkpoint.model_files import open_model
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops

FIGURES = {"board": (25e9, 0.1e12), "laptop": (60e9, 1.2e12)}  # bytes/s of memory, and operations/s, of two CPUs
MODEL = open_model("demo").spec  # any model that llmpq run takes; its weights are not read
WORK = spec.Workload(batch_size=4, prompt_len=64, output_len=32)
OPTIONS = [*(planner.Constraints().precision(bits) for bits in spec.BITS), *MODEL.stored_layouts]


def moved_bytes(op: spec.Op) -> float:
    """What an operation reads and writes."""
    if op.kind == "linear" and op.precision:
        return op.precision.weight_bytes(op.n, op.k) + 4 * op.m * (op.n + op.k)
    return {
        "step": 0,
        "attention": 4 * op.m * (2 * op.n + 2 * op.context * op.k),
        "layer_rest": 4 * op.m * (10 * op.n + 3 * op.k),
        "embedding": 4 * op.m * op.k,
        "head_rest": 12 * op.m * op.n,
    }[op.kind]


def roofline(bytes_per_s: float, op_per_s: float) -> spec.CostTable:
    """Each operation takes as long as its bytes or its arithmetic, whichever is longer, and a microsecond."""

    def seconds(op: spec.Op) -> float:
        arithmetic = 2 * op.m * op.n * (op.context if op.kind == "attention" else op.k)
        return max(moved_bytes(op) / bytes_per_s, arithmetic / op_per_s) + 1e-6

    ops = [*plain_ops(MODEL, Ranges.of(WORK), OPTIONS, "a8"), *attention_ops(MODEL, Ranges.of(WORK))]
    rows = tuple(spec.CostRow(op, seconds(op), "data sheet", "float32", 0) for op in ops)
    return spec.CostTable("data sheet", "none", threads=1, isa=None, overhead_bytes=5 << 20, rows=rows)


links = tuple(spec.Link(a, b, 200e-6, 117e6) for a, b in (("board", "laptop"), ("laptop", "board")))  # 1 Gbit/s
costs = spec.Profile({name: roofline(*figures) for name, figures in FIGURES.items()}, links)
path = sys.argv[1] if len(sys.argv) > 1 else "costs.json"
costs.save(path)
devices = "cpu:name=board,memory=60MiB;cpu:name=laptop,memory=60MiB"
work = "--batch-size 4 --prompt-len 64 --output-len 32"
print(f"llmpq plan --devices '{devices}' {work} --activations a8 --costs {path} --out plan.json")
