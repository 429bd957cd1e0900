"""The goals of the GPU kernels: the rival of each, and the factor by which it should be faster."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from bench.kernels.rivals import GPU_RIVALS
from bench.kernels.rivals.ours import BITS, GPU_BACKENDS, gpu_name

LARGE_BYTES = 100e6  # of the weight in int4: from there on reading it takes much longer than starting a kernel
DECODE = (1, 2, 4, 8, 16)
PREFILL = (1024, 4096)
ERROR_LIMIT = 1.1  # ours over cuBLAS's
READ = "GPU memory read"
CUBLAS = "cuBLAS"
_ONLY = {"torch _weight_int4pack_mm": "bf16", **{f"gptq_gemm int{bits}": "fp16" for bits in BITS}}  # dtypes of x


def shape_class(n: int, k: int) -> str:
    """ "large", or the shape itself."""
    return "large" if n * k / 2 >= LARGE_BYTES else f"{n}x{k}"


@dataclass(frozen=True)
class GpuGoal:
    """Ours (backend, bits) against a rival: its time over ours should be at least that, by shape class and rows m.

    Of several rivals the fastest counts. Compared is at `most` rows and fewer, with or without a goal, unless only
    those with a goal mean anything. `least` likewise.
    """

    backend: str
    bits: int
    rivals: tuple[str, ...]
    at: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # "any": where its class says nothing
    least: int = 1
    most: int = 4096
    only_goals: bool = False

    @property
    def ours(self) -> str:
        return gpu_name(self.bits, self.backend)

    def ratio(self, n: int, k: int, m: int) -> float | None:
        return self.at.get(shape_class(n, k), {}).get(m, self.at.get("any", {}).get(m))

    def applies(self, n: int, k: int, m: int) -> bool:
        return self.least <= m <= self.most and not (self.only_goals and self.ratio(n, k, m) is None)


def _every(goal: float, rows: Collection[int]) -> dict[int, float]:
    return dict.fromkeys(rows, goal)


_PREFILL = {1024: 0.88, 4096: 0.95}
_AGAINST_CUBLAS: dict[int, dict[str, dict[int, float]]] = {
    4: {"large": {1: 3.3, 16: 3.1, 64: 2.3}, "8192x8192": {1: 2.8}, "any": _PREFILL},
    3: {"large": {1: 4.1, 16: 3.8}, "8192x8192": {1: 3.3}, "any": _PREFILL},
    8: {"large": {1: 1.8, 16: 1.75}, "any": _PREFILL},
}
# 3 bits must pay: at most 0.85 of the time that 4 bits take.
_INT3_PAYS = GpuGoal("cuda", 3, (gpu_name(4, "cuda"),), {"large": {1: 1 / 0.85}}, most=16)
_BEST = ("Marlin", "Machete", "Humming")
# Less than 1, as where we dequantize, too, it is the same path: what two timings of one thing differ by is no defeat.
_NEVER_SLOWER = _every(0.97, (64, 128, 256, *PREFILL))

GOALS = (
    *(GpuGoal("cuda", bits, (CUBLAS,), at) for bits, at in _AGAINST_CUBLAS.items()),
    *(GpuGoal("cuda", bits, (f"dequantize + cuBLAS int{bits}",), {"any": _NEVER_SLOWER}, least=64) for bits in BITS),
    *(GpuGoal("cuda", bits, (READ,), {"large": _every(0.8, DECODE)}, only_goals=True) for bits in BITS),
    GpuGoal("cuda", 4, ("Marlin int4",), {"any": {1: 1.15, 16: 1.0}}),
    GpuGoal("cuda", 4, ("Humming int4",), {"any": {1: 1.15, 16: 1.05}}),
    GpuGoal("cuda", 4, ("torch _weight_int4pack_mm",), {"any": {1: 1.2}}, most=16),
    GpuGoal("cuda", 4, ("gemlite int4",), {"any": {1: 1.7}}, most=64),
    GpuGoal("cuda", 4, ("bitsandbytes NF4",), most=64),
    GpuGoal("cuda", 4, ("gptq_gemm int4",), most=16),
    GpuGoal("cuda", 3, ("Humming int3",), {"any": {1: 1.2, 16: 1.05, 64: 1.1}}),
    GpuGoal("cuda", 3, ("gptq_gemm int3",), most=16),
    _INT3_PAYS,
    GpuGoal("cuda", 8, ("Marlin int8",), {"any": {1: 1.1, 16: 1.0}}),
    GpuGoal("cuda", 8, ("Humming int8",), {"any": {1: 1.1, 16: 1.05}}),
    GpuGoal("cuda", 8, ("gptq_gemm int8",), most=16),
    GpuGoal("cuda", 8, ("gemlite int8",), most=64),
    *(GpuGoal("cuda", bits, (f"Machete int{bits}",), {"any": _every(1.0, PREFILL)}, least=16) for bits in (4, 8)),
    *(
        GpuGoal("cuda", bits, tuple(f"{name} int{bits}" for name in _BEST), {"any": {64: 1.1}}, only_goals=True)
        for bits in (4, 8)
    ),
    *(GpuGoal("triton", bits, (gpu_name(bits, "cuda"),), {"any": _every(0.85, DECODE)}) for bits in BITS),
    *(GpuGoal("triton", bits, (CUBLAS,)) for bits in BITS),
)


def selected(
    bits: Collection[int], rivals: Collection[str] | None = None, backends: Collection[str] = GPU_BACKENDS
) -> tuple[GpuGoal, ...]:
    """The goals of these widths and backends; where rivals are named, those that name one of them or ours alone.

    A goal against the best of several is kept with those of them that are named.
    """
    kept = []
    for goal in GOALS:
        named = tuple(name for name in goal.rivals if rivals is None or name in rivals or name not in GPU_RIVALS)
        if goal.bits in bits and goal.backend in backends and named:
            kept.append(replace(goal, rivals=named))
    return tuple(kept)


def contenders_at(goals: Collection[GpuGoal], n: int, k: int, m: int, dtype: str) -> tuple[str, ...]:
    """Everyone who is timed with m rows of x: ours and the rivals of the goals that apply, each once."""
    named = [name for goal in goals if goal.applies(n, k, m) for name in (goal.ours, *goal.rivals)]
    return tuple(dict.fromkeys(name for name in named if _ONLY.get(name, dtype) == dtype))
