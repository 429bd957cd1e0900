"""What a worker is started with: threads, instruction sets, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from llmpq.runtime.launch import device_environment, host_threads
from llmpq.spec import Device


def test_a_worker_imports_neither_transformers_nor_a_planner() -> None:
    code = "import sys, llmpq.runtime.worker; print(*{'transformers', 'planner', 'mip', 'sympy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == ""


def test_gpus_share_the_cores_that_the_cpus_of_their_host_leave() -> None:
    cpu, first, second = Device("cpu0", "cpu", threads=3), Device("a", "cuda"), Device("b", "cuda", index=1)
    away = Device("c", "cuda", host="elsewhere")

    def threads(*devices: Device, cores: int = 16) -> list[int]:
        return [host_threads(device, devices, cores) for device in devices]

    assert threads(first) == [16]
    assert threads(cpu, first, second) == [3, 6, 6]
    assert threads(first, away) == [16, 16]
    assert threads(cpu, first, cores=2) == [3, 1]
    assert threads(replace(first, threads=9), second, cores=4) == [9, 2]
    assert device_environment(first, 6)["OMP_NUM_THREADS"] == "6"


def test_an_instruction_set_limits_torch_and_its_libraries() -> None:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"

    def seen(device: Device) -> str:
        environment = {"PATH": "", **device_environment(device)}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert seen(Device("cpu0", "cpu", isa="portable", threads=2)) == "DEFAULT 2"
    widest = seen(Device("cpu0", "cpu"))
    if widest in ("AVX2 1", "AVX512 1"):
        assert seen(Device("cpu0", "cpu", isa="avx2")) == seen(Device("cpu0", "cpu", isa="avxvnni")) == "AVX2 1"
