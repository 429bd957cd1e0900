"""Which micro-batches go through a pipeline, and in what order: a pure state machine without processes or times.

The runtime carries out its actions; the planner's simulation adds up how long they take.

Requests are admitted to free slots of the KV cache in the order they arrive, as soon as others end and there are blocks
for their prompts, and their prefill is planned at once. Beside a prompt, blocks are left for the next tokens of those
that are there. If none is free when one has to grow, the request that was admitted last gives its own back (if it is in
a micro-batch on its way, when that returns) and waits again, before all others: what it has so far is its prompt then,
and is computed anew. Who was admitted first never has to, and all blocks together hold any one request, so it ends. A
prompt for which layers within a window have no room in a step is taken in chunks, which follow one another through the
stages. Micro-batches start in the order they are planned, but no more for prefill are on their way than keep its stages
busy; what has not started can still be cancelled. While others decode, no more are planned than the pipeline has places
for, so that decoding goes on beside a long queue of prompts, or a long prompt.

Who has a token, and is in no micro-batch, is ready. The ready ones are divided anew whenever something returns: into as
many decode micro-batches as the plan has, or as it has stages if fewer requests are there, all of one size. So requests
leave and join, and the stages stay busy. Whoever has been ready longest goes first. Only requests that were admitted
together wait for each other's first tokens, until they are enough for a micro-batch: a step of few sequences takes
about as long as one of many. All others go on at once.

Where the plan says so, prompts that come later are computed beside those who decode, in one step and in chunks: weights
are read once for both, steps are of more equal length, and nobody waits long for a next token. If the pipeline has
enough to do, such prompts then start when something returns. And fewer prompts than there are stages are computed in
chunks from the start, so that all stages work on them.

The pipeline keeps the order of its micro-batches, so they return in the order they were started. What is started then
depends on the order of events alone: a simulated run of requests that are all there from the start has the very steps
of the real one.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import replace

from llmpq.spec import joint_steps
from llmpq.spec.admission import Room, first_chunk, first_prompts
from llmpq.spec.block_pool import BlockPool
from llmpq.spec.schedule_state import (
    Action,
    Admit,
    Arrived,
    Cancelled,
    End,
    Event,
    Limits,
    Microbatch,
    Prompt,
    Returned,
    State,
    parts,
)


def start(limits: Limits) -> State:
    """Before anything has arrived."""
    return State(limits, tuple(range(limits.slots)), BlockPool.of(limits.blocks))


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
    """Those that are in no micro-batch on its way end now, but for those whose blocks others wait for."""
    awaited = {request for request in requests & state.in_prefill.keys() if state.pool.is_awaited(request)}
    state = _unplanned(state, requests - awaited)
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
        kept = _kept(microbatch, requests)
        ready += [request for request in microbatch.decoding if request in requests]
        in_prefill |= {request: in_prefill[request] - 1 for request in microbatch.prompts if request in requests}
        prefills -= bool(microbatch.prompts) - bool(kept and kept.prompts)
        decodes -= bool(microbatch.decoding) - bool(kept and kept.decoding)
        if kept:
            planned.append(kept)
    return replace(
        state,
        planned=tuple(planned),
        in_prefill=in_prefill,
        ready=tuple(ready),
        prefills=prefills,
        decodes=decodes,
    )


def _kept(microbatch: Microbatch, without: frozenset[int]) -> Microbatch | None:
    """What is left of a micro-batch without these requests, if anything."""
    prompts, decoding = (
        tuple(request for request in requests if request not in without)
        for requests in (microbatch.prompts, microbatch.decoding)
    )
    if not prompts:
        return Microbatch("decode", decoding) if decoding else None
    reused = tuple(n for request, n in zip(microbatch.prompts, microbatch.reused) if request not in without)
    beside, reused = len(decoding), reused if any(reused) else ()
    return replace(microbatch, requests=prompts + decoding, reused=reused, beside=beside)


def _take_back(state: State, event: Returned) -> tuple[State, tuple[int, ...]]:
    microbatch = event.microbatch
    prompts, answered = microbatch.prompts, microbatch.answered
    in_prefill = dict(state.in_prefill)
    for request in prompts:
        if request in answered:
            del in_prefill[request]
        else:
            in_prefill[request] -= 1
    state = replace(
        state,
        lengths={**state.lengths, **{request: state.lengths[request] + 1 for request in answered}},
        in_prefill=in_prefill,
        ready=state.ready + answered,
        prefills=state.prefills - bool(prompts),
        decodes=state.decodes - bool(microbatch.decoding),
        started=state.started - 1,
    )
    over = event.ended | {r for r in state.cancelled & set(microbatch.requests) if not in_prefill.get(r)}
    ended = tuple(request for request in microbatch.requests if request in over)
    state = _without(state, ended)
    if state.leaving in microbatch.requests and not state.in_prefill.get(state.leaving):
        state = _queued_again(state, state.leaving)
    return state, ended


def _without(state: State, ended: tuple[int, ...]) -> State:
    """Without these requests, which are in no micro-batch. The slots that were used last are taken again first."""
    if not ended:
        return state
    return replace(
        state,
        free=tuple(state.slots[request] for request in ended) + state.free,
        pool=state.pool.without(ended, state.in_prefill),
        slots={request: slot for request, slot in state.slots.items() if request not in ended},
        lengths={request: tokens for request, tokens in state.lengths.items() if request not in ended},
        names={request: names for request, names in state.names.items() if request not in ended},
        in_prefill={request: count for request, count in state.in_prefill.items() if request not in ended},
        ready=tuple(request for request in state.ready if request not in ended),
        new={request: admission for request, admission in state.new.items() if request not in ended},
        cancelled=state.cancelled.difference(ended),
        leaving=None if state.leaving in ended else state.leaving,
    )


def _preempt_last(state: State) -> State:
    """The request that was admitted last gives its blocks back, now or when it returns."""
    last = [*state.slots][-1]
    state = _unplanned(state, frozenset((last,)))
    if state.waiting and state.waiting[0].request == last:  # with chunks that were not planned yet
        state = replace(state, waiting=state.waiting[1:])
    if last in state.ready or state.in_prefill.get(last) == 0:
        return _queued_again(state, last)
    return replace(state, leaving=last)


def _queued_again(state: State, request: int) -> State:
    """An admitted request that is in no micro-batch waits again: before all others, since it came before them."""
    prompt = Prompt(request, state.lengths[request], names=state.names.get(request, ()))
    state = _without(state, (request,))
    return replace(state, waiting=(prompt, *state.waiting))


def _admit(state: State) -> tuple[State, tuple[Admit, ...]]:
    """Admit whoever there is room for, and plan their prefill."""
    most = state.limits.prefills_beside_decode if state.decoding else math.inf
    if not state.waiting or state.prefills >= most:
        return state, ()
    room = Room.of(state)
    if not room.takes(state.waiting[0]):
        return state, ()  # without a copy of a queue that may be long
    waiting = deque(state.waiting)
    microbatches: list[Microbatch] = []
    while waiting and room.takes(waiting[0]) and state.prefills + len(microbatches) < most:
        microbatches.append(first_chunk(waiting, room) or first_prompts(waiting, room))
    taken = room.taken
    admitted = [prompt for prompt in state.waiting[: len(taken) + 1] if prompt.request in taken]
    in_prefill = Counter(state.in_prefill)
    in_prefill.update(request for microbatch in microbatches for request in microbatch.requests)
    after = replace(
        state,
        waiting=tuple(waiting),
        free=tuple(room.slots) if state.leaving is None else state.free,
        pool=room.pool,
        slots={**state.slots, **taken},
        lengths={**state.lengths, **{prompt.request: prompt.tokens for prompt in admitted}},
        names={**state.names, **{prompt.request: prompt.names for prompt in admitted if prompt.names}},
        in_prefill=dict(in_prefill),
        planned=state.planned + tuple(microbatches),
        new={**state.new, **dict.fromkeys(taken, state.admissions)},
        prefills=state.prefills + len(microbatches),
        admissions=state.admissions + 1,
    )
    return after, (Admit(tuple(taken.items())),) if taken else ()


def _plan_decode(state: State) -> State:
    """Plan who decodes of the ready requests: beside prompts, if some that have not started leave room for that."""
    count = state.limits.decode_microbatches(len(state.slots))
    size = parts(len(state.slots), count) if count else 0
    while state.ready and state.decodes < count and not _held(state, size):
        prompts = joint_steps.with_room(state, size)
        most = size if prompts is None else min(size, joint_steps.places(state, prompts))
        state, chosen = _with_blocks(state, most)
        if not chosen:
            break
        going = frozenset(chosen)
        state = replace(
            state,
            ready=tuple(request for request in state.ready if request not in going),
            planned=joint_steps.planned_with(state, chosen, prompts),
            new={request: admission for request, admission in state.new.items() if request not in going},
            decodes=state.decodes + 1,
        )
    return state


def _with_blocks(state: State, size: int) -> tuple[State, tuple[int, ...]]:
    """Choose ready requests, up to `size`, in their order. Each has a block for its latest token, or is given one here.

    Who gets none is passed over.
    """
    chosen: list[int] = []
    for request in state.ready:
        if len(chosen) == size:
            break
        if request in state.slots:  # and has not just had to give its blocks back
            state = _grown(state, request)
            if _has_block(state, request):
                chosen.append(request)
    return state, tuple(request for request in chosen if request in state.slots)


def _has_block(state: State, request: int) -> bool:
    """Whether the blocks of an admitted request hold its latest token, which has no place in the cache yet."""
    return len(state.pool.tables[request]) >= state.limits.blocks_for(state.lengths[request])


def _grown(state: State, request: int) -> State:
    """With a block for the request's latest token, if need be that of the one admitted last; which itself waits."""
    if _has_block(state, request):
        return state
    if not state.pool.available and state.leaving is None and request != [*state.slots][-1]:
        state = _preempt_last(state)
    if not state.pool.available:
        return state
    return replace(state, pool=state.pool.with_more(request, 1))


def _start_planned(state: State) -> tuple[State, tuple[Microbatch, ...]]:
    """Start what is planned, up to a prefill micro-batch that is one too many.

    Or, if the pipeline has enough to do, up to prompts that others may decode beside as soon as something returns.
    """
    planned = state.planned
    places = state.limits.prefills_at_once - state.prefills + sum(bool(each.prompts) for each in planned)
    decodes = state.limits.beside_tokens and state.decodes - sum(bool(each.decoding) for each in planned)
    count = 0
    for microbatch in planned:
        places -= bool(microbatch.prompts)
        busy = state.started + count >= state.limits.prefills_beside_decode
        if places < 0 or (busy and decodes and not microbatch.decoding):
            break
        count += 1
    return replace(state, planned=planned[count:], started=state.started + count), planned[:count]


def _held(state: State, size: int) -> bool:
    """Whether all ready requests are new, too few for a micro-batch, and others of their admission are in prefill."""
    if len(state.ready) >= size:
        return False
    admissions = {state.new.get(request) for request in state.ready}
    return None not in admissions and any(state.new[request] in admissions for request in state.in_prefill)
