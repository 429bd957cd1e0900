"""The activation modes a8 and a8x2 by definition: what a kernel in these modes multiplies in place of x.

The columns of x form groups of min(128, the weight's group_size), 128 for the whole row; the last may be short. Each
row and group is quantized by itself, in float32, which every kernel matches to the bit:

    scale   = max|x| / 127
    inverse = 127 / max|x|                      scale and inverse are 0 where this overflows: all is as good as 0
    hi      = round(x * inverse)                to the nearest, halves to even: int8, -127 to 127
    lo      = round((x * inverse - hi) * 254)   in a8x2: what hi leaves, in parts of a step; int8, -127 to 127

    a8      x_hat = scale * hi
    a8x2    x_hat = scale * hi + (scale / 254) * lo

A group that holds an infinity or a NaN has the scale NaN and codes 0, so that all results of its row are NaN.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

TERMS = {"a8": 1, "a8x2": 2}
LARGEST_GROUP = 128
_LEVELS, _PARTS = 127, 254  # codes to one side of zero; parts of a step that lo counts


def activation_group(group_size: int | None) -> int:
    """Columns of x that share a scale, for weights in groups of `group_size` (None: the whole row)."""
    return min(group_size or LARGEST_GROUP, LARGEST_GROUP)


def quantize_activations(x: torch.Tensor, group_size: int | None, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [terms, m, k] and scales float32 [terms, m, groups] of x [m, k], which is taken as float32.

    `group_size` is that of the weights; `terms` is 1 for a8 and 2 for a8x2.
    """
    k = x.shape[1]
    size = activation_group(group_size)
    groups = pad(x.float(), (0, -k % size)).unflatten(1, (-1, size))
    largest = groups.abs().amax(-1)
    # Of two tensors, since a quotient with a Python number may be a product with a rounded reciprocal.
    levels = torch.full_like(largest, _LEVELS)
    scale, inverse = largest / levels, levels / largest
    nothing = inverse.isinf()
    finite = largest.isfinite()
    scale = scale.masked_fill(nothing, 0).masked_fill(~finite, float("nan"))
    steps = torch.where(finite[..., None], groups, 0) * inverse.masked_fill(nothing | ~finite, 0)[..., None]
    hi = steps.round()
    codes, scales = [hi], [scale]
    if terms == 2:
        codes.append(((steps - hi) * _PARTS).round())
        scales.append(scale / torch.full_like(scale, _PARTS))
    return torch.stack(codes).to(torch.int8).flatten(2)[..., :k], torch.stack(scales)


def rounded_activations(x: torch.Tensor, group_size: int | None, activations: str) -> torch.Tensor:
    """x_hat [m, k] of x [m, k] in the mode `activations`, a8 or a8x2; exactly, since in float64."""
    codes, scales = quantize_activations(x, group_size, TERMS[activations])
    each = scales.double().repeat_interleave(activation_group(group_size), -1)[..., : x.shape[1]]
    return (codes * each).sum(0)
