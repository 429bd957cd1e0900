"""Units as they would be served in a precision, for methods that measure what quantizing them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from llmpq.checkpoint.weights import WeightSource, dense
from llmpq.kernels import PreparedWeight, prepare
from llmpq.measure.calibration_pass import CalibrationPass, second_moment
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.models.loading import Loader
from llmpq.quant import InputStatistics, quantize
from llmpq.spec import ModelSpec, Precision

SEQUENCES, SEQUENCE_LENGTH = 16, 512  # of calibration text, for quantizers that know a linear's inputs


class ServedUnits:
    """A UnitLoader on the CPU. Layers are to be asked for in the order of the model.

    For a quantizer that knows a linear's inputs, these are those of the model as it is: errors that layers before it
    have made by then, which the real quantizer makes good in part, depend on a plan. A table that embedding and head
    share is quantized for both; the rows of another embedding are copied, not multiplied, and rounded to nearest.
    """

    def __init__(self, spec: ModelSpec, source: WeightSource, token_ids: Sequence[int]) -> None:
        self._spec, self._source, self._token_ids = spec, source, token_ids
        self._loader = Loader(spec, source, torch.device("cpu"), None, None)
        self._inputs: _Inputs | None = None
        self._shared_table: torch.Tensor | None = None

    def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
        if not precision.calibrated:
            return self._loader.linear(unit, name, precision)
        weight = self._fitted(unit, name, precision)
        bias = self.vector(unit, f"{name}.bias") if self._spec.linears(unit)[name].bias else None
        return QuantLinear(weight, bias)

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        """Those of a layer, which are rounded to nearest: few tokens of a text go through each."""
        nearest = replace(precision, quantizer="rtn") if precision.calibrated else precision
        return self._loader.experts(unit, name, nearest)

    def plain(self, unit: str, name: str) -> QuantLinear:
        return self._loader.plain(unit, name)

    def vector(self, unit: str, part: str) -> torch.Tensor:
        return self._loader.vector(unit, part)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._loader.on_device(tensor)

    def table(self, unit: str, precision: Precision) -> PreparedWeight:
        """The table of the embedding or the head."""
        if not precision.calibrated:
            return self._loader.table(unit, precision)
        if self._spec.tied_embeddings:
            if self._shared_table is None:
                self._shared_table = self._text().shared_table()
            return self._quantized(unit, "table", precision, self._shared_table)
        if unit == "head":
            return self._fitted(unit, "table", precision)
        return self._loader.table(unit, replace(precision, quantizer="rtn"))

    def _text(self) -> CalibrationPass:
        return CalibrationPass(self._spec, self._source, self._token_ids, SEQUENCES, SEQUENCE_LENGTH)

    def _fitted(self, unit: str, name: str, precision: Precision) -> PreparedWeight:
        if self._inputs is None:
            self._inputs = _Inputs(self._spec, self._text())
        return self._quantized(unit, name, precision, self._inputs.second_moment(unit, name))

    def _quantized(self, unit: str, name: str, precision: Precision, second_moment: torch.Tensor) -> PreparedWeight:
        weight, scale_dtype = dense(self._source, unit, f"{name}.weight"), getattr(torch, self._spec.dtype)
        return prepare(quantize(weight, precision, scale_dtype=scale_dtype, inputs=InputStatistics(second_moment)))


class _Inputs:
    """What goes into the linears of a model that a text is read by, one unit after the other."""

    def __init__(self, spec: ModelSpec, text: CalibrationPass) -> None:
        self._spec, self._text = spec, text
        self._hidden_states = self._text.embed()
        self._unit = 0
        self._moments: dict[str, torch.Tensor] = {}  # of the unit's linears

    def second_moment(self, unit: str, name: str) -> torch.Tensor:
        """float64 [k, k]: mean of x x^T over tokens. Units before the last one asked for are gone."""
        while self._spec.units[self._unit] != unit:
            self._unit += 1
            self._moments.clear()
            if self._spec.units[self._unit] == "head":
                self._note("table", None, (self._text.before_table(self._hidden_states),))
            else:
                self._layer(self._unit - 1)
        return self._moments[name]

    def _layer(self, index: int) -> None:
        layer = self._text.layer(index)
        for name, shape in self._spec.linears(f"layer.{index}").items():
            if shape.experts == 1:
                layer.linear(name).register_forward_pre_hook(partial(self._note, name))
        self._hidden_states = self._text.run(layer, self._hidden_states)

    def _note(self, name: str, module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self._moments[name] = second_moment(inputs[0])
