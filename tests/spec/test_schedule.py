"""The pure schedule: every request gets its tokens, in order, in pipelines of any depth, whatever comes between."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec import W16, LayerKind, Plan, parse_devices
from llmpq.spec.schedule import (
    Admit,
    Arrived,
    Cancelled,
    Chunk,
    End,
    Event,
    Limits,
    Microbatch,
    Prompt,
    Returned,
    advance,
    start,
)
from tests.support.specs import tiny_model


def limits(stages: int = 2, slots: int = 8, prefill: int = 2, decode: int = 4) -> Limits:
    return Limits(stages, slots, prefill, decode, step_tokens=100, chunk_tokens=50, blocks=4 * slots)


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
        blocks=draw(st.integers(slot_blocks, min(slots, 2) * slot_blocks)) if few_blocks else slots * slot_blocks,
        block_tokens=block_tokens,
        shares_blocks=shares_blocks,
    )


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=12)  # prompt, output


GROWING = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 10)), min_size=3, max_size=12)


class Pipeline:
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
        if microbatch.is_prefix:
            self._happen(Returned(microbatch, frozenset()))
            return
        self.tokens.update(microbatch.requests)
        self.ready.extend(microbatch.requests)
        self.in_prefill.difference_update(microbatch.requests)
        self._happen(
            Returned(microbatch, frozenset(r for r in microbatch.requests if self.tokens[r] == self.lengths[r][1]))
        )

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
        if microbatch.phase == "prefill":
            assert self.in_prefill.issuperset(requests)
            assert len(requests) <= self.limits.prefill_microbatch
            for r, reused in zip(requests, microbatch.reused or [0] * len(requests)):
                self._reuse(r, reused)
                self._write(r, self.prefilled[r])
            self._start_prefill(requests, microbatch.chunk)
        else:
            for r in requests:
                self._write(r, self._length(r) - 1)
            assert len(requests) <= self.limits.decode_microbatch
            overtaken = self.ready[: self.ready.index(requests[-1])]
            assert [r for r in self.ready if r in requests] == list(requests)
            assert all(r in requests or self._stalled(r) for r in overtaken)
            assert not any(map(self._stalled, requests))
            self.ready = [r for r in self.ready if r not in requests]
        self.queues[0].append(microbatch)
        self.started.append(microbatch)

    def _stalled(self, r: int) -> bool:
        """Whether it has no block for its latest token."""
        return len(self.state.pool.tables[r]) * self.limits.block_tokens < self._length(r)

    def _start_prefill(self, requests: Sequence[int], chunk: Chunk | None) -> None:
        """All tokens of a prompt are computed once, in order, and as many as a step has room for."""
        before = [self.prefilled[r] for r in requests]
        if chunk is None:
            assert not any(before) or self.limits.shares_blocks
            for r in requests:
                self.prefilled[r] = self._length(r)
        else:
            (r,) = requests
            assert before == [chunk.start] and chunk.last == (chunk.end == self._length(r))
            self.prefilled[r] = chunk.end
        tokens = [self.prefilled[r] - start for r, start in zip(requests, before, strict=True)]
        assert 0 < min(tokens) <= max(tokens) <= self.limits.chunk_tokens
        assert sum(tokens) <= self.limits.step_tokens

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
        prefills = [microbatch for microbatch in on_their_way if microbatch.phase == "prefill"]
        assert len(prefills) <= 4 * self.limits.stages - 3
        if self.state.planned:
            assert len(prefills) == 4 * self.limits.stages - 3
        leaving = self.state.leaving is not None
        if (between and not leaving) or (waiting and self._has_room(waiting[0])):
            assert len(prefills) >= 2 * self.limits.stages - 1
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


@given(some_limits(), LENGTHS, st.data())
def test_every_request_gets_exactly_its_tokens_whatever_comes_between(
    given: Limits, lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    assert not run_in_any_order(given, lengths, data).preempted


@given(some_limits(few_blocks=True), GROWING, st.data())
def test_every_request_gets_its_tokens_where_blocks_are_few(
    given: Limits, lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    run_in_any_order(given, lengths, data)


@given(some_limits(few_blocks=True, shares_blocks=True), GROWING | LENGTHS, st.data())
def test_prompts_that_begin_alike_share_what_is_computed_once(
    given: Limits, lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    alike = data.draw(st.lists(st.integers(0, 1), min_size=len(lengths), max_size=len(lengths)))
    run_in_any_order(given, lengths, data, alike)


def run_in_any_order(
    given: Limits, lengths: list[tuple[int, int]], data: st.DataObject, alike: Sequence[int] = ()
) -> Pipeline:
    pipeline = Pipeline(given, lengths, alike)
    to_come, cancels = list(range(len(lengths))), 0
    while to_come or not pipeline.state.done:
        moves = [*pipeline.movable(), *(["arrive"] if to_come else []), *(["cancel"] if cancels < 4 else [])]
        move = data.draw(st.sampled_from(moves))
        if move == "arrive":
            count = data.draw(st.integers(1, len(to_come)))
            pipeline.arrive(to_come[:count])
            del to_come[:count]
        elif move == "cancel":
            cancels += 1
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


@given(some_limits(few_blocks=True), GROWING, st.randoms(use_true_random=False))
def test_what_is_started_does_not_depend_on_how_long_anything_takes(
    given: Limits, lengths: list[tuple[int, int]], random: object
) -> None:
    """The simulation and the runtime have the same steps for requests that are there from the start."""
    pipelines = [Pipeline(given, lengths) for _ in range(2)]
    for pipeline in pipelines:
        pipeline.arrive(range(len(lengths)))
    pipelines[0].drain()
    while movable := pipelines[1].movable():
        pipelines[1].move(random.choice(movable))  # type: ignore[attr-defined]
    assert pipelines[0].started == pipelines[1].started
    assert pipelines[0].ended == pipelines[1].ended


@given(some_limits(longest=36), st.integers(1, 6), st.integers(1, 30))
def test_a_full_cache_decodes_in_the_micro_batches_of_the_plan(given: Limits, prompt: int, output: int) -> None:
    """As many as are planned, of sizes that differ by one at most, in every round."""
    pipeline = Pipeline(given, [(prompt, output)] * given.slots)
    pipeline.arrive(range(given.slots))
    pipeline.drain()
    decode = [microbatch.requests for microbatch in pipeline.started if microbatch.phase == "decode"]
    count = -(-given.slots // given.decode_microbatch)
    assert len(decode) == count * (output - 1)
    size = -(-given.slots // count)
    if decode:
        assert {len(requests) for requests in decode} <= {size, given.slots - (count - 1) * size}
        assert decode[:count] == [tuple(range(given.slots))[i * size : (i + 1) * size] for i in range(count)]


@pytest.mark.parametrize(("windows", "blocks"), [((None,), 5), ((16, None), 5), ((16,), 8), ((16, 190), 5)])
def test_layers_that_keep_the_latest_tokens_alone_take_no_blocks(windows: tuple[int | None, ...], blocks: int) -> None:
    """Of two slots of 4 blocks each; a window of 190 with a step keeps all of a slot."""
    spec = tiny_model(layer_kinds=tuple(LayerKind(window=window) for window in windows))
    plan = Plan.single(spec, parse_devices("cpu").devices[0], W16, slots=2, max_length=200)
    plan = replace(plan, max_prompt_len=20, kv_blocks=5)
    assert Limits.of(plan, spec).blocks == blocks


def test_what_is_reused_takes_no_room_in_a_step() -> None:
    sharing = Limits(1, 8, 8, 8, step_tokens=10, chunk_tokens=10, blocks=80, block_tokens=2, shares_blocks=True)
    _, (_, step) = advance(start(sharing), Arrived(tuple(Prompt(i, 5, names=(8, 9)) for i in range(7))))
    assert step == Microbatch("prefill", tuple(range(6)), reused=(0, 4, 4, 4, 4, 4))  # 5 tokens, and 5 times one


def returned(microbatch: object, *ended: int) -> Returned:
    assert isinstance(microbatch, Microbatch)
    return Returned(microbatch, frozenset(ended))


def prompts(*requests: int) -> Arrived:
    return Arrived(tuple(Prompt(request, 5) for request in requests))


def test_requests_that_come_together_wait_until_they_fill_a_micro_batch() -> None:
    state, (admit, a, b, c, d) = advance(start(limits()), prompts(*range(8)))
    assert admit == Admit(tuple((i, i) for i in range(8)))
    assert [a, b, c, d] == [Microbatch("prefill", (i, i + 1)) for i in (0, 2, 4, 6)]
    state, actions = advance(state, returned(a))
    assert actions == ()
    state, actions = advance(state, returned(b))
    assert actions == (Microbatch("decode", (0, 1, 2, 3)),)
    state, actions = advance(state, returned(c))
    assert actions == ()
    state, actions = advance(state, returned(d, 4, 5, 6, 7))
    assert actions == (End((6, 7)), Microbatch("decode", (4, 5)))


def test_a_request_does_not_wait_for_one_that_came_later() -> None:
    state, (_, first) = advance(start(limits()), prompts(0))
    state, (_, second) = advance(state, prompts(1))
    state, actions = advance(state, returned(first))
    assert actions == (Microbatch("decode", (0,)),)
    state, actions = advance(state, returned(second))
    assert actions == (Microbatch("decode", (1,)),)


def test_who_ends_makes_room_at_once_and_who_comes_joins() -> None:
    state, (_, a, b) = advance(start(limits(slots=4, decode=4)), prompts(*range(5)))
    state, _ = advance(state, returned(a))
    state, (decode,) = advance(state, returned(b))
    assert decode == Microbatch("decode", (0, 1, 2, 3))
    state, actions = advance(state, returned(decode, 1))
    assert actions == (End((1,)), Admit(((4, 1),)), Microbatch("prefill", (4,)), Microbatch("decode", (0, 2, 3)))
    state, none = advance(state, returned(actions[2]))
    assert none == ()  # the plan has one decode micro-batch, and that is on its way
    state, actions = advance(state, returned(actions[3]))
    assert actions == (Microbatch("decode", (4, 0, 2, 3)),)


def test_few_requests_decode_in_as_many_micro_batches_as_there_are_stages() -> None:
    counts = [limits(stages=2, slots=12, decode=3).decode_microbatches(n) for n in range(13)]
    assert counts == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [limits(stages=4, slots=12, decode=6).decode_microbatches(n) for n in (1, 5, 12)] == [1, 2, 2]


def test_prompts_take_turns_with_decoding() -> None:
    state, (_, first) = advance(start(limits(stages=1, prefill=1)), prompts(0))
    state, (decode,) = advance(state, returned(first))
    state, actions = advance(state, prompts(1, 2, 3))
    assert actions == (Admit(((1, 1),)), Microbatch("prefill", (1,)))
    state, actions = advance(state, returned(decode))
    assert actions == (Microbatch("decode", (0,)),)
    state, actions = advance(state, returned(Microbatch("prefill", (1,))))
    assert actions[:2] == (Admit(((2, 2),)), Microbatch("prefill", (2,)))


def test_a_cancelled_request_ends_at_once_unless_it_is_on_its_way() -> None:
    state, (_, prefill) = advance(start(limits(slots=2)), prompts(0, 1, 2, 3))
    state, actions = advance(state, Cancelled((0, 2, 9)))
    assert actions == (End((2,)),)  # never admitted
    state, actions = advance(state, returned(prefill))
    assert actions == (End((0,)), Admit(((3, 0),)), Microbatch("prefill", (3,)), Microbatch("decode", (1,)))
    state, actions = advance(state, Cancelled((0,)))
    assert actions == ()  # it has ended
    state, actions = advance(state, returned(Microbatch("decode", (1,)), 1))
    assert actions == (End((1,)),)
    state, actions = advance(state, Cancelled((3,)))
    assert actions == () and not state.done
    state, actions = advance(state, returned(Microbatch("prefill", (3,))))
    assert actions == (End((3,)),) and state.done


def test_of_what_is_cancelled_only_what_is_on_its_way_is_computed() -> None:
    """However many came together: the others of its micro-batches go on, and decode in the order they would have."""
    one_by_one = limits(stages=1, slots=40, prefill=2, decode=4)
    state, (_, first) = advance(start(one_by_one), prompts(*range(40)))
    assert first == Microbatch("prefill", (0, 1))
    state, actions = advance(state, Cancelled((0, 2, *range(4, 39))))
    assert actions == (End((2, *range(4, 39))),)
    state, actions = advance(state, returned(first))
    assert actions == (End((0,)), Microbatch("prefill", (3,)))
    state, actions = advance(state, returned(actions[1]))
    assert actions == (Microbatch("prefill", (39,)),)
    third = actions[0]
    state, actions = advance(state, Cancelled((1,)))
    assert actions == (End((1,)),)
    state, actions = advance(state, returned(third))
    assert actions == (Microbatch("decode", (3, 39)),)


def test_planned_decode_and_planned_chunks_are_cancelled_at_once() -> None:
    state, (_, a) = advance(
        start(limits(stages=1, slots=4, prefill=1, decode=2)),
        Arrived(tuple(Prompt(i, tokens) for i, tokens in enumerate((5, 5, 5, 120)))),
    )
    state, (b,) = advance(state, returned(a))
    state, (c,) = advance(state, returned(b))
    assert state.planned[-1] == Microbatch("decode", (0, 1))  # behind the chunks of 3
    state, actions = advance(state, Cancelled((0,)))
    assert actions == (End((0,)),)
    state, (chunk,) = advance(state, returned(c))
    assert chunk == Microbatch("prefill", (3,), Chunk(0, 40, False))
    state, actions = advance(state, Cancelled((3,)))
    assert actions == (Microbatch("decode", (1,)),)
    decode = actions[0]
    state, actions = advance(state, returned(chunk))
    assert actions == (End((3,)),)
    state, actions = advance(state, returned(decode))
    assert actions == (Microbatch("decode", (2, 1)),)


def test_an_event_that_admits_nobody_leaves_the_queue_as_it_is() -> None:
    """However long that is, no copy of it is made."""
    state, (_, first) = advance(start(limits(stages=1, slots=2)), prompts(*range(9)))
    after, _ = advance(state, returned(first))
    assert after.waiting is state.waiting and len(after.waiting) == 7


def test_who_waits_for_others_is_cancelled_at_once() -> None:
    state, (_, first, second) = advance(start(limits(slots=4, prefill=2)), prompts(0, 1, 2, 3))
    state, actions = advance(state, returned(first))
    assert actions == ()
    state, actions = advance(state, Cancelled((0,)))
    assert actions == (End((0,)),)
    state, actions = advance(state, returned(second))
    assert actions == (Microbatch("decode", (1, 2, 3)),)


def test_who_came_last_gives_its_blocks_back_and_comes_back_first() -> None:
    """Blocks of 2 tokens, 6 of them: 0 and 1 have 3 each when 0 needs a fourth."""
    few = Limits(1, 2, 2, 2, step_tokens=100, chunk_tokens=50, blocks=6, block_tokens=2)
    state, (admit, step) = advance(start(few), Arrived((Prompt(0, 3), Prompt(1, 3), Prompt(2, 3))))
    assert admit == Admit(((0, 0), (1, 1))) and step == Microbatch("prefill", (0, 1))
    for _ in range(3):
        state, (step,) = advance(state, returned(step))
        assert step == Microbatch("decode", (0, 1))
    state, (step,) = advance(state, returned(step))
    assert step == Microbatch("decode", (0,)) and state.waiting == (Prompt(1, 7), Prompt(2, 3))
    state, actions = advance(state, returned(step, 0))
    assert actions == (End((0,)), Admit(((1, 0), (2, 1))), Microbatch("prefill", (1, 2)))


def test_who_is_cancelled_before_its_prefill_leaves_known_what_others_computed() -> None:
    sharing = Limits(1, 2, 1, 2, step_tokens=100, chunk_tokens=100, blocks=8, block_tokens=2, shares_blocks=True)
    state, (_, step) = advance(start(sharing), Arrived((Prompt(0, 5, names=(8, 9)),)))
    state, _ = advance(state, returned(step, 0))
    state, _ = advance(state, Arrived((Prompt(1, 2), Prompt(2, 5, names=(8, 9)))))
    assert state.planned == (Microbatch("prefill", (2,), reused=(4,)),)
    state, actions = advance(state, Cancelled((2,)))
    assert actions == (End((2,)),)
    state, actions = advance(state, Arrived((Prompt(3, 5, names=(8, 9)),)))
    assert state.planned == (Microbatch("prefill", (3,), reused=(4,)),)


def test_a_long_prompt_is_taken_in_chunks_that_follow_one_another() -> None:
    state, (admit, *chunks) = advance(start(limits()), Arrived((Prompt(0, 120), Prompt(1, 50))))
    assert admit == Admit(((0, 0), (1, 1)))
    ends = [0, 40, 80, 120]
    expected = [Microbatch("prefill", (0,), Chunk(a, b, b == 120)) for a, b in pairwise(ends)]
    assert chunks == [*expected, Microbatch("prefill", (1,))]
    assert [microbatch.is_prefix for microbatch in expected] == [True, True, False]
    for chunk in expected[:2]:
        state, actions = advance(state, returned(chunk))
        assert actions == ()
    state, actions = advance(state, returned(expected[2]))
    assert actions == (Microbatch("decode", (0,)),)


def test_chunks_take_turns_with_decoding_and_stop_when_their_request_is_cancelled() -> None:
    state, (_, first) = advance(start(limits(stages=1)), prompts(0))
    state, (decode,) = advance(state, returned(first))
    state, (_, chunk) = advance(state, Arrived((Prompt(1, 150), Prompt(2, 5))))
    assert chunk == Microbatch("prefill", (1,), Chunk(0, 50, False))
    state, actions = advance(state, returned(decode))
    assert actions == (Microbatch("decode", (0,)),)
    state, actions = advance(state, returned(chunk))
    second = Microbatch("prefill", (1,), Chunk(50, 100, False))
    assert actions == (second,)
    state, actions = advance(state, Cancelled((1,)))
    assert actions == ()  # it is on its way
    state, actions = advance(state, returned(second))
    assert actions == (End((1,)), Admit(((2, 1),)), Microbatch("prefill", (2,)))
