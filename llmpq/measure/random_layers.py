"""Decoder layers of random weights, whose products say when they begin and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llmpq import kernels
from llmpq.measure.expert_routing import router_bias
from llmpq.measure.operation_clock import Clock
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.quant import QuantTensor, pack
from llmpq.spec import ActivationMode, Experts, LinearShape, ModelSpec, Precision


def random_weight(
    shape: LinearShape, precision: Precision, spec: ModelSpec, device: torch.device
) -> kernels.PreparedWeight:
    """An [n, k] weight of random codes, or of random numbers at 16 bit. All blocks of 64 rows are alike."""
    with device:  # a GPU lays out a large weight in a moment
        weight = random_rows(shape, precision, getattr(torch, spec.dtype))
    return kernels.prepare(weight, device)


def random_rows(shape: LinearShape, precision: Precision, dtype: torch.dtype) -> QuantTensor | torch.Tensor:
    rows = torch.arange(shape.n) % 64
    if not precision.quantized:
        return torch.randn(64, shape.k).mul_(shape.k**-0.5).to(dtype)[rows]
    qweight = pack(torch.randint(2**precision.bits, (64, shape.k), dtype=torch.uint8), precision.bits)[rows]
    groups = (shape.n, precision.num_groups(shape.k))
    scales = torch.full(groups, shape.k**-0.5 / 2**precision.bits, dtype=dtype)
    center = 2 ** (precision.bits - 1)
    zeros = None
    if precision.zero == "asym":
        zeros = torch.full(groups, center, dtype=torch.uint8)
    elif precision.zero == "offset":
        zeros = scales * -center
    return QuantTensor(qweight, scales, zeros, precision, (shape.n, shape.k))


class _MarkedLinear(QuantLinear):
    def __init__(
        self, weight: kernels.PreparedWeight, bias: torch.Tensor | None, activations: ActivationMode, clock: Clock
    ) -> None:
        super().__init__(weight, bias, activations)
        self._clock = clock

    def forward(
        self, x: torch.Tensor, out: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._clock.mark()
        y = super().forward(x, out, residual)
        self._clock.mark()
        return y


class _MarkedExperts(ExpertLinear):
    def __init__(
        self,
        weights: Sequence[kernels.PreparedWeight],
        biases: torch.Tensor | None,
        activations: ActivationMode,
        clock: Clock,
    ) -> None:
        super().__init__(weights, biases, activations)
        self._clock = clock

    def forward(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self._clock.mark()
        y = super().forward(x, experts, out)
        self._clock.mark()
        return y


class RandomLoader:
    """In place of a Loader: makes the tensors of a decoder layer.

    Routers choose experts for the `shares` of tokens that are given for their mixture, and alike where none are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        clock: Clock,
        activations: ActivationMode,
        shares: Mapping[Experts, Sequence[float]],
    ) -> None:
        self._spec, self._device, self._clock, self._activations = spec, device, clock, activations
        self._router_biases = {
            experts: router_bias(of, experts.per_token).to(device) for experts, of in shares.items() if of
        }

    def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
        shape = self._spec.linears(unit)[name]
        dtype: torch.dtype = getattr(torch, self._spec.compute_dtype(self._device.type))
        bias = torch.zeros(shape.n, dtype=dtype, device=self._device) if shape.bias else None
        weight = random_weight(shape, precision, self._spec, self._device)
        if weight.backend == "cpu":
            return QuantLinear(weight, bias, self._activations)
        return _MarkedLinear(weight, bias, self._activations, self._clock)

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        shape = self._spec.linears(unit)[name]
        dtype: torch.dtype = getattr(torch, self._spec.compute_dtype(self._device.type))
        weights = [random_weight(shape, precision, self._spec, self._device) for _ in range(shape.experts)]
        biases = torch.zeros(shape.experts, shape.n, dtype=dtype, device=self._device) if shape.bias else None
        if weights[0].backend == "cpu":
            return ExpertLinear(weights, biases, self._activations)
        return _MarkedExperts(weights, biases, self._activations, self._clock)

    def plain(self, unit: str, name: str) -> QuantLinear:
        shape, dtype = self._spec.plain_linears(unit)[name], getattr(torch, self._spec.dtype)
        rows = torch.randn(shape.n, shape.k, device=self._device).mul_(shape.k**-0.5).to(dtype)  # each another choice
        bias = torch.zeros(shape.n, device=self._device) if shape.bias else None
        experts = self._spec.layer_kind(int(unit.removeprefix("layer."))).experts
        if name == "router" and experts in self._router_biases:
            bias = self._router_biases[experts]
        return QuantLinear(kernels.prepare(rows, self._device), bias)

    def vector(self, unit: str, part: str) -> torch.Tensor:
        spec = self._spec
        heads = {"head": (1, 1), "row": (spec.num_heads, spec.num_kv_heads)}.get(spec.qk_norm or "", (1, 1))
        sizes = {"q_norm": heads[0] * spec.head_dim, "k_norm": heads[1] * spec.head_dim, "sinks": spec.num_heads}
        return torch.ones(sizes.get(part.partition(".")[0], spec.hidden_size), device=self._device)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)
