"""Rotary position embeddings: tables made once for a stage, applied in place."""

from __future__ import annotations

import math

import torch

from llmpq.spec import ModelSpec, RopeScaling


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2]."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
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

    def __init__(self, frequencies: torch.Tensor, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.arange(max_length).float()[:, None] * frequencies
        self._cos = torch.cat((angles.cos(), angles.cos()), -1).to(device, dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1).to(device, dtype)

    @classmethod
    def of(cls, spec: ModelSpec, max_length: int, dtype: torch.dtype, device: torch.device) -> Rotary | None:
        """A model's, for positions below `max_length`; None for a model that learns its positions."""
        if spec.rope_theta is None:
            return None
        return cls(inverse_frequencies(spec.rope_theta, spec.head_dim, spec.rope_scaling), max_length, dtype, device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (cos, sin), each [t, 1, head_dim], of tokens at `positions` (int64 [t]), for all layers."""
        return self._cos[positions].unsqueeze_(1), self._sin[positions].unsqueeze_(1)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: torch.Tensor) -> None:
    """Rotate heads x [t, heads, head_dim] in place by the factors of `Rotary.at`; `scratch` has x's shape."""
    half = x.shape[-1] // 2
    torch.cat((x[..., half:], x[..., :half]), -1, out=scratch)
    x.mul_(cos).add_(scratch.mul_(sin))
