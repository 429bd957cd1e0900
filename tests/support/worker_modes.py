"""A worker that does what test_worker_loss.py wants; its argument is a mode."""

from __future__ import annotations

import os
import signal
import time

from llmpq.runtime.control import Control
from llmpq.spec import Device, UsageError

MIB = 2**20


def allocate_too_much(control: Control, cap: int) -> None:
    """One allocation beyond the cap, never touched."""
    import torch

    from llmpq.runtime.memory_watch import MemoryWatch

    memory = MemoryWatch(Device("cpu0", "cpu", memory_bytes=cap), "stage 0 on cpu0", control.status, control.fail)
    control.status.doing = "allocating"
    with control.reporting(memory.explain):
        torch.empty(1000 * MIB, dtype=torch.uint8)


def grow_too_much(control: Control, cap: int) -> None:
    """Many small allocations, each touched, until something stops it."""
    import torch

    from llmpq.runtime.memory_watch import MemoryWatch

    memory = MemoryWatch(Device("cpu0", "cpu", memory_bytes=cap), "stage 0 on cpu0", control.status, control.fail)
    control.status.doing = "growing"
    with control.reporting(memory.explain):
        kept = []
        for _ in range(100):
            kept.append(torch.ones(MIB, dtype=torch.uint8))
            time.sleep(0.05)


def hold_and_go_on(control: Control, cap: int) -> None:
    """What is held counts when a worker begins anew, though its memory was free of a limit in between."""
    import torch

    from llmpq.runtime.memory_watch import MemoryWatch

    device = Device("cpu0", "cpu", memory_bytes=cap)
    memory = MemoryWatch(device, "stage 0 on cpu0", control.status, control.fail)
    control.status.doing = "holding"
    with control.reporting(memory.explain):
        held = torch.ones(cap - 20 * MIB, dtype=torch.uint8)
        memory.lift()
        torch.empty(10 * cap, dtype=torch.uint8)
        memory.renew(device, "stage 1 on cpu0", held.nbytes)
        assert held.nbytes <= memory.sample() < cap
        torch.empty(cap, dtype=torch.uint8)  # never touched


def main(control: Control, argv: list[str]) -> None:
    control.started()
    control.status.doing = "testing"
    match argv[0]:
        case "echo":
            while True:
                control.send("echo", **control.receive())
        case "usage":
            raise UsageError("the model is broken")
        case "defect":
            print("said before")
            raise RuntimeError("a defect")
        case "late-usage":  # the cause of a neighbour's defect, but reported after it
            time.sleep(0.3)
            raise UsageError("the model is broken")
        case "exit":
            os._exit(7)
        case "abort":
            os.kill(os.getpid(), signal.SIGABRT)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "allocate":
            allocate_too_much(control, 64 * MIB)
        case "grow":
            grow_too_much(control, 16 * MIB)
        case "renew":
            hold_and_go_on(control, 64 * MIB)
