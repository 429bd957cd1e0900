"""The goals of the CPU kernels: the rival of each, and the factor by which it should be faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmpq.spec.precision import ZeroKind


def label_of(rivals: Sequence[str]) -> str:
    """Those that ours is compared with, in words."""
    return rivals[0] if len(rivals) == 1 else f"best of {', '.join(rivals)}"


@dataclass(frozen=True)
class Goal:
    """Ours against a rival: its time over ours should be at least that, by the number of rows m.

    Of several rivals the fastest counts. A comparison without a goal at some m is shown all the same, unless only
    those with a goal mean anything.
    """

    bits: int  # of ours, as the next
    activations: str
    rivals: tuple[str, ...]
    at: Mapping[int, float] = field(default_factory=dict)
    at_two_threads: Mapping[int, float] = field(default_factory=dict)  # where it differs
    only_goals: bool = False
    zero: ZeroKind = "sym"

    def ratio(self, m: int, threads: int) -> float | None:
        if threads == 2 and m in self.at_two_threads:
            return self.at_two_threads[m]
        return self.at.get(m)


def _every(goal: float, *rows: int) -> dict[int, float]:
    return dict.fromkeys(rows, goal)


_MODES = ("a16", "a8x2", "a8")
_BEST_INT8 = ("zentorch int8", "onnxruntime int8", "torch dynamic int8")

GOALS = (
    Goal(4, "a8", ("memory read",), {1: 0.85}, only_goals=True),
    Goal(4, "a8", ("onnxruntime int4",), {1: 1.2, 128: 1.7, 512: 1.7}, {1: 1.1}),
    Goal(4, "a8", ("OpenVINO int4 a8",), {4: 1.3, 16: 1.1, 128: 1.0, 512: 1.0}),
    Goal(4, "a8", ("OpenVINO int4 bf16",)),  # the fastest of all on AMX
    Goal(4, "a8", ("zentorch DA8W4",), _every(0.95, 128, 512)),
    Goal(4, "a8", ("ggml Q4_K",)),
    Goal(3, "a8", ("ggml Q3_K",), {1: 2.0, 4: 4.0, 16: 4.0, 128: 1.7, 512: 1.7}),
    Goal(3, "a8", ("llmpq int4 a8",), {1: 1.1, 128: 0.95, 512: 0.95}),
    Goal(8, "a8", _BEST_INT8, _every(0.95, 1, 4, 16)),
    Goal(8, "a8", ("zentorch int8",), _every(0.9, 128, 512)),
    Goal(8, "a8", ("OpenVINO int8 bf16",)),
    Goal(4, "a16", ("OpenVINO int4 fp32",), {1: 2.0, 4: 1.5, 16: 1.0, 128: 1.0, 512: 1.0}),
    Goal(4, "a16", ("auto-round int4",)),
    Goal(4, "a16", ("torch int4pack",)),
    Goal(3, "a16", ("auto-round int3",), {1: 5.0, 4: 2.2, 16: 1.1, 128: 1.0, 512: 1.0}),
    Goal(8, "a16", ("OpenVINO int8 fp32",)),
    *(Goal(bits, "a8x2", (f"llmpq int{bits} a8",), {1: 0.8}) for bits in (3, 4, 8)),  # a8 within 25 %
    *(  # within 3 %
        Goal(4, mode, (f"llmpq int4 asym {mode}",), _every(0.97, 1, 4, 16, 128, 512), zero="offset") for mode in _MODES
    ),
    Goal(4, "a8x2", ("OpenVINO int4 fp32",), _every(1.7, 128, 512)),
    Goal(4, "a8x2", ("OpenVINO int4 bf16",)),
    Goal(3, "a8x2", ("OpenVINO int4 fp32",), _every(1.7, 128, 512)),  # it has no 3 bits
    Goal(8, "a8x2", ("OpenVINO int8 fp32",), _every(1.7, 128, 512)),
    *(
        Goal(bits, mode, (dense,))
        for bits in (3, 4, 8)
        for mode in _MODES
        for dense in ("torch float32", "torch bfloat16")
    ),
)

# The linears of SmolLM2-135M, one row, one thread, groups of 64 codes.
SMALL_GROUP_SIZE = 64
SMALL_SHAPES = ((576, 576), (1536, 576), (576, 1536))
SMALL_GOALS = (
    *(Goal(bits, mode, ("torch int4pack",), {1: 2.0}) for bits in (3, 4, 8) for mode in _MODES),
    *(Goal(3, mode, ("auto-round int3",)) for mode in _MODES),
)


def small_limit(n: int, k: int, cache: str, nbytes: int, read_bytes_per_s: float | None) -> float | None:
    """Seconds that a small linear should take at most; cache is "cold" or "warm". None: there is no such goal."""
    if (n, k) == SMALL_SHAPES[0]:
        return 10e-6 if cache == "cold" else None
    if cache == "warm":
        return 10e-6
    return None if read_bytes_per_s is None else nbytes / read_bytes_per_s + 3e-6
