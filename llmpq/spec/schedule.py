"""Which micro-batches go through a pipeline, and in what order: a pure state machine without processes or times.

The runtime carries out its actions; the planner's simulation adds up how long they take.

Requests run in waves that fill the KV cache: a wave is admitted when all requests of the previous one have ended. Its
prefill micro-batches go first. A decode micro-batch is a fixed group of requests; it starts as soon as all of them have
their first token, while others are still in prefill: there is no barrier between the phases. A request that ends leaves
its group; an empty group is done.

The pipeline keeps the order of its micro-batches, so they return in the order they were started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpq.spec.plan import Plan
from llmpq.spec.trace import Phase

Wave = tuple[tuple[int, ...], ...]  # the requests of each prefill micro-batch


@dataclass(frozen=True, slots=True)
class Admit:
    """Action: these requests take slots 0, 1, ... of the KV cache."""

    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Requests that go through the pipeline in one step. As an action: start it."""

    phase: Phase
    requests: tuple[int, ...]


Action = Admit | Microbatch


@dataclass(frozen=True, slots=True)
class Returned:
    """Event: the tokens of a micro-batch are back at the first stage; with them, the requests in `ended` have ended."""

    microbatch: Microbatch
    ended: frozenset[int]


@dataclass(frozen=True, slots=True)
class State:
    """What remains to be done."""

    groups: tuple[tuple[int, ...], ...]  # decode micro-batches: the requests of each that have not ended
    in_prefill: frozenset[int]  # admitted requests without a first token
    waiting: tuple[Wave, ...]  # to be admitted
    decode_microbatch: int

    @property
    def done(self) -> bool:
        return not any(self.groups)

    def prefill_ends_with(self, microbatch: Microbatch) -> bool:
        """Whether every admitted request has its first token once this micro-batch returns, and not before."""
        return microbatch.phase == "prefill" and self.in_prefill.issubset(microbatch.requests)


def waves(plan: Plan, prompt_lens: Sequence[int]) -> list[Wave]:
    """Requests 0, 1, ... in order, `plan.slots` in a wave. Raises ValueError for a prompt longer than a step."""
    return [
        tuple(
            tuple(first + i for i in requests)
            for requests in plan.prefill_microbatches(prompt_lens[first : first + plan.slots])
        )
        for first in range(0, len(prompt_lens), plan.slots)
    ]


def start(waves: Sequence[Wave], decode_microbatch: int) -> tuple[State, tuple[Action, ...]]:
    """The first state, with decode groups of `decode_microbatch` requests, and the first actions."""
    return _admit(State((), frozenset(), tuple(waves), decode_microbatch))


def advance(state: State, event: Returned) -> tuple[State, tuple[Action, ...]]:
    """The state after an event, and the actions that follow from it, in order."""
    back = frozenset(event.microbatch.requests)
    in_prefill = state.in_prefill - back
    groups = tuple(tuple(r for r in group if r not in event.ended) for group in state.groups)
    after = replace(state, groups=groups, in_prefill=in_prefill)
    if after.done:
        return _admit(after)
    ready = [
        Microbatch("decode", live)
        for group, live in zip(state.groups, groups, strict=True)
        if live and not back.isdisjoint(group) and in_prefill.isdisjoint(live)
    ]
    return after, tuple(ready)


def _admit(state: State) -> tuple[State, tuple[Action, ...]]:
    """Admit the next wave, if one is waiting; no request is left of the one before."""
    if not state.waiting:
        return state, ()
    wave, *waiting = state.waiting
    requests = tuple(request for microbatch in wave for request in microbatch)
    size = state.decode_microbatch
    groups = tuple(requests[i : i + size] for i in range(0, len(requests), size))
    admitted = State(groups, frozenset(requests), tuple(waiting), size)
    return admitted, (Admit(requests), *(Microbatch("prefill", microbatch) for microbatch in wave))
