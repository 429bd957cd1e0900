"""What the first stage sends through the pipeline, and when: a pure state machine, without processes or tensors.

Prefill micro-batches go first. A decode micro-batch is a fixed group of sequences; it starts as soon as all of them
have their first token, while others are still in prefill: there is no barrier between the phases. A sequence that ends
leaves its group; a group that is empty is done.

The pipeline keeps the order of what it is sent, so micro-batches come back in the order they were started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Sequences that go through the pipeline in one step. As an action: start it."""

    phase: Literal["prefill", "decode"]
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """Event: the tokens of a micro-batch are back at the first stage, and these of its sequences have ended."""

    microbatch: Microbatch
    ended: frozenset[int]


@dataclass(frozen=True, slots=True)
class State:
    """What there is still to do."""

    groups: tuple[tuple[int, ...], ...]  # decode micro-batches: of each, the sequences that have not ended
    in_prefill: frozenset[int]  # sequences without a first token

    @property
    def done(self) -> bool:
        return not any(self.groups)


def start(prefill: Sequence[tuple[int, ...]], decode_microbatch: int) -> tuple[State, tuple[Microbatch, ...]]:
    """The first state and actions for prefill micro-batches as given and decode groups of `decode_microbatch`."""
    sequences = [sequence for microbatch in prefill for sequence in microbatch]
    groups = [tuple(sequences[i : i + decode_microbatch]) for i in range(0, len(sequences), decode_microbatch)]
    return State(tuple(groups), frozenset(sequences)), tuple(Microbatch("prefill", s) for s in prefill)


def advance(state: State, event: Returned) -> tuple[State, tuple[Microbatch, ...]]:
    """The state after an event, and the micro-batches to start because of it, in order."""
    back = frozenset(event.microbatch.sequences)
    in_prefill = state.in_prefill - back
    groups = tuple(tuple(s for s in group if s not in event.ended) for group in state.groups)
    ready = [
        Microbatch("decode", after)
        for before, after in zip(state.groups, groups, strict=True)
        if after and not back.isdisjoint(before) and in_prefill.isdisjoint(after)
    ]
    return State(groups, in_prefill), tuple(ready)
