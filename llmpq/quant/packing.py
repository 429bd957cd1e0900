"""The packed format of quantized weights: the only place where the order of bits is decided.

`qweight` is int32 [n, ceil(k / 32) * bits]. A row is cut along k into blocks of 32 consecutive codes; each block is
`bits` words of 32 bits, so every code takes exactly `bits` bits. The last block of a row is filled up with code 0;
whatever multiplies the weights takes x as 0 there.

                     most significant                                      least significant
    4 bits, word w   | 8w+7 | 8w+6 | 8w+5 | 8w+4 | 8w+3 | 8w+2 | 8w+1 | 8w |     w = 0..3, nibbles
    8 bits, word w   |    4w+3     |    4w+2     |    4w+1     |     4w    |     w = 0..7, bytes

    3 bits, word w   as for 4 bits with w = 0..2, which places codes 0..23. Their nibbles have a free top bit:
                     in word w, the top bit of nibble j is bit w of code 24 + j.

       nibble j of   word 2            word 1            word 0
                     a2 | code 16+j    a1 | code 8+j     a0 | code j            a2 a1 a0 = code 24 + j

Three bits are thus read as four are, and the last eight codes of a block are gathered by
(w0 >> 3 & 0x11111111) | (w1 >> 2 & 0x22222222) | (w2 >> 1 & 0x44444444), which is a word of 4 bits again.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from llmpq.spec import BITS, BLOCK

PACKED_BITS = tuple(bits for bits in BITS if bits < 16)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits is {bits}, expected one of {PACKED_BITS}")


def packed_words(k: int, bits: int) -> int:
    """32-bit words in a packed row of k codes."""
    return -(-k // BLOCK) * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [n, k], each below 2**bits, as qweight int32 [n, ceil(k / 32) * bits]. Raises ValueError."""
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes is {codes.dtype} {list(codes.shape)}, expected uint8 [n, k]")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes has a value of {int(codes.max())}, which does not fit {bits} bits")
    codes = pad(codes, (0, -codes.shape[1] % BLOCK))
    if bits == 3:
        blocks = codes.unflatten(1, (-1, 4, 8))
        planes = torch.arange(3, dtype=torch.uint8, device=codes.device)[:, None]
        codes = (blocks[:, :, :3] | ((blocks[:, :, 3:] >> planes & 1) << 3)).flatten(1)
    if bits < 8:
        nibbles = codes.unflatten(1, (-1, 2))
        codes = nibbles[..., 0] | nibbles[..., 1] << 4
    return codes.contiguous().view(torch.int32)


def unpack(qweight: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [n, k]. Raises ValueError."""
    _check_bits(bits)
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or qweight.shape[1] != packed_words(k, bits):
        raise ValueError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}, expected int32 [n, {packed_words(k, bits)}] "
            f"for k = {k} at {bits} bits"
        )
    codes = qweight.contiguous().view(torch.uint8)
    if bits < 8:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    if bits == 3:
        blocks = codes.unflatten(1, (-1, 3, 8))
        top = blocks >> 3
        last = top[:, :, :1] | top[:, :, 1:2] << 1 | top[:, :, 2:] << 2
        codes = torch.cat((blocks & 7, last), dim=2).flatten(1)
    return codes[:, :k]
