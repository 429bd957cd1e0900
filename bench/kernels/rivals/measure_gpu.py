"""All contenders on one weight on a GPU, with one number of rows after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench.kernels.rivals import Contender, Problem, build, ours
from bench.kernels.rivals.graphs import Clock, take, timings
from bench.kernels.rivals.timing import Checked, Timing
from bench.kernels.shapes import GROUP_SIZE
from bench.reasons import reason
from llmpq.measure.cases import COLD_CACHES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class GpuTask:
    """One weight, and who is to multiply with how many rows."""

    n: int
    k: int
    dtype: str  # a key of DTYPES
    contenders: Mapping[int, Sequence[str]]  # m -> names
    rounds: int
    rotated_bytes: int
    group_size: int = GROUP_SIZE


@dataclass(frozen=True)
class Cell:
    """What was found with one number of rows."""

    n: int
    k: int
    m: int
    dtype: str
    timings: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # contender -> why


def rotated_bytes(l2_bytes: int) -> int:
    """That the copies of a weight have together at least, so that none of it is in the cache when its turn comes."""
    return COLD_CACHES * l2_bytes


class _Maker:
    """Makes every contender once, when it is first asked for."""

    def __init__(self, problem: Problem, x: torch.Tensor, backends: Sequence[str]) -> None:
        self._problem, self._x = problem, x
        self._ours = {ours.gpu_name(bits, backend): (bits, backend) for bits in ours.BITS for backend in backends}
        self._made: dict[str, Checked | str] = {}

    def __call__(self, name: str) -> Checked | str:
        """The contender, or the reason why there is none."""
        if name not in self._made:
            try:
                self._made[name] = Checked(self._build(name), self._x)
            except Exception as error:  # whatever it is, the others can be timed
                self._made[name] = reason(error)
        return self._made[name]

    def _build(self, name: str) -> Contender:
        if name in self._ours:
            return ours.gpu_contender(self._problem, *self._ours[name])
        return build(name, self._problem)


def measure(
    task: GpuTask,
    device: torch.device,
    clock: Clock,
    at_work: Callable[[int, str | None], None],
    backends: Sequence[str] = ours.GPU_BACKENDS,
) -> Iterator[Cell]:
    """The cells of a task, each when it is done.

    `at_work` is told m and the name of every contender before it may break something; None: several are timed in turn.
    Raises RuntimeError if the device is in no state to go on.
    """
    dtype = DTYPES[task.dtype]
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(task.n, task.k, generator=generator, device=device) / task.k**0.5
    x = torch.randn(max(task.contenders), task.k, generator=generator, device=device).to(dtype)
    make = _Maker(Problem(weight, task.group_size, 0, task.rotated_bytes, dtype), x, backends)
    for m, names in task.contenders.items():
        missing, takes = {}, {}
        for name in names:
            at_work(m, name)
            made = make(name)
            clock.wait()
            if isinstance(made, str):
                missing[name] = made
                continue
            try:
                takes[name] = take(made, x[:m], clock)
            except Exception as error:
                missing[name] = reason(error)
                clock.wait()
        at_work(m, None)
        yield Cell(task.n, task.k, m, task.dtype, timings(takes, x[:m], task.rounds, clock), missing)
