"""Rows of GGUF's Q4_0, Q4_1 and Q8_0 as QuantTensors: the same codes, scales and offsets, moved to other places.

A row is a sequence of blocks of 32 weights:

    Q4_0   scale float16, 16 bytes                     w = scale * (code - 8)
    Q4_1   scale and offset float16, 16 bytes          w = scale * code + offset
    Q8_0   scale float16, 32 int8                      w = scale * value          code = value + 128

With 4 bits, the low nibble of byte i is code i, the high nibble code 16 + i. llmpq/quant/packing.py draws where a
QuantTensor has them.
"""

from __future__ import annotations

import torch

from llmpq.checkpoint.tensor_index import STORED
from llmpq.quant import QuantTensor
from llmpq.spec import BLOCK

_HALF = 2  # bytes of a float16


def read_blocks(raw: torch.Tensor, kind: str) -> QuantTensor:
    """The rows raw, uint8 [n, bytes], of `kind` as a QuantTensor [n, k] with groups of 32; no number is rounded.

    Raises ValueError if `kind` is none of STORED or raw is not rows of whole blocks.
    """
    if kind not in STORED:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(STORED)}")
    precision = STORED[kind]
    head = _HALF * (1 + (precision.zero == "offset"))
    size = head + BLOCK * precision.bits // 8
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] % size:
        raise ValueError(f"raw is {raw.dtype} {list(raw.shape)}, expected uint8 [n, blocks of {size} bytes] for {kind}")
    blocks = raw.unflatten(1, (-1, size))
    numbers = blocks[..., :head].contiguous().view(torch.float16)  # [n, blocks, 1 or 2]
    codes = blocks[..., head:]
    if precision.bits == 8:
        codes = codes ^ 128
    else:
        even, odd = codes[..., 0::2], codes[..., 1::2]
        codes = torch.cat((even & 15 | odd << 4, even >> 4 | odd & 0xF0), dim=-1)
    offsets = numbers[..., 1].contiguous() if precision.zero == "offset" else None
    qweight = codes.flatten(1).contiguous().view(torch.int32)
    shape = (raw.shape[0], blocks.shape[1] * BLOCK)
    return QuantTensor(qweight, numbers[..., 0].contiguous(), offsets, precision, shape)
