"""What goes into the linears of experts: the inputs of whose tokens, and what to make of few of them.

The tokens of a text are parted among many experts, and the second moment of few says little of others. It is taken as
if WHITE * k more had come, as large as these on average, and alike in all directions: an expert that no token chooses
is then quantized for its weights alone. (Measured at 3 bits on the inputs of layer 12 of the demo model, parted by
direction into 16 experts, with 8 to 512 tokens of each. Of 0, 16, 64, 256 and 1024 white tokens, 64 or 256 left the
least error on other tokens, or nearly so, for k = 576, and 256 for k = 1536. With 128 tokens and 256 white ones, it was
0.32 and 0.62 times that of rounding to nearest; with none, 0.50 and 0.88 times. In tiny mixtures it gained nothing to
let tokens count by their shares.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llmpq.kernels import route
from llmpq.models.decoder import DecoderLayer
from llmpq.models.linear import QuantLinear
from llmpq.models.mixture import Mixture
from llmpq.quant import InputStatistics

WHITE = 0.25  # tokens for each of the k inputs of a linear

# By how the names of linears begin ("", "shared_"), by what the outputs of their MLPs are multiplied: float32 [t, K] of
# a token's experts, [t, 1] of the one that all tokens go through.
Shares = dict[str, torch.Tensor]


def note_shares(layer: DecoderLayer, shares: Shares) -> None:
    """Have a layer note them when its router has run, before its experts do. Nothing where there is no mixture."""
    mixture = layer.mlp
    if not isinstance(mixture, Mixture):
        return
    per_token, normalized, gate = mixture.per_token, mixture.normalized, mixture.shared_gate

    def note(router: QuantLinear, arguments: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        _, shares[""] = route(logits, per_token, normalized)
        if gate is not None:
            shares["shared_"] = gate(arguments[0]).sigmoid()

    mixture.router.register_forward_hook(note)


class Chosen(NamedTuple):
    """The choices that fell on one expert. Choice j of token i has the number i * K + j."""

    tokens: torch.Tensor  # int64 [m]
    numbers: torch.Tensor  # int64 [m]

    def rows(self, name: str) -> torch.Tensor:
        """Those of the inputs of "up", of which a token has one, or "down", of which each choice has one."""
        return self.tokens if name == "up" else self.numbers


def of_each_expert(experts: torch.Tensor, count: int) -> Iterator[Chosen]:
    """Those of each of `count` experts in turn, of the choices of all tokens, int32 [t, K]."""
    choices, per_token = experts.flatten(), experts.shape[1]
    for expert in range(count):
        numbers = (choices == expert).nonzero()[:, 0]
        yield Chosen(numbers // per_token, numbers)


def of_sample(statistics: InputStatistics, tokens: int) -> InputStatistics:
    """What to take for the statistics of an expert's inputs, given those of so many tokens: with white ones."""
    moment = statistics.second_moment
    part = tokens / (tokens + WHITE * len(moment))
    whitened = moment * part
    whitened.diagonal().add_(moment.diagonal().mean() * (1 - part))
    return InputStatistics(whitened, None if statistics.drift is None else statistics.drift * part)
