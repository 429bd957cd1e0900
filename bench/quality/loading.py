"""How long quantizing the demo model takes, and loading what was made of it.

python -m bench.quality.loading [--bits 3 4 8] [--group-size 64] [--json-out FILE]

Loading is from the folder to prepared weights in memory: what a worker does before it serves. The least of five times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import planner
from bench.machine import describe, write_results
from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.quantized_model import write_quantized
from llmpq.models.decoder import build_stage
from llmpq.spec import NATIVE, Device, Plan

TRIALS = 5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    model, rows = open_model("demo"), []
    for quantizer in ("rtn", "gptq"):
        constraints = planner.Constraints(group_size=arguments.group_size, quantizer=quantizer)
        for bits in arguments.bits:
            with TemporaryDirectory() as folder:
                start, cpu_start = time.perf_counter(), time.process_time()
                write_quantized(model, dict.fromkeys(model.spec.units, constraints.precision(bits)), Path(folder))
                row = {
                    "quantizer": quantizer,
                    "bits": bits,
                    "quantize_s": time.perf_counter() - start,
                    "quantize_cpu_s": time.process_time() - cpu_start,
                    "load_s": min(load_seconds(folder) for _ in range(TRIALS)),
                }
            rows.append(row)
            print(row, flush=True)
    if arguments.json_out:
        header = {"group_size": arguments.group_size, "threads": torch.get_num_threads()}
        write_results(arguments.json_out, describe() | header | {"rows": rows})


def load_seconds(folder: str) -> float:
    start = time.perf_counter()
    model = open_model(folder)
    plan = Plan.single(model.spec, Device("cpu0", "cpu"), NATIVE, slots=1, max_length=16)
    build_stage(model.spec, open_weights(model.checkpoint, model.spec), plan, 0, torch.device("cpu"))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
