"""What this GPU can do at most: read, copy, and multiply 16-bit matrices with cuBLAS.

python -m bench.kernels.gpu_ceilings [--json-out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from triton import language as tl

from bench.kernels.rivals.graphs import Clock, CudaClock
from bench.machine import describe, write_results

_BLOCK = 4096  # words that a program reads at once: 16 bytes a thread, four times
_PROGRAMS_PER_SM = (4, 8, 16)
_READ_BYTES = 4 * 2**30
_MATMUL = 8192
_CALLS = 4  # in a graph
_REPEATS = 7


@triton.jit
def _sum_words(source, sums, words, BLOCK: tl.constexpr):
    """Program i reads every (number of programs)-th block from the i-th on and adds it up in sums[i]."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        total += tl.load(source + start + offsets)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def reader(source: torch.Tensor, programs: int) -> Callable[[], torch.Tensor]:
    """A function that reads int32 [words] and writes next to nothing: partial sums int32 [programs].

    Raises ValueError unless words is a multiple of the block and below 2**31.
    """
    words = len(source)
    if words % _BLOCK or words >= 2**31:
        raise ValueError(f"{words} words are not whole blocks of {_BLOCK}, or too many for an int32")
    sums = torch.empty(programs, dtype=torch.int32, device=source.device)

    def read() -> torch.Tensor:
        _sum_words[(programs,)](source, sums, words, BLOCK=_BLOCK, num_warps=8)
        return sums

    return read


def whole_blocks(nbytes: int) -> int:
    """int32 words that are at least so many bytes, and can be read."""
    return -(-nbytes // (4 * _BLOCK)) * _BLOCK


def readers(nbytes: int, device: torch.device) -> list[Callable[[], torch.Tensor]]:
    """Some ways to read at least nbytes; which is the fastest depends on the device."""
    source = torch.ones(whole_blocks(nbytes), dtype=torch.int32, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return [reader(source, processors * each) for each in _PROGRAMS_PER_SM]


def measure(device: torch.device, clock: Clock) -> dict[str, float]:
    """Bytes read, bytes copied (read and written, both counted) and bfloat16 operations (a multiply-add is two) per s.

    The best of a few tries each.
    """

    def best(work: Callable[[], object]) -> float:
        def calls() -> None:
            for _ in range(_CALLS):
                work()

        play = clock.record(calls)
        return min(clock.seconds(play, True) for _ in range(_REPEATS)) / _CALLS

    read_bytes = 4 * whole_blocks(_READ_BYTES)
    reading = min(best(read) for read in readers(_READ_BYTES, device))
    source = torch.empty(_READ_BYTES // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copying = best(lambda: target.copy_(source))
    a, b = (torch.randn(_MATMUL, _MATMUL, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(a)
    multiplying = best(lambda: torch.mm(a, b, out=product))
    return {
        "read_bytes_per_s": read_bytes / reading,
        "copy_bytes_per_s": 2 * source.nbytes / copying,
        "bf16_flop_per_s": 2 * _MATMUL**3 / multiplying,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-out", metavar="FILE", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("error: bench.kernels.gpu_ceilings needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    found = measure(torch.device("cuda", torch.cuda.current_device()), CudaClock())
    print(*(f"{name} {value:.3e}" for name, value in found.items()), sep="\n")
    if arguments.json_out:
        write_results(arguments.json_out, describe() | {"ceilings": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
