"""When the step after one is started before that one's tokens are on the host: a pure rule.

A decode step needs of the one before it nothing but tokens, which are on the device already. What has to be known on
the host is who goes on. That is foreseen where it can be: all that may still end a sequence is then a token that no one
knows yet, and its place in the step after is computed in vain. What comes of that place is dropped, and as the device
keeps the order of steps, whoever gets the slot next writes over what it left there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmpq.spec.schedule_state import Microbatch


@dataclass(frozen=True, slots=True)
class Awaited:
    """A sequence of a step whose tokens the device chooses, and which have not been read."""

    left: int  # tokens that it may still get, this step's included
    ended: bool = False  # by a token that was read: what this step brings it is dropped
    cancelled: bool = False


def is_foreseen(microbatch: Microbatch, sequences: Iterable[Awaited]) -> bool:
    """Whether it is known who goes on after a step: all that had not ended before, as far as tokens do not end them.

    Of prefill it is not asked: what follows takes long anyway, and its time is told apart from that of decode.
    """
    if microbatch.phase != "decode":
        return False
    return all(each.ended or (each.left > 1 and not each.cancelled) for each in sequences)
