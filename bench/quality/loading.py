"""How long `llmpq quantize` takes for the demo model, in how much memory, and loading what it has made.

python -m bench.quality.loading [--bits 3 4 8] [--group-size 64] [--json-out FILE]

Quantizing is the command as users give it, from its start to its end. Loading is from the folder to prepared weights in
memory: what a worker does before it serves. The least of five times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.machine import describe, write_results
from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.weights import open_weights
from llmpq.host_limits import usable_cores
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import NATIVE, Device, Plan

TRIALS = 5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="MODEL")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    for quantizer in ("rtn", "gptq"):
        for bits in arguments.bits:
            with TemporaryDirectory() as folder:
                options = ["--bits", str(bits), "--group-size", str(arguments.group_size), "--quantizer", quantizer]
                found = quantize(["--model", arguments.model, *options, "--out", str(Path(folder) / "model")])
                seconds = min(load_seconds(Path(folder) / "model") for _ in range(TRIALS))
            rows.append({"quantizer": quantizer, "bits": bits, **found, "load_s": seconds})
            print(rows[-1], flush=True)
    if arguments.json_out:
        header = {"group_size": arguments.group_size, "threads": usable_cores()}
        write_results(arguments.json_out, describe() | header | {"rows": rows})


def quantize(options: Sequence[str]) -> dict[str, Any]:
    """Seconds, processor seconds, and the most bytes in memory, of a command that must succeed."""
    start = time.perf_counter()
    command = subprocess.Popen([sys.executable, "-m", "llmpq", "quantize", *options], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(command.pid, 0)
    command.returncode = os.waitstatus_to_exitcode(status)
    if command.returncode != 0:
        raise SystemExit(f"llmpq quantize {' '.join(options)} ended with {command.returncode}")
    return {
        "quantize_s": time.perf_counter() - start,
        "quantize_cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * used.ru_maxrss,
    }


def load_seconds(folder: Path) -> float:
    start = time.perf_counter()
    model = open_model(str(folder))
    plan = Plan.single(model.spec, Device("cpu0", "cpu"), NATIVE, slots=1, max_length=16)
    build_stage(model.spec, open_weights(model.checkpoint, model.spec), plan, 0, torch.device("cpu"))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
