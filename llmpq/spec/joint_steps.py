"""Steps in which some requests decode beside prompts: which prompts have room for that, and for how many."""

from __future__ import annotations

from dataclasses import replace

from llmpq.spec.schedule_state import Microbatch, State


def with_room(state: State, size: int) -> Microbatch | None:
    """The first planned prompts that leave room in a step for `size` of the ready requests, or for all of these.

    Some of these must have been admitted earlier: requests that come together go from one phase to the other together.
    """
    for microbatch in state.planned:
        if microbatch.phase == "prefill" and not microbatch.beside:
            going = state.ready[: min(size, places(state, microbatch))]
            admission, tokens = state.new[microbatch.requests[0]], _tokens(state, microbatch)
            fits = tokens <= state.limits.beside_tokens and tokens + len(going) <= state.limits.step_tokens
            if fits and any(state.new.get(request, -1) < admission for request in going):
                return microbatch
    return None


def places(state: State, microbatch: Microbatch) -> int:
    """How many may decode beside prompts: with them, they are no more than the largest step has."""
    return max(0, state.limits.step_sequences - len(microbatch.prompts))


def planned_with(state: State, decoding: tuple[int, ...], prompts: Microbatch | None) -> tuple[Microbatch, ...]:
    """What is planned, with these requests that decode: beside the prompts, if these are still planned."""
    if prompts is None or prompts not in state.planned:  # those who decode may have taken the prompts' blocks
        return (*state.planned, Microbatch("decode", decoding))
    at = state.planned.index(prompts)
    both = replace(prompts, requests=prompts.requests + decoding, beside=len(decoding))
    return (*state.planned[:at], both, *state.planned[at + 1 :])


def _tokens(state: State, microbatch: Microbatch) -> int:
    """How many tokens of its prompts are computed."""
    if microbatch.chunk is not None:
        return microbatch.chunk.end - microbatch.chunk.start
    return sum(state.lengths[request] for request in microbatch.prompts) - sum(microbatch.reused)
