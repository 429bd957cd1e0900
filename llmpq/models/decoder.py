"""The one decoder layer, for all families, as modules: attention, and the norms and residuals around it and MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from llmpq import kernels
from llmpq.models.arena import Arena
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import ExpertLinear, Linear
from llmpq.models.loading import UnitLoader
from llmpq.models.mixture import Mixture
from llmpq.models.mlp import MLP
from llmpq.models.rotary import Rotary, alibi_slopes
from llmpq.spec import ModelSpec, Precision, Rope, UnitPrecision


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

    def forward(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.eps, out=out, residual=residual)
        if residual is not None:
            raise ValueError("a LayerNorm whose result is added to something is not supported")
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, out=out)


@dataclass(frozen=True)
class ForwardContext:
    """What all layers of a stage share in one step, on the stage's device."""

    sequences: kernels.Sequences
    rotary: Mapping[Rope | None, Rotary | None]  # see rotary_tables
    arena: Arena


class Attention(nn.Module):
    """From hidden states to what attention adds to them."""

    __call__: Callable[..., torch.Tensor]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None

    def __init__(self, spec: ModelSpec, loader: UnitLoader, layer: int, precisions: Mapping[str, Precision]) -> None:
        super().__init__()
        unit, kind = f"layer.{layer}", spec.layer_kind(layer)
        self.heads, self.kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.scale, self.cap, self.eps = spec.attention_scale or spec.head_dim**-0.5, spec.attention_cap, spec.norm_eps
        self.rope, self.window = kind.rope, kind.window
        self.qkv = loader.linear(unit, "qkv", precisions["qkv"])
        self.out = loader.linear(unit, "out", precisions["out"])
        for name in ("q_norm", "k_norm"):
            self.register_buffer(name, loader.vector(unit, f"{name}.weight") if spec.qk_norm else None)
        sinks = loader.vector(unit, "sinks.weight") if spec.attention_sinks else None
        self.register_buffer("sinks", sinks)
        self.register_buffer("slopes", loader.on_device(alibi_slopes(spec.num_heads)) if spec.alibi else None)

    def forward(
        self,
        x: torch.Tensor,
        at: ForwardContext,
        cache: kernels.CacheLayer,
        residual: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of x [t, hidden_size], added to `residual` if that is given, in `out`, which may be x."""
        tokens, heads, head_dim = len(x), self.heads, self.head_dim
        qkv = self.qkv(x, at.arena.empty(tokens, self.qkv.out_features)).view(tokens, -1, head_dim)
        self._norm(qkv[:, :heads], self.q_norm)
        self._norm(qkv[:, heads : heads + self.kv_heads], self.k_norm)
        kernels.rotate_and_store(qkv, cache, at.sequences, at.rotary[self.rope])
        attended = kernels.attention(
            qkv[:, :heads],
            cache,
            at.sequences,
            self.scale,
            window=self.window,
            cap=self.cap,
            sinks=self.sinks,
            slopes=self.slopes,
            out=at.arena.empty(tokens, heads, head_dim),
        )
        return self.out(attended.view(tokens, -1), out, residual)

    def _norm(self, heads: torch.Tensor, weight: torch.Tensor | None) -> None:
        """RMSNorm of `heads` [t, heads, head_dim] in place: of each, or of all of a token, as long as `weight` is."""
        if weight is not None:
            whole = len(weight) != heads.shape[2]
            groups = (
                heads.as_strided((len(heads), 1, len(weight)), (heads.stride(0), len(weight), 1)) if whole else heads
            )
            kernels.head_norm_(groups, weight, self.eps)


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms, in one of the orders of `Block`."""

    __call__: Callable[..., torch.Tensor]

    def __init__(self, spec: ModelSpec, loader: UnitLoader, layer: int, option: UnitPrecision) -> None:
        super().__init__()
        unit = f"layer.{layer}"
        precisions = spec.linear_precisions(unit, option)
        self.block = spec.block
        self.attention = Attention(spec, loader, layer, precisions)
        experts = spec.layer_kind(layer).experts
        self.mlp: MLP | Mixture
        if experts is None:
            self.mlp = MLP(spec, loader, unit, precisions)
        else:
            self.mlp = Mixture(spec, loader, unit, experts, precisions)
        self.norms = nn.ModuleDict({name: build_norm(spec, loader, unit, name) for name in spec.norms})

    def linear(self, name: str) -> Linear | ExpertLinear:
        """A fused linear by its name in ModelSpec.linears."""
        owner, attribute = self._place(name)
        linear: Linear | ExpertLinear = getattr(owner, attribute)
        return linear

    def set_linear(self, name: str, linear: Linear | ExpertLinear) -> None:
        """Put another in its place."""
        owner, attribute = self._place(name)
        setattr(owner, attribute, linear)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a fused linear, and what it is called there."""
        if name in ("qkv", "out"):
            return self.attention, name
        if isinstance(self.mlp, Mixture) and self.mlp.shared is not None and name.startswith("shared_"):
            return self.mlp.shared, name.removeprefix("shared_")
        return self.mlp, name

    def forward(self, hidden_states: torch.Tensor, at: ForwardContext, cache: KVCache, layer: int) -> torch.Tensor:
        """hidden_states [t, hidden_size] of the step's tokens after the layer, which writes to its part of `cache`."""
        if self.block.startswith("parallel"):
            return self._parallel(hidden_states, at, cache.layer(layer))
        attended = self._half(
            "attention", hidden_states, at.arena, partial(self.attention, at=at, cache=cache.layer(layer))
        )
        return self._half("mlp", attended, at.arena, partial(self.mlp, arena=at.arena))

    def _half(self, name: str, h: torch.Tensor, arena: Arena, compute: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Attention or MLP of hidden states h, with its norms and its residual, in a buffer other than that of h."""
        before, after = f"{name}_norm", f"{name}_out_norm"
        out = arena.hidden_states(len(h))
        if self.block == "post":
            compute(h, residual=h, out=out)
            return self._norm(before, out, arena.hidden_states(len(h)))
        x = self._norm(before, h, out) if before in self.norms else h
        if after not in self.norms:
            return compute(x, residual=h, out=out)
        return self._norm(after, compute(x, residual=None, out=out), out, h)

    def _norm(
        self, name: str, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = self.norms[name](x, out, residual)
        return y

    def _parallel(self, h: torch.Tensor, at: ForwardContext, cache: kernels.CacheLayer) -> torch.Tensor:
        out = at.arena.hidden_states(len(h))
        x, attended = (at.arena.empty(len(h), h.shape[1]) for _ in range(2))
        self._norm("attention_norm", h, x)
        self.attention(x, at, cache, residual=h, out=attended)
        if "mlp_norm" in self.norms:
            self._norm("mlp_norm", h, x)
        return self.mlp(x, at.arena, residual=attended, out=out)


def build_norm(spec: ModelSpec, loader: UnitLoader, unit: str, name: str) -> Norm:
    """A norm of a unit: "norm" of embedding and head, or one of ModelSpec.norms of a layer."""
    bias = loader.vector(unit, f"{name}.bias") if spec.norm == "layer" else None
    return Norm(spec.norm_eps, loader.vector(unit, f"{name}.weight"), bias)
