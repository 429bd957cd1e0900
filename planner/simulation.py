"""What a plan will take for the lengths that actually occurred: an event simulation of the pipeline.

Stages and links serve one micro-batch at a time, in the order of arrival. All prefill micro-batches are launched at the
start; a decode micro-batch is launched when all its sequences have their first token, and again whenever its tokens are
back at the first stage. A sequence that has ended no longer counts in its micro-batch.

The planner's closed form (objective.py) is this simulation for equal lengths, without what happens at the seam of the
two phases: prefill agrees exactly, decode exactly for equal stages and within a few percent for unequal ones.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmpq.spec import DTYPE_BYTES, Context, ModelSpec, Plan, Prediction, Profile, Span, stage_seconds
from llmpq.spec.trace import Phase
from planner import memory
from planner.cost_arrays import TOKEN_BYTES


@dataclass(frozen=True)
class Simulation:
    """What is expected of a run as a whole, and of every step on every stage and link, in the order they start."""

    prediction: Prediction
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Step:
    """One micro-batch on its way around the pipeline once."""

    sequences: tuple[int, ...]
    tokens: int
    context: Context
    phase: Phase = "decode"


@dataclass
class _Pipeline:
    """Resources in the order a step visits them, each serving in the order of arrival. `seconds(resource, step)`."""

    resources: int
    seconds: Callable[[int, Step], float]
    now: float  # when the first step is launched
    spans: list[Span] = field(init=False, default_factory=list)
    _free: list[float] = field(init=False)
    _events: list[tuple[float, int, int, Step]] = field(init=False, default_factory=list)
    _arrivals: int = 0

    def __post_init__(self) -> None:
        self._free = [self.now] * self.resources

    def launch(self, step: Step) -> None:
        self._arrive(self.now, 0, step)

    def run(self, back: Callable[[Step], None]) -> None:
        """Serve until nothing is left; `back` is told of each step that is through, at `now`, and may launch others."""
        while self._events:
            self.now, _, resource, step = heapq.heappop(self._events)
            if resource == self.resources:
                back(step)
                continue
            start = max(self.now, self._free[resource])
            end = self._free[resource] = start + self.seconds(resource, step)
            where: tuple[Literal["stage", "link"], int] = ("link" if resource % 2 else "stage", resource // 2)
            self.spans.append(Span(*where, step.phase, len(step.sequences), step.tokens, start, end))
            self._arrive(end, resource + 1, step)

    def _arrive(self, at: float, resource: int, step: Step) -> None:
        heapq.heappush(self._events, (at, self._arrivals, resource, step))
        self._arrivals += 1


def predict(
    plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_lens: Sequence[int]
) -> Prediction:
    """Seconds of both phases, throughput and memory of each stage, as the runtime measures them: see `simulate`."""
    return simulate(plan, spec, profile, prompt_lens, output_lens).prediction


def simulate(
    plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_lens: Sequence[int]
) -> Simulation:
    """What a run of these prompts will look like if it generates as many tokens.

    Sequences run in waves of `plan.slots`, one after the other, and fill micro-batches in order. In each wave prefill_s
    ends when the first token of every prompt is back at the first stage; decode_s is the rest. Raises NotMeasuredError
    for lengths outside the measured range.
    """
    return _simulate(plan, spec, profile, prompt_lens, output_lens, *resources(plan, spec, profile))


def replay(
    plan: Plan,
    spec: ModelSpec,
    profile: Profile,
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    spans: Sequence[Span],
) -> Simulation:
    """`simulate` with every step on a stage as long as it was in a run of as many tokens, whose `spans` these are.

    What it gets wrong is not what stages cost, but what becomes of that in the pipeline. Of steps that are alike the
    first is taken for the first; links are as in the profile. Raises ValueError if the run had other steps.
    """
    servers, expected = resources(plan, spec, profile)
    alike: dict[tuple[int, Phase, int, int], deque[float]] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.kind == "stage":
            alike.setdefault((span.index, span.phase, span.sequences, span.tokens), deque()).append(span.seconds)

    def seconds(resource: int, step: Step) -> float:
        if resource % 2:
            return expected(resource, step)
        key = (resource // 2, step.phase, len(step.sequences), step.tokens)
        if not alike.get(key):
            raise ValueError(f"the run had fewer such steps (stage, phase, sequences, tokens): {key}")
        return alike[key].popleft()

    return _simulate(plan, spec, profile, prompt_lens, output_lens, servers, seconds)


def _simulate(
    plan: Plan,
    spec: ModelSpec,
    profile: Profile,
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    servers: int,
    seconds: Callable[[int, Step], float],
) -> Simulation:
    count = len(prompt_lens)
    if len(output_lens) != count or count == 0 or min(*prompt_lens, *output_lens) < 1:
        raise ValueError(f"expected as many outputs as prompts, all of at least 1 token: {prompt_lens}, {output_lens}")
    prefill_s = end = 0.0
    spans: list[Span] = []
    for first in range(0, count, plan.slots):
        wave = slice(first, first + plan.slots)
        pipeline = _Pipeline(servers, seconds, now=end)
        prefill_s += _run_wave(plan, pipeline, prompt_lens[wave], output_lens[wave])
        end = pipeline.now
        spans += sorted(pipeline.spans, key=lambda span: span.start_s)
    prediction = Prediction(prefill_s, end - prefill_s, sum(output_lens) / end, memory.stage_bytes(plan, spec, profile))
    return Simulation(prediction, tuple(spans))


def _run_wave(plan: Plan, pipeline: _Pipeline, prompt_lens: Sequence[int], output_lens: Sequence[int]) -> float:
    """Run sequences that are in the cache at once; seconds of prefill."""
    count = len(prompt_lens)
    generated = [0] * count
    prefilled = dict.fromkeys(range(0, count, plan.decode_microbatch), 0)  # by the first sequence of a decode group
    began = prefill_end = pipeline.now

    def launch_decode(group: Sequence[int]) -> None:
        live = tuple(i for i in group if generated[i] < output_lens[i])
        if live:
            context = Context.of(*(prompt_lens[i] + generated[i] for i in live))
            pipeline.launch(Step(live, len(live), context))

    def back(step: Step) -> None:
        nonlocal prefill_end
        for i in step.sequences:
            generated[i] += 1
        if step.phase == "decode":
            launch_decode(step.sequences)
            return
        prefill_end = pipeline.now
        for i in step.sequences:
            first = i - i % plan.decode_microbatch
            prefilled[first] += 1
            group = range(first, min(first + plan.decode_microbatch, count))
            if prefilled[first] == len(group):
                launch_decode(group)

    for sequences in plan.prefill_microbatches(prompt_lens):
        lens = [prompt_lens[i] for i in sequences]
        pipeline.launch(Step(sequences, sum(lens), Context.of_prompts(*lens), "prefill"))
    pipeline.run(back)
    return prefill_end - began


def resources(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, Callable[[int, Step], float]]:
    """How many stages and links there are, alternating, the way back last; and the seconds of a step on each."""
    names = [stage.device for stage in plan.stages]
    stages = [stage_seconds(plan, spec, i, profile.table(name)) for i, name in enumerate(names)]

    def seconds(resource: int, step: Step) -> float:
        index = resource // 2
        if resource % 2 == 0:
            return stages[index](step.tokens, len(step.sequences), step.context)
        if index == len(stages) - 1:
            size = len(step.sequences) * TOKEN_BYTES
        else:
            size = step.tokens * spec.hidden_size * DTYPE_BYTES[plan.wire_dtype]
        return profile.link(names[index], names[(index + 1) % len(names)]).seconds(size)

    return (2 * len(stages) if len(stages) > 1 else 1), seconds
