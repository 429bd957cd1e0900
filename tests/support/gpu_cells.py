"""What stands in for a GPU where its results are only worked with: a clock, a device's limits, a measured cell."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.kernels.rivals.goals_gpu import READ
from bench.kernels.rivals.measure_gpu import Cell
from bench.kernels.rivals.timing import Timing

CPU = torch.device("cpu")
CEILINGS = {"read_bytes_per_s": 3e12, "copy_bytes_per_s": 2.8e12, "bf16_flop_per_s": 8e14}
HEAD = {"device": "H", "commit": "abc", "kernels": "123"}
PLACE = {"n": 64, "k": 128, "m": 1, "dtype": "bf16"}


class FakeClock:
    """Takes work for a graph; every play lasts a second longer than the one before."""

    def __init__(self, record: Callable[[Callable[[], object]], Callable[[], object]] = lambda work: work) -> None:
        self._record, self.played, self.broken = record, [], False

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        work()
        return self._record(work)

    def seconds(self, play: Callable[[], object], lead: bool) -> float:
        play()
        self.played.append(play)
        return float(len(self.played))

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("the device is gone")


def timing(*seconds: float, nbytes: int = 2**20, error: float | None = 1e-3, graphed: bool = True) -> Timing:
    return Timing(list(seconds), error, nbytes, graphed, 1e-5)


def example_cell() -> Cell:
    """One row on a large weight; ours is not faster than three times cuBLAS."""
    nbytes = 120 * 10**6  # 40 us to read
    return Cell(
        28672,
        8192,
        1,
        "bf16",
        {
            "llmpq cuda int4": timing(50e-6, 51e-6, 49e-6, nbytes=nbytes),
            "llmpq triton int4": timing(60e-6, 60e-6, 60e-6, nbytes=nbytes),
            "cuBLAS": timing(150e-6, 153e-6, 147e-6, error=2e-3),
            "Marlin int4": timing(60e-6, 60e-6, 60e-6, graphed=False),
            READ: timing(100e-6, 100e-6, 100e-6, nbytes=2 * nbytes, error=None),
        },
        {"Machete int4": "ImportError: no"},
    )
