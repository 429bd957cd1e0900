"""Quantizing for the inputs that linears get: one pass of a calibration text through the model, unit by unit.

Two streams of hidden states go through each layer: that of the model as it is, and that of the units quantized so far.
A linear of the second is quantized when its input arrives, and multiplies it at once: what comes after is quantized for
what it will really get. Held are one unit, and what goes into its linears for all tokens of the text.

Experts are rounded to nearest: of a text, few tokens go through each, and each would need inputs of its own.

An embedding's rows are copied, not multiplied, so they are rounded to nearest. Where the head has the same table, that
matters far more: the table is quantized for what goes into the head of the model as it is, which takes a pass ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from llmpq.checkpoint.weights import WeightSource, dense, floating, is_finite
from llmpq.kernels import prepare
from llmpq.measure.calibration_pass import CalibrationPass, mean_product, second_moment
from llmpq.models.decoder import DecoderLayer
from llmpq.models.linear import DenseLinear, ExpertLinear
from llmpq.models.loading import Loader
from llmpq.progress import Notify, counted, silent
from llmpq.quant import InputStatistics, QuantTensor, quantize
from llmpq.spec import ModelSpec, Precision, UnitPrecision, UsageError

SEQUENCES, SEQUENCE_LENGTH = 64, 512  # of calibration text; half of it leaves an eighth more KL in bed A
TABLE_SEQUENCES = 16  # of them, for a shared table: fewer are enough, as its inputs are only hidden_size wide

Weights = dict[str, QuantTensor]  # of a unit, by linear
Finished = Callable[[str], Weights | None]  # the weights of a unit that are there already
Run = Callable[[torch.Tensor], torch.Tensor]  # hidden states before a layer to those after it


def nothing_finished(unit: str) -> Weights | None:
    return None


@torch.inference_mode()
def quantized_in_turn(
    spec: ModelSpec,
    source: WeightSource,
    options: Mapping[str, UnitPrecision],
    token_ids: Sequence[int],
    finished: Finished = nothing_finished,
    notify: Notify = silent,
    *,
    sequences: int = SEQUENCES,
) -> Iterator[tuple[str, Weights]]:
    """Each unit in turn with its quantized linears, as `options` says; those of 16 bit are left out.

    `token_ids` are read in at most `sequences` equal pieces from all over the text. What is `finished` is taken as it
    is, and a later call with the same arguments yields the same. Raises UsageError for a text without tokens, and for
    weights or inputs that are too large.
    """
    weights, shared = _Weights(spec, source, options), shares_table(spec, options)
    streams = _Streams(spec, source, token_ids, sequences) if needs_text(spec, options) else None
    unit_done = counted(notify, "quantizing", len(spec.units))
    for unit in spec.units:
        found = {} if unit == "head" and shared else finished(unit)
        if streams is None:
            found = weights.rounded(unit) if found is None else found
        elif unit == "embedding":
            found = streams.embedding(weights) if found is None else found
            streams.embed(found.get("table"))
        elif unit == "head":
            found = streams.head(weights) if found is None else found
        else:
            with _bfloat16_products():
                found = streams.layer(unit, weights, found)
        yield unit, found
        unit_done()


def shares_table(spec: ModelSpec, options: Mapping[str, UnitPrecision]) -> bool:
    """Whether embedding and head still have one table."""
    return spec.tied_embeddings and options["embedding"] == options["head"]


def rounds_experts(spec: ModelSpec, options: Mapping[str, UnitPrecision]) -> bool:
    """Whether experts are to be rounded to nearest though the quantizer is one that asks for inputs."""
    weights = _Precisions(spec, options)
    return any(
        shape.experts > 1 and weights.of(unit, name).calibrated and not weights.is_stored(unit, name)
        for unit in spec.units
        for name, shape in spec.linears(unit).items()
    )


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
        """Whether it is quantized for its inputs. Experts never are, as few tokens of a text go through each."""
        one = self.spec.linears(unit)[name].experts == 1
        return one and self.of(unit, name).calibrated and unit != self._copied and not self.is_stored(unit, name)


class _Weights(_Precisions):
    """With the weights themselves."""

    def __init__(self, spec: ModelSpec, source: WeightSource, options: Mapping[str, UnitPrecision]) -> None:
        super().__init__(spec, options)
        self._source = source
        self._scale_dtype: torch.dtype = getattr(torch, spec.dtype)

    def rounded(self, unit: str) -> Weights:
        """A unit's linears that are quantized whatever their inputs are."""
        names = (name for name in self.spec.linears(unit) if self.of(unit, name).quantized)
        return {name: self._round(unit, name) for name in names if not self.needs_inputs(unit, name)}

    def _round(self, unit: str, name: str) -> QuantTensor:
        """As it is stored, if that is its precision; else rounded to nearest, whatever the precision's quantizer."""
        precision, stored = self.of(unit, name), self._source.rows(unit, f"{name}.weight")
        if self.is_stored(unit, name):
            return _joined([rows for rows in stored if isinstance(rows, QuantTensor)])
        plain = replace(precision, quantizer="rtn")
        portions = [quantize(floating(rows), plain, scale_dtype=self._scale_dtype) for rows in stored]
        return self._finite(unit, name, replace(_joined(portions), precision=precision))

    def fitted(self, unit: str, name: str, weight: torch.Tensor, statistics: InputStatistics) -> QuantTensor:
        if not all(bool(x.isfinite().all()) for x in (statistics.second_moment, statistics.drift) if x is not None):
            raise UsageError(f"{self.spec.name}: what goes into {unit}.{name} is too large for float32, or no number")
        precision = self.of(unit, name)
        return self._finite(unit, name, quantize(weight, precision, scale_dtype=self._scale_dtype, inputs=statistics))

    def _finite(self, unit: str, name: str, weight: QuantTensor) -> QuantTensor:
        """UsageError if scales have become infinite in the model's own type."""
        if not is_finite(weight):
            raise UsageError(f"{self.spec.name}: {unit}.{name} holds numbers too large for {self.spec.dtype}")
        return weight


