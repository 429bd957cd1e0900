"""Does it pay to choose bits, and group sizes, for each fused linear instead of for each layer?

    python -m bench.quality.per_linear [--beds NAME,...] [--quantizers rtn,gptq] [--bits-per-weight 3.5,4,4.5,5]
                                       [--work FOLDER] [--json-out FILE]

Beds are those of bench/quality/beds.py; embedding and head stay as they are. The Fisher loss of
each linear alone, and of each layer as a whole, is measured at 3 and 4 bits in groups of 32, 64 and 128, and at 8 bits
in groups of 64. For a size that counts codes, scales and zeros, the choice with the least sum is made of

layer         bits for each layer, groups of 64
steps         that, and three steps between two widths: one linear more is wider (planner/mixed.py)
linear        bits for each linear, groups of 64
layer+group   bits and group size for each layer
linear+group  bits and group size for each linear

and what it does to the predictions of test text is measured. What FILE holds already is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mip

from bench.machine import describe, write_results
from bench.quality.beds import BEDS, USUAL, Bed, network, open_bed
from bench.quality.evaluation import Evaluator, Windows, fields
from bench.quality.rivals.__main__ import LENGTH, numbers, words
from bench.quality.rivals.ours import left_of
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.measure.fisher_indicator import fisher
from llmpq.measure.text import calibration_text, evaluation_text
from llmpq.spec import Mixed, ModelSpec, Precision, Sensitivity, UnitPrecision
from planner.mixed import between
from planner.solver.solving import new_model

BITS, GROUP_SIZES, GROUP_SIZE = (3, 4, 8), (32, 64, 128), 64
TEST_WINDOWS = 8
OPTIONS = ("layer", "steps", "linear", "layer+group", "linear+group")


@dataclass(frozen=True)
class Choice:
    """What some linears of a layer may be, and the loss of that."""

    unit: str
    linears: Mapping[str, Precision]
    loss: float


def choices(
    spec: ModelSpec, sensitivity: Sensitivity, precisions: Sequence[Precision], options: str
) -> list[list[Choice]]:
    """For each decision, what it may be; `precisions` are those of linears, fewest bits first."""
    names, layers = list(spec.linears("layer.0")), spec.units[1:-1]
    if not options.endswith("group"):
        precisions = [p for p in precisions if p.group_size == GROUP_SIZE]
    if options.startswith("linear"):
        parts = [(unit, name) for unit in layers for name in names]
        return [[Choice(u, {name: p}, sensitivity.of(f"{u}.{name}", p)) for p in precisions] for u, name in parts]
    of_layers: list[UnitPrecision] = list(precisions)
    if options == "steps":
        of_layers += [step for few, many in pairwise(precisions) for step in between(spec, sensitivity, few, many)]
    return [
        [Choice(unit, spec.linear_precisions(unit, p), sensitivity.of(unit, p)) for p in of_layers] for unit in layers
    ]


def losses(bed: Bed, source: WeightSource, token_ids: Sequence[int], precisions: Sequence[Precision]) -> Sensitivity:
    """Of layers and their linears; kept in the bed's folder."""
    spec = bed.model.spec
    path = bed.folder / f"losses-{precisions[0].quantizer}-{len(precisions)}.json"
    if not path.exists():
        omega = fisher(source, spec, precisions, token_ids, per_linear=True)
        Sensitivity(spec.name, spec.content_hash, "fisher", "", omega).save(path)
    return Sensitivity.load(path)


