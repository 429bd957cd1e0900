"""How the next token is chosen from its logits.

One row of logits, the request's own tokens and one random number decide. The number depends on the request's seed and
the position only, and rows are worked on one by one, so a request's tokens depend neither on the others of its batch
nor on the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmpq import kernels
from llmpq.runtime.answer_grammar import GrammarHost
from llmpq.runtime.grammar import ENDINGS, Ending
from llmpq.runtime.logits_rules import LogitsRules, weights
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import Record
from llmpq.spec.ranges import Index


@dataclass(frozen=True, slots=True)
class Admitted(Record):
    """A request that takes a slot, as the last stage is told of it; again, if it had to give one back."""

    slot: Index
    sampling: SamplingParams
    prompt: tuple[int, ...] = ()  # only if the parameters read it
    generated: tuple[int, ...] = ()  # its answer so far, likewise

    @classmethod
    def of(cls, slot: int, sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int] = ()) -> Admitted:
        """What has to be told of it."""
        read = tuple(prompt) if sampling.reads_prompt else ()
        return cls(slot, sampling, read, tuple(generated) if sampling.has_rules else ())


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(
        self, admitted: Admitted, eos_token_ids: Sequence[int] = (), grammars: GrammarHost | None = None
    ) -> None:
        """`grammars`: those of the vocabulary, once it has been told. Raises ValueError if one is needed before."""
        params = admitted.sampling
        self.params, self.prompt = params, admitted.prompt
        self._rules = None
        if params.has_rules:
            grammar = None
            if params.grammar is not None:
                if grammars is None:
                    raise ValueError(
                        f"{params.grammar} takes the vocabulary, of which the last stage has not been told"
                    )
                grammar = grammars.start(admitted.slot, params)
            self._rules = LogitsRules(params, admitted.prompt, params.ending(eos_token_ids), grammar)
            for token in admitted.generated:
                self._rules.add(token)
        self._greedy = params.temperature == 0

    @property
    def is_needed(self) -> bool:
        """Whether it does more than to take the likeliest token."""
        return not self.params.is_plain

    @property
    def ended(self) -> Ending | None:
        """How the answer has ended with its last token, if its grammar lets nothing follow."""
        return None if self._rules is None else self._rules.ended

    def next_token(self, likeliest: int, logits: torch.Tensor, position: int) -> int:
        """The token at `position`, given the likeliest one and logits [vocab_size] of any floating dtype and device.

        Called for each token of the answer, in order.
        """
        if self._rules is None and self._greedy:
            return likeliest
        row = logits.cpu().float()
        if self._rules is not None:
            row = row.double()
            self._rules.apply(row)
        number = 0.0 if self.params.seed is None else uniform(self.params.seed, position)
        token = sample(row, self.params, number)
        if self._rules is not None:
            self._rules.add(token)
        return token


_IDS = 2**32  # a token's id is below


def with_ending(token: int, ended: Ending | None) -> int:
    """A token as the last stage returns it: with how it ends its answer, if it does."""
    return token + _IDS * ENDINGS.index(ended)


def read_ending(value: int) -> tuple[int, Ending | None]:
    """What `with_ending` made a value of."""
    ending, token = divmod(value, _IDS)
    return token, ENDINGS[ending]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that chooses the token at `position` of a request with this seed."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def next_tokens(
    likeliest: torch.Tensor, logits: torch.Tensor, samplers: Sequence[Sampler | None], positions: torch.Tensor
) -> torch.Tensor:
    """The next token of each sequence, int64 [s] on the CPU, given its likeliest one, its logits and its position.

    `likeliest` is int64 [s], logits are [s, vocab_size] of any floating dtype, both on one device; `positions` int32
    [s]. A sequence without a sampler takes the likeliest token; of these only the tokens are copied from the device,
    all at once.
    """
    tokens = likeliest.clone() if likeliest.device.type == "cpu" else likeliest.cpu()
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            tokens[row] = sampler.next_token(int(tokens[row]), logits[row], int(positions[row]))
    return tokens


_KEPT = (0.0, 0.0, 1.0, 0.0, 0.0)  # as `_drawing`, of a row whose token stays


@torch.inference_mode()
def draw(
    likeliest: torch.Tensor, logits: torch.Tensor, samplers: Sequence[Sampler | None], positions: torch.Tensor
) -> list[Sampler | None]:
    """Put tokens of requests that are `is_drawn` in their places in `likeliest`, on the device of the logits.

    Arguments are those of `next_tokens`. Returns the samplers of the others, whose tokens are left to that. They are
    the tokens that these samplers would choose, unless a sum in another order rounds to the other side of a boundary.
    """
    left = [None if sampler is not None and sampler.params.is_drawn else sampler for sampler in samplers]
    if left != samplers:
        rows = [
            _KEPT if sampler is other or sampler is None else _drawing(sampler.params, position)
            for sampler, other, position in zip(samplers, left, positions.tolist(), strict=True)
        ]
        told = torch.tensor([*zip(*rows)], dtype=torch.float64, device="cpu")
        told = (told.pin_memory() if logits.is_cuda else told).to(logits.device, non_blocking=True)
        kernels.draw_(likeliest, logits, told[:4], told[4])
    return left


def _drawing(params: SamplingParams, position: int) -> tuple[float, ...]:
    """The parameters of `kernels.draw_`, and the number that chooses the token at a position."""
    number = 0.0 if params.seed is None else uniform(params.seed, position)
    return params.temperature, params.top_k, params.top_p, params.min_p, number


def sample(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """The token that `number` in [0, 1) chooses by its probability, given logits [vocab_size] float32 or float64."""
    if params.temperature == 0:
        return int(logits.argmax())
    found, tokens = weights(logits, params)
    cumulative = found.cumsum(0)
    chosen = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    chosen = min(chosen, len(cumulative) - 1)
    return chosen if tokens is None else int(tokens[chosen])
