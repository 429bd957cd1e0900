"""What the steps of a batch are like, for the lengths that occur.

Consecutive sequences make a micro-batch. If all are alike, all steps of a phase are, too. If not, the closed form
(objective.py) is given means, so that the work of a resource comes out right if its seconds grow in proportion to
tokens, sequences and keys:

    prefill     tokens      of a micro-batch, on average
                context     keys per query: sum L (L + 1) / 2 over sum L of the prompts' lengths L
                longest     tokens of the largest micro-batch of a batch, over those of a mean one: while that one goes
                            from stage to stage, the others wait
    decode      rounds      how many there are in which so many micro-batches have a sequence left
                rows        sequences that are left in such a micro-batch, on average
                context     keys of these sequences, on average

What remains is that micro-batches of a round differ in sequences and keys. simulation.py simulates what really happens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llmpq.spec import Workload
from planner.objective import Rounds


@dataclass(frozen=True)
class Steps:
    """The steps of one phase for one batch, in micro-batches of `size` sequences; means, where lengths are mixed."""

    size: int
    count: int  # micro-batches of a batch
    rows: float  # sequences in a step
    tokens: float  # in a step
    context: float  # keys per query
    largest: int  # tokens in the largest step, which memory must hold
    longest: float  # tokens in the largest step of a batch, over those in a mean one
    rounds: Rounds  # of decode


def prefill_steps(workload: Workload, size: int) -> Steps:
    batches = [[prompt for prompt, _ in batch] for batch in workload.batches]
    prompts = [prompt for batch in batches for prompt in batch]
    total = sum(prompts)
    tokens = size * total / len(prompts)
    largest = sum(max(sum(batch[i : i + size]) for i in range(0, len(batch), size)) for batch in batches)
    return Steps(
        size=size,
        count=-(-workload.batch_size // size),
        rows=size,
        tokens=tokens,
        context=sum(prompt * (prompt + 1) / 2 for prompt in prompts) / total,
        largest=workload.prefill_tokens(size),
        longest=largest / len(batches) / tokens,
        rounds=(),
    )


def decode_steps(workload: Workload, size: int) -> Steps:
    batches, count = workload.batches, -(-workload.batch_size // size)
    steps = keys = places = 0.0  # of sequences that are left; of those and of the ones that ended beside them
    rounds: Counter[int] = Counter()
    for batch in batches:
        groups = [batch[i : i + size] for i in range(0, len(batch), size)]
        last = sorted(max(output for _, output in group) - 1 for group in groups)
        for i, (before, end) in enumerate(zip([0, *last], last)):
            rounds[count - i] += end - before
        places += sum((max(output for _, output in group) - 1) * len(group) for group in groups)
        steps += sum(output - 1 for _, output in batch)
        keys += sum((output - 1) * (prompt + output / 2) for prompt, output in batch)
    return Steps(
        size=size,
        count=count,
        rows=size * steps / places if steps else size,
        tokens=size * steps / places if steps else size,
        context=keys / steps if steps else workload.prompt_len + workload.output_len / 2,
        largest=size,
        longest=1.0,
        rounds=tuple((number / len(batches), left) for left, number in rounds.items() if number) or ((0, count),),
    )


def largest_step(prefill: Steps, decode: Steps) -> tuple[int, int]:
    """Tokens and sequences of the largest step of either phase."""
    return max(prefill.largest, decode.largest), max(prefill.size, decode.size)
