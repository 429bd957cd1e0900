"""A decoder of Llama's shapes with random weights on one GPU, and transformers' own beside it.

    python -m bench.end_to_end.gpu_decoder [--json-out FILE] [--model 8b] [--batches 1,8,32] [--rounds 2]
                                           [--budget-seconds 180] [--device cuda] [--engines NAME,...]

A prompt of 512 tokens for each sequence, and then 128 steps of decode, each from token ids on the host to the next ones
there; `ahead`, as the runtime makes them where a stage is alone: each is started before the last one's are read. Layers
at 4 bits in groups of 128 or at 16 bits, embedding and head at 16; graphed
where the stage is, or eager. `bound_share` is the time of reading the weights, keys and values that a step needs at the
measured bandwidth over the time it took. `kernels` names those that take most of a step. transformers' model has the
same shapes and prompts, in bfloat16: eager, and with a static cache and torch.compile(mode="reduce-overhead"), each in
a process of its own that is stopped if it takes too long.

With --json-out the file is written after every row. What it holds of this device and commit is not measured again.
--device cpu is for trying this out with --model tiny. Exit code 2: no GPU, or a bad option; 1: an engine failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.end_to_end import gpu_models
from bench.end_to_end.bounds import step_work
from bench.kernels.rivals.command_line import numbers, one_of
from bench.kernels.rivals.journal import is_same_run
from bench.machine import describe, write_results
from bench.reasons import reason
from llmpq.models.decoder_stage import DecoderStage, build_stage
from llmpq.models.step import Step
from llmpq.runtime.unread import LatestTokens, Unread
from llmpq.spec import W16, Device, Plan, Precision, Workload
from llmpq.spec.ops import Context

# Name -> bits of the layers, whether eager, whether ahead; or the mode of transformers' model.
OURS = {
    "llmpq int4": (4, False, False),
    "llmpq int4 ahead": (4, False, True),
    "llmpq int4 eager": (4, True, False),
    "llmpq 16 bit": (16, False, False),
    "llmpq 16 bit eager": (16, True, False),
}
THEIRS = {"transformers eager": "eager", "transformers compiled": "compiled"}
# The order in which they are worth their time.
ENGINES = (*list(OURS)[:2], "transformers eager", "llmpq int4 eager", "transformers compiled", *list(OURS)[3:])
RIVAL_SECONDS = 60.0  # that one of theirs may take
TOP = 12  # kernels that are named
_PROFILED = 3  # steps
_PREFILL_SEQUENCES = 4  # in a step


@dataclass(frozen=True)
class Work:
    """Of each sequence: `prompt` tokens, and `output` steps of one more."""

    prompt: int
    output: int

    @property
    def length(self) -> int:
        return self.prompt + self.output


WORK = Work(512, 128)
TINY_WORK = Work(16, 4)


def work_of(model: str) -> Work:
    return TINY_WORK if model == "tiny" else WORK


def prompts(model: str, batch: int) -> list[list[int]]:
    """The same for every engine."""
    generator = torch.Generator().manual_seed(batch)
    vocab_size = gpu_models.CONFIGS[model]["vocab_size"]
    found: list[list[int]] = torch.randint(2, vocab_size, (batch, work_of(model).prompt), generator=generator).tolist()
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ours:
    """A stage with the whole model."""

    def __init__(
        self, model: str, bits: int, eager: bool, device: torch.device, slots: int, *, ahead: bool = False
    ) -> None:
        precision = W16 if bits == 16 else Precision(bits, 32 if model == "tiny" else 128)
        self.spec = gpu_models.spec(model, precision)
        self.work, self._model = work_of(model), model
        place = Device(f"{device.type}0", "cuda" if device.type == "cuda" else "cpu")
        dtype = self.spec.compute_dtype(place.kind)
        plan = Plan.single(self.spec, place, precision, slots=slots, max_length=self.work.length, dtype=dtype)
        units = [W16, *[precision] * self.spec.num_layers, W16]
        microbatch = min(_PREFILL_SEQUENCES, slots)
        workload = Workload(slots, self.work.prompt, self.work.output)
        self.plan = replace(plan.with_precisions(units), workload=workload, prefill_microbatch=microbatch)
        source = gpu_models.RandomWeights(self.spec, device)
        began = time.perf_counter()
        self.stage: DecoderStage = build_stage(self.spec, source, self.plan, 0, device, eager=eager)
        synchronize(device)
        self.load_s = time.perf_counter() - began
        self._latest = LatestTokens(slots, device) if ahead else None

    def prefill(self, batch: int) -> tuple[float, list[int]]:
        """Seconds, and the first new token of each sequence."""
        given, tokens, most = prompts(self._model, batch), [], self.plan.prefill_microbatch
        began = time.perf_counter()
        for first in range(0, batch, most):
            part = given[first : first + most]
            slots, lens = range(first, first + len(part)), [self.work.prompt] * len(part)
            step = Step.of(slots, lens, [0] * len(part), [token for prompt in part for token in prompt])
            tokens += self._next(step)
        return time.perf_counter() - began, tokens

    def decode(self, tokens: list[int], steps: int) -> float:
        """Seconds of so many steps after the prompt."""
        batch, start = len(tokens), self.work.prompt
        began = time.perf_counter()
        if self._latest is not None:
            self._decode_ahead(tokens, steps, self._latest)
            return time.perf_counter() - began
        for i in range(steps):
            tokens = self._next(Step.of(range(batch), [1] * batch, [start + i] * batch, tokens))
        return time.perf_counter() - began

    def _decode_ahead(self, tokens: list[int], steps: int, latest: LatestTokens) -> None:
        batch, unread = len(tokens), deque[Unread]()
        latest.keep(Step.of(range(batch), [1] * batch, [0] * batch, tokens), torch.tensor(tokens))
        for i in range(steps):
            step = Step.of(range(batch), [1] * batch, [self.work.prompt + i] * batch, [0] * batch)
            found, self._logits = self.stage.next_tokens(step, tokens=latest.of(step))
            latest.keep(step, found)
            unread.append(Unread(found))
            if len(unread) > 1:
                unread.popleft().read().tolist()
        unread.popleft().read().tolist()

    def _next(self, step: Step) -> list[int]:
        tokens, logits = self.stage.next_tokens(step)
        self._logits = logits
        found: list[int] = tokens.tolist()
        return found

    @property
    def is_finite(self) -> bool:
        """Whether the last logits are numbers."""
        return bool(self._logits.isfinite().all())

    def bound_seconds(self, batch: int, read_bytes_per_s: float) -> float:
        """Of reading what a step in the middle of decode needs."""
        context = Context.of(*[self.work.prompt + self.work.output / 2] * batch)
        return step_work(self.plan, self.spec, batch, batch, context).nbytes / read_bytes_per_s


def kernels_of(call: Callable[[], object], device: torch.device, steps: int) -> list[dict[str, Any]]:
    """What takes most of a step's time on the device, of so many steps that `call` makes."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
        synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in found.events() or ():
        if on_gpu != (event.device_type.name == "CUDA"):
            continue
        seconds[event.name] += 1e-6 * (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
        calls[event.name] += 1
    top = sorted(seconds, key=lambda name: -seconds[name])[:TOP]
    total = sum(seconds.values()) / steps
    rows = [{"name": n[:120], "seconds": seconds[n] / steps, "calls": calls[n] / steps} for n in top]
    return [{"name": "all", "seconds": total, "calls": sum(calls.values()) / steps}, *rows]


def measure_ours(
    name: str, arguments: argparse.Namespace, device: torch.device, read_bytes_per_s: float | None
) -> Iterator[dict[str, Any]]:
    """A row for each batch."""
    bits, eager, ahead = OURS[name]
    engine = Ours(arguments.model, bits, eager, device, max(arguments.batches), ahead=ahead)
    work = engine.work
    graphed = bool(getattr(engine.stage, "is_graphed", False))
    for batch in arguments.batches:
        prefills, decodes = [], []
        engine.decode(engine.prefill(batch)[1], 2)  # compiles what there is to compile
        for _ in range(arguments.rounds):
            seconds, tokens = engine.prefill(batch)
            prefills.append(seconds)
            decodes.append(engine.decode(tokens, work.output))
        if not engine.is_finite:
            raise RuntimeError(f"the logits of batch {batch} are no numbers")
        row = row_of(name, batch, work, prefills, decodes) | {"load_s": engine.load_s, "graphed": graphed}
        if read_bytes_per_s:
            row["bound_share"] = engine.bound_seconds(batch, read_bytes_per_s) / row["step_s"]
        _, tokens = engine.prefill(batch)
        try:
            row["kernels"] = kernels_of(partial(engine.decode, tokens, _PROFILED), device, _PROFILED)
        except Exception as error:  # the speeds are known all the same
            row["kernels"], row["kernels_missing"] = [], reason(error)
        yield row


def row_of(engine: str, batch: int, work: Work, prefills: Sequence[float], decodes: Sequence[float]) -> dict[str, Any]:
    """What every engine says: medians over the rounds."""
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    return {
        "engine": engine,
        "batch": batch,
        "prompt": work.prompt,
        "output": work.output,
        "prefill_tokens_per_s": batch * work.prompt / prefill,
        "decode_tokens_per_s": batch * work.output / decode,
        "step_s": decode / work.output,
    }


def measure_theirs(name: str, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of a process of its own, as they come. Raises RuntimeError if it fails or is stopped."""
    batches = ",".join(map(str, arguments.batches))
    command = [sys.executable, "-m", "bench.end_to_end.gpu_transformers", "--model", arguments.model, "--device"]
    command += [device.type, "--mode", THEIRS[name], "--batches", batches, "--rounds", str(arguments.rounds)]
    limit = min(RIVAL_SECONDS, arguments.budget_seconds)
    with tempfile.TemporaryFile("w+") as out:  # no pipe: a compiler that it leaves behind would hold that open
        process = subprocess.Popen(command, stdout=out)
        try:
            code = process.wait(limit)
            fault = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            fault = f"stopped after {limit:.0f} s"
        out.seek(0)
        lines = out.read().splitlines()
    for line in lines:
        if line.startswith("{") and line.endswith("}"):
            found = json.loads(line)
            yield row_of(name, found["batch"], work_of(arguments.model), found["prefills"], found["decodes"])
    if fault:
        raise RuntimeError(fault)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-out", metavar="FILE", type=Path)
    parser.add_argument("--model", choices=list(gpu_models.CONFIGS), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32], metavar="N,...")
    parser.add_argument("--engines", type=one_of(ENGINES), default=list(ENGINES), metavar="NAME,...")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    return parser.parse_args(argv)


def known(path: Path | None, head: dict[str, Any], model: str) -> dict[str, Any]:
    """What the file holds already, of the same device, commit and model."""
    old = json.loads(path.read_text()) if path is not None and path.exists() else {}
    fits = bool(old) and old.get("model") == model and is_same_run(old, head)
    return {"model": model, "missing": {}, "rows": [], "ceilings": {}} | (old if fits else {}) | head


def main(argv: Sequence[str] | None = None) -> int:
    arguments, began = parse(argv), time.monotonic()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: bench.end_to_end.gpu_decoder needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    results = known(arguments.json_out, describe(), arguments.model)

    def write() -> None:
        if arguments.json_out:
            write_results(arguments.json_out, results)

    if device.type == "cuda" and not results["ceilings"]:
        from bench.kernels import gpu_ceilings
        from bench.kernels.rivals.graphs import CudaClock

        results["ceilings"] = gpu_ceilings.measure(device, CudaClock())
        torch.cuda.empty_cache()
    read = results["ceilings"].get("read_bytes_per_s")
    results["missing"] = {}
    for name in arguments.engines:
        have = {row["batch"] for row in results["rows"] if row["engine"] == name}
        if have >= set(arguments.batches):
            continue
        left = arguments.budget_seconds - (time.monotonic() - began)
        if left <= 0:
            results["missing"][name] = "no time was left"
            continue
        options = argparse.Namespace(**vars(arguments) | {"budget_seconds": left})
        try:
            found = (
                measure_theirs(name, options, device) if name in THEIRS else measure_ours(name, options, device, read)
            )
            for row in found:
                results["rows"] = [
                    other for other in results["rows"] if (other["engine"], other["batch"]) != (name, row["batch"])
                ] + [row]
                print(json.dumps({key: value for key, value in row.items() if key != "kernels"}), flush=True)
                write()
        except Exception as error:  # the others are measured all the same
            results["missing"][name] = reason(error)
            print(f"missing: {name}: {reason(error)}", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write()
    return int(any(name in results["missing"] for name in OURS))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
