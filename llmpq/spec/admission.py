"""Which prompts there is room for, and how many of them go into a step: what the schedule admits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from llmpq.spec.block_pool import BlockPool
from llmpq.spec.schedule_state import Chunk, Limits, Microbatch, Prompt, State, parts


@dataclass(slots=True)
class Room:
    """Slots, and blocks of which some are left for the next tokens of those that have slots; and who takes them."""

    limits: Limits
    slots: deque[int]
    pool: BlockPool
    growing: int  # blocks that are left for next tokens
    step_tokens: int
    chunk_tokens: int
    taken: dict[int, int] = field(default_factory=dict)  # the slot of each prompt

    @classmethod
    def of(cls, state: State) -> Room:
        slots = state.free if state.leaving is None else ()  # others wait for the blocks of who is leaving
        limits = state.limits
        sizes = limits.step_tokens, limits.chunk_tokens
        few = len(state.waiting) < limits.stages  # whole prompts would leave stages idle
        if limits.beside_tokens and (state.decoding or few):
            sizes = min(limits.step_tokens, limits.beside_tokens), min(limits.chunk_tokens, limits.beside_tokens)
        return cls(limits, deque(slots), state.pool, state.growing, *sizes)

    def takes(self, prompt: Prompt) -> bool:
        """Whether there is room for the prompt, or it has its room already."""
        if prompt.start:
            return True
        in_use = sum(block in self.pool.users for block in self._known(prompt))
        needed = self.limits.blocks_for(prompt.tokens + 1) - in_use
        return bool(self.slots) and needed + self.growing <= self.pool.available

    def give(self, prompt: Prompt) -> int:
        """The prompt takes its room, unless it has it already. How many of its tokens others compute, or have."""
        if prompt.start:
            return 0
        self.taken[prompt.request] = slot = self.slots.popleft()
        known, needed = self._known(prompt), self.limits.blocks_for(prompt.tokens)
        start = slot * self.limits.blocks // self.limits.slots
        pool = self.pool.beginning(prompt.request, known).with_more(prompt.request, needed - len(known), start)
        self.pool = pool.naming(prompt.request, prompt.names) if self.limits.shares_blocks else pool
        self.growing += self.limits.blocks_for(prompt.tokens + 1) - needed
        return len(known) * self.limits.block_tokens

    def reused(self, prompt: Prompt) -> int:
        """Tokens of the prompt that others compute, or have."""
        return len(self._known(prompt)) * self.limits.block_tokens

    def _known(self, prompt: Prompt) -> tuple[int, ...]:
        """The blocks with which it begins that others have; one token is left to compute at least."""
        if not self.limits.shares_blocks:
            return ()
        return self.pool.known(prompt.names[: (prompt.tokens - 1) // self.limits.block_tokens])


def first_chunk(waiting: deque[Prompt], room: Room) -> Microbatch | None:
    """The next chunk of the first prompt, if that is too long for a step. Its chunks are as long as one another."""
    prompt = waiting[0]
    start = prompt.start or room.reused(prompt)
    left = prompt.tokens - start
    if not prompt.start and left <= room.chunk_tokens:
        return None
    waiting.popleft()
    reused = room.give(prompt)
    end = start + parts(left, parts(left, room.chunk_tokens))
    last = end == prompt.tokens
    if not last:
        waiting.appendleft(replace(prompt, start=end))
    return Microbatch("prefill", (prompt.request,), Chunk(start, end, last), (reused,) if reused else ())


def first_prompts(waiting: deque[Prompt], room: Room) -> Microbatch:
    """The first prompts, as many as fit in a step together."""
    chosen: list[int] = []
    reused: list[int] = []
    left = room.step_tokens
    while waiting and len(chosen) < room.limits.prefill_microbatch and room.takes(waiting[0]):
        tokens = waiting[0].tokens - room.reused(waiting[0])
        left -= tokens
        if left < 0 or tokens > room.chunk_tokens:
            break
        reused.append(room.give(waiting[0]))
        chosen.append(waiting.popleft().request)
    return Microbatch("prefill", tuple(chosen), None, tuple(reused) if any(reused) else ())
