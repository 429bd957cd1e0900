"""A process at one end of links: `--devices JSON --store ADDRESS --rank N` (see runtime/control.py for how it starts).

The command "exchange" (source, target; ranks) sends messages from one to the other, which answers each; the source
reports the median seconds of a small and of a large one, there and back. They travel as hidden states do
(runtime/communication.py): between different GPUs by NCCL, else by gloo through host memory, and answers by gloo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import combinations

import torch
import torch.distributed as dist

from llmpq import hardware
from llmpq.doctor.link_speed import LARGE_BYTES
from llmpq.runtime.communication import transport
from llmpq.runtime.control import Control
from llmpq.runtime.meeting import join, open_store
from llmpq.spec import Device

_ROUNDS = {"small": 100, "large": 10}
_WARM_UP = 2


class _End:
    """This end of the link to another rank."""

    def __init__(self, other: int, device: torch.device, nccl: dist.ProcessGroup | None) -> None:
        self._other, self._device, self._nccl = other, device, nccl
        on_gpu = device.type == "cuda"
        self._token = torch.zeros(1, dtype=torch.int64)
        self._message = torch.zeros(LARGE_BYTES, dtype=torch.uint8, device=device)
        self._host = torch.zeros(LARGE_BYTES, dtype=torch.uint8, pin_memory=on_gpu) if on_gpu else self._message

    def send_token(self) -> None:
        dist.send(self._token, self._other)

    def receive_token(self) -> None:
        dist.recv(self._token, self._other)

    def send_message(self) -> None:
        if self._nccl is not None:
            dist.send(self._message, self._other, group=self._nccl)
            return
        if self._host is not self._message:
            self._host.copy_(self._message)
        dist.send(self._host, self._other)

    def receive_message(self) -> None:
        if self._nccl is not None:
            dist.recv(self._message, self._other, group=self._nccl)
            torch.cuda.synchronize(self._device)
            return
        dist.recv(self._host, self._other)
        if self._host is not self._message:
            self._message.copy_(self._host)


def _round_trips(count: int, there: Callable[[], None], back: Callable[[], None]) -> float:
    """Median seconds of doing one after the other."""
    seconds = []
    for _ in range(_WARM_UP + count):
        began = time.perf_counter()
        there()
        back()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARM_UP:])


def _exchange(end: _End, source: bool) -> dict[str, float]:
    """The seconds of a small and a large message; at the target they mean nothing."""
    if source:
        ways = {"small": (end.send_token, end.receive_token), "large": (end.send_message, end.receive_token)}
    else:
        ways = {"small": (end.receive_token, end.send_token), "large": (end.receive_message, end.send_token)}
    return {f"{size}_s": _round_trips(_ROUNDS[size], *way) for size, way in ways.items()}


def main(control: Control, argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--rank", type=int, required=True)
    arguments = parser.parse_args(argv)
    devices = [Device.from_dict(device) for device in json.loads(arguments.devices)]
    rank: int = arguments.rank
    device = hardware.use(devices[rank])
    control.started()
    join(open_store(arguments.store, len(devices)), rank, len(devices))
    groups = {  # every process takes part in making every group
        frozenset(pair): dist.new_group(list(pair), backend="nccl")
        for pair in combinations(range(len(devices)), 2)
        if transport(devices[pair[0]], devices[pair[1]]) == "nccl"
    }
    while True:
        command = control.receive()
        control.status.doing = "measuring a link"
        source, target = command["source"], command["target"]
        other = target if rank == source else source
        end = _End(other, device, groups.get(frozenset((rank, other))))
        control.send("exchanged", source=rank == source, **_exchange(end, rank == source))
