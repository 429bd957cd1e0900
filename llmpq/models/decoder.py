"""The one decoder, for all families, as modules: layers, the embedding, the head, and the norms within them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from llmpq import kernels
from llmpq.models.arena import Arena
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import QuantLinear
from llmpq.models.loading import Loader, UnitLoader
from llmpq.spec import ModelSpec, UnitPrecision


class Norm(nn.Module):
    """RMSNorm, or LayerNorm if there is a bias."""

    __call__: Callable[..., torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, eps: float, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.eps, out=out)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, out=out)


@dataclass(frozen=True)
class ForwardContext:
    """What all layers of a stage share in one step, on the stage's device."""

    sequences: kernels.Sequences
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # see rotary_tables
    arena: Arena


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms, before them or after."""

    __call__: Callable[..., torch.Tensor]

    def __init__(self, spec: ModelSpec, loader: UnitLoader, layer: int, option: UnitPrecision) -> None:
        super().__init__()
        unit = f"layer.{layer}"
        precisions = spec.linear_precisions(unit, option)
        self.heads, self.kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.norm_first = spec.norm_first
        self.activation, self.gated_mlp = spec.activation, spec.gated_mlp
        self.attention_norm = build_norm(spec, loader, unit, "attention_norm")
        self.qkv = loader.linear(unit, "qkv", precisions["qkv"])
        self.out = loader.linear(unit, "out", precisions["out"])
        self.mlp_norm = build_norm(spec, loader, unit, "mlp_norm")
        self.up = loader.linear(unit, "up", precisions["up"])
        self.down = loader.linear(unit, "down", precisions["down"])

    def forward(self, hidden_states: torch.Tensor, at: ForwardContext, cache: KVCache, layer: int) -> torch.Tensor:
        """hidden_states [t, hidden_size] of the step's tokens, left as they are; writes to a layer of `cache`."""
        arena, tokens = at.arena, len(hidden_states)
        if self.norm_first:
            x = self.attention_norm(hidden_states, arena.hidden_states(tokens))
            hidden_states = self._attend(x, at, cache, layer, residual=hidden_states, out=x)
            x = self.mlp_norm(hidden_states, arena.hidden_states(tokens))
            return self._mlp(x, arena, residual=hidden_states, out=x)
        out = arena.hidden_states(tokens)
        x = self._attend(hidden_states, at, cache, layer, residual=hidden_states, out=out)
        hidden_states = self.attention_norm(x, arena.hidden_states(tokens))
        x = self._mlp(hidden_states, arena, residual=hidden_states, out=arena.hidden_states(tokens))
        return self.mlp_norm(x, arena.hidden_states(tokens))

    def _attend(
        self,
        x: torch.Tensor,
        at: ForwardContext,
        cache: KVCache,
        layer: int,
        residual: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of x [t, hidden_size], added to `residual`, in `out`, which may be x."""
        tokens, heads, head_dim = len(x), self.heads, self.head_dim
        qkv = self.qkv(x, at.arena.empty(tokens, self.qkv.out_features)).view(tokens, -1, head_dim)
        kernels.rotate_and_store(qkv, cache.layer(layer), at.sequences, at.rotary)
        attended = kernels.attention(
            qkv[:, :heads],
            cache.layer(layer),
            at.sequences,
            head_dim**-0.5,
            out=at.arena.empty(tokens, heads, head_dim),
        )
        return self.out(attended.view(tokens, -1), out, residual)

    def _mlp(self, x: torch.Tensor, arena: Arena, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The MLP of x [t, hidden_size], added to `residual`, in `out`, which may be x."""
        up = self.up(x, arena.empty(len(x), self.up.out_features))
        return self.down(kernels.activate_(up, self.activation, self.gated_mlp), out, residual)


class Embedding(nn.Module):
    """Tokens, and learned positions where the model has them, to hidden states."""

    __call__: Callable[..., torch.Tensor]
    positions: torch.Tensor | None

    def __init__(
        self, table: kernels.PreparedWeight, positions: torch.Tensor | None, project: QuantLinear | None
    ) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("positions", positions)
        self.project = project

    def forward(self, tokens: torch.Tensor, sequences: kernels.Sequences, arena: Arena) -> torch.Tensor:
        """[t, hidden_size] of `tokens` (int64 [t], on any device), in the arena's next buffer of hidden states."""
        tokens = tokens.to(arena.device, non_blocking=True)
        hidden_states = arena.hidden_states(len(tokens))
        if self.project is None:
            kernels.embedding(tokens, self.table, hidden_states.dtype, out=hidden_states)
        else:
            rows = arena.empty(len(tokens), self.table.k)
            self.project(kernels.embedding(tokens, self.table, rows.dtype, out=rows), hidden_states)
        if self.positions is None:
            return hidden_states
        return kernels.add_positions_(hidden_states, self.positions, sequences)


class Head(nn.Module):
    """Hidden states to logits."""

    __call__: Callable[..., torch.Tensor]

    def __init__(self, norm: Norm | None, project: QuantLinear | None, table: QuantLinear) -> None:
        super().__init__()
        self.norm = norm
        self.project = project
        self.table = table

    def forward(self, hidden_states: torch.Tensor, out: torch.Tensor, arena: Arena | None = None) -> torch.Tensor:
        """`out` [rows, vocab_size] of hidden_states [rows, hidden_size], by way of `arena` or of new tensors."""

        def room(width: int) -> torch.Tensor:
            rows = len(hidden_states)
            return hidden_states.new_empty(rows, width) if arena is None else arena.empty(rows, width)

        x = hidden_states
        if self.norm is not None:
            x = self.norm(x, room(x.shape[1]))
        if self.project is not None:
            x = self.project(x, room(self.project.out_features))
        return self.table(x, out)


def build_norm(spec: ModelSpec, loader: UnitLoader, unit: str, name: str) -> Norm:
    """A norm of a unit: "attention_norm" or "mlp_norm" of a layer, "norm" of the head."""
    bias = loader.vector(unit, f"{name}.bias") if spec.norm == "layer" else None
    return Norm(spec.norm_eps, loader.vector(unit, f"{name}.weight"), bias)


def build_embedding(loader: Loader, option: UnitPrecision, dtype: torch.dtype, length: int) -> Embedding:
    """The embedding of a stage that computes in `dtype`, for positions below `length`."""
    table = loader.table("embedding", option)
    return Embedding(table, loader.positions(dtype, length), loader.projection("embedding"))
