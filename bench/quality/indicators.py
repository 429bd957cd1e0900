"""Sensitivity methods side by side: how well each ranks units, how good the plans are that it leads to, and its time.

python -m bench.quality.indicators [--form A|B|OPT] [--tokens 2048] [--quantizer rtn] [--json-out FILE]

The network's weights are on no grid (beds.py). Truth is what each unit does alone, on
validation text: the divergence of the predictions (KL) and the loss that it adds, both in nats. A method is judged by
Spearman's rank correlation with that over all units in one width. Then, for an average width, the plan with the least
summed sensitivity is made, and what it does as a whole is measured on the same text, its perplexity as well. All
weights are quantized and in the cache before: seconds are the methods' own.

What FILE holds of the same network and text is kept and not measured again, so that the work can be done in parts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mip
import torch
from torch.nn import functional as F

from bench.machine import commit, describe, write_results
from bench.quality.beds import BEDS, open_bed
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.indicators import METHODS
from llmpq.measure.kl_indicator import Damage, damages, single_damages
from llmpq.measure.served_units import ServedUnits
from llmpq.measure.text import calibration_text, validation_text
from llmpq.spec import ModelSpec, Precision
from planner.solver.solving import new_model

RANKED_BITS, AVERAGE_BITS = (3, 4), (3.5, 4.0, 5.0, 6.0)
LENGTH = 256
Omega = Mapping[str, Mapping[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=BEDS, default="B")
    parser.add_argument("--tokens", type=int, default=2048, help="of validation text")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-quality", metavar="FOLDER")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    precisions = [Precision(bits, arguments.group_size, "asym", arguments.quantizer) for bits in (3, 4, 8)]
    model = open_bed(arguments.form, arguments.work).model
    source, spec = open_weights(model.checkpoint, model.spec), model.spec
    calibration, validation = (model.tokenizer.encode(text()) for text in (calibration_text, validation_text))
    text = CalibrationPass(spec, source, validation, max(1, arguments.tokens // LENGTH), LENGTH)
    results = {"form": arguments.form, "tokens": text.tokens, "precisions": [str(p) for p in precisions]}
    path = arguments.json_out
    if path and path.exists():
        kept = json.loads(path.read_text())
        if any(kept[field] != value for field, value in results.items()):
            raise SystemExit(f"{path} holds figures of another network or text; name another file")
        results = kept

    def keep() -> None:
        if path:
            write_results(path, describe() | results)

    bench = Bench(source, spec, precisions, calibration, text)
    bench.know(results)
    keep()
    for method in arguments.methods:
        bench.judge(method, results["methods"])
        keep()


class KeptUnits(ServedUnits):
    """Keeps what it has made, all of a model in all precisions: plans are made of the same units again and again."""

    def __init__(self, spec: ModelSpec, source: WeightSource, token_ids: Sequence[int]) -> None:
        super().__init__(spec, source, token_ids)
        self.linear = cache(super().linear)  # type: ignore[method-assign]
        self.experts = cache(super().experts)  # type: ignore[method-assign]
        self.table = cache(super().table)  # type: ignore[method-assign]


class Bench:
    """One network, what its units do alone, and the plans that have been measured."""

    def __init__(
        self,
        source: WeightSource,
        spec: ModelSpec,
        precisions: Sequence[Precision],
        calibration: Sequence[int],
        text: CalibrationPass,
    ) -> None:
        self._source, self._spec, self._precisions, self._calibration = source, spec, precisions, calibration
        self._text, self._ranked = text, [p for p in precisions if p.bits in RANKED_BITS]
        self._plans: dict[tuple[Precision, ...], Damage] = {}
        self._units = KeptUnits(spec, source, calibration)
        self._exact = text.embed()
        for i in range(spec.num_layers):
            self._exact = text.run(text.layer(i), self._exact)

    @torch.inference_mode()
    def know(self, results: dict[str, Any]) -> None:
        """Measure the truth, and the perplexity of the network as it is, unless they are there."""
        if "singles" not in results:
            singles = single_damages(self._text, self._units, self._spec, self._precisions)
            results["singles"] = {
                unit: {str(p): singles[unit, p]._asdict() for p in self._precisions} for unit in self._spec.units
            }
            results["methods"] = []
        self._singles = results["singles"]
        results["perplexity"] = self._perplexity = math.exp(mean_loss(self._text, self._exact))

    def judge(self, method: str, rows: list[dict[str, Any]]) -> None:
        """Add what is missing of a method to the rows of all."""
        row = next((row for row in rows if row["method"] == method), None)
        if row is None:
            start, cpu_start = time.perf_counter(), time.process_time()
            omega = METHODS[method](self._source, self._spec, self._precisions, self._calibration)  # type: ignore[index]
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            row = {"method": method, "commit": commit(), "seconds": seconds, "cpu_seconds": cpu_seconds}
            row |= {"plans": [], "omega": omega}
            rows.append(row)
        row["spearman"] = {str(p): self._ranks(row["omega"], str(p)) for p in self._ranked}
        for bits in AVERAGE_BITS[len(row["plans"]) :]:
            row["plans"].append({"average_bits": bits, **self._plan(row["omega"], bits)})
        print({name: value for name, value in row.items() if name != "omega"}, flush=True)

    def _ranks(self, omega: Omega, precision: str) -> dict[str, float]:
        """Rank correlation with each kind of damage."""
        found = [omega[unit][precision] for unit in self._spec.units]
        alone = [self._singles[unit][precision] for unit in self._spec.units]
        return {name: spearman(found, [damage[name] for damage in alone]) for name in Damage._fields}

    def _plan(self, omega: Omega, average_bits: float) -> dict[str, Any]:
        options = best_plan(self._spec, self._precisions, omega, average_bits)
        key = tuple(options[unit] for unit in self._spec.units)
        if key not in self._plans:
            self._plans[key] = self._measure(options)
        found = self._plans[key]
        return {
            "omega": sum(omega[unit][str(p)] for unit, p in options.items()),
            **found._asdict(),
            "perplexity": self._perplexity * math.exp(found.loss),
            "bits": [options[unit].bits for unit in self._spec.units],
        }

    @torch.inference_mode()
    def _measure(self, options: Mapping[str, Precision]) -> Damage:
        """What a plan does as a whole."""
        text, units = self._text, self._units
        changed = text.embed(units.table("embedding", options["embedding"]))
        for i in range(self._spec.num_layers):
            changed = text.run(text.layer(i, options[f"layer.{i}"], units), changed)
        change = "plan", options["head"]
        head = text.head(units.table("head", options["head"]))
        return damages(text, text.head(), self._exact, {change: (head, changed)}, lambda step=None, /: None)[change]


@torch.inference_mode()
def mean_loss(text: CalibrationPass, hidden_states: torch.Tensor) -> float:
    """-log p(next token of the text) in nats, for hidden states after the last layer."""
    head, losses = text.head(), []
    for rows, targets in zip(hidden_states.split(text.length), text.step.tokens.split(text.length), strict=True):
        logits = head(rows, torch.empty(len(rows), head.table.weight.n))
        losses.append(F.cross_entropy(logits[:-1], targets[1:].long()))
    return float(torch.stack(losses).mean())


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of values without ties."""
    ranks = torch.tensor([list(a), list(b)], dtype=torch.float64).argsort(1).argsort(1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def best_plan(
    spec: ModelSpec, precisions: Sequence[Precision], omega: Omega, average_bits: float
) -> dict[str, Precision]:
    """The precision of each unit, with the least summed omega at `average_bits` of a weight or less."""
    sizes = {unit: sum(linear.weights for linear in spec.linears(unit).values()) for unit in spec.units}
    total = sum(sizes.values())
    with new_model() as program:
        chosen = {(unit, p): program.add_var(var_type=mip.BINARY) for unit in spec.units for p in precisions}
        for unit in spec.units:
            program += mip.xsum(chosen[unit, p] for p in precisions) == 1
        program += (
            mip.xsum(sizes[unit] / total * p.bits * variable for (unit, p), variable in chosen.items()) <= average_bits
        )
        program.objective = mip.xsum(omega[unit][str(p)] * variable for (unit, p), variable in chosen.items())
        program.optimize(max_seconds=20)
        return {unit: p for (unit, p), variable in chosen.items() if variable.x > 0.5}


if __name__ == "__main__":
    main()
