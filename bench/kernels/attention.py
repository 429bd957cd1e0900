"""Attention on this CPU, beside what the processor can do at most: its multiply-adds in prefill, its memory in decode.

    python -m bench.kernels.attention [--threads T,...] [--kv-bits 16 8] [--rounds R] [--json-out FILE]

In each round the ceilings (bench/kernels/ceilings.py) are measured between the calls, and a share is the median over
the rounds of what was reached over what the round's ceiling was: the machine may be faster or slower from one moment to
the next. Operations count those that causal attention needs; bytes are those of the keys and values of all contexts,
scales included, read once. Decoding reads cold memory, as in a model: each call takes the next of several layers that
exceed the caches together. `store` is the time of rotary and the way into the cache for the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, product
from statistics import median
from typing import Any

import torch

from bench.kernels import ceilings
from bench.machine import describe, write_results
from llmpq.kernels import Sequences, attention, rotate_and_store
from llmpq.models.kv_cache import KVCache

COLD_BYTES = 128 * 2**20  # of keys and values that calls go through in turn
ROUND_S = 0.03  # of calls
READ_BYTES = 256 * 2**20
PREFILL_GOAL, DECODE_GOAL = 0.60, 0.70  # at 512 tokens; at a context of 2048
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama 8B": (32, 8, 128)}  # heads, kv_heads, head_dim


@dataclass(frozen=True)
class Case:
    """`batch` sequences of `tokens` new tokens each, at a context of `context`."""

    shape: str
    tokens: int
    context: int
    batch: int
    threads: int
    kv_bits: int = 16

    @property
    def phase(self) -> str:
        return "decode" if self.tokens == 1 else "prefill"

    @property
    def goal(self) -> float | None:
        if self.kv_bits != 16:
            return None
        if self.tokens == 512:
            return PREFILL_GOAL
        return DECODE_GOAL if self.tokens == 1 and self.context == 2048 else None


def cases(threads: Sequence[int], shapes: Sequence[str], kv_bits: Sequence[int]) -> Iterator[Case]:
    sizes = [(tokens, tokens, 1) for tokens in (128, 512, 2048)]
    sizes += [(1, context, batch) for batch in (1, 8, 32) for context in (128, 512, 2048)]
    for number, shape, size, bits in product(threads, shapes, sizes, kv_bits):
        yield Case(shape, *size, number, bits)


def seconds_each(call: Callable[[], object], at_least: float, threads: int) -> float:
    """Median of as many calls as take so long; of one thread its processor time, in which no other process has part."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: list[float] = []
    while sum(times) < at_least:
        start = clock()
        call()
        times.append(clock() - start)
    return median(times)


def peak_flop_per_s(threads: int) -> float:
    """Of one thread in its processor time, too."""
    wall, processor = time.perf_counter(), time.process_time()
    rate = ceilings.library().ceilings_fp32_flop_per_s(threads)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return float(rate * wall / processor) if threads == 1 else float(rate)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    heads, kv_heads, head_dim = SHAPES[case.shape]
    dtype, head_bytes = {16: (torch.float16, 2 * head_dim), 8: (torch.int8, head_dim + 4)}[case.kv_bits]
    layer_bytes = 2 * case.batch * case.context * kv_heads * head_bytes
    layers = -(-COLD_BYTES // layer_bytes) if case.phase == "decode" else 1
    shape = (layers, case.batch, case.context, kv_heads, head_dim)
    cache = KVCache(*shape, dtype, torch.float32, torch.device("cpu"))
    angles = torch.randn(case.context, head_dim // 2)  # what is rotated again and again keeps its size
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)
    for layer in map(cache.layer, range(layers)):
        for tensor in (layer.keys, layer.values):
            tensor.normal_() if case.kv_bits == 16 else tensor.random_(-127, 128)
        for scales in (layer.key_scales, layer.value_scales):
            if scales is not None:
                scales.fill_(1 / 40)
    of = Sequences(
        torch.arange(case.batch, dtype=torch.int32),
        *(torch.full((case.batch,), v, dtype=torch.int32) for v in (case.tokens, case.context)),
    )
    qkv = torch.randn(of.tokens, heads + 2 * kv_heads, head_dim)
    out = torch.empty(of.tokens, heads, head_dim)
    turns = count()
    torch.set_num_threads(case.threads)

    def attend() -> None:
        attention(qkv[:, :heads], cache.layer(next(turns) % layers), of, head_dim**-0.5, out=out)

    def store() -> None:
        rotate_and_store(qkv, cache.layer(next(turns) % layers), of, tables)

    def read_all() -> None:
        functions.ceilings_read_seconds(address, READ_BYTES, case.threads)

    operations = 4 * heads * head_dim * case.batch * sum(range(case.context - case.tokens + 1, case.context + 1))
    functions, address = ceilings.library(), ceilings.buffer(READ_BYTES)
    seconds, stores, shares, peaks = [], [], [], []
    for call in (attend, store):
        seconds_each(call, ROUND_S, case.threads)
    for _ in range(rounds):
        if case.phase == "decode":
            peak = READ_BYTES / seconds_each(read_all, ROUND_S, case.threads)
        else:
            peak = peak_flop_per_s(case.threads)
        seconds.append(seconds_each(attend, ROUND_S, case.threads))
        stores.append(seconds_each(store, ROUND_S / 10, case.threads))
        amount = layer_bytes if case.phase == "decode" else operations
        peaks.append(peak)
        shares.append(amount / seconds[-1] / peak)
    return asdict(case) | {
        "phase": case.phase,
        "seconds": median(seconds),
        "store_seconds": median(stores),
        "flop_per_s": operations / median(seconds),
        "bytes_per_s": layer_bytes / median(seconds),
        "ceiling": "read_bytes_per_s" if case.phase == "decode" else "fp32_flop_per_s",
        "ceiling_per_s": median(peaks),
        "share": median(shares),
        "share_range": [min(shares), max(shares)],
        "goal": case.goal,
    }


def line(row: dict[str, Any]) -> str:
    rate = (
        f"{row['bytes_per_s'] / 1e9:6.1f} GB/s" if row["phase"] == "decode" else f"{row['flop_per_s'] / 1e9:6.1f} GF/s"
    )
    low, high = row["share_range"]
    goal = ""
    if row["goal"] is not None:
        goal = f"  >= {100 * row['goal']:.0f} %: {'met' if row['share'] >= row['goal'] else 'missed'}"
    return (
        f"{row['shape']:<13} t={row['threads']} {row['phase']:<7} context {row['context']:<5} batch {row['batch']:<3} "
        f"kv {row['kv_bits']:<2}{1e6 * row['seconds']:10.1f} us  store {1e6 * row['store_seconds']:8.1f} us  {rate} of "
        f"{row['ceiling_per_s'] / 1e9:6.1f}  {100 * row['share']:4.0f} % ({100 * low:.0f} to {100 * high:.0f}){goal}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=lambda text: [int(t) for t in text.split(",")], default=[1], metavar="T,...")
    parser.add_argument("--kv-bits", type=int, nargs="+", choices=(16, 8), default=[16])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    for case in cases(arguments.threads, arguments.shapes, arguments.kv_bits):
        rows.append(measure(case, arguments.rounds))
        print(line(rows[-1]), flush=True)
        if arguments.json_out:
            write_results(arguments.json_out, describe() | {"rows": rows})
    missed = [row for row in rows if row["goal"] is not None and row["share"] < row["goal"]]
    if missed:
        print(f"{len(missed)} goals missed", file=sys.stderr)


if __name__ == "__main__":
    main()
