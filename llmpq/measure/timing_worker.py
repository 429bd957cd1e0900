"""A process that times operations: `--device JSON` (see runtime/control.py for how a worker is started).

It runs in its device's environment and at its pace, as a stage would. Commands: "operations" (spec, ranges, shares,
precisions, activations, kv_bits), answered with an event of that name and the rows of a cost table; a GPU's routes are
measured and kept in the cache before. Until the next command the device is kept busy, so that devices that still
measure do so beside it. "link" (plan, spec, store, rank, sizes) exchanges messages with another worker, and both
compute in between.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llmpq import hardware
from llmpq.kernels import cache_backend
from llmpq.kernels.backends import cpu
from llmpq.kernels.backends.dense import SCRATCH_BYTES
from llmpq.measure.cases import Case, Cases
from llmpq.measure.expert_routing import ExpertShares
from llmpq.measure.gemm_paths import measure_routes
from llmpq.measure.operation_clock import Clock
from llmpq.measure.operation_grid import Ranges
from llmpq.models.arena import return_free_memory
from llmpq.models.decode_graph import CudaCapture
from llmpq.models.step import Step
from llmpq.runtime.communication import StageComm
from llmpq.runtime.control import Control
from llmpq.runtime.emulation import SlowdownEmulator
from llmpq.runtime.meeting import join, open_store
from llmpq.runtime.memory_watch import resident_bytes
from llmpq.runtime.message import Close, StageLinks, StepMessage
from llmpq.spec import CostRow, Device, ModelSpec, Op, Plan, Precision

SWEEPS = 5  # visits to every case, so that a bad moment of the machine affects many cases a little
_ENOUGH_S = 0.05  # spent in 3 visits: no more of them
_BUSY_BYTES = 64 * 2**20  # read for each message: some milliseconds, as a decode step of a stage takes


@torch.inference_mode()
def measure(
    cases: Sequence[Case], dtype: str, visit_s: float, on_progress: Callable[[int, int], None]
) -> list[CostRow]:
    """The median seconds of every operation, from several visits of `visit_s` at least to every case.

    `on_progress` is called with the visits that are done and all there are.
    """
    # Python would keep the memory of so many numbers, which would count as what a stage needs.
    samples: dict[Op, array[float]] = {op: array("d") for case in cases for op in case.ops}
    spent, turns = [0.0] * len(cases), [0] * len(cases)
    total = (SWEEPS + 1) * len(cases)
    for i, case in enumerate(cases):
        case.timed(0)  # warm-up
        on_progress(i + 1, total)
    for sweep in range(SWEEPS):
        for i, case in enumerate(cases):
            on_progress((sweep + 1) * len(cases) + i + 1, total)
            if sweep >= 3 and spent[i] > _ENOUGH_S:
                continue
            until = spent[i] + visit_s
            while spent[i] < until:
                turns[i] += 1
                times = case.timed(turns[i])
                spent[i] += sum(times) + 1e-6
                for op, seconds in zip(case.ops, times, strict=True):
                    samples[op].append(seconds)
    conditions = {
        op: (backend, dtype, case.working_set_bytes, case.graphed)
        for case in cases
        for op, backend in zip(case.ops, case.backends, strict=True)
    }
    return [CostRow(op, statistics.median(seconds), *conditions[op]) for op, seconds in samples.items()]


class _Busy:
    """Keeps the device at work from a thread until `stop`."""

    def __init__(self, cases: Sequence[Case], device: torch.device) -> None:
        self._device = device
        self._cases = [case for case in cases if case.ops[-1].kind == "layer_rest" and case.ops[-1].m == 1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="busy", daemon=True)
        self._thread.start()

    @torch.inference_mode()
    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # which each thread does for itself
        turn = 0
        while not self._stop.is_set():
            turn += 1
            self._cases[turn % len(self._cases)].timed(turn)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._cases = []


def _operations(control: Control, device: torch.device, slowness: SlowdownEmulator, command: dict[str, Any]) -> None:
    """Measure all operations and report them."""
    spec, ranges = ModelSpec.from_dict(command["spec"]), Ranges.from_dict(command["ranges"])
    precisions = [Precision.parse(text) for text in command["precisions"]]
    if device.type == "cuda":
        measure_routes(spec, precisions, device)  # first, as what a product costs depends on its route
    idle = resident_bytes()
    dtype: torch.dtype = getattr(torch, spec.compute_dtype(device.type))
    graphs = device.type == "cuda" and cache_backend(device, dtype) == "triton"
    shares = ExpertShares.from_dict(command["shares"])
    clock, capture = Clock(device, slowness), CudaCapture(device) if graphs else None
    maker = Cases(spec, ranges, device, clock, capture, shares, command["kv_bits"])
    cases = maker.all(precisions, command["activations"])
    last = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            control.send("progress", done=done, total=total)

    rows = measure(cases, str(maker.dtype).removeprefix("torch."), command["visit_s"], on_progress)
    control.send(
        "operations",
        rows=[row.to_dict() for row in rows],
        isa=cpu.isa() if device.type == "cpu" else None,
    )
    busy = _Busy(cases, device)
    del maker, cases
    control.receive()  # once all devices are measured
    busy.stop()
    gc.collect()
    if device.type == "cpu":
        return_free_memory()
        overhead = resident_bytes() - idle
    else:
        torch.cuda.empty_cache()
        overhead = torch.cuda.memory_reserved(device) + SCRATCH_BYTES  # which was given back just now, too
    control.send("overhead", overhead_bytes=max(0, overhead))


def _link(control: Control, device: torch.device, command: dict[str, Any]) -> None:
    """Send messages of several sizes to the next stage, which returns a token for each.

    Reports the seconds of both ways and those that this end is at work on a message, for each size.
    """
    plan, spec, rank = Plan.from_dict(command["plan"]), ModelSpec.from_dict(command["spec"]), command["rank"]
    join(open_store(f"file:{command['store']}", 2), rank, 2)
    links = StageComm(plan, spec, rank)
    data = torch.ones(_BUSY_BYTES // 4, device=device)
    trips = command["round_trips"]
    found = [exchange(links, rank, tokens, spec.hidden_size, data, trips) for tokens in command["sizes"]]
    seconds, handling = zip(*found)
    # The receiver is always waiting for one more message; it gets it before both leave.
    if rank == 0:
        links.send(Close())
    else:
        links.receive()
    links.flush()
    control.send("link", seconds=seconds, handling_s=handling)
    control.receive()
    dist.destroy_process_group()


def exchange(
    links: StageLinks, rank: int, tokens: int, hidden_size: int, data: torch.Tensor, trips: int
) -> tuple[float, float]:
    """Median seconds of a message and its answer, of `trips`, at rank 0, and of that what this end is at work.

    `data` is read at both ends before they send, as a stage reads its weights: meanwhile the other end has fallen
    asleep, and what follows finds nothing of its own in the caches. That does not count, neither here nor there. Hidden
    states come from where `data` is and go there, as a stage's do.
    """
    step = Step.of([0], [tokens], [0], [0] * tokens)
    hidden_states = torch.zeros(tokens, hidden_size, device=data.device)
    whole, work = [], []
    ready_ns = time.monotonic_ns()
    for _ in range(trips):
        if rank > 0:
            received = links.receive()
            ready_ns = received.arrived_ns
            if isinstance(received.content, StepMessage) and received.content.hidden_states is not None:
                received.content.hidden_states.to(data.device)[
                    :1, :1
                ].tolist()  # gloo leaves them on the host; NCCL may still be at work
        began_ns = time.monotonic_ns()
        data.sum().item()
        computed_ns = time.monotonic_ns()
        computing_ns = computed_ns - began_ns
        if rank > 0:
            links.return_tokens(torch.tensor([computing_ns]))
        else:
            links.expect(1)
            links.send(StepMessage(step, hidden_states))
        work.append((time.monotonic_ns() - ready_ns - computing_ns) / 1e9)
        if rank == 0:
            returned = links.receive_tokens()
            ready_ns = returned.arrived_ns
            assert isinstance(returned.content, torch.Tensor)
            whole.append((ready_ns - computed_ns - int(returned.content)) / 1e9)
    return statistics.median(whole or [0.0]), statistics.median(work[1:])


def run(control: Control, place: Device) -> None:
    """Carry out commands until they end. Does not return."""
    device = hardware.use(place)
    control.started()
    while True:
        command = control.receive()
        control.status.doing = f"measuring ({command['command']})"
        if command["command"] == "operations":
            _operations(control, device, SlowdownEmulator(place), command)
        else:
            _link(control, device, command)


def main(control: Control, argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args(argv)
    run(control, Device.from_dict(json.loads(arguments.device)))
