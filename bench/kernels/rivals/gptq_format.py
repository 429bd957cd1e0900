"""What the libraries that read GPTQ's checkpoints take: codes as one stream of bits along k, and vLLM's own habits."""

from __future__ import annotations

import torch

from llmpq.spec import BLOCK


def bit_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, k * bits / 32] of codes uint8 [rows, k], k a multiple of 32.

    Code i of a row is in the bits from i * bits on, the least significant first; with 3 bits some span two words.
    """
    codes = codes.unflatten(1, (-1, BLOCK))
    words = torch.zeros(*codes.shape[:2], bits + 1, dtype=torch.int64, device=codes.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        value = codes[..., i].long() << shift
        words[..., word] |= value & 0xFFFFFFFF
        words[..., word + 1] |= value >> 32
    words = words[..., :bits]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).flatten(1)


def marlin_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [groups, n] of more than one group in the order of Marlin's threads; n a multiple of 64.

    Of 64 columns, those that are 8 apart come one after the other.
    """
    ordered: torch.Tensor = scales.unflatten(1, (-1, 8, 8))
    return ordered.transpose(2, 3).flatten(1).contiguous()


def scalar_type(bits: int) -> int:
    """How vLLM's operators name unsigned integers that stand for themselves less 2**(bits - 1).

    Fields from the lowest bit on: exponent (8 bits), mantissa (8), signed (1), bias (32), finite only (1), and the kind
    of NaN, which is 1 for integers, too.
    """
    return bits << 8 | 1 << (bits - 1) << 17 | 1 << 50
