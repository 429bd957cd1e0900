"""How both GPU backends hold a quantized weight: one layout, made once, whose words tensor cores take as they come.

Rows lie in panels of 16, as many as one tensor-core instruction multiplies. A block of 32 codes of a row is four octets
of eight, and a plane holds one word for every row of a panel and every octet of a block, word t being octet t:

    qweight  int32 [ceil(n / 16), planes, 16 rows, 4 octets]
    scales   float16 or bfloat16 [ceil(n / 16), groups, 16 rows]
    zeros    uint8, or offsets of the scales' dtype; as the scales; absent in a symmetric weight

    8 bits  two planes a block: codes 0..3 of each octet in the first, 4..7 in the second, the lowest byte first
    4 bits  one plane a block, in nibbles:

              most significant                           least significant
              | code 7 | code 5 | code 3 | code 1 | code 6 | code 4 | code 2 | code 0 |

    3 bits  three planes for four blocks. Plane p is block p in nibbles, as with 4 bits; bit p of the codes of block 3
            is in the free top bits of the nibbles of plane p. Of the last, fewer than four blocks, each has a plane.

So `word >> 4 * i & 0x000F000F` is codes 2i and 2i + 1, one in each half of a register, and the octet x[8t .. 8t + 7] of
a row of x goes with word t as it lies in memory. The thread that holds octet t of a row is the one that the
instruction wants to hold four of its columns; which four columns of k they are is free, as sums do not care.
Rows beyond n and codes beyond k are 0.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from llmpq.kernels.backends import reference
from llmpq.kernels.weight import PreparedWeight
from llmpq.quant import QuantTensor
from llmpq.quant.packing import unpack
from llmpq.quant.tensor import GPU_CHUNK, dequantize_codes, zeros_dtype
from llmpq.spec import BLOCK, Precision

PANEL = 16  # rows
OCTETS = 4  # in a block
_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # the code in each nibble of a word, from the least significant on


def num_planes(k: int, bits: int) -> int:
    """Planes of a panel."""
    blocks = -(-k // BLOCK)
    return {8: 2 * blocks, 4: blocks, 3: blocks - blocks // 4}[bits]


def allocate(
    n: int, k: int, precision: Precision, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """(weight,), or (qweight, scales[, zeros]) with rows filled up to whole panels."""
    if not precision.quantized:
        return reference.allocate(n, k, precision, dtype, device)
    panels, groups = -(-n // PANEL), precision.num_groups(k)
    qweight = torch.empty(panels, num_planes(k, precision.bits), PANEL, OCTETS, dtype=torch.int32, device=device)
    data = [qweight, torch.empty(panels, groups, PANEL, dtype=dtype, device=device)]
    if (kind := zeros_dtype(precision, dtype)) is not None:
        data.append(torch.empty(panels, groups, PANEL, dtype=kind, device=device))
    for tensor in data:
        tensor[-1].zero_()
    return tuple(data)


def fill(
    data: tuple[torch.Tensor, ...],
    row_start: int,
    part: QuantTensor | torch.Tensor,
    *,
    n: int,
    k: int,
    precision: Precision,
) -> None:
    """Lay out the rows of `part` from row_start on, where `data` is: packed rows are the least to bring there."""
    if not isinstance(part, QuantTensor):
        return reference.fill(data, row_start, part, n=n, k=k, precision=precision)
    step = max(1, GPU_CHUNK // k)
    for start in range(0, part.shape[0], step):
        rows = part.rows(start, min(start + step, part.shape[0])).to(data[0].device)
        at = torch.arange(row_start + start, row_start + start + rows.shape[0], device=data[0].device)
        panel, row = at // PANEL, at % PANEL
        data[0][panel, :, row] = planes(unpack(rows.qweight, precision.bits, -(-k // BLOCK) * BLOCK), precision.bits)
        for target, source in zip(data[1:], (rows.scales, rows.zeros)):
            if source is not None:
                target[panel, :, row] = source
    return None


def planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [rows, blocks * 32] as the words of their planes: int32 [rows, planes, 4]."""
    octets = torch.unflatten(codes, 1, (-1, OCTETS, 8))
    blocks = octets.shape[1]
    if bits == 8:
        return (
            torch.unflatten(octets, 3, (2, 4)).transpose(2, 3).flatten(1, 2).contiguous().view(torch.int32).squeeze(-1)
        )
    if bits == 3:
        octets = torch.unflatten(pad(octets, (0, 0, 0, 0, 0, -blocks % 4)), 1, (-1, 4))
        plane = torch.arange(3, dtype=torch.uint8, device=codes.device)[:, None, None]
        octets = (octets[:, :, :3] | (octets[:, :, 3:] >> plane & 1) << 3).flatten(1, 2)
    nibbles = octets[:, : num_planes(codes.shape[1], bits), :, _NIBBLES]
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def codes_of(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse of `planes`: uint8 [rows, k]."""
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)  # [rows, planes, 4, 4 bytes]
    if bits == 8:
        return torch.unflatten(octets, 1, (-1, 2)).transpose(2, 3).flatten(1)[:, :k]
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(3)
    # The inverse of _NIBBLES; a list as an index would be copied to the device, for which a graph cannot be captured.
    octets = torch.stack((nibbles[..., :4], nibbles[..., 4:]), dim=-1).flatten(-2)
    if bits == 3:
        octets = torch.unflatten(pad(octets, (0, 0, 0, 0, 0, -octets.shape[1] % 3)), 1, (-1, 3))
        top = octets >> 3
        last = top[:, :, 0] | top[:, :, 1] << 1 | top[:, :, 2] << 2
        octets = torch.cat((octets & 7, last.unsqueeze(2)), dim=2).flatten(1, 2)
    return octets.flatten(1)[:, :k]


def embedding(ids: torch.Tensor, w: PreparedWeight, out: torch.Tensor) -> None:
    """Rows ids (int64 [t]) of the weight, dequantized, in `out` [t, k]."""
    out.copy_(rows(ids, w))


def rows(ids: torch.Tensor, w: PreparedWeight) -> torch.Tensor:
    """Rows ids (int64 [t]) of the weight [t, k], float32 where they were dequantized."""
    if not w.precision.quantized:
        return w.data[0][ids]
    panel, row = ids // PANEL, ids % PANEL
    qweight, scales, *zeros = (tensor[panel, :, row] for tensor in w.data[: 2 + (w.precision.zero != "sym")])
    codes = codes_of(qweight, w.precision.bits, w.k)
    return dequantize_codes(codes, scales, zeros[0] if zeros else None, w.precision)
