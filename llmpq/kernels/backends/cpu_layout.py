"""Weights as the C++ kernels read them, in panels of 16 rows; csrc/cpu/kernels.h draws it."""

from __future__ import annotations

import torch

from llmpq.kernels.backends import large_pages
from llmpq.kernels.backends.cpu_extension import extension as _cpu
from llmpq.quant import QuantTensor
from llmpq.quant.packing import packed_words
from llmpq.quant.tensor import zeros_dtype
from llmpq.spec import BLOCK, Precision

PANEL = 16  # rows that are interleaved: lane = row


def allocate(
    n: int, k: int, precision: Precision, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """(panels,) or (panels, scales[, zeros]), with n filled up to whole panels of 16 rows and k to whole blocks.

    panels: 3, 4 and 8 bits: int32 [n / 16, words, 16]; 16 bits: `dtype` [n / 16, k, 16].
    scales `dtype`, zeros uint8 or, where they are offsets, `dtype`: [n / 16, groups, 16].
    """
    count, columns = -(-n // PANEL), -(-k // BLOCK) * BLOCK
    if precision.quantized:
        shape, kind = (count, packed_words(k, precision.bits), PANEL), torch.int32
    else:
        shape, kind = (count, columns, PANEL), dtype
    data = [large_pages.empty(shape, kind)]
    if precision.quantized:
        groups = (count, precision.num_groups(k), PANEL)
        data.append(large_pages.empty(groups, dtype))
        if (of_zeros := zeros_dtype(precision, dtype)) is not None:
            data.append(large_pages.empty(groups, of_zeros))
    else:
        data[0][:, k:].zero_()
    if n % PANEL:
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
    """Lay out the rows of `part` from row_start on."""
    if not isinstance(part, QuantTensor):
        _fill_panels(data[0], row_start, part)
        return
    for panels, rows in zip(data, (part.qweight, part.scales, part.zeros), strict=False):
        if rows is not None:
            _fill_panels(panels, row_start, rows)


def _fill_panels(panels: torch.Tensor, first_row: int, rows: torch.Tensor) -> None:
    """Write rows [r, w] into panels [n / 16, >= w, 16] from row `first_row` on."""
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    _cpu.fill_panels(
        *(rows.data_ptr(), panels.data_ptr(), first_row, len(rows), rows.shape[1], rows.stride(0)),
        *(panels.shape[1], rows.element_size()),
    )
