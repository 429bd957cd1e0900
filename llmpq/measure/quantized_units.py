"""Units as they would be served in a precision, for methods that measure what quantizing them does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.kernels import PreparedWeight
from llmpq.models.linear import QuantLinear
from llmpq.models.loading import Loader
from llmpq.spec import ModelSpec, Precision


class QuantizedUnits:
    """A UnitLoader on the CPU. Layers are to be asked for in the order of the model."""

    def __init__(self, spec: ModelSpec, source: WeightSource, token_ids: Sequence[int]) -> None:
        self._loader = Loader(spec, source, torch.device("cpu"), None, None)

    def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
        return self._loader.linear(unit, name, precision)

    def vector(self, unit: str, part: str) -> torch.Tensor:
        return self._loader.vector(unit, part)

    def table(self, unit: str, precision: Precision) -> PreparedWeight:
        """The table of the embedding or the head."""
        return self._loader.table(unit, self.table_precision(precision))

    def table_precision(self, precision: Precision) -> Precision:
        """What a table is quantized to in a plan that has `precision` for it."""
        return precision
