"""The time that a plan takes for the lengths that actually occurred: an event simulation of the pipeline.

The schedule is the runtime's (llmpq/spec/schedule.py). Stages and links serve one micro-batch at a time, in the order
of arrival; a request that has ended no longer counts in its micro-batch.

The planner's closed form (objective.py) is this simulation for one batch of equal lengths, without what happens at the
seam of the two phases: prefill agrees exactly, decode exactly for equal stages and within a few percent for unequal
ones. A queue of more requests than the plan has slots takes less time than batches of them one after the other.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from llmpq.spec import (
    DTYPE_BYTES,
    Context,
    Latency,
    ModelSpec,
    Plan,
    Prediction,
    Profile,
    RequestTimes,
    Span,
    SpanLog,
    schedule,
    stage_seconds,
)
from llmpq.spec.phases import Phases
from llmpq.spec.schedule_state import Arrived, End, Limits, Microbatch, Prompt, Returned
from llmpq.spec.trace import Phase
from planner import memory
from planner.cost_arrays import TOKEN_BYTES


@dataclass(frozen=True)
class Simulation:
    """What is expected of a run as a whole, and of every step on every stage and link, in the order they start.

    Of each stage and of each link the first SPANS_KEPT are there, as in a RunResult. `times` are those of each request.
    """

    prediction: Prediction
    spans: tuple[Span, ...]
    times: tuple[RequestTimes, ...]

    @property
    def latency(self) -> Latency:
        """Throughput of the queue, and percentiles of TTFT and TPOT."""
        return Latency.of(self.times)


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
    _events: list[tuple[float, int, int, Work | Arrived]] = field(init=False, default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self._free = [self.now] * self.resources

    def launch(self, work: Work) -> None:
        self._add(self.now, 0, work)

    def expect(self, at: float, event: Arrived) -> None:
        """Requests that arrive later."""
        self._add(at, self.resources, event)

    def events(self) -> Iterator[Work | Arrived]:
        """Serve until nothing is left: each micro-batch when it returns, at `now`, and what was expected.

        More may be launched then.
        """
        while self._events:
            self.now, _, resource, work = heapq.heappop(self._events)
            if resource == self.resources or isinstance(work, Arrived):
                yield work
                continue
            start = max(self.now, self._free[resource])
            end = self._free[resource] = start + self.seconds(resource, work)
            where: tuple[Literal["stage", "link"], int] = ("link" if resource % 2 else "stage", resource // 2)
            microbatch = work.microbatch
            self.spans.add(Span(*where, microbatch.phase, len(microbatch.requests), work.tokens, start, end))
            self._add(end, resource + 1, work)

    def _add(self, at: float, resource: int, event: Work | Arrived) -> None:
        heapq.heappush(self._events, (at, self._count, resource, event))
        self._count += 1


def predict(
    plan: Plan, spec: ModelSpec, profile: Profile, prompt_lens: Sequence[int], output_lens: Sequence[int]
) -> Prediction:
    """Seconds of both phases, throughput and memory of each stage, as the runtime measures them: see `simulate`."""
    return simulate(plan, spec, profile, prompt_lens, output_lens).prediction


def simulate(
    plan: Plan,
    spec: ModelSpec,
    profile: Profile,
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    arrivals_s: Sequence[float] | None = None,
    names: Sequence[Sequence[int]] | None = None,
) -> Simulation:
    """A run of these prompts that generates `output_lens` tokens. Without `arrivals_s`, all are there from the start.

    `names` are those of each prompt's blocks (llmpq/spec/block_pool.py), by which it is seen which of them begin alike.
    prefill_s and decode_s are as RunResult says. Raises NotMeasuredError for lengths outside the measured range.
    """
    servers, seconds = resources(plan, spec, profile)
    return _simulate(plan, spec, profile, prompt_lens, output_lens, servers, seconds, arrivals_s, names)


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
    arrivals_s: Sequence[float] | None = None,
    names: Sequence[Sequence[int]] | None = None,
) -> Simulation:
    requests = _Requests(prompt_lens, output_lens, arrivals_s, names)
    pipeline = _Pipeline(servers, seconds)
    for at, arrived in requests.arrivals():
        pipeline.expect(at, arrived)
    state, phases = schedule.start(Limits.of(plan, spec)), Phases(0.0)
    for event in pipeline.events():
        now = pipeline.now
        phases.pass_to(now, state)
        happened = event if isinstance(event, Arrived) else requests.take_back(event.microbatch, now)
        state, actions = schedule.advance(state, happened)
        for action in actions:
            if isinstance(action, Microbatch):
                requests.reuse(action)
                pipeline.launch(work_of(action, prompt_lens, requests.generated))
            elif isinstance(action, End):
                requests.end(action.requests, now)
    prediction = phases.prediction(sum(output_lens), memory.stage_bytes(plan, spec, profile))
    spans = sorted(pipeline.spans.take(), key=lambda span: span.start_s)
    return Simulation(prediction, tuple(spans), requests.times)


class _Requests:
    """The requests of a run, their tokens so far, and their times."""

    def __init__(
        self,
        prompt_lens: Sequence[int],
        output_lens: Sequence[int],
        arrivals_s: Sequence[float] | None,
        names: Sequence[Sequence[int]] | None,
    ) -> None:
        count = len(prompt_lens)
        if len(output_lens) != count or count == 0 or min(*prompt_lens, *output_lens) < 1:
            raise ValueError(
                f"expected as many outputs as prompts, all of at least 1 token: {prompt_lens}, {output_lens}"
            )
        self._arrivals_s = [0.0] * count if arrivals_s is None else list(arrivals_s)
        if len(self._arrivals_s) != count or min(self._arrivals_s) < 0:
            raise ValueError(f"expected a time of arrival for each of {count} prompts, none before 0: {arrivals_s}")
        self._prompt_lens, self._output_lens = prompt_lens, output_lens
        self._names = names or [()] * count
        self._reused = [0] * count
        self.generated = [0] * count
        self._first_s, self._end_s = [0.0] * count, [0.0] * count

    def arrivals(self) -> Iterator[tuple[float, Arrived]]:
        """In order; requests that come at one time come together."""
        by_time = sorted(range(len(self.generated)), key=self._arrivals_s.__getitem__)
        for at, together in groupby(by_time, self._arrivals_s.__getitem__):
            yield at, Arrived(tuple(Prompt(i, self._prompt_lens[i], names=tuple(self._names[i])) for i in together))

    def reuse(self, microbatch: Microbatch) -> None:
        """What of prompts is not computed, as it was for others."""
        for i, reused in microbatch.begun:
            if not self.generated[i]:
                self._reused[i] = reused

    def take_back(self, microbatch: Microbatch, now: float) -> Returned:
        """Each of a micro-batch has another token."""
        for i in microbatch.answered:
            self.generated[i] += 1
            if self.generated[i] == 1:
                self._first_s[i] = now
        ended = (i for i in microbatch.answered if self.generated[i] == self._output_lens[i])
        return Returned(microbatch, frozenset(ended))

    def end(self, requests: Sequence[int], now: float) -> None:
        for i in requests:
            self._end_s[i] = now

    @property
    def times(self) -> tuple[RequestTimes, ...]:
        columns = zip(self._arrivals_s, self._first_s, self._end_s, self._output_lens, self._reused, strict=True)
        return tuple(RequestTimes(*row) for row in columns)


def work_of(microbatch: Microbatch, prompt_lens: Sequence[int] | Mapping[int, int], generated: Sequence[int]) -> Work:
    """What a micro-batch computes once its requests have so many generated tokens."""
    prompts, chunk = microbatch.prompts, microbatch.chunk
    lens = [prompt_lens[i] + (generated[i] if generated else 0) for i in microbatch.requests]
    decoding = tuple((length, length) for length in lens[len(prompts) :])
    if chunk is not None:
        spans: tuple[tuple[float, float], ...] = ((chunk.start + 1, chunk.end),)
    else:  # all there is so far: of a prompt that is computed once more, its answer, too
        starts = microbatch.reused or [0] * len(prompts)
        spans = tuple((start + 1, length) for start, length in zip(starts, lens))
    tokens = sum(int(last - first) + 1 for first, last in spans) + len(decoding)
    return Work(microbatch, tokens, Context.of_step(spans + decoding))


def resources(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, Callable[[int, Work], float]]:
    """How many stages and links there are, alternating, the way back last; and the seconds of a step on each."""
    names = [stage.device for stage in plan.stages]
    stages = [stage_seconds(plan, spec, i, profile.table(name)) for i, name in enumerate(names)]

    def seconds(resource: int, work: Work) -> float:
        index, returned = resource // 2, len(work.microbatch.answered)
        if resource % 2 == 0:
            rows = len(work.microbatch.requests) if returned else 0
            return stages[index](work.tokens, rows, work.context)
        if index == len(stages) - 1:
            size = returned * TOKEN_BYTES
        else:
            size = work.tokens * spec.hidden_size * DTYPE_BYTES[plan.wire_dtype]
        return profile.link(names[index], names[(index + 1) % len(names)]).seconds(size)

    return (2 * len(stages) if len(stages) > 1 else 1), seconds
