"""What a user of this project gets: a plan carried out by the engine, whose stages are processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import planner
from bench.end_to_end.child import Job
from llmpq.checkpoint.model_files import open_model
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import (
    NATIVE,
    ActivationMode,
    Cluster,
    Device,
    ModelSpec,
    Plan,
    Precision,
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
        plan = plan_for(self._model.spec, self._job.threads, batch, length, self._job.options, self._job.model)
        self._engine = Engine(plan, self._model.checkpoint, self._model.spec)

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        """`busy` is each stage's share of decode."""
        assert self._engine is not None
        result = self._engine.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True))
        shares = [busy(result.spans, stage, "decode").share for stage in range(len(self._engine.plan.stages))]
        measured = result.measured
        return {"prefill_s": measured.prefill_s, "decode_s": measured.decode_s, "busy": shares}

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        self.close()
        options = {**self._job.options, "stages": 1}
        plan = plan_for(self._model.spec, self._job.threads, 1, max(map(len, windows)), options, self._job.model)
        with Engine(plan, self._model.checkpoint, self._model.spec) as engine:
            return [scores.log_probs for scores in engine.score(windows)]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def load(job: Job) -> Ours:
    return Ours(job)


def precisions_of(spec: ModelSpec, options: dict[str, Any]) -> list[UnitPrecision]:
    """Of each unit. `bits` are those of the layers; None: all as the file stores it.

    Embedding and head have TABLE_BITS, as the other engines' tables have 6 or 8 by default.
    """
    if options["bits"] is None:
        return [NATIVE] * len(spec.units)
    layer, table = Precision(options["bits"], GROUP_SIZE), Precision(TABLE_BITS, GROUP_SIZE)
    return [table, *[layer] * spec.num_layers, table]


def plan_for(spec: ModelSpec, threads: int, batch: int, length: int, options: dict[str, Any], model: str) -> Plan:
    """One stage with all the threads; or `stages` of one thread each, split by the planner from measured costs."""
    activations = cast(ActivationMode, options["activations"])
    precisions = precisions_of(spec, options)
    if (stages := options.get("stages", 1)) == 1:
        device = Device("cpu0", "cpu", threads=threads)
        plan = Plan.single(spec, device, precisions[0], slots=batch, max_length=length, activations=activations)
        return replace(plan.with_precisions(precisions), prefill_microbatch=min(batch, PREFILL_SEQUENCES))
    cluster = Cluster(tuple(Device(f"cpu{i}", "cpu", threads=1) for i in range(stages)))
    widths = {unit: TABLE_BITS if unit in ("embedding", "head") else options["bits"] for unit in spec.units}
    bits = tuple(sorted(set(widths.values())))
    omega = {unit: {str(Precision(width, GROUP_SIZE)): 0.0 for width in bits} for unit in spec.units}
    free = Sensitivity(spec.name, spec.content_hash, "none", "", omega)
    constraints = planner.Constraints(
        bits=bits,
        unit_bits=widths,
        omega_budget=1.0,
        group_size=GROUP_SIZE,
        activations=activations,
        all_devices=True,
    )
    workload = Workload(batch, length * 2 // 3, length - length * 2 // 3)
    problem = make_problem(open_model(model), cluster, workload, constraints, omega=free)
    return planner.solve(problem).plan
