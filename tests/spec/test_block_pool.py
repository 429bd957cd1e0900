"""Blocks of the KV cache: what is known of them, and what becomes of it when others need the room."""

from __future__ import annotations

from llmpq.spec.block_pool import BlockPool


def idle_pool(count: int) -> BlockPool:
    """All blocks are idle; block i has the name 1000 + i, and the last of them has been idle longest."""
    return BlockPool.of(count).with_more(0, count).naming(0, range(1000, 1000 + count)).without((0,))


def test_of_many_idle_blocks_some_lose_their_names_together() -> None:
    """What is known of thousands is not copied for each block that is taken."""
    pool = idle_pool(512).with_more(1, 1)
    assert len(pool.free) == 3 and len(pool.idle) == len(pool.named) == len(pool.names) == 508
    more = pool.with_more(1, 3)
    assert more.names is pool.names and more.named is pool.named
    assert sorted((*pool.free, *pool.tables[1])) == [508, 509, 510, 511]  # the end of a prompt is known no more
    assert pool.known(range(1000, 1512)) == tuple(range(508))


def test_of_few_idle_blocks_no_more_lose_their_names_than_are_taken() -> None:
    pool = idle_pool(16).with_more(1, 3)
    assert pool.free == () and pool.known(range(1000, 1016)) == tuple(range(13))
    assert pool.named == {1000 + block: block for block in range(13)}
    assert pool.names == {block: name for name, block in pool.named.items()}


def test_who_begins_with_idle_blocks_wakes_these_alone() -> None:
    pool = idle_pool(4)
    first = pool.beginning(1, (0, 2))
    assert first.idle == (3, 1) and first.users == {0: 1, 2: 1}
    second = first.beginning(2, (0,))
    assert second.idle is first.idle and second.users == {0: 2, 2: 1}


def test_what_others_computed_is_known_after_one_that_did_not_finish() -> None:
    pool = idle_pool(3).beginning(1, (0, 1)).with_more(1, 1).naming(1, (1000, 1001, 7))
    assert pool.without((1,), {1}).known((1000, 1001, 7)) == (0, 1)
    assert pool.without((1,)).known((1000, 1001, 7)) == (0, 1, 2)
    unfinished = BlockPool.of(3).with_more(1, 3).naming(1, (1000, 1001, 7)).without((1,), {1})
    assert unfinished.free == (0, 1, 2) and not unfinished.named
