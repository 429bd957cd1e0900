"""How the next token is chosen from its logits.

One row of logits and one random number decide. The number depends on the request's seed and the position only, and rows
are worked on one by one, so a request's tokens depend neither on the others of its batch nor on the plan.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmpq.spec import Record, UsageError
from llmpq.spec.record import check

SEEDS = 2**63  # a seed is below


@dataclass(frozen=True, slots=True)
class SamplingParams(Record):
    """How a prompt is continued. The default is greedy: the likeliest token each time."""

    max_tokens: int = 64
    temperature: float = 0.0  # 0: greedy, the next three are then without effect
    top_k: int = 0  # choose among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # choose among the fewest likeliest tokens that together have this probability
    seed: int | None = None  # None: another one each time
    ignore_eos: bool = False  # go on to max_tokens, for measurements

    def validate(self) -> None:
        check(self.max_tokens > 0, "max_tokens", f"is {self.max_tokens}, expected a positive number")
        check(0 <= self.temperature < float("inf"), "temperature", f"is {self.temperature}, expected at least 0")
        check(self.top_k >= 0, "top_k", f"is {self.top_k}, expected at least 0")
        check(0 < self.top_p <= 1, "top_p", f"is {self.top_p}, expected more than 0 and at most 1")
        check(self.seed is None or 0 <= self.seed < SEEDS, "seed", f"is {self.seed}, expected 0 to 2^63 - 1")


def spread(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """The same parameters for `count` requests, of which request i (from 0) has the seed `sampling.seed` + i.

    So equal prompts differ. Where there is no seed, one is drawn.
    """
    first = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed
    return [replace(sampling, seed=(first + i) % SEEDS) for i in range(count)]


def each_sampling(sampling: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """The sampling parameters of `count` requests, given those of all, which are `spread`, or each with its own.

    Those that sample have a seed, if need be a drawn one; greedy ones have none. Raises UsageError if there are
    parameters for another number of requests.
    """
    if isinstance(sampling, SamplingParams):
        sampling = spread(sampling, count)
    elif len(sampling) != count:
        raise UsageError(f"there are {count} prompts, but sampling parameters for {len(sampling)}")

    def seed(params: SamplingParams) -> int | None:
        if params.temperature == 0:
            return None
        return secrets.randbelow(SEEDS) if params.seed is None else params.seed

    return [replace(params, seed=seed(params)) for params in sampling]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that chooses the token at `position` of a request with this seed."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def next_tokens(
    likeliest: torch.Tensor, logits: torch.Tensor, sampling: Sequence[SamplingParams], positions: torch.Tensor
) -> torch.Tensor:
    """The next token of each sequence, int64 [s] on the CPU, given its likeliest one, its logits and its position.

    `likeliest` is int64 [s], logits are [s, vocab_size] of any floating dtype, both on one device; `positions` int32
    [s]. Of greedy sequences only the tokens are copied from the device, all at once.
    """
    tokens = likeliest.clone() if likeliest.device.type == "cpu" else likeliest.cpu()
    for row, params in enumerate(sampling):
        if params.temperature > 0:
            number = 0.0 if params.seed is None else uniform(params.seed, int(positions[row]))
            tokens[row] = sample(logits[row].cpu().float(), params, number)
    return tokens


def sample(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """The token that `number` in [0, 1) chooses by its probability, given logits [vocab_size] float32 on the CPU."""
    if params.temperature == 0:
        return int(logits.argmax())
    if params.top_k or params.top_p < 1:
        k = min(params.top_k or len(logits), len(logits))
        logits, tokens = logits.topk(k)  # sorted, the likeliest first
    else:
        tokens = None
    # In float64 temperatures near 0 stay finite: the largest logit becomes 0.
    logits = logits.double()
    cumulative = ((logits - logits.max()) / params.temperature).exp_().cumsum_(0)
    kept = len(cumulative)
    if tokens is not None:
        # A token is kept if those before it have not reached top_p.
        kept = int(torch.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1
        kept = min(kept, len(cumulative))
    chosen = int(torch.searchsorted(cumulative[:kept], number * cumulative[kept - 1], right=True))
    chosen = min(chosen, kept - 1)
    return chosen if tokens is None else int(tokens[chosen])
