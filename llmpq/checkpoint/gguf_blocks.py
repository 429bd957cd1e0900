"""Rows of GGUF's quantized types as QuantTensors: what the file has for codes, scales and offsets, in other places.

A row is a sequence of blocks of 32 or 256 weights, each with numbers of its own. STORED (tensor_index.py) says which
form a type has here. Where that form holds all that the file says, no number is rounded:

    type     bits    here   form            w in the file, and what becomes of it
    Q4_0     4.5     4.5    w4-g32-sym      d (q - 8)
    Q4_1     5.0     5.0    w4-g32-offset   d q + m
    Q5_0     5.5     8.5    w8-g32-sym      d (q - 16)
    Q5_1     6.0     9.0    w8-g32-offset   d q + m
    Q8_0     8.5     8.5    w8-g32-sym      d q
    IQ4_NL   4.5     8.5    w8-g32-sym      d v[q], v being 16 values of 8 bits
    MXFP4    4.25    8.5    w8-g32-sym      2^e v[q], v being integers up to 12; scales are bfloat16, which has each 2^e
    Q3_K     3.44    8.06   w8-g256-sym     d s (q - 4), s an integer for each 16; the code is s (q - 4), which 8 bits
                                            hold as its negative: the scale is -d
    TQ2_0    2.06    3.06   w3-g256-sym     d (q - 1)
    TQ1_0    1.69    3.06   w3-g256-sym     d (q - 1)

In three types the scale of each 32 weights is a product d s with an integer s of 6 bits, and so is the offset. Products
are rounded to float16, which a file with these products in place of their factors would have had to do:

    Q4_K     4.5     5.0    w4-g32-offset   d s q - e t      off by at most 2^-11 (|d s q| + |e t|)
    Q5_K     5.5     9.0    w8-g32-offset   d s q - e t      the same
    IQ4_XS   4.25    8.5    w8-g32-sym      d s v[q]         off by at most 2^-11 |w|

The bound holds for the smallest numbers, too: a float16 is a multiple of 2^-24, therefore d s is, and one that is below
2^-13 is a float16 itself. A product beyond float16's largest number becomes infinite here; FileTensor then refuses it.

The other types have a scale for each 16 weights, or codes that stand for several weights; kernels have neither. They
are dequantized, and quantized as the plan says: Q6_K and Q2_K, NVFP4, and all IQ types but the two above.

The layouts are those of ggml's ggml-common.h. llmpq/quant/packing.py draws where a QuantTensor has its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmpq.checkpoint.tensor_index import STORED
from llmpq.quant import QuantTensor
from llmpq.quant.packing import pack

Decoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # packed codes as words; scales, offsets [b, groups]

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def read_blocks(raw: torch.Tensor, kind: str) -> QuantTensor:
    """The rows raw, uint8 [n, bytes], of `kind` as a QuantTensor [n, k].

    Raises ValueError if `kind` is none of STORED or raw is not rows of whole blocks.
    """
    if kind not in STORED:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(STORED)}")
    block, precision = _TYPES[kind], STORED[kind].precision
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] % block.nbytes:
        raise ValueError(
            f"raw is {raw.dtype} {list(raw.shape)}, expected uint8 [n, blocks of {block.nbytes} bytes] for {kind}"
        )
    n, k = raw.shape[0], raw.shape[1] // block.nbytes * block.weights
    codes, scales, offsets = block.decode(raw.reshape(-1, block.nbytes))
    words, groups = (n, k // 32 * precision.bits), (n, precision.num_groups(k))
    offsets = None if offsets is None else offsets.reshape(groups)
    return QuantTensor(codes.view(torch.int32).view(words), scales.reshape(groups), offsets, precision, (n, k))


def _q4_0(blocks: torch.Tensor) -> Decoded:
    return _nibbles(_field(blocks, 2, 18, torch.int16)), _field(blocks, 0, 2), None


def _q4_1(blocks: torch.Tensor) -> Decoded:
    return _nibbles(_field(blocks, 4, 20, torch.int16)), _field(blocks, 0, 2), _field(blocks, 2, 4)


def _q5_0(blocks: torch.Tensor) -> Decoded:
    return _fifth_bits(blocks[:, 2:]) + _each(128 - 16), _field(blocks, 0, 2), None


def _q5_1(blocks: torch.Tensor) -> Decoded:
    return _fifth_bits(blocks[:, 4:]), _field(blocks, 0, 2), _field(blocks, 2, 4)


def _q8_0(blocks: torch.Tensor) -> Decoded:
    return _field(blocks, 2, 34, torch.int64).bitwise_xor_(_each(128)), _field(blocks, 0, 2), None


def _iq4_nl(blocks: torch.Tensor) -> Decoded:
    return _looked_up(blocks[:, 2:], _IQ4_VALUES), _field(blocks, 0, 2), None


def _mxfp4(blocks: torch.Tensor) -> Decoded:
    e = blocks[:, :1].to(torch.int32)
    # 2^(e - 128) as a bfloat16, half of what e says, as the values are doubled. e = 255 stands for no number.
    scale = torch.where(e < 2, 0x20 << e, e - 1 << 7).masked_fill(e == 255, 0x7FC0).to(torch.int16)
    return _looked_up(blocks[:, 1:], _MXFP4_VALUES), scale.view(torch.bfloat16), None


def _q3_k(blocks: torch.Tensor) -> Decoded:
    """[32] third bits, [64] first two bits, [12] s + 32, d."""
    thirds, pairs = _field(blocks, 0, 32, torch.int64), _field(blocks, 32, 96, torch.int64).view(-1, 2, 4)
    low = torch.stack([pairs >> shift & _each(3) for shift in (0, 2, 4, 6)], 2).view(-1, 8, 4)
    high = torch.stack([(thirds >> i & _each(1)) << 2 for i in range(8)], 1)
    first, last = _field(blocks, 96, 104, torch.int64), _field(blocks, 104, 108, torch.int32)
    lower = torch.stack((first & _each(15), first >> 4 & _each(15)), 1).view(torch.uint8)
    upper = torch.stack([last >> shift & _each(3, 4) for shift in (0, 2, 4, 6)], 1).view(torch.uint8)
    s = (lower | upper.view(lower.shape) << 4).to(torch.int64).view(-1, 16, 1)
    # 128 - (s - 32)(q - 4) = (32 - s) q + 4 s, in the eight bytes of a word at once: none of them leaves 0 .. 252.
    codes = (low | high).view(-1, 16, 2) * (32 - s) + s * _each(4)
    return codes, -_field(blocks, 108, 110), None


def _q4_k(blocks: torch.Tensor) -> Decoded:
    codes = _nibbles(_field(blocks, 16, 144, torch.int16).view(-1, 4, 16))
    return codes, *_products(blocks)


def _q5_k(blocks: torch.Tensor) -> Decoded:
    """As Q4_K, with the fifth bit of code j in group i as bit i of byte j, before the others."""
    low = _bytes(_field(blocks, 48, 176, torch.int64).view(-1, 4, 4)).view(-1, 8, 4)
    fifths = _field(blocks, 16, 48, torch.int64)
    high = torch.stack([(fifths >> i & _each(1)) << 4 for i in range(8)], 1)
    return low | high, *_products(blocks)


def _iq4_xs(blocks: torch.Tensor) -> Decoded:
    """d, [8] upper 2 bits of s + 32, [8] lower 4 bits, codes."""
    upper, lower = _field(blocks, 2, 4, torch.int16), blocks[:, 4:8]
    low = torch.stack((lower & 15, lower >> 4), -1).view(-1, 8)
    high = torch.cat([upper >> 2 * i & 3 for i in range(8)], 1)
    s = (low | high << 4) - 32
    return _looked_up(blocks[:, 8:], _IQ4_VALUES), _product(_field(blocks, 0, 2), s), None


def _tq2_0(blocks: torch.Tensor) -> Decoded:
    words = _field(blocks, 0, 64, torch.int64).view(-1, 2, 4)
    codes = torch.stack([words >> shift & _each(3) for shift in (0, 2, 4, 6)], 2) + _each(4 - 1)
    return pack(codes.view(torch.uint8).view(-1, 256), 3), _field(blocks, 64, 66), None


def _tq1_0(blocks: torch.Tensor) -> Decoded:
    """[48] five digits in base 3 each, [4] four each; a byte is the digits' fraction of 256, rounded up."""
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        rest = blocks[:, start:stop]
        for _ in range(digits):
            parts.append(rest.to(torch.int16) * 3 >> 8)
            rest = rest * 3
    codes = torch.cat(parts, 1).to(torch.uint8) + (4 - 1)
    return pack(codes, 3), _field(blocks, 52, 54), None


