"""The two ends of the decoder as modules: tokens to hidden states, and hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llmpq import kernels
from llmpq.models.arena import Arena
from llmpq.models.decoder import Norm, build_norm
from llmpq.models.linear import QuantLinear
from llmpq.models.loading import Loader
from llmpq.spec import ActivationMode


class Embedding(nn.Module):
    """Tokens, and learned positions where the model has them, to hidden states."""

    __call__: Callable[..., torch.Tensor]
    positions: torch.Tensor | None

    def __init__(
        self,
        table: kernels.PreparedWeight,
        positions: torch.Tensor | None = None,
        project: QuantLinear | None = None,
        *,
        scale: float = 1.0,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("positions", positions)
        self.project = project
        self.scale, self.norm = scale, norm

    def forward(self, tokens: torch.Tensor, sequences: kernels.Sequences, arena: Arena) -> torch.Tensor:
        """[t, hidden_size] of `tokens` (int64 [t], on any device), in the arena's next buffer of hidden states."""
        tokens = tokens.to(arena.device, non_blocking=True)
        hidden_states = arena.hidden_states(len(tokens))
        if self.project is None:
            kernels.embedding(tokens, self.table, hidden_states.dtype, out=hidden_states)
        else:
            rows = arena.empty(len(tokens), self.table.k)
            self.project(kernels.embedding(tokens, self.table, rows.dtype, out=rows), hidden_states)
        if self.scale != 1.0:
            kernels.scale_(hidden_states, self.scale)
        if self.positions is not None:
            kernels.add_positions_(hidden_states, self.positions, sequences)
        return hidden_states if self.norm is None else self.norm(hidden_states, arena.hidden_states(len(tokens)))


class Head(nn.Module):
    """Hidden states to logits."""

    __call__: Callable[..., torch.Tensor]

    def __init__(
        self, norm: Norm | None, project: QuantLinear | None, table: QuantLinear, cap: float | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.project = project
        self.table = table
        self.cap = cap

    def before_table(self, hidden_states: torch.Tensor, arena: Arena | None = None) -> torch.Tensor:
        """What the table multiplies, [rows, embedding_dim], by way of `arena` or of new tensors."""

        def room(width: int) -> torch.Tensor:
            rows = len(hidden_states)
            return hidden_states.new_empty(rows, width) if arena is None else arena.empty(rows, width)

        x = hidden_states
        if self.norm is not None:
            x = self.norm(x, room(x.shape[1]))
        if self.project is not None:
            x = self.project(x, room(self.project.out_features))
        return x

    def forward(self, hidden_states: torch.Tensor, out: torch.Tensor, arena: Arena | None = None) -> torch.Tensor:
        """`out` [rows, vocab_size] of hidden_states [rows, hidden_size], by way of `arena` or of new tensors."""
        logits = self.table(self.before_table(hidden_states, arena), out)
        return logits if self.cap is None else kernels.scale_(logits, 1.0, self.cap)


def build_embedding(loader: Loader, table: kernels.PreparedWeight, dtype: torch.dtype, length: int) -> Embedding:
    """The embedding of a stage that computes in `dtype`, for positions below `length`."""
    spec = loader.spec
    return Embedding(
        table,
        loader.positions(dtype, length),
        loader.plain("embedding", "project") if "project" in spec.plain_linears("embedding") else None,
        scale=spec.embedding_scale,
        norm=build_norm(spec, loader, "embedding", "norm") if spec.embedding_norm else None,
    )


def build_head(loader: Loader, table: kernels.PreparedWeight, activations: ActivationMode = "a16") -> Head:
    """The head of a model with this table."""
    spec = loader.spec
    norm = build_norm(spec, loader, "head", "norm") if spec.final_norm else None
    if norm is not None and spec.logit_scale != 1.0:  # what scales the logits may as well scale what they are made of
        norm = Norm(
            norm.eps, norm.weight * spec.logit_scale, None if norm.bias is None else norm.bias * spec.logit_scale
        )
    project = loader.plain("head", "project") if "project" in spec.plain_linears("head") else None
    bias = loader.vector("head", "table.bias") if "head" in spec.biases else None
    return Head(norm, project, QuantLinear(table, bias, activations), spec.logit_cap)
