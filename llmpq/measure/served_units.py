"""Units as they would be served in a precision, for methods that measure what quantizing them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from llmpq.checkpoint.weights import WeightSource, dense
from llmpq.kernels import PreparedWeight, prepare
from llmpq.measure.calibration_pass import CalibrationPass, mean_product
from llmpq.models.linear import QuantLinear
from llmpq.models.loading import Loader
from llmpq.quant.gptq import InputStatistics, quantize_for_inputs
from llmpq.spec import ModelSpec, Precision

SEQUENCES, SEQUENCE_LENGTH = 16, 512  # of calibration text, for quantizers that know a linear's inputs


class ServedUnits:
    """A UnitLoader on the CPU. Layers are to be asked for in the order of the model.

    For a quantizer that knows a linear's inputs, these are those of the model as it is: errors that layers before it
    have made by then, which the real quantizer makes good in part, depend on a plan. Embeddings are copied, not
    multiplied, so they are rounded to nearest, and with them the head's table if it is the same.
    """

    def __init__(self, spec: ModelSpec, source: WeightSource, token_ids: Sequence[int]) -> None:
        self._spec, self._source, self._token_ids = spec, source, token_ids
        self._loader = Loader(spec, source, torch.device("cpu"), None, None)
        self._inputs: _Inputs | None = None

    def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
        if precision.quantizer != "gptq":
            return self._loader.linear(unit, name, precision)
        weight = self._fitted(unit, name, precision)
        bias = self.vector(unit, f"{name}.bias") if self._spec.layer_linears[name].bias else None
        return QuantLinear(weight, bias)

    def vector(self, unit: str, part: str) -> torch.Tensor:
        return self._loader.vector(unit, part)

    def table(self, unit: str, precision: Precision) -> PreparedWeight:
        """The table of the embedding or the head."""
        if precision.quantizer != "gptq":
            return self._loader.table(unit, precision)
        if unit == "head" and not self._spec.tied_embeddings:
            return self._fitted(unit, "table", precision)
        return self._loader.table(unit, replace(precision, quantizer="rtn"))

    def _fitted(self, unit: str, name: str, precision: Precision) -> PreparedWeight:
        if self._inputs is None:
            self._inputs = _Inputs(self._spec, self._source, self._token_ids)
        weight = dense(self._source, unit, f"{name}.weight")
        statistics = InputStatistics(self._inputs.second_moment(unit, name), torch.zeros(weight.shape).double())
        return prepare(quantize_for_inputs(weight, precision, getattr(torch, self._spec.dtype), statistics))


class _Inputs:
    """What goes into the linears of a model that a text is read by, one unit after the other."""

    def __init__(self, spec: ModelSpec, source: WeightSource, token_ids: Sequence[int]) -> None:
        self._spec = spec
        self._text = CalibrationPass(spec, source, token_ids, SEQUENCES, SEQUENCE_LENGTH)
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
        for name in self._spec.layer_linears:
            getattr(layer, name).register_forward_pre_hook(partial(self._note, name))
        self._hidden_states = self._text.run(layer, self._hidden_states)

    def _note(self, name: str, module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self._moments[name] = mean_product(inputs[0], inputs[0])
