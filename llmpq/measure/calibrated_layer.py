"""One layer whose linears are quantized in turn, each when its inputs arrive from those that have been.

A weight W that gets x, where it would get x' in the model as it is, is fitted (quant/gptq.py) to mean x x^T and to

    drift = mean (W x' + r - W x) x^T

over tokens, r being what is missing in the stream that its output is added to. Of a mixture, the outputs of a token's
experts are multiplied by shares w before: r is then w / (sum of all w^2) times what is missing, as that makes it good
with the least change of them. An expert's x' is what it would get in the model as it is, whoever were chosen there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from llmpq.kernels import ExpertWeights, activate_, prepare
from llmpq.measure.calibration_pass import mean_product, second_moment
from llmpq.measure.expert_inputs import WHITE, Chosen, Shares, note_shares, of_each_expert, of_sample
from llmpq.measure.fitted_weights import FittedWeights, Weights, joined
from llmpq.models.decoder import DecoderLayer
from llmpq.models.linear import DenseLinear, ExpertLinear
from llmpq.quant import InputStatistics, QuantTensor

Run = Callable[[torch.Tensor], torch.Tensor]  # hidden states before a layer to those after it
Arguments = tuple[torch.Tensor, ...]  # of a call of a module


class CalibratedLayer:
    """One layer's linears: what goes into them in the model as it is, then what does so as they are quantized."""

    def __init__(self, unit: str, weights: FittedWeights, layer: DecoderLayer) -> None:
        self.quantized: Weights = {}
        self.experts = 0  # that are quantized for their inputs
        self.small_samples = 0  # of them, with fewer inputs than white ones
        self._unit, self._weights, self._layer = unit, weights, layer
        self._inputs: dict[str, torch.Tensor] = {}  # [t, k], of choices [t * K, k]; in the model as it is
        self._residuals: dict[str, torch.Tensor] = {}  # [t, hidden_size] that an output is added to
        self._shares: Shares = {}

    def replace(self, quantized: Weights) -> None:
        """Put quantized weights into the layer."""
        for name, weight in quantized.items():
            n = self._layer.linear(name).out_features
            for expert in range(weight.shape[0] // n):
                self._put(name, weight.rows(expert * n, (expert + 1) * n), expert)

    def _put(self, name: str, weight: QuantTensor, expert: int = 0) -> None:
        linear = self._layer.linear(name)
        if isinstance(linear, ExpertLinear):
            weights = [*linear.weights]
            weights[expert] = prepare(weight.dequantize())
            linear.weights = ExpertWeights(weights)
        else:
            assert isinstance(linear, DenseLinear)
            linear.weight = weight.dequantize()

    def _needs_inputs(self, name: str) -> bool:
        return self._weights.needs_inputs(self._unit, name)

    def observe(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [t, hidden_size] after the layer as it is."""
        needed = filter(self._needs_inputs, self._weights.spec.linears(self._unit))
        handles = [
            self._layer.linear(name).register_forward_pre_hook(partial(self._note, name))
            for name in {self._told_by(name) for name in needed}
        ]
        if self._weights.spec.block == "pre":
            self._residuals["out"] = hidden_states
            handles.append(self._layer.norms["mlp_norm"].register_forward_pre_hook(self._note_middle))
        after = run(hidden_states)
        for handle in handles:
            handle.remove()
        return after

    def _told_by(self, name: str) -> str:
        """The linear whose inputs tell those of another.

        Those of experts' "up" tell what "down" of each would get, once it is known who is chosen.
        """
        return "up" if name == "down" and isinstance(self._layer.linear(name), ExpertLinear) else name

    def _note(self, name: str, module: torch.nn.Module, arguments: Arguments) -> None:
        self._inputs[name] = arguments[0].clone()

    def _note_middle(self, module: torch.nn.Module, arguments: Arguments) -> None:
        self._residuals["down"] = arguments[0].clone()

    def quantize(self, run: Run, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, each of whose linears is quantized as its input arrives."""
        handles = []
        note_shares(self._layer, self._shares)
        if self._weights.spec.block == "pre":  # else outputs do not enter the stream as they are
            self._residuals["out"] = self._residuals["out"] - hidden_states
            handles.append(self._layer.norms["mlp_norm"].register_forward_pre_hook(self._middle_arrives))
        self.quantized = self._weights.rounded(self._unit)
        self.replace(self.quantized)
        for name in self._weights.spec.linears(self._unit):
            linear = self._layer.linear(name)
            if isinstance(linear, ExpertLinear):
                handles.append(linear.register_forward_pre_hook(partial(self._choices_arrive, name)))
            elif self._needs_inputs(name):
                handles.append(linear.register_forward_pre_hook(partial(self._input_arrives, name)))
        after = run(hidden_states)
        for handle in handles:  # which would keep this, and the layer, in memory
            handle.remove()
        return after

    def _middle_arrives(self, module: torch.nn.Module, arguments: Arguments) -> None:
        self._residuals["down"] -= arguments[0]
        del self._residuals["out"]

    def _input_arrives(self, name: str, module: DenseLinear, arguments: Arguments) -> None:
        x, weight = arguments[0], module.weight
        statistics = drifted(weight, x, self._inputs.pop(name).sub_(x), self._missing_after(name))
        self.quantized[name] = self._weights.fitted(self._unit, name, weight, statistics)
        self._put(name, self.quantized[name])

    def _choices_arrive(self, name: str, module: ExpertLinear, arguments: Arguments) -> None:
        """Of the tokens' experts, which are quantized one after the other."""
        if name not in self._inputs:
            return
        x, experts, _ = arguments
        inputs, fitted = self._inputs.pop(name), list[QuantTensor]()
        if name == "up" and self._needs_inputs("down"):
            self._inputs["down"] = torch.empty(experts.numel(), self._layer.linear("down").in_features)
        for expert, chosen in enumerate(of_each_expert(experts, len(module.weights))):
            rows = chosen.rows(name)
            weight = self._weights.dense(self._unit, name, expert)
            if "down" in self._inputs:
                bias = None if module.biases is None else module.biases[expert]
                self._inputs["down"][chosen.numbers] = self._activated(F.linear(inputs[rows], weight, bias))
            if self._needs_inputs(name):
                of_expert, missing = x[rows], inputs[rows].sub_(x[rows])
                statistics = drifted(weight, of_expert, missing, self._missing_after(name, chosen))
                statistics = of_sample(statistics, len(rows))
                fitted.append(self._weights.fitted(self._unit, name, weight, statistics))
                self._put(name, fitted[-1], expert)
        if fitted:
            self.quantized[name], self.experts = joined(fitted), len(fitted)
            tokens = experts.flatten().bincount(minlength=len(fitted))
            self.small_samples = max(self.small_samples, int((tokens < WHITE * module.in_features).sum()))

    def _activated(self, up: torch.Tensor) -> torch.Tensor:
        return activate_(up, self._weights.spec.activation, self._weights.spec.gated_mlp)

    def _missing_after(self, name: str, chosen: Chosen | None = None) -> torch.Tensor | None:
        """r of each token, or of the choices of one expert: [t, n]. None where outputs do not enter the stream."""
        prefix = "shared_" if name.startswith("shared_") else ""
        missing = self._residuals.get(name.removeprefix(prefix))
        if missing is None or name == "out" or not self._shares:
            return missing
        factors = self._shares[prefix] / torch.cat([*self._shares.values()], 1).square().sum(1, keepdim=True)
        return missing * factors if chosen is None else missing[chosen.tokens] * factors.flatten()[chosen.numbers, None]


def drifted(
    weight: torch.Tensor, x: torch.Tensor, missing: torch.Tensor, residual: torch.Tensor | None = None
) -> InputStatistics:
    """Of the inputs x [t, k] that arrive, what is `missing` in them, and in the stream that the output is added to."""
    if residual is None:
        drift = weight.double() @ mean_product(missing, x)
    else:
        drift = mean_product(torch.addmm(residual, missing, weight.T), x)
    return InputStatistics(second_moment(x), drift)
