"""Mixed bits at equal size: the assignment that sensitivities lead to, beside random ones and uniform bits.

    python -m bench.quality.mixed [--models OPT/rtn,OPT/gptq,B/rtn,A/rtn] [--seconds S]
                                  [--work FOLDER] [--json-out FILE]

Networks are the beds of beds.py. Each layer has 3, 4 or 8 bits, in groups of 64, and an average over layers is asked
for: layers are all of one size, so random assignments of exactly that size are drawn, each equally likely. Ours are the
least summed sensitivity at no more bits. What is nearest to uniform has the two widths next to the average spread
evenly over the layers, in its favour with one wide layer more where they do not come out even. Embedding and head stay
as they are for all. Each is measured on the test text with the weights that are left. So is each layer alone: sums of
these say how far any method can see that adds up what layers do. FILE is written after each row, and what it holds is
not measured again; after S seconds no row is begun, so that it is made in parts.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe, write_results
from bench.quality.beds import BEDS, Bed, network, open_bed
from bench.quality.evaluation import Evaluator, Windows, fields
from bench.quality.rivals.ours import left_of
from bench.quality.small_opt import counting_perplexity
from llmpq.measure.indicators import sensitivity
from llmpq.measure.text import calibration_text, evaluation_text
from llmpq.spec import Precision, SensitivityMethod

BITS, AVERAGE_BITS = (3, 4, 8), (3.5, 4.0, 5.0)
METHODS: tuple[SensitivityMethod, ...] = ("fisher", "kl")
DRAWN, SEED = 50, 0
MODELS = ("OPT/rtn", "OPT/gptq", "B/rtn", "A/rtn")  # bed and quantizer
GROUP_SIZE, LENGTH = 64, 512
CALIBRATION_WINDOWS = 8  # for quantizers that read them; they begin anew for each assignment
TEST_WINDOWS = {"OPT": 4, "A": 1, "B": 1}

Assignment = tuple[int, ...]  # bits of each layer; 16: as it is
AS_IT_IS = 16


def draw(layers: int, total: int, count: int, generator: random.Random) -> list[Assignment]:
    """`count` different assignments whose bits add up to `total`, all equally likely; all there are if they are fewer.

    An assignment is found by its rank among all.
    """

    @functools.cache
    def ways(layers: int, rest: int) -> int:
        if layers == 0:
            return int(rest == 0)
        return sum(ways(layers - 1, rest - bits) for bits in BITS if bits <= rest)

    def at(rank: int) -> Iterator[int]:
        rest = total
        for left in reversed(range(layers)):
            for bits in BITS:
                if rank < ways(left, rest - bits):
                    yield bits
                    rest -= bits
                    break
                rank -= ways(left, rest - bits)

    there = ways(layers, total)
    return [tuple(at(rank)) for rank in generator.sample(range(there), min(count, there))]


def cheapest(omega: Sequence[Mapping[int, float]], total: int) -> Assignment:
    """That of at most `total` bits with the least sum of omega[layer][bits]. Raises ValueError if there is none."""
    best: dict[int, tuple[float, Assignment]] = {0: (0.0, ())}  # bits spent -> the best so far
    for layer in omega:
        longer: dict[int, tuple[float, Assignment]] = {}
        for spent, (cost, chosen) in best.items():
            for bits in BITS:
                found = (cost + layer[bits], (*chosen, bits))
                if spent + bits <= total and found < longer.get(spent + bits, (math.inf, ())):
                    longer[spent + bits] = found
        best = longer
    if not best:
        raise ValueError(f"{len(omega)} layers take more than {total} bits")
    return min(best.values())[1]


def evenly(layers: int, average: float) -> Assignment:
    """The two widths around an average, spread evenly; of the wider one as many as take, or just exceed, its size."""
    if average in BITS:
        return (int(average),) * layers
    low, high = max(b for b in BITS if b < average), min(b for b in BITS if b > average)
    wide = math.ceil(layers * (average - low) / (high - low))
    return tuple(high if (i + 1) * wide // layers > i * wide // layers else low for i in range(layers))


class Network:
    """A bed whose layers are quantized to any assignment, and judged."""

    def __init__(self, bed: Bed, quantizer: str) -> None:
        self.bed, self._quantizer = bed, quantizer
        encode = bed.model.tokenizer.encode
        self.calibration = Windows.spread("calibration", encode(calibration_text()), CALIBRATION_WINDOWS, LENGTH)
        self.text = Windows.spread("test", encode(evaluation_text()), TEST_WINDOWS[bed.name], LENGTH)
        self._evaluator = Evaluator(network(bed.folder), [self.text], bed.folder)
        self._uniform: dict[int, Mapping[str, torch.Tensor]] = {}

    @property
    def layers(self) -> int:
        return self.bed.model.spec.num_layers

    def precision(self, bits: int) -> Precision:
        return Precision(bits, GROUP_SIZE, "asym", self._quantizer)

    def omega(self, method: SensitivityMethod) -> list[dict[int, float]]:
        """Sensitivity of each layer at each width."""
        model, precisions = self.bed.model, [self.precision(bits) for bits in BITS]
        found = sensitivity(model.checkpoint, model.spec, precisions=precisions, method=method)
        return [{bits: found.of(f"layer.{i}", self.precision(bits)) for bits in BITS} for i in range(self.layers)]

    def measure(self, assignment: Assignment) -> dict[str, float]:
        return fields(self._evaluator.measure(self._weights(assignment)))

    def as_it_is(self) -> dict[str, float]:
        seen, read = (text.token_ids.flatten().tolist() for text in (self.calibration, self.text))
        counting = counting_perplexity(seen, read, self.bed.model.spec.vocab_size)
        return {**fields(self._evaluator.measure({})), "counting_perplexity": counting}

    def _weights(self, assignment: Assignment) -> Mapping[str, torch.Tensor]:
        if self._quantizer != "rtn":  # what layers before it have become changes a layer's codes
            return self._left(assignment)
        for bits in set(assignment) - self._uniform.keys() - {AS_IT_IS}:
            self._uniform[bits] = self._left((bits,) * self.layers)
        per_layer = len(self.bed.linears) // self.layers
        chosen = {name: assignment[i // per_layer] for i, name in enumerate(self.bed.linears)}
        return {name: self._uniform[bits][name] for name, bits in chosen.items() if bits != AS_IT_IS}

    def _left(self, assignment: Assignment) -> Mapping[str, torch.Tensor]:
        options = {f"layer.{i}": self.precision(bits) for i, bits in enumerate(assignment) if bits != AS_IT_IS}
        token_ids = self.calibration.token_ids
        return left_of(self.bed, token_ids.flatten().tolist(), options, len(token_ids)).weights


def written(assignment: Assignment) -> str:
    """A digit for each layer, a dash for one that is as it is."""
    return "".join("-" if bits == AS_IT_IS else str(bits) for bits in assignment)


def wanted(quantized: Network) -> Iterator[tuple[dict[str, Any], Assignment]]:
    """What each row is of, and its assignment. `omega` sums the sensitivities of what is quantized."""
    omega = {method: quantized.omega(method) for method in METHODS}

    def row(method: str, average: float, assignment: Assignment) -> tuple[dict[str, Any], Assignment]:
        summed = {name: sum(o.get(b, 0.0) for o, b in zip(omega[name], assignment, strict=True)) for name in METHODS}
        size = sum(assignment) / len(assignment)
        key = {"average_bits": average, "method": method, "bits": written(assignment), "exact_bits": size}
        return {**key, "omega": summed}, assignment

    for bits in BITS:
        yield row("uniform", float(bits), (bits,) * quantized.layers)
    totals = {average: math.floor(average * quantized.layers) for average in AVERAGE_BITS}
    for average, total in totals.items():
        for method in METHODS:
            yield row(method, average, cheapest(omega[method], total))
        if average not in BITS:
            yield row("uniform", average, evenly(quantized.layers, average))
    drawn = {average: draw(quantized.layers, total, DRAWN, random.Random(SEED)) for average, total in totals.items()}
    for number in range(DRAWN):  # of all sizes in turn, so that what is there has as many of each
        for average, assignments in drawn.items():
            if number < len(assignments):
                yield row("random", average, assignments[number])
    for layer in range(quantized.layers):
        for bits in BITS:
            alone = tuple(bits if i == layer else AS_IT_IS for i in range(quantized.layers))
            yield row("alone", sum(alone) / len(alone), alone)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), metavar="BED/QUANTIZER,...")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-quality", metavar="FOLDER")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    deadline, path = time.monotonic() + arguments.seconds, arguments.json_out
    kept = json.loads(path.read_text()) if path and path.exists() else {"models": [], "rows": []}
    for name, quantizer in (model.split("/") for model in arguments.models.split(",")):
        measure(Network(open_bed(name, arguments.work), quantizer), quantizer, kept, path, deadline)


def measure(quantized: Network, quantizer: str, results: dict[str, Any], path: Path | None, deadline: float) -> None:
    """Add the rows of a network that are not there yet, until the deadline. SystemExit if the text is another."""
    name, text = quantized.bed.name, quantized.text
    of = {"model": BEDS[name], "bed": name, "quantizer": quantizer}
    model = {**of, "text": text.digest, "predictions": text.predictions}
    known = next((m for m in results["models"] if {**m, **of} == m), None)
    if known is None:
        results["models"].append({**model, **quantized.as_it_is()})
    elif {**known, **model} != known:
        raise SystemExit(f"{path} holds figures of another text; name another file")
    done = {(row["bed"], row["quantizer"], row["average_bits"], row["method"], row["bits"]) for row in results["rows"]}
    for key, assignment in wanted(quantized):
        if time.monotonic() > deadline:
            return
        if (name, quantizer, key["average_bits"], key["method"], key["bits"]) not in done:
            start = time.process_time()
            found = quantized.measure(assignment)
            results["rows"].append({**of, **key, **found, "cpu_seconds": time.process_time() - start})
            print(json.dumps(results["rows"][-1]), flush=True)
            if path:
                write_results(path, {**describe(), **results})


if __name__ == "__main__":
    main()
