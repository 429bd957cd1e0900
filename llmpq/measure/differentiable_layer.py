"""The formulas of models.decoder.DecoderLayer in operations that autograd knows, on floating-point weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional as F

from llmpq.checkpoint.weights import WeightSource, floating
from llmpq.models.rotary import Rotary, alibi_slopes
from llmpq.spec import ModelSpec, Rope

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
Compute = Callable[[torch.Tensor], torch.Tensor]
Parameters = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias of a linear


class DifferentiableLayer:
    """A layer of a model, its weights in `dtype` on the CPU."""

    def __init__(self, spec: ModelSpec, source: WeightSource, index: int, dtype: torch.dtype = torch.float32) -> None:
        self._spec, self._source, self._unit, self._dtype = spec, source, f"layer.{index}", dtype
        self._kind = spec.layer_kind(index)
        shapes = spec.linears(self._unit) | spec.plain_linears(self._unit)
        self._linears: dict[str, Parameters] = {
            name: (self._part(f"{name}.weight"), self._part(f"{name}.bias") if shape.bias else None)
            for name, shape in shapes.items()
        }
        self._norms = {name: self._norm(name) for name in spec.norms}
        self._qk_norms = [self._part(f"{name}.weight") for name in ("q_norm", "k_norm")] if spec.qk_norm else None
        self._sinks = self._part("sinks.weight") if spec.attention_sinks else None

    def __call__(self, hidden_states: torch.Tensor, rotary: Mapping[Rope | None, Rotary | None]) -> torch.Tensor:
        """[sequences, length, hidden_size] of whole sequences, before the layer and after it."""
        h, attend = hidden_states, partial(self._attend, rotary=rotary[self._kind.rope])
        if self._spec.block.startswith("parallel"):
            x = self._norms["attention_norm"](h)
            return h + attend(x) + self._mlp(self._norms["mlp_norm"](h) if "mlp_norm" in self._norms else x)
        return self._half("mlp", self._half("attention", h, attend), self._mlp)

    def _half(self, name: str, h: torch.Tensor, compute: Compute) -> torch.Tensor:
        before, after = self._norms.get(f"{name}_norm"), self._norms.get(f"{name}_out_norm")
        if self._spec.block == "post":
            assert before is not None
            return before(h + compute(h))
        y = compute(h if before is None else before(h))
        return h + (y if after is None else after(y))

    def _attend(self, x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        spec, length = self._spec, x.shape[1]
        heads = F.linear(x, *self._linears["qkv"]).unflatten(-1, (-1, spec.head_dim))
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 2)
        if self._qk_norms is not None:
            q, k = (self._normed(part, weight) for part, weight in zip((q, k), self._qk_norms, strict=True))
        if rotary is not None:
            cos, sin = (table[:length, None].to(x.dtype) for table in rotary)
            q, k = (_rotated(part, cos, sin) for part in (q, k))
        k, v = (part.repeat_interleave(spec.num_heads // spec.num_kv_heads, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) * (spec.attention_scale or spec.head_dim**-0.5)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        if spec.alibi:
            scores = scores - alibi_slopes(spec.num_heads).to(x.dtype)[:, None, None] * distance
        if spec.attention_cap is not None:
            scores = spec.attention_cap * torch.tanh(scores / spec.attention_cap)
        seen = distance >= 0 if self._kind.window is None else (distance >= 0) & (distance < self._kind.window)
        scores = scores.masked_fill(~seen, -torch.inf)
        if self._sinks is not None:
            sinks = self._sinks[:, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), *self._linears["out"])

    def _normed(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of [..., heads, head_dim]: of each head, or of all together, as long as `weight` is."""
        whole = heads.flatten(-2) if self._spec.qk_norm == "row" else heads
        return norm(whole, weight, None, self._spec.norm_eps).view_as(heads)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        experts = self._kind.experts
        if experts is None:
            return self._down(x, self._linears["up"], self._linears["down"])
        rows = x.flatten(0, -2)
        logits = F.linear(rows, *self._linears["router"])
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : experts.per_token]
        weights = logits.softmax(-1).gather(-1, chosen)
        if experts.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for expert in range(experts.count):
            tokens, choice = (chosen == expert).nonzero(as_tuple=True)
            of = self._down(rows[tokens], *(self._of_expert(name, expert) for name in ("up", "down")))
            y = y.index_add(0, tokens, of * weights[tokens, choice, None])
        if experts.shared_size:
            shared = self._down(rows, self._linears["shared_up"], self._linears["shared_down"])
            y = y + F.linear(rows, *self._linears["shared_gate"]).sigmoid() * shared
        return y.view_as(x)

    def _down(self, x: torch.Tensor, up: Parameters, down: Parameters) -> torch.Tensor:
        """An MLP of these linears."""
        y = F.linear(x, *up)
        if self._spec.activation == "swiglu_clamped":
            gate, y = y.chunk(2, -1)
            gate, y = gate.clamp(max=7.0), y.clamp(-7.0, 7.0)
            return F.linear(gate * (1.702 * gate).sigmoid() * (y + 1), *down)
        activation = _ACTIVATIONS[self._spec.activation]
        if self._spec.gated_mlp:
            gate, y = y.chunk(2, -1)
            return F.linear(activation(gate) * y, *down)
        return F.linear(activation(y), *down)

    def _of_expert(self, name: str, expert: int) -> Parameters:
        weight, bias = self._linears[name]
        n = self._spec.linears(self._unit)[name].n
        rows = slice(expert * n, (expert + 1) * n)
        return weight[rows], None if bias is None else bias[rows]

    def _part(self, part: str) -> torch.Tensor:
        return torch.cat([floating(rows) for rows in self._source.rows(self._unit, part)]).to(self._dtype)

    def _norm(self, name: str) -> Compute:
        weight = self._part(f"{name}.weight")
        bias = self._part(f"{name}.bias") if self._spec.norm == "layer" else None
        return partial(norm, weight=weight, bias=bias, eps=self._spec.norm_eps)


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[..., length, heads, head_dim] with the first dimensions rotated, as many as the tables have."""
    turning, still = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], -1)
    return torch.cat((turning * cos + turning.roll(cos.shape[-1] // 2, -1) * sin, still), -1)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """models.decoder.Norm: RMSNorm, or LayerNorm if there is a bias; over the last dim of x [..., size]."""
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
