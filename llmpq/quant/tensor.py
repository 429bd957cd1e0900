"""QuantTensor: a weight as quantized, for files, tests and quantizers. Kernels hold it in layouts of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from llmpq.quant.packing import packed_words, unpack
from llmpq.spec import Precision

# Weights that are read, quantized, dequantized or laid out at once: few enough for their float32 temporaries to stay in
# a core's cache.
CHUNK = 2**18
GPU_CHUNK = 2**22  # and on a GPU: enough to keep it busy for as long as it takes to launch what is done to them
SCALE_DTYPES = (torch.float16, torch.bfloat16)


def numbers_at_once(device: torch.device) -> int:
    """How many weights are worked on at a time on a device."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def zeros_dtype(precision: Precision, scale_dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a QuantTensor's zeros; None: it has none."""
    return {"sym": None, "asym": torch.uint8, "offset": scale_dtype}[precision.zero]


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """An [n, k] weight, with one scale and zero for each group of codes along k. The precision says which zero it is:

    sym     w = scale * (code - 2**(bits - 1))
    asym    w = scale * (code - zero), zeros being codes
    offset  w = scale * code + zero, zeros being floating-point numbers as the scales

    All scales and offsets may have either sign.
    """

    qweight: torch.Tensor  # int32 [n, ceil(k / 32) * bits]; see llmpq/quant/packing.py
    scales: torch.Tensor  # float16 or bfloat16 [n, groups]; the last group of a row may be short
    zeros: torch.Tensor | None  # [n, groups]: uint8, or the scales' dtype; None: symmetric. See zeros_dtype
    precision: Precision
    shape: tuple[int, int]  # n, k

    def __post_init__(self) -> None:
        n, k = self.shape
        if not self.precision.quantized:
            raise ValueError("precision is w16, which is a plain tensor")
        groups = self.precision.num_groups(k)
        self._check("qweight", self.qweight, (torch.int32,), (n, packed_words(k, self.precision.bits)))
        self._check("scales", self.scales, SCALE_DTYPES, (n, groups))
        kind = zeros_dtype(self.precision, self.scales.dtype)
        if kind is not None:
            self._check("zeros", self.zeros, (kind,), (n, groups))
        elif self.zeros is not None:
            raise ValueError(f"zeros is given, but {self.precision} is symmetric")

    def _check(
        self, field: str, tensor: torch.Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]
    ) -> None:
        expected = f"expected {' or '.join(str(dtype) for dtype in dtypes)} {list(shape)}"
        if tensor is None:
            raise ValueError(f"{field} is missing, {expected}")
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            raise ValueError(f"{field} is {tensor.dtype} {list(tensor.shape)}, {expected}")
        if tensor.device != self.qweight.device:
            raise ValueError(f"{field} is on {tensor.device}, but qweight is on {self.qweight.device}")

    @property
    def nbytes(self) -> int:
        return self.qweight.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """Rows start..stop as a view."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} are not rows of a weight with n = {self.shape[0]}")
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantTensor(
            self.qweight[start:stop], self.scales[start:stop], zeros, self.precision, (stop - start, self.shape[1])
        )

    def to(self, device: torch.device) -> QuantTensor:
        """The same on a device; itself if it is there."""
        if self.qweight.device == device:
            return self
        zeros = None if self.zeros is None else self.zeros.to(device)
        return QuantTensor(self.qweight.to(device), self.scales.to(device), zeros, self.precision, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [n, k] that this tensor stands for, by definition.

        float32 holds scale * (code - zero) exactly: a 16-bit scale has at most 11 significant bits, code - zero at most
        9. scale * code + offset is rounded once. Other dtypes round these float32 numbers.
        """
        codes = unpack(self.qweight, self.precision.bits, self.shape[1])
        return dequantize_codes(codes, self.scales, self.zeros, self.precision).to(dtype)


def dequantize_codes(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, precision: Precision
) -> torch.Tensor:
    """float32 [rows, k] of codes uint8 [rows, k], scales and zeros [rows, groups]: QuantTensor's formulas."""
    k = codes.shape[1]
    group = precision.group_size or k
    grouped = torch.unflatten(pad(codes, (0, -k % group)), 1, (-1, group)).to(torch.float32)
    if zeros is None:
        grouped -= 2 ** (precision.bits - 1)
    elif precision.zero == "asym":
        grouped -= zeros[..., None]
    grouped *= scales[..., None]
    if zeros is not None and precision.zero == "offset":
        grouped += zeros[..., None]
    return grouped.flatten(1)[:, :k]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What a quantizer may know of a linear's inputs x, over the tokens of a calibration text."""

    second_moment: torch.Tensor  # float64 [k, k]: mean of x x^T
    # float64 [n, k]: mean of (what the linear should give - W x) x^T, if that is not zero
    drift: torch.Tensor | None = None
