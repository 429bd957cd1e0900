"""What the benchmarks share: the device, a clock that waits for it, and what a result says about its machine."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.machine import describe


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device to time on: cpu or cuda")
    parser.addoption("--threads", type=int, default=1, help="CPU threads")


def synced_clock() -> float:
    """Seconds, once the GPU has done what it was given: --benchmark-timer=bench.conftest.synced_clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test, with its number of threads set while the test runs."""
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    request.addfinalizer(lambda: torch.set_num_threads(before))
    return torch.device(name)


@pytest.fixture
def timed(request: pytest.FixtureRequest) -> bool:
    """False where each body is only run once, to see that it runs (--benchmark-disable)."""
    return not request.config.getoption("benchmark_disable")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Name device, versions, commit, date and threads in every result file."""
    machine_info.update(describe(), threads=config.getoption("--threads"))
