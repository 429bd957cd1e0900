"""The pure schedule: every request gets its tokens, in order, in pipelines of any depth, whatever comes between."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec.schedule import advance, start
from llmpq.spec.schedule_state import Admit, Arrived, Cancelled, Chunk, End, Limits, Microbatch, Prompt
from tests.support.queued_pipeline import GROWING, LENGTHS, QueuedPipeline, returned, run_in_any_order, some_limits


def limits(stages: int = 2, slots: int = 8, prefill: int = 2, decode: int = 4) -> Limits:
    return Limits(stages, slots, prefill, decode, 100, chunk_tokens=50, blocks=4 * slots, beside_tokens=100)


@given(some_limits(), LENGTHS, st.data())
def test_every_request_gets_exactly_its_tokens_whatever_comes_between(
    given: Limits, lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    assert not run_in_any_order(given, lengths, data).preempted


@given(some_limits(few_blocks=True), GROWING, st.randoms(use_true_random=False))
def test_what_is_started_does_not_depend_on_how_long_anything_takes(
    given: Limits, lengths: list[tuple[int, int]], random: object
) -> None:
    """The simulation and the runtime have the same steps for requests that are there from the start."""
    pipelines = [QueuedPipeline(given, lengths) for _ in range(2)]
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
    pipeline = QueuedPipeline(given, [(prompt, output)] * given.slots)
    pipeline.arrive(range(given.slots))
    pipeline.drain()
    decode = [microbatch.requests for microbatch in pipeline.started if microbatch.phase == "decode"]
    count = -(-given.slots // given.decode_microbatch)
    assert len(decode) == count * (output - 1)
    size = -(-given.slots // count)
    if decode:
        assert {len(requests) for requests in decode} <= {size, given.slots - (count - 1) * size}
        assert decode[:count] == [tuple(range(given.slots))[i * size : (i + 1) * size] for i in range(count)]


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
    assert actions == (End((1,)), Admit(((4, 1),)), Microbatch("prefill", (4, 0, 2, 3), beside=3))
    state, actions = advance(state, returned(actions[2]))
    assert actions == (Microbatch("decode", (4, 0, 2, 3)),)


def test_few_requests_decode_in_as_many_micro_batches_as_there_are_stages() -> None:
    counts = [limits(stages=2, slots=12, decode=3).decode_microbatches(n) for n in range(13)]
    assert counts == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [limits(stages=4, slots=12, decode=6).decode_microbatches(n) for n in (1, 5, 12)] == [1, 2, 2]


def test_prompts_that_find_the_pipeline_busy_are_computed_beside_those_who_decode() -> None:
    state, (_, first) = advance(start(limits(stages=1, prefill=1)), prompts(0))
    state, (decode,) = advance(state, returned(first))
    state, actions = advance(state, prompts(1, 2, 3))
    assert actions == (Admit(((1, 1),)),)  # its prompt would wait anyway
    state, actions = advance(state, returned(decode))
    assert actions == (Microbatch("prefill", (1, 0), beside=1),)
    state, actions = advance(state, returned(actions[0]))
    assert actions == (Admit(((2, 2),)), Microbatch("prefill", (2, 1, 0), beside=2))
    state, actions = advance(state, returned(actions[1], 0, 1))
    assert actions == (End((1, 0)), Admit(((3, 1),)), Microbatch("prefill", (3, 2), beside=1))


@pytest.mark.parametrize(
    ("changes", "separate"),
    [
        ({}, False),
        ({"step_tokens": 7}, False),
        ({"step_tokens": 6}, True),  # a prompt of 5 tokens and two others
        ({"decode_microbatch": 2}, True),  # and no more sequences than the largest step has
        ({"prefill_microbatch": 3, "decode_microbatch": 2}, False),
    ],
)
def test_a_step_of_both_is_no_larger_than_others(changes: dict[str, int], separate: bool) -> None:
    given = replace(limits(stages=1, slots=3, prefill=1, decode=3), **changes)
    state, (_, *steps) = advance(start(given), prompts(0, 1))
    while steps[0].phase == "prefill":
        state, steps = advance(state, returned(steps[0]))
    state, (_,) = advance(state, prompts(2))
    state, actions = advance(state, returned(steps[0]))
    both = (Microbatch("prefill", (2, 0, 1), beside=2),)
    first, second = Microbatch("prefill", (2,)), Microbatch("decode", (0, 1))
    one_beside = (Microbatch("prefill", (2, 0), beside=1), Microbatch("decode", (1,)))
    assert actions == (both if not separate else one_beside if "decode_microbatch" in changes else (first, second))


def test_who_comes_together_decodes_together() -> None:
    """Beside none of its own prompts that are still to start, so batches of equal lengths are as predicted."""
    state, (_, step) = advance(start(limits(stages=1, slots=4, prefill=1, decode=2)), prompts(0, 1, 2, 3))
    phases = []
    while len(phases) < 8:
        state, actions = advance(state, returned(step))
        phases += [(each.phase, each.beside) for each in actions if isinstance(each, Microbatch)]
        step = next(each for each in actions if isinstance(each, Microbatch))
    assert phases[:3] == [("prefill", 0)] * 3 and all(phase == ("decode", 0) for phase in phases[3:])


def test_a_cancelled_request_ends_at_once_unless_it_is_on_its_way() -> None:
    state, (_, prefill) = advance(start(limits(slots=2)), prompts(0, 1, 2, 3))
    state, actions = advance(state, Cancelled((0, 2, 9)))
    assert actions == (End((2,)),)  # never admitted
    state, actions = advance(state, returned(prefill))
    both = Microbatch("prefill", (3, 1), beside=1)
    assert actions == (End((0,)), Admit(((3, 0),)), both)
    state, actions = advance(state, Cancelled((0,)))
    assert actions == ()  # it has ended
    state, actions = advance(state, Cancelled((3,)))
    assert actions == () and not state.done
    state, actions = advance(state, returned(both, 1))
    assert actions == (End((3, 1)),) and state.done


@pytest.mark.parametrize(
    ("cancelled", "left"),
    [
        ((2, 3), Microbatch("decode", (0, 1))),
        ((0, 1), Microbatch("prefill", (2, 3))),
        ((2, 0), Microbatch("prefill", (3, 1), beside=1)),
    ],
)
def test_what_is_left_of_a_planned_step_of_both(cancelled: tuple[int, ...], left: Microbatch) -> None:
    """It waits for a step of prompts that was started before; three more are on their way."""
    state, (_, first) = advance(start(limits(stages=1, slots=8, prefill=2, decode=4)), prompts(0, 1))
    both = Microbatch("prefill", (2, 3, 0, 1), beside=2)
    state, _ = advance(state, returned(first))
    state, _ = advance(state, prompts(2, 3))
    planned = replace(state, planned=(both,), ready=(), decodes=1, prefills=2, in_prefill={2: 1, 3: 1}, started=1)
    state, actions = advance(planned, Cancelled(cancelled))
    assert {request for action in actions if isinstance(action, End) for request in action.requests} == set(cancelled)
    assert left in (*state.planned, *actions)


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
    state, actions = advance(state, Arrived((Prompt(1, 150), Prompt(2, 5))))
    assert actions == (Admit(((1, 1),)),)
    state, actions = advance(state, returned(decode))
    chunk = Microbatch("prefill", (1, 0), Chunk(0, 50, False), beside=1)
    assert actions == (chunk,)
    state, actions = advance(state, returned(chunk))
    second = Microbatch("prefill", (1, 0), Chunk(50, 100, False), beside=1)
    assert actions == (second,) and second.answered == (0,)
    state, actions = advance(state, Cancelled((1,)))
    assert actions == ()  # it is on its way
    state, actions = advance(state, returned(second))
    assert actions == (End((1,)), Admit(((2, 1),)), Microbatch("prefill", (2, 0), beside=1))


def test_while_others_decode_chunks_may_be_shorter() -> None:
    """A prompt that is alone is computed at once, and so is what is left of one as soon as it is alone."""
    given = replace(limits(stages=1, slots=2), beside_tokens=30)
    state, (_, first) = advance(start(given), Arrived((Prompt(0, 50),)))
    assert first == Microbatch("prefill", (0,))
    state, (decode,) = advance(state, returned(first))
    state, _ = advance(state, Arrived((Prompt(1, 80),)))
    state, (step,) = advance(state, returned(decode))
    assert step == Microbatch("prefill", (1, 0), Chunk(0, 27, False), beside=1)
    state, (step,) = advance(state, returned(step))
    assert step == Microbatch("prefill", (1, 0), Chunk(27, 54, False), beside=1)
    state, (_, step) = advance(state, returned(step, 0))
    assert step == Microbatch("prefill", (1,), Chunk(54, 80, True))