def _field(blocks: torch.Tensor, start: int, stop: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Bytes start..stop of each block as numbers of `dtype` [b, count], copied to where such numbers may lie."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def _each(byte: int, count: int = 8) -> int:
    """The word of `count` bytes that are all `byte`."""
    return int.from_bytes(bytes([byte]) * count, "little", signed=True)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Packed codes of 4 bits, of int16 [..., w]: their low nibbles are 2w codes, their high ones the next 2w."""
    halves = words & 0x0F0F, (words >> 4).bitwise_and_(0x0F0F)
    low, high = (two.bitwise_or_(two >> 4).to(torch.uint8).view(torch.int64) for two in halves)
    return torch.stack((low, high), -2)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """The same for int64 [..., w], of whose nibbles each becomes a byte: int64 [..., 2, w]."""
    return torch.stack((words & _each(15), words >> 4 & _each(15)), -2)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bytes of codes of 5 bits, of uint8 [b, 4 + 16]: the fifth bits of all 32, then the others."""
    low = _bytes(_field(codes, 4, 20, torch.int64)).view(-1, 4)
    spread = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8) << 4  # bit i becomes byte i
    high = spread.view(torch.int64).view(-1).index_select(0, codes[:, :4].flatten().to(torch.int32))
    return low | high.view(low.shape)


