"""The steps of a batch, for the lengths of its sequences.

Consecutive sequences make a micro-batch. If all sequences are equal, so are all steps of a phase. If not, the closed
form (objective.py) takes means. The work of a resource is then exact if its seconds grow in proportion to tokens,
sequences and keys:

    prefill     tokens      of a micro-batch, on average
                context     of all queries of all prompts
                longest     tokens of the largest micro-batch of a batch, over those of a mean one: while the largest
                            passes through the stages, the others wait
    decode      rounds      (count, micro-batches): in `count` rounds that many micro-batches have a sequence left
                rows        sequences left in such a micro-batch, on average
                context     of these sequences, over all rounds

The means ignore that the micro-batches of one round differ in sequences and keys, and that what is left of a batch is
divided anew as sequences end; simulation.py does not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llmpq.spec import Context, Workload
from planner.objective import Rounds


@dataclass(frozen=True)
class Steps:
    """The steps of one phase for one batch, in micro-batches of `size` sequences; means, where lengths are mixed."""

    size: int
    count: int  # micro-batches of a batch
    rows: float  # sequences in a step
    tokens: float  # in a step
    context: Context
    largest: int  # tokens in the largest step, which memory must hold
    longest: float  # tokens in the largest step of a batch, over those in a mean one
    rounds: Rounds  # of decode


def prefill_steps(workload: Workload, size: int) -> Steps:
    if not workload.prompt_lens:
        return Steps(
            size=size,
            count=-(-workload.batch_size // size),
            rows=size,
            tokens=size * workload.prompt_len,
            context=Context.of_prompts(workload.prompt_len),
            largest=workload.largest_prefill(size),
            longest=1.0,
            rounds=(),
        )
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
        context=Context.of_prompts(*prompts),
        largest=workload.largest_prefill(size),
        longest=largest / len(batches) / tokens,
        rounds=(),
    )


def decode_steps(workload: Workload, size: int) -> Steps:
    count = -(-workload.batch_size // size)
    if not workload.prompt_lens:
        keys = workload.prompt_len + 1, workload.prompt_len + workload.output_len - 1
        return Steps(
            size=size,
            count=count,
            rows=size,
            tokens=size,
            context=Context((keys,)) if workload.output_len > 1 else Context.of(workload.prompt_len + 0.5),
            largest=size,
            longest=1.0,
            rounds=((workload.output_len - 1, count),),
        )
    batches = workload.batches
    steps = places = 0.0  # of sequences that are left; of those and of the ones that ended beside them
    spans: list[tuple[float, float]] = []
    rounds: Counter[int] = Counter()
    for batch in batches:
        groups = [batch[i : i + size] for i in range(0, len(batch), size)]
        last = sorted(max(output for _, output in group) - 1 for group in groups)
        for i, (before, end) in enumerate(zip([0, *last], last)):
            rounds[count - i] += end - before
        places += sum((max(output for _, output in group) - 1) * len(group) for group in groups)
        steps += sum(output - 1 for _, output in batch)
        spans += [(prompt + 1, prompt + output - 1) for prompt, output in batch if output > 1]
    return Steps(
        size=size,
        count=count,
        rows=size * steps / places if steps else size,
        tokens=size * steps / places if steps else size,
        context=Context(tuple(spans)) if spans else Context.of(workload.prompt_len + workload.output_len / 2),
        largest=size,
        longest=1.0,
        rounds=tuple((number / len(batches), left) for left, number in rounds.items() if number) or ((0, count),),
    )


def largest_step(prefill: Steps, decode: Steps) -> tuple[int, int]:
    """Tokens and sequences of the largest step of either phase."""
    return max(prefill.largest, decode.largest), max(prefill.size, decode.size)


def microbatch_sizes(batch_size: int, max_stages: int) -> list[int]:
    """Divisors of the batch, powers of two and one micro-batch a stage; the smallest size for each count of them."""
    sizes = {size for size in range(1, batch_size + 1) if batch_size % size == 0}
    sizes |= {2**i for i in range(batch_size.bit_length())}
    sizes |= {-(-batch_size // stages) for stages in range(1, max_stages + 1)}
    counts = {-(-batch_size // size) for size in sizes}
    return sorted(-(-batch_size // count) for count in counts)
