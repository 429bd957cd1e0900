"""One linear layer on this CPU: our kernels against PyTorch's, interleaved in one process on cold weights.

    python -m bench.linear_vs_torch [--threads 1] [--shapes 4096x4096 ...] [--json-out FILE]

Every repetition times each contender once, in an order shuffled anew, on the next of several copies of its weight that
together exceed the last-level cache several times. Reported are medians, the ratio of PyTorch's float32 linear to ours,
and the read bandwidth of this machine as measured in the same run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

import torch

from bench.machine import describe, write_results
from llmpq.kernels import gemm, prepare
from llmpq.quant import quantize
from llmpq.spec import Precision

_ROTATED_BYTES = 160 * 2**20
_GROUP_SIZE = 128


@dataclass(frozen=True)
class Row:
    """One contender on one problem. `ratio` is torch float32's median time over this one's."""

    threads: int
    n: int
    k: int
    m: int
    contender: str
    seconds: float
    spread: float  # (third quartile - first) / median
    ratio: float
    error: float  # max abs error against float64 on the same weights, over the largest result


def read_bandwidth() -> float:
    """Bytes per second at which the running number of threads sums 512 MiB: the ceiling of a product with one row."""
    buffer = torch.ones(2**27)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.numel() * 4 / min(seconds)


def contenders(n: int, k: int) -> dict[str, tuple[list[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]]:
    """Name -> (the linear on each of several copies of its weight, the float64 weight it stands for)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) / k**0.5

    def copies(size: int, make: Callable[[], Callable[[torch.Tensor], torch.Tensor]]) -> list:
        return [make() for _ in range(max(2, -(-_ROTATED_BYTES // size)))]

    def dense(dtype: torch.dtype) -> list:
        def make() -> Callable[[torch.Tensor], torch.Tensor]:
            copy = weight.to(dtype, copy=True)
            return lambda x: torch.nn.functional.linear(x.to(dtype), copy)

        return copies(n * k * dtype.itemsize, make)

    found = {
        "torch float32": (dense(torch.float32), weight.double()),
        "torch bfloat16": (dense(torch.bfloat16), weight.bfloat16().double()),
    }
    for bits in (3, 4, 8):
        quantized = quantize(weight, Precision(bits, _GROUP_SIZE))

        def make(quantized=quantized) -> Callable[[torch.Tensor], torch.Tensor]:
            prepared = prepare(quantized)
            return lambda x: gemm(x, prepared)

        found[f"llmpq int{bits}"] = (copies(quantized.nbytes, make), quantized.dequantize(torch.float64))
    return found


def compare(n: int, k: int, m: int, threads: int, repetitions: int) -> list[Row]:
    """All contenders on one problem."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    found = contenders(n, k)
    rotations = {name: cycle(copies) for name, (copies, _) in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    errors = {}
    for name, (copies, weight) in found.items():
        exact = x.double() @ weight.T
        errors[name] = float((copies[0](x).double() - exact).abs().max() / exact.abs().max())
    shuffle = random.Random(0).shuffle
    for _ in range(repetitions):
        order = list(found)
        shuffle(order)
        for name in order:
            linear = next(rotations[name])
            start = time.perf_counter()
            linear(x)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name, times in seconds.items():
        quartiles = statistics.quantiles(times, n=4)
        spread = (quartiles[2] - quartiles[0]) / median[name]
        ratio = median["torch float32"] / median[name]
        rows.append(Row(threads, n, k, m, name, median[name], spread, ratio, errors[name]))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "1536x576", "576x576"], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128], metavar="M")
    parser.add_argument("--repetitions", type=int, default=41)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {arguments.threads} thread(s)")
    rows: list[Row] = []
    with torch.inference_mode():
        for shape in arguments.shapes:
            n, k = map(int, shape.split("x"))
            for m in arguments.rows:
                rows += (found := compare(n, k, m, arguments.threads, arguments.repetitions))
                for row in found:
                    microseconds = 1e6 * row.seconds
                    print(f"{n}x{k} m={m:<4} {row.contender:<15} {microseconds:10.1f} us {row.ratio:6.2f}x", flush=True)
    if arguments.json_out:
        results = {
            "ceilings": {"read_bytes_per_s": bandwidth},
            "group_size": _GROUP_SIZE,
            "rows": list(map(asdict, rows)),
        }
        write_results(arguments.json_out, describe() | results)


if __name__ == "__main__":
    main()
