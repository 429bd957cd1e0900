"""Quantizing for the inputs that linears get: one pass of a calibration text through the model, unit by unit.

Two streams of hidden states go through each layer: that of the model as it is, and that of the units quantized so far.
A linear of the second is quantized when its input arrives, and multiplies it at once: what comes after is quantized for
what it will really get. Held are one unit, and what goes into its linears for all tokens of the text. Experts are
quantized one after the other, each for the tokens that choose it (expert_inputs.py).

An embedding's rows are copied, not multiplied, so they are rounded to nearest. Where the head has the same table, that
matters far more: the table is quantized for what goes into the head of the model as it is, which takes a pass ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from llmpq.checkpoint.weights import WeightSource, dense, dense_expert
from llmpq.kernels import prepare
from llmpq.measure.calibrated_layer import CalibratedLayer, drifted
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.fitted_weights import FittedWeights, Weights, needs_text, shares_table
from llmpq.models.linear import DenseLinear, ExpertLinear
from llmpq.models.loading import Loader
from llmpq.progress import Notify, counted, silent, warn_once
from llmpq.quant import InputStatistics, QuantTensor
from llmpq.spec import ModelSpec, Precision, UnitPrecision

SEQUENCES, SEQUENCE_LENGTH = 64, 512  # of calibration text; half of it leaves an eighth more KL in bed A
TABLE_SEQUENCES = 16  # of them, for a shared table: fewer are enough, as its inputs are only hidden_size wide

Finished = Callable[[str], Weights | None]  # the weights of a unit that are there already


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
    weights, shared = FittedWeights(spec, source, options), shares_table(spec, options)
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
    if streams is not None and streams.small_samples:
        warn_once(
            f"{spec.name}: {streams.small_samples} of {streams.experts} experts get too few tokens of the calibration "
            "text to tell what goes into them; they are quantized more for their weights than for their inputs"
        )


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
        self.experts = self.small_samples = 0  # that were quantized for their inputs; those with few of these

    def embedding(self, weights: FittedWeights) -> Weights:
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

    def layer(self, unit: str, weights: FittedWeights, finished: Weights | None) -> Weights:
        """Go through a layer, and quantize its linears unless that has been done."""
        layer = self._text.layer(int(unit.removeprefix("layer.")))
        watched = CalibratedLayer(unit, weights, layer)
        run = partial(self._text.run, layer)
        if finished is not None:
            self._exact = run(self._exact)
            watched.replace(finished)
            self._served = run(self._served)
            return finished
        self._exact = watched.observe(run, self._exact)
        self._served = watched.quantize(run, self._served)
        self.experts += watched.experts
        self.small_samples += watched.small_samples
        return watched.quantized

    def head(self, weights: FittedWeights) -> Weights:
        if not weights.needs_inputs("head", "table"):
            return weights.rounded("head")
        exact, served = self._text.before_table(self._exact), self._text.before_table(self._served)
        weight = dense(self._text.loader.source, "head", "table.weight")
        return {"table": weights.fitted("head", "table", weight, drifted(weight, served, exact - served))}


class _DenseLoader(Loader):
    """Makes layers of float32 weights."""

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        shape = self.spec.linears(unit)[name]
        weights = [prepare(dense_expert(self.source, unit, name, shape.n, expert)) for expert in range(shape.experts)]
        return ExpertLinear(weights, self.expert_biases(unit, name))

    def linear(self, unit: str, name: str, precision: Precision) -> Any:
        weight = dense(self.source, unit, f"{name}.weight")
        return DenseLinear(weight, self.vector(unit, f"{name}.bias") if self.spec.linears(unit)[name].bias else None)


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