class _Streams:
    """The hidden states [t, hidden_size] of a text: those of the model as it is, and those of the quantized one."""

    def __init__(self, spec: ModelSpec, source: WeightSource, token_ids: Sequence[int], sequences: int) -> None:
        loader = _DenseLoader(spec, source, torch.device("cpu"), None, None)
        self._spec = spec
        self._text = CalibrationPass(spec, source, token_ids, sequences, SEQUENCE_LENGTH, loader)
        self._text_of_table = partial(
            CalibrationPass, spec, source, token_ids, min(sequences, TABLE_SEQUENCES), SEQUENCE_LENGTH, loader
        )
        self._exact = self._served = torch.empty(0)

    def embedding(self, weights: _Weights) -> Weights:
        """The table: where the head has it too, for what goes into that in the model as it is."""
        if not weights.needs_inputs("embedding", "table"):
            return weights.rounded("embedding")
        with _bfloat16_products():
            second_moment = self._text_of_table().shared_table()
        weight = dense(self._text.loader.source, "embedding", "table.weight")
        return {"table": weights.fitted("embedding", "table", weight, InputStatistics(second_moment))}

    def embed(self, table: QuantTensor | None) -> None:
        """Begin, the quantized stream with this table if it is another."""
        self._exact = self._text.embed()
        self._served = self._exact if table is None else self._text.embed(prepare(table))

    def layer(self, unit: str, weights: _Weights, finished: Weights | None) -> Weights:
        """Go through a layer, and quantize its linears unless that has been done."""
        layer = self._text.layer(int(unit.removeprefix("layer.")))
        watched = _Layer(self._spec, unit, weights, layer)
        run = partial(self._text.run, layer)
        if finished is not None:
            self._exact = run(self._exact)
            watched.replace(finished)
            self._served = run(self._served)
            return finished
        self._exact = watched.observe(run, self._exact)
        self._served = watched.quantize(run, self._served)
        return watched.quantized

    def head(self, weights: _Weights) -> Weights:
        if not weights.needs_inputs("head", "table"):
            return weights.rounded("head")
        exact, served = self._text.before_table(self._exact), self._text.before_table(self._served)
        weight = dense(self._text.loader.source, "head", "table.weight")
        return {"table": weights.fitted("head", "table", weight, _statistics(weight, served, exact - served))}


