"""The pure schedule: every sequence gets its tokens, in order, through pipelines of any depth, without a barrier."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llmpq.spec.schedule import Action, Admit, Microbatch, Returned, advance, start


class Pipeline:
    """A pipeline of `stages` queues that the test moves on one by one.

    Request i ends after lengths[i] tokens; a wave has `microbatches` prefill micro-batches.
    """

    def __init__(
        self, lengths: list[int], prefill_microbatch: int, decode_microbatch: int, stages: int, microbatches: int = 99
    ) -> None:
        self.lengths = lengths
        sequences = range(len(lengths))
        packed = [tuple(sequences[i : i + prefill_microbatch]) for i in sequences[::prefill_microbatch]]
        waves = [tuple(packed[i : i + microbatches]) for i in range(0, len(packed), microbatches)]
        self.queues = [deque[Microbatch]() for _ in range(stages + 1)]
        self.admitted: list[int] = []
        self.ended: set[int] = set()
        self.state, actions = start(waves, decode_microbatch)
        self.carry_out(actions)
        self.tokens: Counter[int] = Counter()

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Admit):
                assert self.ended == set(self.admitted)  # a wave has the whole cache
                self.admitted.extend(action.requests)
            else:
                assert set(action.requests) <= set(self.admitted)
                self.queues[0].append(action)

    def movable(self) -> list[int]:
        return [i for i, queue in enumerate(self.queues) if queue]

    def move(self, i: int) -> None:
        """Move the head of queue i on; from the last one, back to the first stage."""
        microbatch = self.queues[i].popleft()
        if i + 1 < len(self.queues):
            self.queues[i + 1].append(microbatch)
            return
        self.tokens.update(microbatch.requests)
        ended = frozenset(r for r in microbatch.requests if self.tokens[r] == self.lengths[r])
        self.ended |= ended
        first_tokens = all(self.tokens[r] for r in self.admitted)
        assert self.state.prefill_ends_with(microbatch) == (first_tokens and microbatch.phase == "prefill")
        self.state, actions = advance(self.state, Returned(microbatch, ended))
        self.carry_out(actions)


@given(st.data())
def test_every_sequence_gets_exactly_its_tokens_whatever_moves_first(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=9), "lengths")
    pipeline = Pipeline(
        lengths,
        prefill_microbatch=data.draw(st.integers(1, 10), "prefill"),
        decode_microbatch=data.draw(st.integers(1, 10), "decode"),
        stages=data.draw(st.integers(1, 4), "stages"),
        microbatches=data.draw(st.integers(1, 4), "microbatches of a wave"),
    )
    while not pipeline.state.done:
        movable = pipeline.movable()
        assert movable, "deadlock: work is left, but nothing is on its way"
        pipeline.move(data.draw(st.sampled_from(movable)))
    assert not pipeline.movable()
    assert pipeline.tokens == Counter(dict(enumerate(lengths)))
    assert pipeline.admitted == [*range(len(lengths))]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 10), st.integers(1, 10), st.randoms())
def test_a_sequence_is_never_in_two_microbatches_at_once(
    lengths: list[int], prefill: int, decode: int, random: object
) -> None:
    pipeline = Pipeline(lengths, prefill, decode, 3)
    while not pipeline.state.done:
        on_their_way = Counter(s for queue in pipeline.queues for microbatch in queue for s in microbatch.requests)
        assert set(on_their_way.values()) == {1}
        pipeline.move(random.choice(pipeline.movable()))  # type: ignore[attr-defined]


def test_decode_starts_while_others_are_in_prefill() -> None:
    state, (_, *prefill) = start(
        [
            (
                (0, 1),
                (2, 3),
            )
        ],
        decode_microbatch=2,
    )
    assert prefill == [Microbatch("prefill", (0, 1)), Microbatch("prefill", (2, 3))]
    state, actions = advance(state, Returned(prefill[0], frozenset()))
    assert actions == (Microbatch("decode", (0, 1)),)
    assert state.in_prefill == {2, 3}


def test_a_decode_group_waits_for_all_its_first_tokens() -> None:
    state, (_, *prefill) = start(
        [
            (
                (0,),
                (1,),
                (2,),
            )
        ],
        decode_microbatch=2,
    )
    state, actions = advance(state, Returned(prefill[0], frozenset()))
    assert actions == ()
    state, actions = advance(state, Returned(prefill[1], frozenset()))
    assert actions == (Microbatch("decode", (0, 1)),)


def test_a_sequence_that_ends_leaves_its_group_and_the_last_one_ends_it() -> None:
    state, (_, *prefill) = start([((0, 1, 2),)], decode_microbatch=3)
    state, actions = advance(state, Returned(prefill[0], frozenset({1})))
    assert actions == (Microbatch("decode", (0, 2)),)
    state, actions = advance(state, Returned(actions[-1], frozenset({0})))
    assert actions == (Microbatch("decode", (2,)),)
    state, actions = advance(state, Returned(actions[-1], frozenset({2})))
    assert actions == ()
    assert state.done


def test_a_group_whose_sequences_all_end_with_their_first_token_never_decodes() -> None:
    state, (_, *prefill) = start(
        [
            (
                (0,),
                (1,),
            )
        ],
        decode_microbatch=2,
    )
    state, actions = advance(state, Returned(prefill[0], frozenset({0})))
    assert actions == ()
    state, actions = advance(state, Returned(prefill[1], frozenset({1})))
    assert actions == ()
    assert state.done


def test_a_wave_is_admitted_when_the_one_before_has_ended() -> None:
    state, actions = start([((0,), (1,)), ((2,),)], decode_microbatch=2)
    first, second = Microbatch("prefill", (0,)), Microbatch("prefill", (1,))
    assert actions == (Admit((0, 1)), first, second)
    state, actions = advance(state, Returned(first, frozenset({0})))
    assert actions == () and not state.done
    state, actions = advance(state, Returned(second, frozenset({1})))
    assert actions == (Admit((2,)), Microbatch("prefill", (2,)))
    assert state.in_prefill == {2}
