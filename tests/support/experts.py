"""Experts of transformers' mixtures: which tokens choose them, and what goes into their linears."""

from __future__ import annotations

from typing import Any

import torch

PARAMETERS = {"up": "gate_up_proj", "down": "down_proj"}


class Expert:
    """One of a mixture of transformers, float64, and the tokens that a router gives to it."""

    def __init__(self, mixture: Any, number: int, chosen: torch.Tensor) -> None:
        self.experts, self.number = mixture.experts, number
        self.tokens, self.choices = (chosen == number).nonzero(as_tuple=True)
        self.in_columns = hasattr(self.experts, "gate_up_proj_bias")  # [k, n], and rows of gate and up in turn

    @torch.no_grad()
    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into its "down" for rows of x."""
        weight = self.experts.gate_up_proj[self.number]
        if self.in_columns:
            return self.experts._apply_gate(x @ weight + self.experts.gate_up_proj_bias[self.number])
        gated, up = (x @ weight.T).chunk(2, -1)
        return self.experts.act_fn(gated) * up

    def weight(self, name: str) -> torch.Tensor:
        """[n, k] of "up", the gate first, or "down"."""
        weight: torch.Tensor = getattr(self.experts, PARAMETERS[name])[self.number].detach()
        if not self.in_columns:
            return weight
        return weight.T if name == "down" else weight.T.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    def replace(self, name: str, weight: torch.Tensor) -> None:
        if self.in_columns:
            rows = weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) if name == "up" else weight
            weight = rows.T
        getattr(self.experts, PARAMETERS[name]).data[self.number] = weight


def moment_of_few(moment: torch.Tensor, tokens: int) -> torch.Tensor:
    """As if a quarter of k inputs more had come, all directions alike."""
    k = len(moment)
    white = torch.eye(k, dtype=torch.float64) * moment.diagonal().mean()
    return (tokens * moment + k / 4 * white) / (tokens + k / 4)
