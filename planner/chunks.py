"""How many tokens of prompts are computed in a step beside others that decode: judged by a simulated queue.

A pipeline computes few prompts in such chunks as well, all stages at once.

A batch whose sequences come and end together has no such steps. A queue, whose requests come as others end, has them
all the time, and what is best there depends on how much longer steps take with more tokens, and on how unlike the steps
of a pipeline may be before its stages wait for each other. With small chunks a pipeline may answer 1.5 times as many
requests (SARATHI, arXiv 2308.16369, says why).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice

from llmpq.spec import NotMeasuredError, Plan, Prediction, Solved
from planner import memory
from planner.clock import Clock
from planner.problem import Problem
from planner.simulation import predict, simulate

LEAST = 16  # tokens, which take hardly longer than fewer
NEARLY = 0.99  # of the best throughput: then the smaller chunk is taken, since nobody waits long for a next token
_SLOTS, _REQUESTS, _OUTPUT = 3, 64, 64  # of the queue: requests for each slot, and at most; tokens of an answer at most
_SPREAD = 16  # lengths, from one of these parts to the whole, where none are known


def with_chunks(solved: Solved, problem: Problem, clock: Clock) -> Solved:
    """The plan with the chunks that answer a queue of its workload soonest, or the smallest that nearly do.

    As far as time allows, and of those for which there is memory.
    """
    plan = solved.plan
    if plan.workload.output_len == 1 or plan.slots == len(plan.stages) == 1:
        return solved  # nobody decodes while others are in prefill, nor are there stages for a prompt's chunks
    prompt_lens, output_lens = zip(*_queue(plan), strict=True)
    rates: dict[Plan, float] = {}
    for chunked in (replace(plan, chunk_tokens=tokens) for tokens in chunk_sizes(plan)):
        if clock.over:
            break
        with suppress(NotMeasuredError):
            if fits(chunked, problem):
                found = simulate(chunked, problem.spec, problem.profile, prompt_lens, output_lens)
                rates[chunked] = found.prediction.tokens_per_s
    if not rates:
        return solved
    enough = max(rates.values()) * (NEARLY if plan.slots > 1 else 1)
    good = [chunked for chunked, rate in rates.items() if rate >= enough]
    best = min(good, key=lambda chunked: chunked.chunk_tokens or plan.max_length + 1)
    return replace(solved, plan=best, prediction=_prediction(best, solved.prediction, problem))


def _prediction(plan: Plan, closed_form: Prediction, problem: Problem) -> Prediction:
    """Of a batch. The closed form has no chunks; a batch of as many prompts as stages, or more, needs none."""
    if plan.workload.batch_size < len(plan.stages):
        return batch_prediction(plan, problem)
    return replace(closed_form, memory_bytes=memory.stage_bytes(plan, problem.spec, problem.profile))


def batch_prediction(plan: Plan, problem: Problem) -> Prediction:
    """Of the workload's first batch, by simulation."""
    prompts, outputs = zip(*plan.workload.batches[0], strict=True)
    return predict(plan, problem.spec, problem.profile, prompts, outputs)


def fits(plan: Plan, problem: Problem) -> bool:
    """Whether its stages have the memory that they need."""
    room = [problem.constraints.room(problem.cluster.device(stage.device)) for stage in plan.stages]
    needed = memory.stage_bytes(plan, problem.spec, problem.profile)
    return all(size <= most for size, most in zip(needed, room, strict=True))


def chunk_sizes(plan: Plan) -> list[int]:
    """Values of `chunk_tokens`: none, whole prompts, and powers of two below."""
    powers = [1 << i for i in range(LEAST.bit_length() - 1, plan.max_length.bit_length())]
    return [0, plan.max_length, *(tokens for tokens in reversed(powers) if tokens < plan.max_length)]


def near_chunks(plan: Plan) -> list[int]:
    """Those that differ least from the plan's."""
    sizes = chunk_sizes(plan)
    at = sizes.index(plan.chunk_tokens) if plan.chunk_tokens in sizes else 0
    return [sizes[i] for i in (at + 1, at - 1) if 0 <= i < len(sizes)]


def _queue(plan: Plan) -> list[tuple[int, int]]:
    """Lengths of its requests: those of the workload, or where one is given for all, up to that."""
    work = plan.workload
    if work.prompt_lens:
        lengths = list(zip(work.prompt_lens, work.output_lens, strict=True))
    else:
        parts = [(i % _SPREAD + 1, 5 * i % _SPREAD + 1) for i in range(_SPREAD)]
        lengths = [(-(-work.prompt_len * a // _SPREAD), -(-work.output_len * b // _SPREAD)) for a, b in parts]
    count = min(_SLOTS * plan.slots, max(_REQUESTS, plan.slots + plan.slots // 2))
    return [(prompt, min(output, _OUTPUT)) for prompt, output in islice(cycle(lengths), count)]
