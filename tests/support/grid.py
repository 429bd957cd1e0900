"""The grid of GEMM cases, and an array of few of them that still covers every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from llmpq.spec import ACTIVATION_MODES, ActivationMode, Precision
from llmpq.spec.precision import ZeroKind

FACTORS: dict[str, Sequence[Any]] = {
    "bits": (3, 4, 8),
    "group": (32, 64, 128, None),
    "zero": get_args(ZeroKind),
    "activations": ACTIVATION_MODES,
    "m": (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 129),
    "n": (1, 5, 16, 31, 33, 70, 128, 200),  # around and between the tile sizes
    "k": (1, 31, 32, 33, 64, 100, 129, 200, 257, 576),  # whole and ragged blocks and groups
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "scale_dtype": (torch.float16, torch.bfloat16),
    "bias": (False, True),
}
PACKED = [
    Precision(bits, group, zero) for bits in FACTORS["bits"] for group in FACTORS["group"] for zero in FACTORS["zero"]
]
PRODUCTS: list[tuple[Precision, ActivationMode]] = [(p, mode) for p in PACKED for mode in ACTIVATION_MODES]
W16_FACTORS = {name: FACTORS[name] for name in ("m", "n", "k", "dtype", "scale_dtype", "bias")}
FULL_FACTORS = {**W16_FACTORS, "n": (1, 5, 33, 128), "k": (31, 64, 257, 300)}


def name(product: tuple[Precision, ActivationMode]) -> str:
    """Of a kind of product: w4-g64-sym-rtn-a8."""
    return "-".join(map(str, product))


@dataclass(frozen=True)
class Case:
    """One product. `scale_dtype` is the weight's own where it is not quantized."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    bias: bool
    bits: int = 16
    group: int | None = None
    zero: ZeroKind = "sym"
    activations: ActivationMode = "a16"
    precision: Precision = field(init=False)

    def __post_init__(self) -> None:
        precision = Precision(self.bits, self.group, self.zero)
        object.__setattr__(self, "precision", precision)

    def __str__(self) -> str:
        x, scale = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.scale_dtype))
        kind = name((self.precision, self.activations))
        return f"{kind}-m{self.m}-n{self.n}-k{self.k}-{x}-{scale}{'-bias' if self.bias else ''}"


def covering_array(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations such that every pair of values of every two factors is in one of them (greedy, deterministic).

    Each new row starts with a pair that is still missing; every other factor takes the value that covers the most.
    """
    names = list(factors)
    missing = dict.fromkeys(
        ((a, va), (b, vb))
        for a, b in itertools.combinations(names, 2)
        for va, vb in itertools.product(factors[a], factors[b])
    )
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name in row:
                continue

            def gain(value: Any, name: str = name, row: dict[str, Any] = row) -> int:
                item = (name, value)
                return sum((item, other) in missing or (other, item) in missing for other in row.items())

            values = factors[name]
            turn = len(rows) % len(values)  # so that ties do not always go to the first value
            row[name] = max([*values[turn:], *values[:turn]], key=gain)
        for pair in itertools.combinations([(name, row[name]) for name in names], 2):
            missing.pop(pair, None)
        rows.append(row)
    return rows


CASES = [Case(**row) for row in covering_array(FACTORS) + covering_array(W16_FACTORS)]


def full_grid(precision: Precision, activations: ActivationMode) -> Iterator[Case]:
    """All combinations of one kind of product, over fewer sizes n and k.

    In a16 without n = 1: there torch sums as a tree, and an honest sequential float32 sum can be three times as far
    off.
    """
    p = precision
    fixed = {"bits": p.bits, "group": p.group_size, "zero": p.zero, "activations": activations}
    for values in itertools.product(*FULL_FACTORS.values()):
        case = Case(**dict(zip(FULL_FACTORS, values, strict=True)), **fixed)
        if activations != "a16" or case.n > 1:
            yield case
