"""Whether costs reach the steps that a run may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmpq.spec import Context, ModelSpec, Plan, Profile, schedule
from llmpq.spec.schedule_state import Arrived, Chunk, Limits, Microbatch, Prompt
from planner.simulation import Work, resources, work_of


def check_measured(
    plan: Plan,
    spec: ModelSpec,
    profile: Profile,
    prompt_lens: Sequence[int],
    output_len: int,
    names: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raise NotMeasuredError if a run of these prompts may have a step that the profile does not reach.

    Looks at the prompts that come first, the shortest and the longest of the others, by itself and with others that
    decode beside it, what is left of each that begins like one before, the largest that are computed anew if blocks may
    run out, and the ends of decode. `names` are as in `simulate`.
    """
    servers, seconds = resources(plan, spec, profile)
    limits = Limits.of(plan, spec)
    prompts = [Prompt(i, length) for i, length in enumerate(prompt_lens)]
    named = [replace(prompt, names=tuple(of)) for prompt, of in zip(prompts, names or [()] * len(prompts), strict=True)]
    others = sorted(prompts[plan.slots :], key=lambda prompt: prompt.tokens)  # they may come one by one as others end
    together = [prompts[: plan.slots], named[: plan.slots], others[:1], others[-1:]]
    lengths = sorted(min(length + output_len, plan.max_length) for length in prompt_lens)
    longest = lengths[-1]
    works = [work for arrived in together if arrived for work in _prefills(limits, arrived)]
    works += _tails(limits, named)
    if sum(map(limits.blocks_for, lengths[-plan.slots :])) > limits.blocks:
        works += _recomputed(limits, max(named, key=lambda prompt: len(prompt.names)), longest - 1)
    if output_len > 1:
        works += _beside(limits, others[-1:], [min(length + output_len, longest) for length in prompt_lens])
        works += [
            Work(Microbatch("decode", tuple(range(rows))), rows, Context.of(*[length] * rows))
            for rows in {1, min(plan.decode_microbatch, len(prompt_lens))}
            for length in (min(prompt_lens) + 1, longest)
        ]
    for work in {(work.tokens, len(work.microbatch.requests), work.context): work for work in works}.values():
        for resource in range(servers):
            seconds(resource, work)


def _prefills(limits: Limits, prompts: Sequence[Prompt]) -> list[Work]:
    """The steps of prompts that come together, when nothing else is there."""
    lens = {prompt.request: prompt.tokens for prompt in prompts}
    state, actions = schedule.advance(schedule.start(limits), Arrived(tuple(prompts)))
    planned = (*(action for action in actions if isinstance(action, Microbatch)), *state.planned)
    return [work_of(microbatch, lens, ()) for microbatch in planned]


def _beside(limits: Limits, late: Sequence[Prompt], lens: Sequence[int]) -> Iterator[Work]:
    """The first and the last chunk of a prompt that comes late, if any does, and as many as may decode beside it."""
    for prompt in late if limits.beside_tokens else ():
        tokens = min(prompt.tokens, limits.beside_tokens, limits.chunk_tokens)
        room = min(limits.step_sequences - 1, limits.step_tokens - tokens, limits.slots - 1)
        decoding = [i for i in range(len(lens)) if i != prompt.request][: max(0, room)]
        for end in {tokens, prompt.tokens}:
            chunk = Chunk(end - tokens, end, end == prompt.tokens)
            microbatch = Microbatch("prefill", (prompt.request, *decoding), chunk, beside=len(decoding))
            yield work_of(microbatch, dict(enumerate(lens)), ())


def _tails(limits: Limits, prompts: Sequence[Prompt]) -> Iterator[Work]:
    """What is left to compute of each prompt that begins like one before it."""
    seen: set[int] = set()
    for prompt in prompts if limits.shares_blocks else ():
        known = next((i for i, name in enumerate(prompt.names) if name not in seen), len(prompt.names))
        if known:
            yield _tail(limits, prompt, known)
        seen.update(prompt.names)


def _tail(limits: Limits, prompt: Prompt, blocks: int) -> Work:
    """What is left to compute of a prompt of which others have so many blocks; a token at least."""
    start = min(blocks, (prompt.tokens - 1) // limits.block_tokens) * limits.block_tokens
    microbatch = Microbatch("prefill", (prompt.request,), reused=(start,))
    return work_of(microbatch, {prompt.request: prompt.tokens}, ())


def _recomputed(limits: Limits, named: Prompt, tokens: int) -> list[Work]:
    """The largest steps of requests that come again with up to `tokens` tokens; `named` has most names of blocks."""
    together = limits.prefill_microbatch
    most = max(1, min(tokens, limits.step_tokens // together))
    works = [*_prefills(limits, [Prompt(0, tokens)]), *_prefills(limits, [Prompt(i, most) for i in range(together)])]
    if limits.shares_blocks and named.names:
        works.append(_tail(limits, replace(named, tokens=tokens), len(named.names)))
    return works
