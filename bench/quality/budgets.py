"""Plans for quality budgets: is what they lose within the budget, and what does another budget bring in speed.

    python -m bench.quality.budgets [--beds B OPT QWEN] [--quantizers rtn gptq] [--only CLUSTER ...]
                                    [--tokens 8192] [--work FOLDER] [--json-out FILE]

For each budget of perplexity a plan is made as `llmpq plan --max-ppl-increase` makes it: predicted, measured on
validation text, tightened. Then it is measured once on the test text. A plan that comes again, on another cluster, is
not measured again. What FILE holds is kept, so that it can be made in parts; the plot beside it is made of its rows.

Models have no weights that are on a grid before (beds.py). Devices are analytic (bench/plans/analytic.py). So small a
model would wait for calls and messages on them, whatever its bits are, so these take 1 / SCALE of the time that they
take: plans are those of a model that is SCALE times as large, and tokens/s are SCALE times as many as that would have.
Memory is a share of what the model takes in 16 bits with its largest cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import planner
from bench.machine import describe, write_results
from bench.plans import analytic
from bench.plans.hetero_clusters import needed_bytes
from bench.quality.beds import BEDS, OPT, QWEN, open_bed
from bench.quality.budgets_plot import plot
from llmpq.checkpoint.model_files import Model
from llmpq.measure.divergence import Divergence
from llmpq.measure.served_quality import TextQuality, mode_of
from llmpq.measure.text import digest, evaluation_text, validation_text
from llmpq.spec import BITS, W16, Cluster, InfeasibleError, ModelSpec, Plan, Workload
from llmpq.spec.formatting import format_split
from llmpq.tuning.quality_budget import QualityBudget
from llmpq.workflow import QUALITY_TOKENS, make_plan, make_plan_within, measured_sensitivity

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)  # of perplexity
CONSTRAINTS = planner.Constraints(bits=BITS, group_size=64, gap=5e-3, time_limit_s=15.0)  # of three rounds
SCALE = 200.0
WORKLOADS = {"B": Workload(8, 64, 32), OPT: Workload(4, 32, 16), QWEN: Workload(8, 64, 32)}  # of beds
QUANTIZERS = "rtn", "gptq"

Row = dict[str, Any]


@dataclass(frozen=True)
class Devices:
    """A cluster but for its caps, which depend on the model: a kind of device on each host, and its share of memory."""

    name: str
    about: str
    hosts: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...]

    def cluster(self, needed: int) -> Cluster:
        cluster = analytic.cluster(self.hosts, network_bytes_per_s=12.5e9)
        devices = [
            replace(device, memory_bytes=int(share * needed)) for device, share in zip(cluster.devices, self.shares)
        ]
        links = [replace(link, latency_s=link.latency_s / SCALE) for link in cluster.links]
        return Cluster(tuple(devices), tuple(links))


CLUSTERS = (
    Devices("two CPUs", "Equally fast, with unequal memory.", (("CPU host",), ("CPU host",)), (0.4, 0.3)),
    Devices("fast but small", "The CPU holds all, the GPU a quarter.", (("RTX 4090", "CPU host"),), (0.25, 1.1)),
    Devices("three GPUs", "Together they hold half.", (("V100",), ("L4",), ("T4",)), (0.2, 0.2, 0.15)),
    Devices("short of memory", "Together they hold four tenths.", (("A100-40",), ("T4",)), (0.2, 0.2)),
)


def world() -> analytic.World:
    """Kernels whose calls take less time, by SCALE."""

    def quicker(kernel: analytic.Kernel) -> analytic.Kernel:
        return replace(kernel, call_s=kernel.call_s / SCALE)

    modern = analytic.MODERN
    return replace(
        modern,
        linears={name: {bits: quicker(k) for bits, k in kernels.items()} for name, kernels in modern.linears.items()},
        attention=quicker(modern.attention),
        rest=quicker(modern.rest),
        step_s=modern.step_s / SCALE,
    )


class Ledger:
    """What has been found so far, written to a file after each step. Rows and measured plans have keys of their own."""

    def __init__(self, path: Path | None, head: Row) -> None:
        self._path = path
        old = json.loads(path.read_text()) if path is not None and path.exists() else head
        if any(old[field] != head[field] for field in ("texts", "constraints", "clusters")):
            raise SystemExit(f"{path} is of other texts or clusters; name another file")
        plans = [{"kv_bits": 16, **plan} for plan in old.get("plans", [])]  # older files have no other caches
        self.results: Row = {**head, "rows": old.get("rows", []), "plans": plans}

    def find(self, kind: Literal["rows", "plans"], key: Row) -> Row | None:
        return next((row for row in self.results[kind] if key.items() <= row.items()), None)

    def add(self, kind: Literal["rows", "plans"], row: Row) -> None:
        self.results[kind].append(row)
        self.save()

    def save(self) -> None:
        if self._path is not None:
            write_results(self._path, self.results)
            self._path.with_suffix(".svg").write_text(plot(self.results["rows"]))


class KeptQuality(TextQuality):
    """Measures a plan unless the ledger has it; the model in 16 bits is computed when that is needed first."""

    def __init__(self, model: Model, about: Row, text: str, max_tokens: int, ledger: Ledger) -> None:
        self._spec, self._ledger = model.spec, ledger
        self._key = about | {"text": digest(text), "max_tokens": max_tokens}
        prepare = super().__init__
        self._prepare: Callable[[], None] | None = lambda: prepare(model, text, max_tokens)

    def of(self, plan: Plan) -> Divergence:
        served = {"activations": mode_of(plan), "kv_bits": plan.kv_bits}
        key = self._key | {"precisions": precisions_of(self._spec, plan)} | served
        kept = self._ledger.find("plans", key)
        if kept is None:
            if self._prepare is not None:
                self._prepare()
                self._prepare = None
            start = time.perf_counter()
            found = super().of(plan)
            kept = key | {"tokens": self.tokens, "seconds": time.perf_counter() - start, **found.to_dict()}
            self._ledger.add("plans", kept)
        self.tokens = kept["tokens"]
        return Divergence(**{field.name: kept[field.name] for field in fields(Divergence)})


def precisions_of(spec: ModelSpec, plan: Plan) -> str:
    """Of each unit, equal ones that follow each other as one, with their number."""
    runs = groupby(str(plan.precision(unit)) for unit in spec.units)
    return ", ".join(f"{len([*run])} {precision}" for precision, run in runs)


def mean_bits(spec: ModelSpec, plan: Plan) -> float:
    """Of a weight."""
    sizes = {unit: sum(linear.weights for linear in spec.linears(unit).values()) for unit in spec.units}
    return sum(size * spec.bits(unit, plan.precision(unit)) for unit, size in sizes.items()) / sum(sizes.values())


class Study:
    """A model whose units are quantized in one way, on all clusters."""

    def __init__(
        self, name: str, model: Model, workload: Workload, quantizer: Any, max_tokens: int, ledger: Ledger
    ) -> None:
        self._about, self._model, self._workload = {"model": name, "quantizer": quantizer}, model, workload
        self._ledger = ledger
        self._constraints = replace(CONSTRAINTS, quantizer=quantizer)
        self._needed = needed_bytes(model.spec, [workload], W16)
        texts = validation_text(), evaluation_text()
        self._texts = [KeptQuality(model, self._about, text, max_tokens, ledger) for text in texts]

    def run(self, devices: Devices) -> None:
        """A row for each budget that has none."""
        for budget in BUDGETS:
            key = self._about | {"cluster": devices.name, "budget": budget}
            if self._ledger.find("rows", key) is None:
                row = key | self._row(devices, budget)
                self._ledger.add("rows", row)
                print(row, flush=True)

    def _row(self, devices: Devices, budget: float) -> Row:
        cluster, constraints = devices.cluster(self._needed), self._constraints
        costs = analytic.profile(self._model.spec, cluster, self._workload, world(), constraints.precisions)
        sensitivity = measured_sensitivity(self._model, constraints)
        problem = planner.Problem(self._model.spec, cluster, self._workload, costs, sensitivity, constraints)
        validation, test = self._texts
        start = time.perf_counter()
        try:
            solved, problem = make_plan_within(
                self._model, problem, QualityBudget("perplexity", budget), validation=validation, test=test
            )
        except InfeasibleError as error:
            return {"infeasible": str(error), "seconds": time.perf_counter() - start}
        seconds = time.perf_counter() - start
        assert solved.quality is not None
        start = time.perf_counter()
        make_plan(self._model, replace(problem, sensitivity=measured_sensitivity(self._model, constraints)))
        again = time.perf_counter() - start
        found = solved.quality
        return {
            "predicted": found.predicted,
            "validation": found.validation,
            "test": found.test,
            "test_standard_error": found.test_error,
            "tokens": found.tokens,
            "rounds": found.rounds,
            "omega": solved.solution.omega,
            "mean_bits": mean_bits(self._model.spec, solved.plan),
            "split": format_split(solved.plan),
            "tokens_per_s": solved.prediction.tokens_per_s,
            "seconds": seconds,
            "again_s": again,
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", choices=WORKLOADS, default=["B", OPT], help="default: B OPT")
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--only", nargs="+", metavar="CLUSTER", choices=[c.name for c in CLUSTERS])
    parser.add_argument("--tokens", type=int, default=QUALITY_TOKENS, help="of each text")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-quality", metavar="FOLDER")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    head = {
        **describe(),
        "texts": {"validation": digest(validation_text()), "test": digest(evaluation_text())},
        "constraints": CONSTRAINTS.to_dict(),
        "workloads": {name: workload.to_dict() for name, workload in WORKLOADS.items()},
        "scale": SCALE,
        "clusters": {c.name: {"about": c.about, "hosts": c.hosts, "shares": c.shares} for c in CLUSTERS},
    }
    ledger = Ledger(arguments.json_out, json.loads(json.dumps(head)))  # tuples become lists, as in the file
    for name in arguments.beds:
        model = open_bed(name, arguments.work).model
        for quantizer in arguments.quantizers:
            study = Study(f"{BEDS[name]}, bed {name}", model, WORKLOADS[name], quantizer, arguments.tokens, ledger)
            for devices in CLUSTERS:
                if arguments.only is None or devices.name in arguments.only:
                    study.run(devices)
    ledger.save()


if __name__ == "__main__":
    main()
