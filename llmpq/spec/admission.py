"""Which prompts there is room for, and how many of them go into a step: what the schedule admits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from llmpq.spec.schedule_state import Chunk, Limits, Prompt, State, parts


@dataclass(slots=True)
class Room:
    """What is left for prompts: slots, and blocks that those who are there do not need for their next tokens."""

    limits: Limits
    slots: int
    blocks: int

    @classmethod
    def of(cls, state: State) -> Room:
        limits, lengths = state.limits, state.lengths
        if state.leaving is not None:  # others wait for its blocks
            return cls(limits, 0, 0)
        growing = sum(len(table) < limits.blocks_for(lengths[owner] + 1) for owner, table in state.pool.tables.items())
        return cls(limits, len(state.free), len(state.pool.free) - growing)

    def takes(self, prompt: Prompt) -> bool:
        """Whether there is room for the prompt, or it has its room already."""
        return prompt.start > 0 or (self.slots > 0 and self.limits.blocks_for(prompt.tokens + 1) <= self.blocks)

    def give(self, prompt: Prompt) -> None:
        """The prompt takes its room, unless it has it already."""
        if not prompt.start:
            self.slots -= 1
            self.blocks -= self.limits.blocks_for(prompt.tokens + 1)


def first_chunk(waiting: deque[Prompt], room: Room) -> tuple[tuple[Prompt, ...], Chunk | None] | None:
    """The first prompt and its next chunk, if it is too long for a step. Its chunks are as long as one another."""
    limits = room.limits
    prompt = waiting[0]
    if prompt.tokens <= limits.chunk_tokens:
        return None
    left = prompt.tokens - prompt.start
    end = prompt.start + parts(left, parts(left, limits.chunk_tokens))
    last = end == prompt.tokens
    waiting.popleft()
    room.give(prompt)
    if not last:
        waiting.appendleft(replace(prompt, start=end))
    return (prompt,), Chunk(prompt.start, end, last)


def first_prompts(waiting: deque[Prompt], room: Room) -> tuple[tuple[Prompt, ...], Chunk | None]:
    """The first prompts, as many as fit in a step together."""
    limits = room.limits
    chosen: list[Prompt] = []
    left = limits.step_tokens
    while waiting and len(chosen) < limits.prefill_microbatch and room.takes(waiting[0]):
        left -= waiting[0].tokens
        if left < 0 or waiting[0].tokens > limits.chunk_tokens:
            break
        chosen.append(waiting.popleft())
        room.give(chosen[-1])
    return tuple(chosen), None