class _Layer:
    """One layer's linears: what goes into them in the model as it is, then what does so as they are quantized."""

    def __init__(self, spec: ModelSpec, unit: str, weights: _Weights, layer: DecoderLayer) -> None:
        self.quantized: Weights = {}
        self._spec, self._weights, self._layer, self._unit = spec, weights, layer, unit
        self._inputs: dict[str, torch.Tensor] = {}  # [t, k], of the model as it is
        self._residuals: dict[str, torch.Tensor] = {}  # [t, hidden_size] that an output is added to

    def replace(self, quantized: Weights) -> None:
        for name, weight in quantized.items():
            linear, values = self._layer.linear(name), weight.dequantize()
            if isinstance(linear, ExpertLinear):
                linear.weights = [prepare(of_one) for of_one in values.split(linear.out_features)]
            else:
                self._linear(name).weight = values

    def _linear(self, name: str) -> DenseLinear:
        linear = self._layer.linear(name)
        assert isinstance(linear, DenseLinear)
        return linear

    def observe(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [t, hidden_size] after the layer as it is."""
        handles = [
            self._linear(name).register_forward_pre_hook(partial(self._note, name))
            for name in self._spec.linears(self._unit)
            if self._weights.needs_inputs(self._unit, name)
        ]
        if self._spec.block == "pre":
            self._residuals["out"] = hidden_states
            handles.append(self._layer.norms["mlp_norm"].register_forward_pre_hook(self._note_middle))
        after = run(hidden_states)
        for handle in handles:
            handle.remove()
        return after

    def _note(self, name: str, module: DenseLinear, arguments: tuple[torch.Tensor, ...]) -> None:
        self._inputs[name] = arguments[0].clone()

    def _note_middle(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._residuals["down"] = arguments[0].clone()

    def quantize(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, each of whose linears is quantized as its input arrives."""
        handles = []
        if self._spec.block == "pre":  # else outputs do not enter the stream as they are
            self._residuals["out"] = self._residuals["out"] - hidden_states
            handles.append(self._layer.norms["mlp_norm"].register_forward_pre_hook(self._middle_arrives))
        self.quantized = self._weights.rounded(self._unit)
        self.replace(self.quantized)
        handles += [
            self._linear(name).register_forward_pre_hook(partial(self._input_arrives, name)) for name in self._inputs
        ]
        after = run(hidden_states)
        for handle in handles:  # which would keep this, and the layer, in memory
            handle.remove()
        return after

    def _middle_arrives(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._residuals["down"] -= arguments[0]

    def _input_arrives(self, name: str, module: DenseLinear, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0]
        missing = self._inputs.pop(name).sub_(x)
        statistics = _statistics(module.weight, x, missing, self._residuals.pop(name, None))
        self.quantized[name] = self._weights.fitted(self._unit, name, module.weight, statistics)
        module.weight = self.quantized[name].dequantize()


class _DenseLoader(Loader):
    """Makes layers of float32 weights."""

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        shape = self.spec.linears(unit)[name]
        weights = [prepare(weight) for weight in dense(self.source, unit, f"{name}.weight").split(shape.n)]
        biases = self.vector(unit, f"{name}.bias").view(-1, shape.n) if shape.bias else None
        return ExpertLinear(weights, biases)

    def linear(self, unit: str, name: str, precision: Precision) -> Any:
        weight = dense(self.source, unit, f"{name}.weight")
        return DenseLinear(weight, self.vector(unit, f"{name}.bias") if self.spec.linears(unit)[name].bias else None)


def _joined(portions: Sequence[QuantTensor]) -> QuantTensor:
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


def _statistics(
    weight: torch.Tensor, x: torch.Tensor, missing: torch.Tensor, residual: torch.Tensor | None = None
) -> InputStatistics:
    """Of the inputs x [t, k] that arrive, what is `missing` in them, and in the stream that the output is added to."""
    if residual is None:
        drift = weight.double() @ mean_product(missing, x)
    else:
        drift = mean_product(torch.addmm(residual, missing, weight.T), x)
    return InputStatistics(second_moment(x), drift)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """float32 matrices are multiplied by their bfloat16 values where that is faster; sums stay float32.

    Statistics of a sample do not need more, and it takes half of the time.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
