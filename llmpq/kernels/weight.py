"""PreparedWeight, a weight in one backend's own layout, and how one is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llmpq.kernels.registry import check_backend, choose, load
from llmpq.quant import QuantTensor
from llmpq.quant.tensor import SCALE_DTYPES
from llmpq.spec import W16, Precision

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP_BYTES = 16  # at multiples of which all allocations begin


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """An [n, k] weight as one backend multiplies it. One layout serves every m."""

    backend: str
    n: int
    k: int
    precision: Precision
    dtype: torch.dtype  # of the scales, or of the weight itself where it is not quantized
    device: torch.device
    data: tuple[torch.Tensor, ...]  # the backend's own

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.data)

    @cached_property
    def module(self) -> Any:
        """The backend."""
        return load(self.backend)

    @cached_property
    def activations(self) -> tuple[str, ...]:
        """The modes in which it can be multiplied."""
        return self.module.ACTIVATIONS if self.precision.quantized else ("a16",)

    @cached_property
    def handle(self) -> Any:
        """`data` as a compiled backend knows it."""
        return self.module.handle(self)


class ExpertWeights(tuple[PreparedWeight, ...]):
    """The weights of one linear of every expert, in order. Raises ValueError unless all but their numbers is alike."""

    def __new__(cls, weights: Iterable[PreparedWeight]) -> ExpertWeights:
        self = super().__new__(cls, weights)
        if not self:
            raise ValueError("weights is empty, expected one for each expert")
        kinds = [(w.precision, [w.n, w.k], w.dtype, w.backend, w.device) for w in self]
        for i, kind in enumerate(kinds):
            if kind != kinds[0]:
                found, expected = (" ".join(map(str, of)) for of in (kind, kinds[0]))
                raise ValueError(f"weight {i} is {found}, but weight 0 is {expected}")
        return self

    @cached_property
    def distances(self) -> torch.Tensor:
        """int64 [experts, tensors], on their device: how far each tensor of their data is from the first expert's.

        In steps of STEP_BYTES.
        """
        places = torch.tensor([[tensor.data_ptr() for tensor in w.data] for w in self])
        distances = places - places[0]
        assert not (distances % STEP_BYTES).any()
        return (distances // STEP_BYTES).to(self[0].device)


class WeightBuilder:
    """Makes a PreparedWeight from consecutive rows, so that fused and large weights never exist as originals.

    `dtype` is that of the scales (float16 or bfloat16), or of the weight where `precision` is w16 (float32, too).
    """

    def __init__(
        self,
        n: int,
        k: int,
        precision: Precision,
        dtype: torch.dtype,
        device: str | torch.device,
        backend: str | None = None,
    ) -> None:
        device = torch.device(device)
        dtypes = SCALE_DTYPES if precision.quantized else FLOAT_DTYPES
        if n < 1 or k < 1:
            raise ValueError(f"a weight of n = {n} and k = {k} has no elements")
        if dtype not in dtypes:
            raise ValueError(f"dtype is {dtype}, expected one of {dtypes} for {precision}")
        if backend is None:
            backend = choose(device, precision, dtype)
        check_backend(backend, device)
        if dtype == torch.float32 and backend != "reference":
            raise ValueError(f"dtype is {dtype}, which only the reference backend multiplies, not {backend!r}")
        data = load(backend).allocate(n, k, precision, dtype, device)
        self._weight = PreparedWeight(backend, n, k, precision, dtype, data[0].device, data)
        self._rows = 0

    def add(self, part: QuantTensor | torch.Tensor) -> None:
        """Append the next rows: a QuantTensor or a plain tensor [rows, k], stored as the precision says."""
        w = self._weight
        kind = QuantTensor if w.precision.quantized else torch.Tensor
        if not isinstance(part, kind):
            raise ValueError(f"part is a {type(part).__name__}, expected a {kind.__name__} for {w.precision}")
        dtype = part.scales.dtype if isinstance(part, QuantTensor) else part.dtype
        if isinstance(part, QuantTensor) and part.precision != w.precision:
            raise ValueError(f"part is {part.precision}, expected {w.precision}")
        if dtype != w.dtype:
            raise ValueError(f"part has dtype {dtype}, expected {w.dtype}")
        if len(part.shape) != 2 or part.shape[1] != w.k:
            raise ValueError(f"part has shape {list(part.shape)}, expected [rows, {w.k}]")
        rows = part.shape[0]
        if self._rows + rows > w.n:
            raise ValueError(f"part has {rows} rows, but only {w.n - self._rows} of {w.n} are missing")
        load(w.backend).fill(w.data, self._rows, part, n=w.n, k=w.k, precision=w.precision)
        self._rows += rows

    def finish(self) -> PreparedWeight:
        """The weight, once all rows are there."""
        if self._rows != self._weight.n:
            raise ValueError(f"only {self._rows} of {self._weight.n} rows were added")
        return self._weight


def prepare(
    weight: QuantTensor | torch.Tensor, device: str | torch.device = "cpu", *, backend: str | None = None
) -> PreparedWeight:
    """A weight [n, k] in the layout of a backend: the one named, else the best there is on `device`.

    A plain tensor may be float16 or bfloat16, or float32 in tests (reference backend). Raises ValueError; UsageError
    if LLMPQ_BACKEND names a backend that cannot run here.
    """
    if isinstance(weight, QuantTensor):
        precision, dtype = weight.precision, weight.scales.dtype
    else:
        precision, dtype = W16, weight.dtype
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [n, k]")
    builder = WeightBuilder(*weight.shape, precision, dtype, device, backend)
    builder.add(weight)
    return builder.finish()
