"""A pipeline of queues that runs a schedule and checks at every step all that must hold of any."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from hypothesis import strategies as st

from llmpq.spec.schedule import advance, start
from llmpq.spec.schedule_state import (
    Admit,
    Arrived,
    Cancelled,
    End,
    Event,
    Limits,
    Microbatch,
    Prompt,
    Returned,
)


@st.composite
def some_limits(draw: st.DrawFn, *, longest: int = 14, few_blocks: bool = False, shares_blocks: bool = False) -> Limits:
    """With blocks for all slots at full length, or fewer. `longest`: tokens of a prompt and its answer."""
    block_tokens, slots = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    slot_blocks = -(-longest // block_tokens)
    return Limits(
        stages=draw(st.integers(1, 4)),
        slots=slots,
        prefill_microbatch=draw(st.integers(1, 8)),
        decode_microbatch=draw(st.integers(1, 8)),
        step_tokens=longest if shares_blocks else draw(st.integers(4, 12)),
        chunk_tokens=longest if shares_blocks else draw(st.integers(1, 4)),
        beside_tokens=draw(st.sampled_from([0, 1, 3, longest])),
        blocks=draw(st.integers(slot_blocks, slots * slot_blocks)) if few_blocks else slots * slot_blocks,
        block_tokens=block_tokens,
        shares_blocks=shares_blocks,
    )


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=12)  # prompt, output


GROWING = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 10)), min_size=3, max_size=12)


class QueuedPipeline:
    """A pipeline of queues, one for each stage and one for the way back, that the test moves on one by one.

    Request i has a prompt of lengths[i][0] tokens, and ends after lengths[i][1] of its own. All that must hold of any
    schedule is checked at every step. Whoever gives its blocks back is computed anew from its first token on.

    Prompts whose number in `alike` is the same have the same tokens, up to the end of the shorter one.
    """

    def __init__(self, given: Limits, lengths: Sequence[tuple[int, int]], alike: Sequence[int] = ()) -> None:
        self.lengths, self.limits = lengths, given
        self.names = [
            tuple(100 * alike[r] + i for i in range(prompt // given.block_tokens)) if alike else ()
            for r, (prompt, _) in enumerate(lengths)
        ]
        self.written: dict[int, int | None] = {}  # what each block holds, by what has been started so far
        self.reused = 0  # tokens
        self.beside = 0  # steps in which some decode beside prompts
        self.queues = [deque[Microbatch]() for _ in range(given.stages + 1)]
        self.started: list[Microbatch] = []
        self.arrived: list[int] = []
        self.slots: dict[int, int] = {}  # of requests that have one
        self.ready: list[int] = []  # in the order they became so
        self.tokens: Counter[int] = Counter()
        self.prefilled: Counter[int] = Counter()  # tokens of prompts that were started
        self.in_prefill: set[int] = set()  # admitted, without a token since
        self.preempted: list[int] = []
        self.cancelled: set[int] = set()
        self.ended: list[int] = []
        self.state = start(given)

    def arrive(self, requests: Sequence[int]) -> None:
        self.arrived.extend(requests)
        self._happen(Arrived(tuple(Prompt(i, self.lengths[i][0], names=self.names[i]) for i in requests)))

    def cancel(self, requests: Sequence[int]) -> None:
        in_flight = {r for queue in self.queues for microbatch in queue for r in microbatch.requests}
        here = set(requests) & set(self.arrived) - set(self.ended)
        self.cancelled |= here
        self._happen(Cancelled(tuple(requests)))
        if not self.limits.shares_blocks:  # or others wait for what it computes
            assert here - in_flight <= set(self.ended)  # at once

    def movable(self) -> list[int]:
        return [i for i, queue in enumerate(self.queues) if queue]

    def move(self, i: int) -> None:
        """Move the head of queue i on; from the last one, back to the first stage."""
        microbatch = self.queues[i].popleft()
        if i + 1 < len(self.queues):
            self.queues[i + 1].append(microbatch)
            return
        answered = microbatch.requests[1:] if microbatch.chunk and not microbatch.chunk.last else microbatch.requests
        self.tokens.update(answered)
        self.ready.extend(answered)
        self.in_prefill.difference_update(answered)
        self._happen(Returned(microbatch, frozenset(r for r in answered if self.tokens[r] == self.lengths[r][1])))

    def drain(self) -> None:
        while movable := self.movable():
            self.move(movable[-1])

    def _happen(self, event: Event) -> None:
        before = self.state
        self.state, actions = advance(before, event)
        ended = {r for action in actions if isinstance(action, End) for r in action.requests}
        again = {r for action in actions if isinstance(action, Admit) for r, _ in action.slots if r in self.slots}
        self._preempt((set(before.slots) - set(self.state.slots) - ended) | again, ended)
        for action in actions:
            if isinstance(action, End):
                self._end(action.requests)
            elif isinstance(action, Admit):
                self._admit(action.slots)
            else:
                self._start(action)
        self._check()

    def _preempt(self, requests: set[int], ended: set[int]) -> None:
        """Those that had been admitted last, of those that are left."""
        left = [r for r in self.slots if r not in ended]
        on_their_way = {r for queue in self.queues for microbatch in queue for r in microbatch.requests}
        assert requests.isdisjoint(on_their_way) and requests.isdisjoint(self.cancelled)
        assert requests == set(left[len(left) - len(requests) :])
        for r in requests:
            self.preempted.append(r)
            self.prefilled[r] = 0
            del self.slots[r]
        self.in_prefill -= requests
        self.ready = [r for r in self.ready if r not in requests]

    def _length(self, r: int) -> int:
        """Tokens so far, of the prompt and the answer."""
        return self.lengths[r][0] + self.tokens[r]

    def _end(self, requests: Sequence[int]) -> None:
        on_their_way = {r for queue in self.queues for microbatch in queue for r in microbatch.requests}
        for r in requests:
            assert r not in self.ended and r not in on_their_way
            assert r in self.cancelled or self.tokens[r] == self.lengths[r][1]
            self.ended.append(r)
            self.slots.pop(r, None)
            self.in_prefill.discard(r)
        self.ready = [r for r in self.ready if r not in requests]

    def _admit(self, slots: Sequence[tuple[int, int]]) -> None:
        for r, slot in slots:
            assert slot not in self.slots.values() and 0 <= slot < self.limits.slots
            self.slots[r] = slot
            self.in_prefill.add(r)

    def _start(self, microbatch: Microbatch) -> None:
        requests = microbatch.requests
        assert requests and set(requests) <= set(self.slots)
        prompts = requests[: len(requests) - microbatch.beside] if microbatch.phase == "prefill" else ()
        tokens = 0
        if prompts:
            assert self.in_prefill.issuperset(prompts)
            assert len(prompts) <= self.limits.prefill_microbatch
            for r, reused in zip(prompts, microbatch.reused or [0] * len(prompts)):
                self._reuse(r, reused)
                self._write(r, self.prefilled[r])
            tokens = self._start_prefill(prompts, microbatch)
        if decoding := requests[len(prompts) :]:
            for r in decoding:
                self._write(r, self._length(r) - 1)
            assert len(decoding) <= self.limits.decode_microbatch
            overtaken = self.ready[: self.ready.index(decoding[-1])]
            assert [r for r in self.ready if r in decoding] == list(decoding)
            assert all(r in decoding or self._stalled(r) for r in overtaken)
            assert not any(map(self._stalled, decoding))
            self.ready = [r for r in self.ready if r not in decoding]
        if prompts and decoding:
            assert tokens <= self.limits.beside_tokens
            assert len(requests) <= max(self.limits.prefill_microbatch, self.limits.decode_microbatch)
            assert tokens + len(decoding) <= self.limits.step_tokens
            self.beside += 1
        self.queues[0].append(microbatch)
        self.started.append(microbatch)

    def _stalled(self, r: int) -> bool:
        """Whether it has no block for its latest token."""
        return len(self.state.pool.tables[r]) * self.limits.block_tokens < self._length(r)

    def _start_prefill(self, requests: Sequence[int], microbatch: Microbatch) -> int:
        """All tokens of a prompt are computed once, in order, and as many as a step has room for. How many it has."""
        chunk = microbatch.chunk
        before = [self.prefilled[r] for r in requests]
        if chunk is None:
            assert before == list(microbatch.reused or [0] * len(requests))
            for r in requests:
                self.prefilled[r] = self._length(r)
        else:
            (r,) = requests
            assert before == [chunk.start] and chunk.last == (chunk.end == self._length(r))
            self.prefilled[r] = chunk.end
        tokens = [self.prefilled[r] - start for r, start in zip(requests, before, strict=True)]
        assert 0 < min(tokens) <= max(tokens) <= self.limits.chunk_tokens
        assert sum(tokens) <= self.limits.step_tokens
        return sum(tokens)

    def _reuse(self, r: int, tokens: int) -> None:
        """Of a prompt, which is not yet computed, so many are in its blocks by what was started before."""
        blocks, rest = divmod(tokens, self.limits.block_tokens)
        assert rest == 0 and tokens < self._length(r) and not (tokens and self.prefilled[r])
        assert [self.written[block] for block in self.state.pool.tables[r][:blocks]] == list(self.names[r][:blocks])
        self.prefilled[r] += tokens
        self.reused += tokens

    def _write(self, r: int, start: int) -> None:
        """Its tokens from that one on are written to its blocks, which nobody has at another place."""
        table, first = self.state.pool.tables[r], start // self.limits.block_tokens
        for i, block in enumerate(table[first:], first):
            self.written[block] = self.names[r][i] if i < len(self.names[r]) else None
            assert all(i < len(other) and other[i] == block for other in self._tables_with(block))
        assert len(table) <= len(self.names[r]) or len(self._tables_with(table[-1])) == 1

    def _tables_with(self, block: int) -> list[tuple[int, ...]]:
        return [table for table in self.state.pool.tables.values() if block in table]

    def _check(self) -> None:
        on_their_way = [microbatch for queue in self.queues for microbatch in queue]
        counts = Counter(r for microbatch in (*on_their_way, *self.state.planned) for r in microbatch.requests)
        assert all(count == 1 or r in self.in_prefill for r, count in counts.items())  # chunks follow one another
        unfinished = {r for r in self.in_prefill if 0 < self.prefilled[r] < self._length(r)}
        between = unfinished - set(counts)
        assert len(between) <= 1
        assert set(self.slots) == set(counts) | set(self.ready) | between
        assert sorted(self.state.ready) == sorted(r for r in self.ready if r not in counts)
        if not self.limits.shares_blocks:
            assert self.cancelled.isdisjoint(r for microbatch in self.state.planned for r in microbatch.requests)
        assert self.state.in_prefill == {r: counts[r] for r in self.in_prefill}
        # First come, first served.
        assert [*self.slots] == [r for r in self.arrived if r in self.slots]
        waiting = [r for r in self.arrived if r not in self.slots and r not in self.ended]
        assert not waiting or not self.slots or self.arrived.index(waiting[0]) > self.arrived.index([*self.slots][-1])
        self._check_blocks(on_their_way)
        assert self.state.done == (not self.slots and not waiting)
        # No stage waits while there is work.
        places = 2 * self.limits.stages - 1
        prefills, planned = (
            [microbatch for microbatch in several if microbatch.phase == "prefill"]
            for several in (on_their_way, self.state.planned)
        )
        assert len(prefills) <= 2 * places - 1
        if self.state.planned:
            waits = self.limits.beside_tokens and planned and len(on_their_way) >= places  # for who decodes beside it
            assert len(prefills) == 2 * places - 1 or waits
        leaving = self.state.leaving is not None
        if (between and not leaving) or (waiting and self._has_room(waiting[0])):
            assert len(prefills) + len(planned) >= places
        if self.ready and not leaving and not any(map(self._stalled, self.ready)):
            most = max(1, min(self.limits.stages, self.limits.slots // self.limits.decode_microbatch))
            assert prefills or len(on_their_way) >= min(most, len(self.slots) - len(self.ready))
        assert self.state.done or on_their_way, "deadlock: work is left, but nothing is on its way"

    def _check_blocks(self, on_their_way: Sequence[Microbatch]) -> None:
        """Each belongs to one admitted request or is free, and whoever is on its way has all it needs."""
        pool = self.state.pool
        assert set(pool.tables) == set(self.slots)
        owned = [block for table in pool.tables.values() for block in table]
        assert sorted((*pool.free, *pool.idle, *set(owned))) == list(range(self.limits.blocks))
        assert len(set(owned)) == len(owned) or self.limits.shares_blocks
        for r in {r for microbatch in on_their_way for r in microbatch.requests}:
            assert not self._stalled(r)

    def _has_room(self, r: int) -> bool:
        """Whether there is a slot, and blocks beside those for the next tokens of all that are there."""
        size, tables = self.limits.block_tokens, self.state.pool.tables
        growing = sum(len(table) * size <= self._length(r) for r, table in tables.items())
        needed = self._length(r) // size + 1 + growing
        free = self.state.pool.available >= needed and self.state.leaving is None
        return free and len(self.slots) < self.limits.slots


def run_in_any_order(
    given: Limits, lengths: list[tuple[int, int]], data: st.DataObject, alike: Sequence[int] = ()
) -> QueuedPipeline:
    """One whose requests have all ended, by moves that hypothesis chose."""
    pipeline = QueuedPipeline(given, lengths, alike)
    to_come = list(range(len(lengths)))
    while to_come or not pipeline.state.done:
        moves = [*pipeline.movable(), *(["arrive"] if to_come else []), "cancel"]
        move = data.draw(st.sampled_from(moves))
        if move == "arrive":
            count = data.draw(st.integers(1, len(to_come)))
            pipeline.arrive(to_come[:count])
            del to_come[:count]
        elif move == "cancel":
            pipeline.cancel(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
            if not pipeline.movable() and not to_come and not given.shares_blocks:
                assert pipeline.state.done
        else:
            pipeline.move(int(move))
    assert not pipeline.movable()
    assert sorted(pipeline.ended) == list(range(len(lengths)))
    for r, (_, output) in enumerate(lengths):
        assert pipeline.tokens[r] == output or r in pipeline.cancelled
    assert sorted(pipeline.state.free) == list(range(given.slots))
    pool = pipeline.state.pool
    assert sorted((*pool.free, *pool.idle)) == list(range(given.blocks)) and not pool.users
    assert set(pool.named.values()) == set(pool.names) == set(pool.idle)
    return pipeline


def returned(microbatch: object, *ended: int) -> Returned:
    assert isinstance(microbatch, Microbatch)
    return Returned(microbatch, frozenset(ended))
