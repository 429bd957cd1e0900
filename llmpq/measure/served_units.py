"""Units as they would be served in a precision, for methods that measure what quantizing them does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from llmpq.checkpoint.weights import WeightSource, dense_expert
from llmpq.kernels import PreparedWeight, prepare
from llmpq.measure.calibration_pass import CalibrationPass, second_moment
from llmpq.measure.expert_inputs import of_each_expert, of_sample
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
        (weight,) = self._fitted(unit, name, precision)
        bias = self.vector(unit, f"{name}.bias") if self._spec.linears(unit)[name].bias else None
        return QuantLinear(weight, bias)

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        if not precision.calibrated:
            return self._loader.experts(unit, name, precision)
        return ExpertLinear([*self._fitted(unit, name, precision)], self._loader.expert_biases(unit, name))

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
            return self._quantized(unit, "table", precision, InputStatistics(self._shared_table))
        if unit == "head":
            (table,) = self._fitted(unit, "table", precision)
            return table
        return self._loader.table(unit, replace(precision, quantizer="rtn"))

    def _text(self) -> CalibrationPass:
        return CalibrationPass(self._spec, self._source, self._token_ids, SEQUENCES, SEQUENCE_LENGTH)

    def _fitted(self, unit: str, name: str, precision: Precision) -> Iterator[PreparedWeight]:
        """The weight of a linear, or those of its experts in turn."""
        if self._inputs is None:
            self._inputs = _Inputs(self._spec, self._text())
        for expert, statistics in enumerate(self._inputs.statistics(unit, name)):
            yield self._quantized(unit, name, precision, statistics, expert)

    def _quantized(
        self, unit: str, name: str, precision: Precision, statistics: InputStatistics, expert: int = 0
    ) -> PreparedWeight:
        scale_dtype = getattr(torch, self._spec.dtype)
        weight = dense_expert(self._source, unit, name, self._spec.linears(unit)[name].n, expert)
        return prepare(quantize(weight, precision, scale_dtype=scale_dtype, inputs=statistics))


class _Inputs:
    """What goes into the linears of a model that a text is read by, one unit after the other."""

    def __init__(self, spec: ModelSpec, text: CalibrationPass) -> None:
        self._spec, self._text = spec, text
        self._hidden_states = self._text.embed()
        self._unit = 0
        self._moments: dict[str, torch.Tensor] = {}  # of the unit's linears that all tokens go through
        # Of linears of experts: x, and the experts [t, K] that tokens chose. Moments of all experts at once would take
        # much more memory, so each is made when it is asked for.
        self._chosen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def statistics(self, unit: str, name: str) -> Iterator[InputStatistics]:
        """Of a linear, or of each expert's. Units before the last one asked for are gone."""
        while self._spec.units[self._unit] != unit:
            self._unit += 1
            self._moments.clear()
            self._chosen.clear()
            if self._spec.units[self._unit] == "head":
                self._note("table", None, (self._text.before_table(self._hidden_states),))
            else:
                self._layer(self._unit - 1)
        if name in self._moments:
            yield InputStatistics(self._moments[name])
            return
        x, experts = self._chosen[name]
        for chosen in of_each_expert(experts, self._spec.linears(unit)[name].experts):
            rows = x[chosen.rows(name)]
            yield of_sample(InputStatistics(second_moment(rows)), len(rows))

    def _layer(self, index: int) -> None:
        layer = self._text.layer(index)
        for name in self._spec.linears(f"layer.{index}"):
            layer.linear(name).register_forward_pre_hook(partial(self._note, name))
        self._hidden_states = self._text.run(layer, self._hidden_states)

    def _note(self, name: str, module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, ExpertLinear):
            self._chosen[name] = inputs[0].clone(), inputs[1].clone()
        else:
            self._moments[name] = second_moment(inputs[0])
