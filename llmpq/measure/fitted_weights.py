"""What each linear of a model is to be quantized to, and its weights so quantized: for their inputs or for any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from llmpq.checkpoint.weights import WeightSource, dense_expert, floating, is_finite
from llmpq.quant import InputStatistics, QuantTensor, quantize
from llmpq.spec import LinearShape, ModelSpec, Precision, UnitPrecision, UsageError

Weights = dict[str, QuantTensor]  # of a unit, by linear


def shares_table(spec: ModelSpec, options: Mapping[str, UnitPrecision]) -> bool:
    """Whether embedding and head still have one table."""
    return spec.tied_embeddings and options["embedding"] == options["head"]


def needs_text(spec: ModelSpec, options: Mapping[str, UnitPrecision]) -> bool:
    """Whether some linear is to be quantized for its inputs, and is not stored so already."""
    weights = _Precisions(spec, options)
    return any(weights.needs_inputs(unit, name) for unit in spec.units for name in spec.linears(unit))


class _Precisions:
    """What each linear of a model is to be quantized to."""

    def __init__(self, spec: ModelSpec, options: Mapping[str, UnitPrecision]) -> None:
        self.spec = spec
        self._precisions = {unit: spec.linear_precisions(unit, options[unit]) for unit in spec.units}
        self._copied = "head" if shares_table(spec, options) else "embedding"  # whose table is not quantized for inputs

    def of(self, unit: str, name: str) -> Precision:
        return self._precisions[unit][name]

    def is_stored(self, unit: str, name: str) -> bool:
        return self.spec.stored.get(unit, {}).get(name) == self.of(unit, name)

    def needs_inputs(self, unit: str, name: str) -> bool:
        """Whether it is quantized for its inputs."""
        return self.of(unit, name).calibrated and unit != self._copied and not self.is_stored(unit, name)


class FittedWeights(_Precisions):
    """With the weights themselves. What is quantized is finite: else UsageError."""

    def __init__(self, spec: ModelSpec, source: WeightSource, options: Mapping[str, UnitPrecision]) -> None:
        super().__init__(spec, options)
        self._source = source
        self._scale_dtype: torch.dtype = getattr(torch, spec.dtype)

    def shape(self, unit: str, name: str) -> LinearShape:
        return self.spec.linears(unit)[name]

    def dense(self, unit: str, name: str, expert: int = 0) -> torch.Tensor:
        """The weight of a linear, or of one expert's, as the checkpoint has it: float32 [n, k]."""
        return dense_expert(self._source, unit, name, self.shape(unit, name).n, expert)

    def rounded(self, unit: str) -> Weights:
        """A unit's linears that are quantized whatever their inputs are."""
        names = (name for name in self.spec.linears(unit) if self.of(unit, name).quantized)
        return {name: self._round(unit, name) for name in names if not self.needs_inputs(unit, name)}

    def _round(self, unit: str, name: str) -> QuantTensor:
        """As it is stored, if that is its precision; else rounded to nearest, whatever the precision's quantizer."""
        precision, stored = self.of(unit, name), self._source.rows(unit, f"{name}.weight")
        if self.is_stored(unit, name):
            return joined([rows for rows in stored if isinstance(rows, QuantTensor)])
        plain = replace(precision, quantizer="rtn")
        portions = [quantize(floating(rows), plain, scale_dtype=self._scale_dtype) for rows in stored]
        return self._finite(unit, name, replace(joined(portions), precision=precision))

    def fitted(self, unit: str, name: str, weight: torch.Tensor, statistics: InputStatistics) -> QuantTensor:
        """A weight of this linear, quantized for its inputs."""
        if not all(bool(x.isfinite().all()) for x in (statistics.second_moment, statistics.drift) if x is not None):
            raise UsageError(f"{self.spec.name}: what goes into {unit}.{name} is too large for float32, or no number")
        precision = self.of(unit, name)
        return self._finite(unit, name, quantize(weight, precision, scale_dtype=self._scale_dtype, inputs=statistics))

    def _finite(self, unit: str, name: str, weight: QuantTensor) -> QuantTensor:
        """UsageError if scales have become infinite in the model's own type."""
        if not is_finite(weight):
            raise UsageError(f"{self.spec.name}: {unit}.{name} holds numbers too large for {self.spec.dtype}")
        return weight


def joined(portions: Sequence[QuantTensor]) -> QuantTensor:
    """Rows after each other."""
    first = portions[0]
    zeros = None if first.zeros is None else torch.cat([p.zeros for p in portions if p.zeros is not None])
    return QuantTensor(
        torch.cat([p.qweight for p in portions]),
        torch.cat([p.scales for p in portions]),
        zeros,
        first.precision,
        (sum(p.shape[0] for p in portions), first.shape[1]),
    )
