"""What a user of this project gets: a plan carried out by the engine, whose stages are processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import planner
from bench.end_to_end.child import Job
from llmpq.checkpoint.model_files import open_model
from llmpq.measure.quantized_model import as_served
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import (
    NATIVE,
    ActivationMode,
    Cluster,
    Device,
    ModelSpec,
    Plan,
    Sensitivity,
    UnitPrecision,
    Workload,
    busy,
)
from llmpq.workflow import make_problem

GROUP_SIZE, TABLE_BITS = 64, 8
PREFILL_SEQUENCES = 4  # prompts in a step: activations of more do not stay in the caches, as the planner finds, too


class Ours:
    """A Runner. The engine is made by `prepare`: slots are of its batch and length."""

    def __init__(self, job: Job) -> None:
        self._job, self._model = job, open_model(job.model)
        self._engine: Engine | None = None

    def prepare(self, batch: int, length: int) -> None:
        self.close()
        self._engine = self._open(self._job, batch, length)

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        """`busy` is each stage's share of decode."""
        assert self._engine is not None
        result = self._engine.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True))
        shares = [busy(result.spans, stage, "decode").share for stage in range(len(self._engine.plan.stages))]
        measured = result.measured
        return {"prefill_s": measured.prefill_s, "decode_s": measured.decode_s, "busy": shares}

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        self.close()
        job = replace(self._job, options={**self._job.options, "stages": 1})
        with self._open(job, 1, max(map(len, windows))) as engine:
            return [scores.log_probs for scores in engine.score(windows)]

    def _open(self, job: Job, batch: int, length: int) -> Engine:
        model, plan = as_served(self._model, plan_for(self._model.spec, job, batch, length))
        return Engine(plan, model.checkpoint, model.spec)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def load(job: Job) -> Ours:
    return Ours(job)


def precisions_of(spec: ModelSpec, job: Job) -> list[UnitPrecision]:
    """Of each unit. `bits` are those of the layers; None: all as the file stores it.

    Embedding and head have TABLE_BITS, as the other engines' tables have 6 or 8 by default.
    """
    if job.options["bits"] is None:
        return [NATIVE] * len(spec.units)
    constraints = constraints_of(spec, job)
    return [constraints.option(constraints.unit_bits[unit]) for unit in spec.units]


def constraints_of(spec: ModelSpec, job: Job) -> planner.Constraints:
    """Of plans with quantized layers: these widths, whatever they cost in quality."""
    widths = {unit: TABLE_BITS if unit in ("embedding", "head") else job.options["bits"] for unit in spec.units}
    return planner.Constraints(
        bits=tuple(sorted(set(widths.values()))),
        unit_bits=widths,
        omega_budget=1.0,
        group_size=GROUP_SIZE,
        quantizer=cast(Literal["rtn", "gptq"], job.quantizer),
        activations=cast(ActivationMode, job.options["activations"]),
        all_devices=True,
    )


def plan_for(spec: ModelSpec, job: Job, batch: int, length: int) -> Plan:
    """One stage with all the threads; or `stages` of one thread each, split by the planner from measured costs."""
    if (stages := job.options.get("stages", 1)) == 1:
        device, precisions = Device("cpu0", "cpu", threads=job.threads), precisions_of(spec, job)
        activations = cast(ActivationMode, job.options["activations"])
        plan = Plan.single(spec, device, precisions[0], slots=batch, max_length=length, activations=activations)
        return replace(plan.with_precisions(precisions), prefill_microbatch=min(batch, PREFILL_SEQUENCES))
    cluster = Cluster(tuple(Device(f"cpu{i}", "cpu", threads=1) for i in range(stages)))
    constraints = constraints_of(spec, job)
    omega = {unit: {str(constraints.option(width)): 0.0 for width in constraints.bits} for unit in spec.units}
    free = Sensitivity(spec.name, spec.content_hash, "none", "", omega)
    workload = Workload(batch, length * 2 // 3, length - length * 2 // 3)
    problem = make_problem(open_model(job.model), cluster, workload, constraints, omega=free)
    return planner.solve(problem).plan
