"""How attention knows of positions: tables of rotary embeddings, made once for a stage, and the slopes of ALiBi."""

from __future__ import annotations

import math

import torch

from llmpq.spec import ModelSpec, Rope

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [max_length, dims]


def inverse_frequencies(rope: Rope, max_length: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 [dims / 2], in slots of `max_length` tokens."""
    theta, longer = rope.theta, rope.original_positions is not None and max_length > rope.original_positions
    if rope.dynamic is not None and rope.original_positions is not None and longer:
        # So that the slowest pair turns as far as it does within the original positions, and the fastest as fast.
        stretched = rope.dynamic * max_length / rope.original_positions - (rope.dynamic - 1)
        theta *= stretched ** (rope.dims / (rope.dims - 2))
    inverse = 1.0 / theta ** (torch.arange(0, rope.dims, 2).float() / rope.dims)
    factors = rope.long_factors if longer and rope.long_factors else rope.factors
    return inverse / torch.tensor(factors) if factors else inverse


def rotary_table(rope: Rope, max_length: int, dtype: torch.dtype, device: torch.device) -> Rotary:
    """Cosines and sines, each [max_length, dims], for `kernels.rotate_and_store`.

    Dimension j of a head is rotated with dimension j + dims / 2, by an angle that grows with the position.
    """
    longer = bool(rope.long_factors) and rope.original_positions is not None and max_length > rope.original_positions
    magnitude = rope.long_magnitude if longer else rope.magnitude
    angles = torch.arange(max_length).float()[:, None] * inverse_frequencies(rope, max_length)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return torch.cat((cos, cos), -1).to(device, dtype), torch.cat((-sin, sin), -1).to(device, dtype)


def rotary_tables(
    spec: ModelSpec, max_length: int, dtype: torch.dtype, device: torch.device
) -> dict[Rope | None, Rotary | None]:
    """The table of each Rope that a layer has; None where nothing is rotated."""
    ropes = {kind.rope for kind in spec.layer_kinds}
    return {rope: None if rope is None else rotary_table(rope, max_length, dtype, device) for rope in ropes}


def alibi_slopes(heads: int) -> torch.Tensor:
    """float32 [heads]: by how much a score falls with each position of distance (arXiv 2108.12409, section 3).

    A geometric sequence for a power of two; else that of the next lower one, then every second of the next higher one.
    """
    whole = 2 ** int(math.log2(heads))

    def sequence(count: int) -> torch.Tensor:
        return 2.0 ** (-8.0 / count * torch.arange(1, count + 1))

    return torch.cat((sequence(whole), sequence(2 * whole)[::2][: heads - whole])).float()