def _looked_up(codes: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """Codes of 8 bits, of uint8 [b, blocks of 16]: the values of the low nibbles, then those of the high ones."""
    of_nibble = torch.tensor(values, dtype=torch.int16) + 128
    of_byte = (of_nibble[:, None] << 8 | of_nibble).flatten()
    both = of_byte.index_select(0, codes.flatten().to(torch.int32)).view(-1, 16)
    low, high = (half.to(torch.uint8).view(torch.int64) for half in (both, both >> 8))
    return torch.stack((low, high), -2)


def _products(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets, of blocks that begin with d, e and 12 bytes for s and t: [4] each, with the upper 2 bits of
    [4] more, whose lower 4 bits share the last bytes."""
    s, t, both = (_field(blocks, at, at + 4, torch.int32) for at in (4, 8, 12))
    low, high = _each(15, 4), _each(0x30, 4)
    scales = torch.cat((s & _each(63, 4), both & low | s >> 2 & high), 1).view(torch.uint8)
    offsets = torch.cat((t & _each(63, 4), both >> 4 & low | t >> 2 & high), 1).view(torch.uint8)
    return _product(_field(blocks, 0, 2), scales), -_product(_field(blocks, 2, 4), offsets)


def _product(factor: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    return (factor.float() * integers).half()


@dataclass(frozen=True, slots=True)
class _Block:
    weights: int
    nbytes: int
    decode: Callable[[torch.Tensor], Decoded]  # of uint8 [b, nbytes]


_TYPES = {
    "Q4_0": _Block(32, 18, _q4_0),
    "Q4_1": _Block(32, 20, _q4_1),
    "Q5_0": _Block(32, 22, _q5_0),
    "Q5_1": _Block(32, 24, _q5_1),
    "Q8_0": _Block(32, 34, _q8_0),
    "IQ4_NL": _Block(32, 18, _iq4_nl),
    "MXFP4": _Block(32, 17, _mxfp4),
    "Q3_K": _Block(256, 110, _q3_k),
    "Q4_K": _Block(256, 144, _q4_k),
    "Q5_K": _Block(256, 176, _q5_k),
    "IQ4_XS": _Block(256, 136, _iq4_xs),
    "TQ1_0": _Block(256, 54, _tq1_0),
    "TQ2_0": _Block(256, 66, _tq2_0),
}
