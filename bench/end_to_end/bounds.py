"""What a phase cannot be faster than: bytes over the measured read bandwidth, operations over the measured peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmpq.spec import ModelSpec, Plan
from llmpq.spec.ops import Context

_TERMS = {"a16": 0, "a8": 1, "a8x2": 2}  # int8 products for each weight
INT8_PEAKS = ("amx_int8_op_per_s", "int8_op_per_s")  # the largest that was measured counts


@dataclass(frozen=True)
class Work:
    """What has to be read from memory and computed."""

    nbytes: float
    int8_operations: float
    fp32_operations: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.nbytes + other.nbytes,
            self.int8_operations + other.int8_operations,
            self.fp32_operations + other.fp32_operations,
        )

    def seconds(self, ceilings: Mapping[str, float]) -> float | None:
        """At least; None where a ceiling that counts was not measured. Both kinds of operations take turns."""
        int8 = max((ceilings.get(name, 0.0) for name in INT8_PEAKS), default=0.0)
        fp32, read = ceilings.get("fp32_flop_per_s", 0.0), ceilings.get("read_bytes_per_s", 0.0)
        if not (int8 and fp32 and read):
            return None
        return max(self.nbytes / read, self.int8_operations / int8 + self.fp32_operations / fp32)


def step_work(plan: Plan, spec: ModelSpec, tokens: int, rows: int, context: Context) -> Work:
    """One step of a plan with quantized weights: all of them once, and the keys and values that queries attend to.

    What a prompt attends to is its own, and not read from memory. A query reads its keys only where it is the only one
    of its sequence. The embedding's few rows do not count.
    """
    nbytes = int8 = 0.0
    for unit in spec.units[1:]:
        nbytes += spec.unit_bytes(unit, plan.precision(unit))
        multiplied = rows if unit == "head" else tokens
        terms = _TERMS[plan.stages[0].activations]
        int8 += sum(2.0 * terms * multiplied * linear.n * linear.k for linear in spec.linears(unit).values())
    keys = context.keys()
    fp32 = spec.num_layers * 4.0 * tokens * keys * spec.num_heads * spec.head_dim
    if tokens == rows:
        nbytes += spec.num_layers * tokens * keys * spec.kv_bytes(1, plan.stages[0].kv_dtype)
    return Work(nbytes, int8, fp32)


def phase_works(plan: Plan, spec: ModelSpec, batch: int, prompt: int, output: int) -> dict[str, Work]:
    """Of both phases and of all; decode has output - 1 steps, at their average context."""
    prefill = step_work(plan, spec, batch * prompt, batch, Context.of_prompts(*[prompt] * batch))
    step = step_work(plan, spec, batch, batch, Context.of(*[prompt + output / 2] * batch))
    steps = output - 1
    decode = Work(steps * step.nbytes, steps * step.int8_operations, steps * step.fp32_operations)
    return {"prefill": prefill, "decode": decode}
