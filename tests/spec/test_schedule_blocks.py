"""The schedule where requests take blocks of the KV cache as they grow, run out of them, or share them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec.schedule import advance, start
from llmpq.spec.schedule_state import Admit, Arrived, Cancelled, End, Limits, Microbatch, Prompt
from tests.support.queued_pipeline import GROWING, LENGTHS, QueuedPipeline, returned, run_in_any_order, some_limits


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


def test_what_is_reused_takes_no_room_in_a_step() -> None:
    sharing = Limits(1, 8, 8, 8, step_tokens=10, chunk_tokens=10, blocks=80, block_tokens=2, shares_blocks=True)
    _, (_, step) = advance(start(sharing), Arrived(tuple(Prompt(i, 5, names=(8, 9)) for i in range(7))))
    assert step == Microbatch("prefill", tuple(range(6)), reused=(0, 4, 4, 4, 4, 4))  # 5 tokens, and 5 times one


def test_of_a_prompt_in_chunks_what_others_have_is_not_computed() -> None:
    """Two tokens a block, of which a chunk has two while another decodes."""
    sharing = Limits(1, 3, 3, 3, 100, 100, blocks=80, block_tokens=2, shares_blocks=True, beside_tokens=4)
    state, (_, step) = advance(start(sharing), Arrived((Prompt(0, 5, names=(8, 9)),)))
    state, (step,) = advance(state, returned(step))
    state, _ = advance(
        state, Arrived((Prompt(1, 15, names=(8, 9, 10, 11, 12, 13, 14)), Prompt(2, 7, names=(8, 9, 10))))
    )
    chunks = []
    for _ in range(3):
        state, actions = advance(state, returned(step))
        chunks.append(step := actions[-1])
    assert [(chunk.chunk.start, chunk.chunk.end, chunk.reused) for chunk in chunks] == [
        (4, 8, (4,)),
        (8, 12, ()),
        (12, 15, ()),
    ]
    state, actions = advance(state, returned(step))
    assert actions[-1] == Microbatch("prefill", (2, 1, 0), reused=(6,), beside=2)


def test_who_decodes_is_not_lost_where_the_prompts_to_be_beside_lose_their_blocks() -> None:
    """A long prompt, ten short ones, and too few blocks for the ends of all."""
    given = Limits(1, 16, 1, 16, step_tokens=1000, chunk_tokens=1000, blocks=11, beside_tokens=1000)
    pipeline = QueuedPipeline(given, [(60, 20), *[(10, 60)] * 10])
    pipeline.arrive([0])
    pipeline.arrive([*range(1, 11)])
    pipeline.drain()
    assert sorted(pipeline.ended) == [*range(11)] and pipeline.preempted and pipeline.beside


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