def choose(
    spec: ModelSpec, decisions: Sequence[Sequence[Choice]], bits_per_weight: float
) -> tuple[dict[str, dict[str, Precision]], float]:
    """The precision of each linear of each layer that loses least in sum, and that. Raises ValueError if none fits."""
    shapes = spec.linears("layer.0")
    room = spec.num_layers * sum(linear.n * linear.k for linear in shapes.values()) * bits_per_weight / 8

    def share(choice: Choice) -> float:
        return sum(p.weight_bytes(shapes[name].n, shapes[name].k) for name, p in choice.linears.items()) / room

    with new_model() as program:
        made = [[(program.add_var(var_type=mip.BINARY), choice) for choice in of] for of in decisions]
        for of in made:
            program += mip.xsum(variable for variable, _ in of) == 1
        every = [pair for of in made for pair in of]
        program += mip.xsum(share(choice) * variable for variable, choice in every) <= 1
        program.objective = mip.xsum(choice.loss * variable for variable, choice in every)
        program.max_mip_gap = 1e-3
        program.optimize(max_seconds=30)
        if not program.num_solutions:
            raise ValueError(f"nothing fits into {bits_per_weight} bits per weight")
        best = [choice for variable, choice in every if variable.x > 0.5]
    assigned: dict[str, dict[str, Precision]] = {}
    for choice in best:
        assigned.setdefault(choice.unit, {}).update(choice.linears)
    return assigned, sum(choice.loss for choice in best)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", type=words, default=list(USUAL), metavar=",".join(BEDS))
    parser.add_argument("--quantizers", type=words, default=["rtn", "gptq"], metavar="NAME,...")
    parser.add_argument("--bits-per-weight", type=words, default=["3.5", "4", "4.5", "5"], metavar="X,...")
    parser.add_argument("--bits", type=numbers, default=list(BITS), metavar="B,...", help="fewest first")
    parser.add_argument("--options", type=words, default=list(OPTIONS), metavar="NAME,...")
    parser.add_argument("--windows", type=int, default=TEST_WINDOWS, help="of the test text")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmpq-quality", metavar="FOLDER")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    if arguments.json_out and arguments.json_out.exists():
        rows = json.loads(arguments.json_out.read_text())["rows"]
    keys = ("bed", "quantizer", "size", "options")
    for name in arguments.beds:
        bed = open_bed(name, arguments.work)
        spec, source = bed.model.spec, open_weights(bed.model.checkpoint, bed.model.spec)
        token_ids, test = (bed.model.tokenizer.encode(text()) for text in (calibration_text, evaluation_text))
        judged = Windows.spread("test", test, arguments.windows, LENGTH)
        evaluator = Evaluator(network(bed.folder), [judged], bed.folder)
        for quantizer in arguments.quantizers:
            groups = GROUP_SIZES if any(name.endswith("group") for name in arguments.options) else (GROUP_SIZE,)
            sizes = [(bits, group) for bits in arguments.bits for group in groups if bits < 8 or group == GROUP_SIZE]
            precisions = [Precision(bits, group, "asym", quantizer) for bits, group in sizes]  # fewest bits first
            sensitivity = losses(bed, source, token_ids, precisions)
            for size, options in ((size, name) for size in arguments.bits_per_weight for name in arguments.options):
                key = dict(zip(keys, (name, quantizer, float(size), options), strict=True))
                if any(key.items() <= row.items() for row in rows):
                    continue
                assigned, predicted = choose(spec, choices(spec, sensitivity, precisions, options), float(size))
                options_of = {unit: Mixed(tuple(linears.items())) for unit, linears in assigned.items()}
                left = left_of(bed, token_ids, options_of)
                row = {"model": BEDS[name], **key, "bits_per_weight": left.bits_per_weight, "predicted": predicted}
                counts = {name: [assigned[unit][name].bits for unit in assigned] for name in spec.linears("layer.0")}
                mean_bits = {name: sum(bits) / len(bits) for name, bits in counts.items()}
                rows.append(row | fields(evaluator.measure(left.weights)) | {"mean_bits": mean_bits})
                print(json.dumps(rows[-1]), flush=True)
                if arguments.json_out:
                    head = {**describe(), "predictions": judged.predictions, "group_size": GROUP_SIZE}
                    write_results(arguments.json_out, {**head, "rows": rows})


if __name__ == "__main__":
    main()
