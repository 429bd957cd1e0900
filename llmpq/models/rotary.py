"""Rotary position embeddings: tables made once for a stage."""

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


def rotary_tables(
    spec: ModelSpec, max_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines, each [max_length, head_dim], for `kernels.rotate_and_store`; None: positions are learned.

    Dimension j of a head is rotated with dimension j + head_dim / 2, by an angle that grows with the position.
    """
    if spec.rope_theta is None:
        return None
    frequencies = inverse_frequencies(spec.rope_theta, spec.head_dim, spec.rope_scaling)
    angles = torch.arange(max_length).float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(device, dtype), torch.cat((-sin, sin), -1).to(device, dtype)
