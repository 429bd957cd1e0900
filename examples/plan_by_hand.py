"""A plan from numbers written down by hand: no model file, nothing measured, no torch.

Two GPUs: the fast one has too little memory for the whole model at 4 bits, the slow one has plenty.
"""

import planner
from llmpq import spec

MODEL = spec.ModelSpec(
    name="by hand", content_hash="0" * 16, dtype="float16", norm="rms", activation="silu", gated_mlp=True,
    num_layers=16, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=64, intermediate_size=2816,
    vocab_size=32000, embedding_dim=1024, tied_embeddings=False, max_positions=2048, norm_eps=1e-5,
    final_norm=True, position_offset=None, eos_token_ids=(2,), bos_token_id=1,
)  # fmt: skip
WORK = spec.Workload(batch_size=8, prompt_len=128, output_len=64)
OPTIONS = [spec.Precision(bits, 32 if bits < 16 else None) for bits in spec.BITS]
LOSS = {3: 4.0, 4: 1.0, 8: 0.01}  # of a layer, by bits; whatever unit a budget is in


def seconds(op: spec.Op, read_s: float, compute_s: float) -> float:
    """Of an operation on a device that reads a byte in `read_s` and does a multiplication in `compute_s`."""
    if op.kind == "linear" and op.precision:
        return op.precision.weight_bytes(op.n, op.k) * read_s + op.m * op.n * op.k * compute_s
    if op.kind == "attention":
        return op.m * op.context * (2 * op.k * 2 * read_s + 2 * op.n * compute_s)
    return 20e-6 + 4 * op.m * (op.n if op.kind != "embedding" else op.k) * read_s


def table(read_s: float, compute_s: float) -> spec.CostTable:
    """Costs are linear between the smallest and the largest step; both, at the shortest and the longest context."""
    ends = [(m, rows, spec.Context.of(x)) for m, rows in ((1, 1), (8 * 128, 8)) for x in (1, 192)]
    cases = [(unit, p, "a16", *end) for unit in MODEL.distinct_units for p in OPTIONS for end in ends]
    ops = {spec.Op("step"), *(op for case in cases for op in spec.unit_ops(MODEL, *case))}
    known = {op: seconds(op, read_s, compute_s) for op in sorted(ops, key=str)}
    rows = tuple(spec.CostRow(op, known[op], "by hand", "float16", working_set_bytes=0) for op in known)
    return spec.CostTable("by hand", "none", threads=1, isa=None, overhead_bytes=0, rows=rows)


DEVICES = (spec.Device("fast", "cuda", 0, memory_bytes=120 << 20), spec.Device("slow", "cuda", 1, memory_bytes=1 << 30))
LINKS = tuple(spec.Link(a, b, latency_s=20e-6, bytes_per_s=10e9) for a, b in (("fast", "slow"), ("slow", "fast")))
COSTS = spec.Profile({"fast": table(2e-12, 4e-14), "slow": table(6e-12, 2e-13)}, LINKS)
OMEGA = {u: {str(p): LOSS[p.bits] * (i + 1) / 10 for p in OPTIONS[:3]} for i, u in enumerate(MODEL.units)}
SENSITIVITY = spec.Sensitivity(MODEL.name, MODEL.content_hash, "by hand", "none", OMEGA)
LIMITS = planner.Constraints(omega_budget=20.0)
PROBLEM = planner.Problem(MODEL, spec.Cluster(DEVICES, LINKS), WORK, COSTS, SENSITIVITY, LIMITS)

if __name__ == "__main__":
    solved = planner.solve(PROBLEM)
    for stage in solved.plan.stages:
        print(f"{stage.device}: layers {stage.layers[0]} to {stage.layers[1] - 1}, bits {[*stage.widths]}")
    print(f"{solved.prediction.tokens_per_s:.1f} tokens/s, sensitivity {solved.solution.omega:.2f} of 20")
