"""The time that a plan takes for the lengths that actually occurred: an event simulation of the pipeline.

The schedule is the runtime's (llmpq/spec/schedule.py). Stages and links serve one micro-batch at a time, in the order
of arrival; a request that has ended no longer counts in its micro-batch.

The planner's closed form (objective.py) is this simulation for equal lengths, without what happens at the seam of the
two phases: prefill agrees exactly, decode exactly for equal stages and within a few percent for unequal ones.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmpq.spec import (
    DTYPE_BYTES,
    Context,
    ModelSpec,
    Plan,
    Prediction,
    Profile,
    Span,
    SpanLog,
    schedule,
    stage_seconds,
)
from llmpq.spec.costs import LEAST_S
from llmpq.spec.schedule import Action, Admit, Microbatch, Returned
from llmpq.spec.trace import Phase
from planner import memory
from planner.cost_arrays import TOKEN_BYTES


@dataclass(frozen=True)
class Simulation:
    """What is expected of a run as a whole, and of every step on every stage and link, in the order they start.

    Of each stage and of each link the first SPANS_KEPT are there, as in a RunResult.
    """

    prediction: Prediction
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Work:
    """One micro-batch on its way around the pipeline once."""

    microbatch: Microbatch
    tokens: int
    context: Context


@dataclass
class _Pipeline:
    """Resources in the order that a micro-batch visits them, each serving in the order of arrival."""

    resources: int
    seconds: Callable[[int, Work], float]  # of a resource, for a micro-batch
    now: float = 0.0
    spans: SpanLog = field(init=False, default_factory=SpanLog)
    _free: list[float] = field(init=False)
    _events: list[tuple[float, int, int, Work]] = field(init=False, default_factory=list)
    _arrivals: int = 0

    def __post_init__(self) -> None:
        self._free = [self.now] * self.resources

    def launch(self, work: Work) -> None:
        self._arrive(self.now, 0, work)

    def returned(self) -> Iterator[Work]:
        """Serve until nothing is left: each micro-batch when it returns, at `now`; more may be launched then."""
        while self._events:
            self.now, _, resource, work = heapq.heappop(self._events)
            if resource == self.resources:
                yield work
                continue
            start = max(self.now, self._free[resource])
            end = self._free[resource] = start + self.seconds(resource, work)
            where: tuple[Literal["stage", "link"], int] = ("link" if resource % 2 else "stage", resource // 2)
            microbatch = work.microbatch
            self.spans.add(Span(*where, microbatch.phase, len(microbatch.requests), work.tokens, start, end))
            self._arrive(end, resource + 1, work)

    def _arrive(self, at: float, resource: int, work: Work) -> None:
        heapq.heappush(self._events, (at, self._arrivals, resource, work))
        self._arrivals += 1


def predict(
    plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_lens: Sequence[int]
) -> Prediction:
    """Seconds of both phases, throughput and memory of each stage, as the runtime measures them: see `simulate`."""
    return simulate(plan, spec, profile, prompt_lens, output_lens).prediction


def simulate(
    plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_lens: Sequence[int]
) -> Simulation:
    """A run of these prompts that generates `output_lens` tokens.

    In each wave prefill_s ends when the first token of every prompt is back at the first stage; decode_s is the rest.
    Raises NotMeasuredError for lengths outside the measured range.
    """
    return _simulate(plan, spec, profile, prompt_lens, output_lens, *resources(plan, spec, profile))


def check_measured(plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_len: int) -> None:
    """Raise NotMeasuredError if a run of these prompts may have a step that the profile does not reach.

    Looks at the smallest and the largest steps of both phases.
    """
    servers, seconds = resources(plan, spec, profile)
    prefill = [_work(Microbatch("prefill", m), prompt_lens, ()) for m in plan.prefill_microbatches(prompt_lens)]
    longest = min(max(prompt_lens) + output_len, plan.max_length)
    decode = [
        Work(Microbatch("decode", tuple(range(rows))), rows, Context.of(*[length] * rows))
        for rows in {1, min(plan.decode_microbatch, len(prompt_lens))}
        for length in (min(prompt_lens) + 1, longest)
    ]
    by_size = sorted(prefill, key=lambda work: work.tokens)
    for work in (by_size[0], by_size[-1], *(decode if output_len > 1 else ())):
        for resource in range(servers):
            seconds(resource, work)


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

    def seconds(resource: int, work: Work) -> float:
        if resource % 2:
            return expected(resource, work)
        key = (resource // 2, work.microbatch.phase, len(work.microbatch.requests), work.tokens)
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
    seconds: Callable[[int, Work], float],
) -> Simulation:
    count = len(prompt_lens)
    if len(output_lens) != count or count == 0 or min(*prompt_lens, *output_lens) < 1:
        raise ValueError(f"expected as many outputs as prompts, all of at least 1 token: {prompt_lens}, {output_lens}")
    pipeline = _Pipeline(servers, seconds)
    generated = [0] * count
    prefill_s = admitted = 0.0

    def carry_out(actions: Iterable[Action]) -> None:
        nonlocal admitted
        for action in actions:
            if isinstance(action, Admit):
                admitted = pipeline.now
            else:
                pipeline.launch(_work(action, prompt_lens, generated))

    state, actions = schedule.start(schedule.waves(plan, prompt_lens), plan.decode_microbatch)
    carry_out(actions)
    for work in pipeline.returned():
        for i in work.microbatch.requests:
            generated[i] += 1
        ended = frozenset(i for i in work.microbatch.requests if generated[i] == output_lens[i])
        if state.prefill_ends_with(work.microbatch):
            prefill_s += pipeline.now - admitted
        state, actions = schedule.advance(state, Returned(work.microbatch, ended))
        carry_out(actions)
    end = pipeline.now
    tokens_per_s = sum(output_lens) / max(end, LEAST_S)
    prediction = Prediction(prefill_s, end - prefill_s, tokens_per_s, memory.stage_bytes(plan, spec, profile))
    return Simulation(prediction, tuple(sorted(pipeline.spans.take(), key=lambda span: span.start_s)))


def _work(microbatch: Microbatch, prompt_lens: Sequence[int], generated: Sequence[int]) -> Work:
    """What a micro-batch computes once its requests have so many generated tokens."""
    requests = microbatch.requests
    lens = [prompt_lens[i] for i in requests]
    if microbatch.phase == "prefill":
        return Work(microbatch, sum(lens), Context.of_prompts(*lens))
    return Work(microbatch, len(requests), Context.of(*(prompt_lens[i] + generated[i] for i in requests)))


def resources(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, Callable[[int, Work], float]]:
    """How many stages and links there are, alternating, the way back last; and the seconds of a step on each."""
    names = [stage.device for stage in plan.stages]
    stages = [stage_seconds(plan, spec, i, profile.table(name)) for i, name in enumerate(names)]

    def seconds(resource: int, work: Work) -> float:
        index, rows = resource // 2, len(work.microbatch.requests)
        if resource % 2 == 0:
            return stages[index](work.tokens, rows, work.context)
        if index == len(stages) - 1:
            size = rows * TOKEN_BYTES
        else:
            size = work.tokens * spec.hidden_size * DTYPE_BYTES[plan.wire_dtype]
        return profile.link(names[index], names[(index + 1) % len(names)]).seconds(size)

    return (2 * len(stages) if len(stages) > 1 else 1), seconds
