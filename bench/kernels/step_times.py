"""Where the time of a whole step goes on a CPU: python -m bench.kernels.step_times [--json-out FILE].

The demo model at 4 bits, groups of 64, as one stage: a step as the runtime makes it, from token ids to the next tokens.
Linears are all products, the head's too; attention includes rotating and writing to the cache. Operations are timed
inside the recorded step. What they leave of the whole is `python`: describing the step, and taking its tokens. Figures
are medians of interleaved rounds. The overhead is the share that neither linears nor attention take. Beside it: what
each operation pays for being handed to several threads, the median of many hand-overs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernels.rivals.rounds import await_quiet
from bench.machine import describe, processor, write_results
from llmpq.checkpoint.model_files import open_model
from llmpq.checkpoint.weights import open_weights
from llmpq.kernels.backends.cpu import hand_over_seconds
from llmpq.models.decoder_stage import DecoderStage, build_stage
from llmpq.models.step import Step
from llmpq.runtime.sampler import next_tokens
from llmpq.spec import ActivationMode, Device, Plan, Precision

KINDS = {"gemm": "linears", "attention": "attention", "rotate_and_store": "attention"}
STEPS = {"decode 1": (1, 1, 128), "decode 8": (8, 1, 128), "decode 32": (32, 1, 128), "prefill 128": (1, 128, 0)}
ROUNDS = 15
HAND_OVERS = 20000


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--activations", nargs="+", default=["a8", "a8x2"], metavar="MODE")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    hand_overs = {threads: hand_over(threads) for threads in arguments.threads if threads > 1}
    for threads, seconds in hand_overs.items():
        print(f"hand-over to {threads} threads: {1e6 * seconds:.2f} us", flush=True)
    for mode in arguments.activations:
        for eager in (False, True):
            stage = demo_stage(mode, eager)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                found = measure(stage, arguments.rounds)
                rows += [{"activations": mode, "eager": eager, "threads": threads, **row} for row in found]
                for row in rows[-len(found) :]:
                    print(json.dumps(row), flush=True)
    if arguments.json_out:
        kept = json.loads(arguments.json_out.read_text())["runs"] if arguments.json_out.exists() else []
        others = [run for run in kept if run["device"] != processor()]
        write_results(
            arguments.json_out, {"runs": [*others, describe() | {"rows": rows, "hand_over_seconds": hand_overs}]}
        )


def hand_over(threads: int) -> float:
    """Median seconds until so many threads that are awake have all begun and ended an item."""
    return float(hand_over_seconds(threads, HAND_OVERS).median())


def demo_stage(activations: ActivationMode, eager: bool) -> DecoderStage:
    """All of the demo model, with room for the steps above."""
    model, precision = open_model("demo"), Precision(4, 64, "asym")
    plan = Plan.single(model.spec, Device("cpu0", "cpu"), precision, slots=32, max_length=160, activations=activations)
    return build_stage(
        model.spec, open_weights(model.checkpoint, model.spec), plan, 0, torch.device("cpu"), eager=eager
    )


def measure(stage: DecoderStage, rounds: int) -> list[dict[str, Any]]:
    """For each of STEPS: seconds of the whole, and, of a recorded stage, of its parts and the share of overhead."""
    whole: dict[str, list[float]] = {name: [] for name in STEPS}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    samplers = [None] * 32  # all are greedy

    def take(name: str, seconds: torch.Tensor | None) -> float:
        """Seconds of a step."""
        sequences, query_len, start = STEPS[name]
        tokens = [5] * (sequences * query_len)
        began = time.perf_counter()
        step = Step.of(range(sequences), [query_len] * sequences, [start] * sequences, tokens)
        likeliest, logits = stage.next_tokens(step, seconds=seconds)
        next_tokens(likeliest, logits, samplers[:sequences], step.context_lens).tolist()
        return time.perf_counter() - began

    for name in STEPS:
        take(name, None)
    operations = stage.operations if stage.is_recorded else ()
    seconds = torch.zeros(len(operations), dtype=torch.float64)
    await_quiet(10)
    for _ in range(rounds):
        for name in STEPS:
            whole[name].append(take(name, seconds))
            parts[name].append(by_kind(list(zip(operations, seconds.tolist(), strict=True))))
    return [summary(name, whole[name], parts[name]) for name in STEPS]


def by_kind(operations: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds of linears, of attention, and of every other operation by its name."""
    found: dict[str, float] = {}
    for name, seconds in operations:
        kind = KINDS.get(name, name)
        found[kind] = found.get(kind, 0.0) + seconds
    return found


def summary(name: str, whole: Sequence[float], parts: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A row: medians, and which share of the whole neither linears nor attention take. `parts` may be empty."""
    row: dict[str, Any] = {"step": name, "seconds": statistics.median(whole)}
    if any(parts):
        rest = [seconds - sum(part.values()) for seconds, part in zip(whole, parts, strict=True)]
        medians = {kind: statistics.median(part[kind] for part in parts) for kind in parts[0]}
        row["parts"] = medians | {"python": statistics.median(rest)}
        shares = [1 - (p["linears"] + p["attention"]) / s for s, p in zip(whole, parts, strict=True)]
        row["overhead"] = statistics.median(shares)
    return row


if __name__ == "__main__":
    main()
