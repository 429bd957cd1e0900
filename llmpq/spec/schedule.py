"""Which micro-batches go through a pipeline, and in what order: a pure state machine without processes or times.

The runtime carries out its actions; the planner's simulation adds up how long they take.

Requests are admitted to free slots of the KV cache in the order they arrive, as soon as others end, and their prefill
is planned at once. A prompt for which layers within a window have no room in a step is taken in chunks, which follow
one another through the stages. Micro-batches start in the order they are planned, but no more for prefill are on their
way than keep its stages busy; what has not started can still be cancelled. While others decode, no more are planned
than the pipeline has places for, so that decoding goes on beside a long queue of prompts, or a long prompt.

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

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmpq.spec.model import ModelSpec
from llmpq.spec.plan import Plan
from llmpq.spec.trace import Phase


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan allows, in sequences and tokens."""

    stages: int
    slots: int
    prefill_microbatch: int
    decode_microbatch: int
    step_tokens: int  # of a prefill micro-batch
    chunk_tokens: int  # of one sequence in it

    @classmethod
    def of(cls, plan: Plan, model: ModelSpec) -> Limits:
        return cls(
            len(plan.stages),
            plan.slots,
            plan.prefill_microbatch,
            plan.decode_microbatch,
            plan.step_tokens,
            plan.longest_query(model),
        )

    @property
    def prefills_beside_decode(self) -> int:
        """Prefill micro-batches at once while others decode: one for each stage, and for each link between stages."""
        return 2 * self.stages - 1

    @property
    def prefills_at_once(self) -> int:
        """Prefill micro-batches on their way: nearly twice as many, or prompts of unlike lengths would idle stages."""
        return 4 * self.stages - 3

    def decode_microbatches(self, sequences: int) -> int:
        """How many micro-batches so many sequences decode in."""
        planned = _divided(self.slots, self.decode_microbatch)
        return max(_divided(sequences, self.decode_microbatch), min(self.stages, planned, sequences))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the schedule sees it, known by its number."""

    request: int
    tokens: int
    start: int = 0  # of these, whose chunks have been started


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of a prompt that does not fit in a step; `last`: none follow."""

    start: int
    end: int
    last: bool


@dataclass(frozen=True, slots=True)
class Admit:
    """Action: requests take slots of the KV cache, as pairs (request, slot)."""

    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Requests that go through the pipeline in one step. As an action: start it."""

    phase: Phase
    requests: tuple[int, ...]
    chunk: Chunk | None = None  # of the prompt of its only request; None: of each request all there is

    @property
    def is_prefix(self) -> bool:
        """Whether no token comes of it."""
        return self.chunk is not None and not self.chunk.last


@dataclass(frozen=True, slots=True)
class End:
    """Action: these requests have ended, by themselves or cancelled. They are in no micro-batch, and have no slot."""

    requests: tuple[int, ...]


Action = Admit | Microbatch | End


@dataclass(frozen=True, slots=True)
class Arrived:
    """Event: requests are handed in."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Event: requests are to end: at once, or if they are in a micro-batch on its way, when that returns.

    Requests that have ended, or never came, may be among them.
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
    in_prefill: Mapping[int, int] = field(default_factory=dict)  # those without a token: their micro-batches
    ready: tuple[int, ...] = ()  # requests with a token that are in no micro-batch; who has waited longest comes first
    planned: tuple[Microbatch, ...] = ()  # that have not started, in their order
    new: Mapping[int, int] = field(default_factory=dict)  # requests that have not decoded yet: the admission of each
    cancelled: frozenset[int] = frozenset()  # requests on their way in a micro-batch that end when it returns
    prefills: int = 0  # micro-batches that are planned or on their way
    decodes: int = 0
    admissions: int = 0  # so far

    @property
    def done(self) -> bool:
        return not (self.waiting or self.slots)


def start(limits: Limits) -> State:
    """Before anything has arrived."""
    return State(limits, tuple(range(limits.slots)))


