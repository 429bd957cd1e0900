"""Sensitivity methods side by side: how well each ranks units, how good the plans are that it leads to, and its time.

python -m bench.quality.indicators [--form A|B] [--tokens 1024] [--quantizer rtn] [--json-out FILE]

The network is a form of the demo model whose weights are on no grid (beds.py). Truth is what each unit does alone, on
validation text: the divergence of the predictions (KL) and the loss that it adds, both in nats. A method is judged by
Spearman's rank correlation with that over all units in one width. Then, for an average width, the plan with the least
summed sensitivity is made, and what it does as a whole is measured on the same text. All weights are quantized and in
the cache before: seconds are the methods' own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mip
import torch

from bench.machine import describe, write_results
from bench.quality.beds import FORMS, make_bed
from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.indicators import METHODS
from llmpq.measure.kl_indicator import Damage, damages, single_damages
from llmpq.measure.served_units import ServedUnits
from llmpq.measure.text import calibration_text, validation_text
from llmpq.spec import ModelSpec, Precision
from planner.solver.solving import new_model

RANKED_BITS, AVERAGE_BITS = (3, 4), (3.5, 4.0, 5.0)
LENGTH = 256
Omega = Mapping[str, Mapping[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, default="B")
    parser.add_argument("--tokens", type=int, default=1024, help="of validation text")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    precisions = [Precision(bits, arguments.group_size, "asym", arguments.quantizer) for bits in (3, 4, 8)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_bed(open_model("demo"), arguments.form, Path(folder)).model
        source, spec = open_weights(model.checkpoint, model.spec), model.spec
        calibration, validation = (model.tokenizer.encode(text()) for text in (calibration_text, validation_text))
        bench = Bench(source, spec, precisions, calibration, validation, arguments.tokens)
        results = [bench.judge(method) for method in arguments.methods]
    if arguments.json_out:
        details = {"form": arguments.form, "tokens": bench.text.tokens, "precisions": [str(p) for p in precisions]}
        singles = {unit: {str(p): bench.singles[unit, p]._asdict() for p in bench.ranked} for unit in spec.units}
        write_results(arguments.json_out, describe() | details | {"singles": singles, "methods": results})


class Bench:
    """One network, what its units do alone, and the plans that have been measured."""

    def __init__(
        self,
        source: WeightSource,
        spec: ModelSpec,
        precisions: Sequence[Precision],
        calibration: Sequence[int],
        validation: Sequence[int],
        tokens: int,
    ) -> None:
        self._source, self._spec, self._precisions, self._calibration = source, spec, precisions, calibration
        self.text = CalibrationPass(spec, source, validation, max(1, tokens // LENGTH), LENGTH)
        start = time.perf_counter()
        units = ServedUnits(spec, source, calibration)
        self.ranked = [p for p in precisions if p.bits in RANKED_BITS]
        self.singles = single_damages(self.text, units, spec, self.ranked)
        print(f"truth: {time.perf_counter() - start:.0f} s", flush=True)
        self._plans: dict[tuple[Precision, ...], Damage] = {}
        self._exact = self.text.embed()
        for i in range(spec.num_layers):
            self._exact = self.text.run(self.text.layer(i), self._exact)

    def judge(self, method: str) -> dict[str, Any]:
        start, cpu_start = time.perf_counter(), time.process_time()
        omega = METHODS[method](self._source, self._spec, self._precisions, self._calibration)  # type: ignore[index]
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        row: dict[str, Any] = {"method": method, "seconds": seconds, "cpu_seconds": cpu_seconds, "spearman": {}}
        for p in self.ranked:
            found = [omega[unit][str(p)] for unit in self._spec.units]
            row["spearman"][str(p)] = {
                name: spearman(found, [getattr(self.singles[unit, p], name) for unit in self._spec.units])
                for name in Damage._fields
            }
        row["plans"] = [{"average_bits": bits, **self._plan(omega, bits)} for bits in AVERAGE_BITS]
        row["omega"] = omega
        print({name: value for name, value in row.items() if name != "omega"}, flush=True)
        return row

    def _plan(self, omega: Omega, average_bits: float) -> dict[str, Any]:
        options = best_plan(self._spec, self._precisions, omega, average_bits)
        key = tuple(options[unit] for unit in self._spec.units)
        if key not in self._plans:
            self._plans[key] = self._measure(options)
        predicted = sum(omega[unit][str(p)] for unit, p in options.items())
        bits = [options[unit].bits for unit in self._spec.units]
        return {"omega": predicted, **self._plans[key]._asdict(), "bits": bits}

    @torch.inference_mode()
    def _measure(self, options: Mapping[str, Precision]) -> Damage:
        """What a plan does as a whole."""
        text, units = self.text, ServedUnits(self._spec, self._source, self._calibration)
        changed = text.embed(units.table("embedding", options["embedding"]))
        for i in range(self._spec.num_layers):
            changed = text.run(text.layer(i, options[f"layer.{i}"], units), changed)
        change = "plan", options["head"]
        head = text.head(units.table("head", options["head"]))
        return damages(text, text.head(), self._exact, {change: (head, changed)}, lambda step=None, /: None)[change]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of values without ties."""
    ranks = torch.tensor([list(a), list(b)], dtype=torch.float64).argsort(1).argsort(1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def best_plan(
    spec: ModelSpec, precisions: Sequence[Precision], omega: Omega, average_bits: float
) -> dict[str, Precision]:
    """The precision of each unit, with the least summed omega at `average_bits` of a weight or less."""
    sizes = {unit: sum(linear.n * linear.k for linear in spec.linears(unit).values()) for unit in spec.units}
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
