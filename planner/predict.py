"""What a plan will take for the lengths that actually occurred: an event simulation of the pipeline.

Stages and links serve one micro-batch at a time, in the order of arrival. All prefill micro-batches are launched at the
start; a decode micro-batch is launched when all its sequences have their first token, and again whenever its tokens are
back at the first stage. A sequence that has ended no longer counts in its micro-batch.

The planner's closed form (objective.py) is this simulation for equal lengths, without what happens at the seam of the
two phases: prefill agrees exactly, decode exactly for equal stages and within a few percent for unequal ones.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmpq.spec import DTYPE_BYTES, ModelSpec, Op, Plan, Precision, Prediction, Profile, unit_ops
from planner import memory
from planner.costs import TOKEN_BYTES


@dataclass(frozen=True)
class Step:
    """One micro-batch on its way around the pipeline once."""

    sequences: tuple[int, ...]
    tokens: int
    context: float  # keys per query, on average


@dataclass
class _Pipeline:
    """Resources in the order a step visits them, each serving in the order of arrival. `seconds(resource, step)`."""

    resources: int
    seconds: Callable[[int, Step], float]
    _free: list[float] = field(init=False)
    _events: list[tuple[float, int, int, Step]] = field(init=False, default_factory=list)
    _arrivals: int = 0

    def __post_init__(self) -> None:
        self._free = [0.0] * self.resources

    def arrive(self, at: float, resource: int, step: Step) -> None:
        heapq.heappush(self._events, (at, self._arrivals, resource, step))
        self._arrivals += 1

    def run(self, back: Callable[[float, Step], None]) -> None:
        """Serve until nothing is left; `back` is told of each step that is through, and may launch others."""
        while self._events:
            at, _, resource, step = heapq.heappop(self._events)
            if resource == self.resources:
                back(at, step)
                continue
            self._free[resource] = max(at, self._free[resource]) + self.seconds(resource, step)
            self.arrive(self._free[resource], resource + 1, step)


def predict(
    plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_lens: Sequence[int]
) -> Prediction:
    """Seconds of both phases, throughput and memory of each stage, as the runtime measures them.

    Sequences run in waves of `plan.slots` and fill micro-batches in order. In each wave prefill_s ends when the first
    token of every prompt is back at the first stage; decode_s is the rest. Raises NotMeasuredError for lengths outside
    the measured range.
    """
    count = len(prompt_lens)
    if len(output_lens) != count or count == 0 or min(*prompt_lens, *output_lens) < 1:
        raise ValueError(f"expected as many outputs as prompts, all of at least 1 token: {prompt_lens}, {output_lens}")
    servers = resources(plan, spec, profile)
    waves = [slice(first, first + plan.slots) for first in range(0, count, plan.slots)]
    seconds = [_wave(plan, servers, prompt_lens[wave], output_lens[wave]) for wave in waves]
    prefill_s, decode_s = (sum(phase) for phase in zip(*seconds, strict=True))
    throughput = sum(output_lens) / (prefill_s + decode_s)
    return Prediction(prefill_s, decode_s, throughput, memory.stage_bytes(plan, spec, profile))


def _wave(
    plan: Plan,
    servers: tuple[int, Callable[[int, Step], float]],
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
) -> tuple[float, float]:
    """Seconds of prefill and decode of sequences that are in the cache at once."""
    count = len(prompt_lens)
    generated = [0] * count
    waiting = dict.fromkeys(range(0, count, plan.decode_microbatch), 0)  # first sequence -> how many were prefilled
    pipeline = _Pipeline(*servers)
    prefill_end = end = 0.0

    def launch_decode(at: float, group: Sequence[int]) -> None:
        live = tuple(i for i in group if generated[i] < output_lens[i])
        if live:
            context = sum(prompt_lens[i] + generated[i] for i in live) / len(live)
            pipeline.arrive(at, 0, Step(live, len(live), context))

    def back(at: float, step: Step) -> None:
        nonlocal prefill_end, end
        end = at
        first_tokens = generated[step.sequences[0]] == 0
        for i in step.sequences:
            generated[i] += 1
        if not first_tokens:
            launch_decode(at, step.sequences)
            return
        prefill_end = at
        for i in step.sequences:
            first = i - i % plan.decode_microbatch
            waiting[first] += 1
            group = range(first, min(first + plan.decode_microbatch, count))
            if waiting[first] == len(group):
                launch_decode(at, group)

    for sequences in plan.prefill_microbatches(prompt_lens):
        lens = [prompt_lens[i] for i in sequences]
        keys = sum(length * (length + 1) / 2 for length in lens)
        pipeline.arrive(0.0, 0, Step(sequences, sum(lens), keys / sum(lens)))
    pipeline.run(back)
    return prefill_end, end - prefill_end


def resources(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, Callable[[int, Step], float]]:
    """How many stages and links there are, alternating, the way back last; and the seconds of a step on each."""
    stages = len(plan.stages)

    @functools.cache
    def stage_seconds(index: int, tokens: int, rows: int, context: float) -> float:
        table = profile.table(plan.stages[index].device)
        return table.seconds(Op("step")) + sum(
            unit_seconds(
                index, "layer.0" if unit.startswith("layer") else unit, plan.precision(unit), tokens, rows, context
            )
            for unit in plan.units_of(index)
        )

    @functools.cache
    def unit_seconds(index: int, kind: str, precision: Precision, tokens: int, rows: int, context: float) -> float:
        table = profile.table(plan.stages[index].device)
        return sum(table.seconds(op) for op in unit_ops(spec, kind, precision, tokens, rows, context))

    def seconds(resource: int, step: Step) -> float:
        index = resource // 2
        if resource % 2 == 0:
            return stage_seconds(index, step.tokens, len(step.sequences), step.context)
        back = index == stages - 1
        size = (
            len(step.sequences) * TOKEN_BYTES if back else step.tokens * spec.hidden_size * DTYPE_BYTES[plan.wire_dtype]
        )
        link = profile.link(plan.stages[index].device, plan.stages[(index + 1) % stages].device)
        return link.seconds(size)

    return (2 * stages if stages > 1 else 1), seconds
