"""Which micro-batches go through a pipeline, and in what order: a pure state machine without processes or times.

The runtime carries out its actions; the planner's simulation adds up how long they take.

Requests are admitted to free slots of the KV cache in the order they arrive, as soon as others end, and their prefill
starts at once. While others decode, no more prefill micro-batches are on their way than the pipeline has places for, so
that decoding goes on beside a long queue of prompts.

Who has a token, and is in no micro-batch, is ready. The ready ones are divided anew whenever something returns: into as
many decode micro-batches as the plan has, or as it has stages if fewer requests are there, all of one size. So requests
leave and join, and the stages stay busy. Whoever has been ready longest goes first. Only requests that were admitted
together wait for each other's first tokens, until they are enough for a micro-batch: a step of few sequences takes
about as long as one of many. All others go on at once.

The pipeline keeps the order of its micro-batches, so they return in the order they were started. What is started then
depends on the order of events alone: a simulated run of requests that are all there from the start has the very steps
of the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmpq.spec.plan import Plan
from llmpq.spec.trace import Phase


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan allows, in sequences and tokens."""

    stages: int
    slots: int
    prefill_microbatch: int
    decode_microbatch: int
    step_tokens: int

    @classmethod
    def of(cls, plan: Plan) -> Limits:
        return cls(len(plan.stages), plan.slots, plan.prefill_microbatch, plan.decode_microbatch, plan.step_tokens)

    @property
    def prefills_beside_decode(self) -> int:
        """Prefill micro-batches at once while others decode: one for each stage, and for each link between stages."""
        return 2 * self.stages - 1

    def decode_microbatches(self, sequences: int) -> int:
        """How many micro-batches so many sequences decode in."""
        planned = -(-self.slots // self.decode_microbatch)
        return max(-(-sequences // self.decode_microbatch), min(self.stages, planned, sequences))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the schedule sees it, known by its number."""

    request: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Action: requests take slots of the KV cache, as pairs (request, slot)."""

    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Requests that go through the pipeline in one step. As an action: start it."""

    phase: Phase
    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Action: these requests have ended, by themselves or cancelled. They are in no micro-batch, and have no slot."""

    requests: tuple[int, ...]


Action = Admit | Microbatch | End


@dataclass(frozen=True, slots=True)
class Arrived:
    """Event: requests are handed in, none longer than a step."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Event: requests are to end: at once, or if they are in a micro-batch, when that returns. Ended ones may be named.

    What was never handed in may be named as well.
    """

    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """Event: the tokens of a micro-batch are back at the first stage; with them, the requests in `ended` have ended."""

    microbatch: Microbatch
    ended: frozenset[int]


Event = Arrived | Cancelled | Returned


@dataclass(frozen=True, slots=True)
class State:
    """Where all requests are that have not ended."""

    limits: Limits
    free: tuple[int, ...]  # slots
    waiting: tuple[Prompt, ...] = ()  # for a slot, in the order they arrived
    slots: Mapping[int, int] = field(default_factory=dict)  # of each admitted request
    in_prefill: frozenset[int] = frozenset()  # admitted requests without a first token
    ready: tuple[int, ...] = ()  # requests with a token that are in no micro-batch; who has waited longest comes first
    new: Mapping[int, int] = field(default_factory=dict)  # requests that have not decoded yet: the admission of each
    cancelled: frozenset[int] = frozenset()  # requests in a micro-batch that end when it returns
    prefills: int = 0  # micro-batches on their way
    decodes: int = 0
    admissions: int = 0  # so far

    @property
    def done(self) -> bool:
        return not (self.waiting or self.slots)


def start(limits: Limits) -> State:
    """Before anything has arrived."""
    return State(limits, tuple(range(limits.slots)))


def advance(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The state after an event, and the actions that follow from it, in order.

    Raises ValueError for a prompt longer than a step.
    """
    ended: tuple[int, ...] = ()
    if isinstance(event, Arrived):
        state = _queued(state, event.prompts)
    elif isinstance(event, Cancelled):
        state, ended = _cancel(state, frozenset(event.requests))
    else:
        state, ended = _take_back(state, event)
    state, prefills = _admit(state)
    state, decodes = _decode(state)
    return state, ((End(ended),) if ended else ()) + prefills + decodes


def _queued(state: State, prompts: tuple[Prompt, ...]) -> State:
    most = state.limits.step_tokens
    for prompt in prompts:
        if prompt.tokens > most:
            raise ValueError(f"request {prompt.request} has {prompt.tokens} tokens, more than the {most} of a step")
    return replace(state, waiting=state.waiting + prompts)


def _cancel(state: State, requests: frozenset[int]) -> tuple[State, tuple[int, ...]]:
    """Those that are in no micro-batch end now."""
    never = tuple(prompt.request for prompt in state.waiting if prompt.request in requests)
    ready = tuple(request for request in state.ready if request in requests)
    state = _without(state, ready)
    later = requests & state.slots.keys()
    waiting = tuple(prompt for prompt in state.waiting if prompt.request not in requests)
    return replace(state, waiting=waiting, cancelled=state.cancelled | later), never + ready


def _take_back(state: State, event: Returned) -> tuple[State, tuple[int, ...]]:
    requests, prefill = event.microbatch.requests, event.microbatch.phase == "prefill"
    ended = tuple(request for request in requests if request in event.ended | state.cancelled)
    state = replace(
        state,
        in_prefill=state.in_prefill.difference(requests),
        ready=state.ready + requests,
        prefills=state.prefills - prefill,
        decodes=state.decodes - (not prefill),
    )
    return _without(state, ended), ended


def _without(state: State, ended: tuple[int, ...]) -> State:
    """Without these requests, which have been ready. The slots that were used last are taken again first."""
    if not ended:
        return state
    return replace(
        state,
        free=tuple(state.slots[request] for request in ended) + state.free,
        slots={request: slot for request, slot in state.slots.items() if request not in ended},
        ready=tuple(request for request in state.ready if request not in ended),
        new={request: admission for request, admission in state.new.items() if request not in ended},
        cancelled=state.cancelled.difference(ended),
    )


def _admit(state: State) -> tuple[State, tuple[Action, ...]]:
    """Admit whoever there is room for, and start their prefill."""
    limits, decoding = state.limits, len(state.slots) > len(state.in_prefill)
    room = max(0, limits.prefills_beside_decode - state.prefills) if decoding else len(state.free)
    microbatches: list[Microbatch] = []
    admitted = 0
    while len(microbatches) < room and admitted < min(len(state.waiting), len(state.free)):
        most = min(limits.prefill_microbatch, len(state.free) - admitted)
        chosen = _first_step(state.waiting[admitted : admitted + most], limits.step_tokens)
        microbatches.append(Microbatch("prefill", chosen))
        admitted += len(chosen)
    if not microbatches:
        return state, ()
    requests = tuple(prompt.request for prompt in state.waiting[:admitted])
    taken = tuple(zip(requests, state.free))
    after = replace(
        state,
        waiting=state.waiting[admitted:],
        free=state.free[admitted:],
        slots={**state.slots, **dict(taken)},
        in_prefill=state.in_prefill.union(requests),
        new={**state.new, **dict.fromkeys(requests, state.admissions)},
        prefills=state.prefills + len(microbatches),
        admissions=state.admissions + 1,
    )
    return after, (Admit(taken), *microbatches)


def _first_step(prompts: tuple[Prompt, ...], step_tokens: int) -> tuple[int, ...]:
    """The first of these prompts, as many as fit in a step together."""
    chosen: list[int] = []
    for prompt in prompts:
        step_tokens -= prompt.tokens
        if step_tokens < 0:
            break
        chosen.append(prompt.request)
    return tuple(chosen)


def _decode(state: State) -> tuple[State, tuple[Action, ...]]:
    """Start the decode micro-batches that can be made of the ready requests."""
    actions: list[Action] = []
    count = state.limits.decode_microbatches(len(state.slots))
    size = -(-len(state.slots) // count) if count else 0
    while state.ready and state.decodes < count and not _held(state, size):
        chosen = state.ready[:size]
        state = replace(
            state,
            ready=state.ready[size:],
            new={request: admission for request, admission in state.new.items() if request not in chosen},
            decodes=state.decodes + 1,
        )
        actions.append(Microbatch("decode", chosen))
    return state, tuple(actions)


def _held(state: State, size: int) -> bool:
    """Whether all ready requests are new, too few for a micro-batch, and others of their admission are in prefill."""
    if len(state.ready) >= size:
        return False
    admissions = {state.new.get(request) for request in state.ready}
    return None not in admissions and any(state.new[request] in admissions for request in state.in_prefill)
