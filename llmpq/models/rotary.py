"""Rotary position embeddings: tables made once for a stage, applied in place."""

from __future__ import annotations

import math

import torch

from llmpq.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2], scaled as the spec says."""
    assert spec.rope_theta is not None
    inverse = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return inverse
    slowed = inverse / scaling.factor
    if scaling.kind == "linear":
        return slowed
    # Llama 3 slows down only waves longer than the original context, with a gradual transition.
    periods = scaling.original_max_positions * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * slowed + kept * inverse


class Rotary:
    """Rotates dimension j of a head with dimension j + head_dim / 2, by an angle that grows with the position."""

    def __init__(self, spec: ModelSpec, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.arange(max_length).float()[:, None] * inverse_frequencies(spec)
        self._cos = torch.cat((angles.cos(), angles.cos()), -1).to(device, dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors [t, 1, head_dim] of the tokens at `positions`, int64 [t]; the same for all layers."""
        return self._cos[positions].unsqueeze_(1), self._sin[positions].unsqueeze_(1)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
    """Rotate heads x [t, heads, head_dim] in place by factors that `Rotary.at` gave; `scratch` is of x's shape."""
    half = x.shape[-1] // 2
    other = torch.empty_like(x) if scratch is None else scratch
    torch.cat((x[..., half:], x[..., :half]), -1, out=other)
    x.mul_(cos).add_(other.mul_(sin))