def advance(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The state after an event, and the actions that follow from it, in order."""
    ended: tuple[int, ...] = ()
    if isinstance(event, Arrived):
        state = replace(state, waiting=state.waiting + event.prompts)
    elif isinstance(event, Cancelled):
        state, ended = _cancel(state, frozenset(event.requests))
    else:
        state, ended = _take_back(state, event)
    state, admitted = _admit(state)
    state, started = _start_planned(_plan_decode(state))
    return state, ((End(ended),) if ended else ()) + admitted + started


def _cancel(state: State, requests: frozenset[int]) -> tuple[State, tuple[int, ...]]:
    """Those that are in no micro-batch on its way end now."""
    state = _unplanned(state, requests)
    never = tuple(p.request for p in state.waiting if p.request in requests and p.request not in state.slots)
    between = tuple(request for request, count in state.in_prefill.items() if request in requests and count == 0)
    ready = tuple(request for request in state.ready if request in requests)
    waiting = tuple(prompt for prompt in state.waiting if prompt.request not in requests)
    state = _without(replace(state, waiting=waiting), between + ready)
    return replace(state, cancelled=state.cancelled | requests & state.slots.keys()), never + between + ready


def _unplanned(state: State, requests: frozenset[int]) -> State:
    """Without these requests in what has not started."""
    planned: list[Microbatch] = []
    in_prefill, ready = dict(state.in_prefill), list(state.ready)
    prefills, decodes = state.prefills, state.decodes
    for microbatch in state.planned:
        dropped = [request for request in microbatch.requests if request in requests]
        kept = tuple(request for request in microbatch.requests if request not in requests)
        if microbatch.phase == "decode":
            ready += dropped
            decodes -= not kept
        else:
            in_prefill |= {request: in_prefill[request] - 1 for request in dropped}
            prefills -= not kept
        if kept:
            planned.append(replace(microbatch, requests=kept))
    return replace(
        state,
        planned=tuple(planned),
        in_prefill=in_prefill,
        ready=tuple(ready),
        prefills=prefills,
        decodes=decodes,
    )


def _take_back(state: State, event: Returned) -> tuple[State, tuple[int, ...]]:
    microbatch, requests = event.microbatch, event.microbatch.requests
    if microbatch.phase == "decode":
        state = replace(state, ready=state.ready + requests, decodes=state.decodes - 1)
        over = event.ended | state.cancelled
    elif microbatch.is_prefix:
        (request,) = requests
        left = state.in_prefill[request] - 1
        state = replace(state, in_prefill={**state.in_prefill, request: left}, prefills=state.prefills - 1)
        over = state.cancelled if left == 0 else frozenset()
    else:
        in_prefill = {request: count for request, count in state.in_prefill.items() if request not in requests}
        state = replace(state, in_prefill=in_prefill, ready=state.ready + requests, prefills=state.prefills - 1)
        over = event.ended | state.cancelled
    ended = tuple(request for request in requests if request in over)
    return _without(state, ended), ended


def _without(state: State, ended: tuple[int, ...]) -> State:
    """Without these requests, which are in no micro-batch. The slots that were used last are taken again first."""
    if not ended:
        return state
    return replace(
        state,
        free=tuple(state.slots[request] for request in ended) + state.free,
        slots={request: slot for request, slot in state.slots.items() if request not in ended},
        in_prefill={request: count for request, count in state.in_prefill.items() if request not in ended},
        ready=tuple(request for request in state.ready if request not in ended),
        new={request: admission for request, admission in state.new.items() if request not in ended},
        cancelled=state.cancelled.difference(ended),
    )


def _admit(state: State) -> tuple[State, tuple[Admit, ...]]:
    """Admit whoever there is room for, and plan their prefill."""
    limits, decoding = state.limits, len(state.slots) > len(state.in_prefill)
    most = limits.prefills_beside_decode if decoding else math.inf
    if state.prefills >= most or not state.waiting or not (state.free or state.waiting[0].start):
        return state, ()  # without a copy of a queue that may be long
    waiting, free = deque(state.waiting), deque(state.free)
    taken: dict[int, int] = {}
    microbatches: list[Microbatch] = []
    while waiting and (free or waiting[0].start) and state.prefills + len(microbatches) < most:
        begun = waiting[0].start > 0
        microbatch = _first_chunk(waiting, limits) or _first_prompts(waiting, len(free), limits)
        if not begun:
            taken.update((request, free.popleft()) for request in microbatch.requests)
        microbatches.append(microbatch)
    in_prefill = Counter(state.in_prefill)
    in_prefill.update(request for microbatch in microbatches for request in microbatch.requests)
    after = replace(
        state,
        waiting=tuple(waiting),
        free=tuple(free),
        slots={**state.slots, **taken},
        in_prefill=dict(in_prefill),
        planned=state.planned + tuple(microbatches),
        new={**state.new, **dict.fromkeys(taken, state.admissions)},
        prefills=state.prefills + len(microbatches),
        admissions=state.admissions + 1,
    )
    return after, (Admit(tuple(taken.items())),) if taken else ()


def _first_chunk(waiting: deque[Prompt], limits: Limits) -> Microbatch | None:
    """The next chunk of the first prompt, if that is too long for a step. Its chunks are as long as one another."""
    prompt = waiting[0]
    if prompt.tokens <= limits.chunk_tokens:
        return None
    left = prompt.tokens - prompt.start
    end = prompt.start + _divided(left, _divided(left, limits.chunk_tokens))
    last = end == prompt.tokens
    waiting.popleft()
    if not last:
        waiting.appendleft(replace(prompt, start=end))
    return Microbatch("prefill", (prompt.request,), Chunk(prompt.start, end, last))


def _first_prompts(waiting: deque[Prompt], slots: int, limits: Limits) -> Microbatch:
    """The first prompts, as many as fit in a step together."""
    chosen: list[int] = []
    room = limits.step_tokens
    while waiting and len(chosen) < min(limits.prefill_microbatch, slots):
        room -= waiting[0].tokens
        if room < 0 or waiting[0].tokens > limits.chunk_tokens:
            break
        chosen.append(waiting.popleft().request)
    return Microbatch("prefill", tuple(chosen))


def _plan_decode(state: State) -> State:
    """Plan the decode micro-batches that can be made of the ready requests."""
    count = state.limits.decode_microbatches(len(state.slots))
    size = _divided(len(state.slots), count) if count else 0
    while state.ready and state.decodes < count and not _held(state, size):
        chosen = state.ready[:size]
        state = replace(
            state,
            ready=state.ready[size:],
            planned=(*state.planned, Microbatch("decode", chosen)),
            new={request: admission for request, admission in state.new.items() if request not in chosen},
            decodes=state.decodes + 1,
        )
    return state


def _start_planned(state: State) -> tuple[State, tuple[Microbatch, ...]]:
    """Start what is planned, up to a prefill micro-batch that is one too many."""
    places = state.limits.prefills_at_once - state.prefills
    places += sum(microbatch.phase == "prefill" for microbatch in state.planned)
    count = 0
    for microbatch in state.planned:
        places -= microbatch.phase == "prefill"
        if places < 0:
            break
        count += 1
    return replace(state, planned=state.planned[count:]), state.planned[:count]


def _held(state: State, size: int) -> bool:
    """Whether all ready requests are new, too few for a micro-batch, and others of their admission are in prefill."""
    if len(state.ready) >= size:
        return False
    admissions = {state.new.get(request) for request in state.ready}
    return None not in admissions and any(state.new[request] in admissions for request in state.in_prefill)


def _divided(count: int, size: int) -> int:
    """How many parts of a size hold all."""
    return -(-count // size)
