"""The formulas of models.decoder.DecoderLayer in operations that autograd knows, on floating-point weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from llmpq.checkpoint.weights import WeightSource, floating
from llmpq.spec import ModelSpec

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class DifferentiableLayer:
    """A layer of a model, its weights in `dtype` on the CPU."""

    def __init__(self, spec: ModelSpec, source: WeightSource, index: int, dtype: torch.dtype = torch.float32) -> None:
        self._spec, self._source, self._unit, self._dtype = spec, source, f"layer.{index}", dtype
        self._linears = {
            name: (self._part(f"{name}.weight"), self._part(f"{name}.bias") if shape.bias else None)
            for name, shape in spec.layer_linears.items()
        }
        self._attention_norm, self._mlp_norm = self._norm("attention_norm"), self._norm("mlp_norm")

    def __call__(self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """[sequences, length, hidden_size] of whole sequences, before the layer and after it."""
        x = hidden_states
        if self._spec.norm_first:
            x = x + self._attend(self._attention_norm(x), rotary)
            return x + self._mlp(self._mlp_norm(x))
        x = self._attention_norm(x + self._attend(x, rotary))
        return self._mlp_norm(x + self._mlp(x))

    def _attend(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        spec, length = self._spec, x.shape[1]
        heads = F.linear(x, *self._linears["qkv"]).unflatten(-1, (-1, spec.head_dim))
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 2)
        if rotary is not None:
            cos, sin = (table[:length, None].to(x.dtype) for table in rotary)
            q, k = (part * cos + part.roll(spec.head_dim // 2, -1) * sin for part in (q, k))
        k, v = (part.repeat_interleave(spec.num_heads // spec.num_kv_heads, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(attended.transpose(1, 2).flatten(2), *self._linears["out"])

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        up, activation = F.linear(x, *self._linears["up"]), _ACTIVATIONS[self._spec.activation]
        if self._spec.gated_mlp:
            gate, up = up.chunk(2, -1)
            return F.linear(activation(gate) * up, *self._linears["down"])
        return F.linear(activation(up), *self._linears["down"])

    def _part(self, part: str) -> torch.Tensor:
        return torch.cat([floating(rows) for rows in self._source.rows(self._unit, part)]).to(self._dtype)

    def _norm(self, name: str) -> partial[torch.Tensor]:
        weight = self._part(f"{name}.weight")
        bias = self._part(f"{name}.bias") if self._spec.norm == "layer" else None
        return partial(norm, weight=weight, bias=bias, eps=self._spec.norm_eps)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """models.decoder.Norm: RMSNorm, or LayerNorm if there is a bias; over the last dim of x [..., size]."""
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
