"""From a checkpoint's tensors to prepared weights: some rows at a time, quantized on the way.

Nothing is ever held whole but the result: rows are read, quantized and handed to the backend in portions. All but the
reading is done on the stage's device, with the same bits on all devices (llmpq/quant/rtn.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol, TypeVar

import torch

from llmpq import kernels
from llmpq.checkpoint.weights import Rows, WeightSource, floating, is_finite
from llmpq.models.arena import return_free_memory
from llmpq.models.linear import ExpertLinear, QuantLinear
from llmpq.models.portions import brought
from llmpq.models.quantized_cache import cached
from llmpq.quant import QuantTensor, quantize
from llmpq.spec import W16, ActivationMode, LinearShape, ModelSpec, Precision, UnitPrecision, UsageError

# Bytes of weights. Memory that is returned is soon asked for again, which costs as much as reading a few MiB.
_RETURN_AFTER = 2**22
FiniteRows = TypeVar("FiniteRows", torch.Tensor, QuantTensor)


class UnitLoader(Protocol):
    """What the decoder's modules are made from."""

    def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
        """A fused linear of a decoder layer, with its bias."""

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        """The same of all experts of a layer, with their biases."""

    def plain(self, unit: str, name: str) -> QuantLinear:
        """One of ModelSpec.plain_linears, with its bias."""

    def vector(self, unit: str, part: str) -> torch.Tensor:
        """The weight or bias of a norm, the bias of a linear, or sinks: float32, on the device."""

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is no part of the checkpoint, on the device."""


class Loader:
    """Makes the weights of one stage from a source, on a device and for a backend (None: the best)."""

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        device: torch.device,
        backend: str | None,
        weight_dtype: torch.dtype | None,
        activations: ActivationMode = "a16",
    ) -> None:
        self.spec = spec
        self.source = source
        self._device = device
        self._backend = backend
        self._model_dtype: torch.dtype = getattr(torch, spec.dtype)
        self._weight_dtype = weight_dtype or self._model_dtype
        self._activations = activations
        self._made = 0  # bytes of weights since unused memory was returned

    def linear(self, unit: str, name: str, precision: Precision) -> QuantLinear:
        shape = self.spec.linears(unit)[name]
        weight = self._weight(unit, name, shape, precision)
        return QuantLinear(weight, self.vector(unit, f"{name}.bias") if shape.bias else None, self._activations)

    def experts(self, unit: str, name: str, precision: Precision) -> ExpertLinear:
        weights = self._weights(unit, name, self.spec.linears(unit)[name], precision)
        return ExpertLinear(weights, self.expert_biases(unit, name), self._activations)

    def expert_biases(self, unit: str, name: str) -> torch.Tensor | None:
        """[experts, n], if a linear of experts has any."""
        shape = self.spec.linears(unit)[name]
        return self.vector(unit, f"{name}.bias").view(-1, shape.n) if shape.bias else None

    def table(self, unit: str, option: UnitPrecision) -> kernels.PreparedWeight:
        """The embedding table or the head's, [vocab_size, embedding_dim]. Tied ones are the same tensor."""
        precision = self.spec.linear_precisions(unit, option)["table"]
        if self.spec.tied_embeddings:
            unit = "embedding"
        return self._weight(unit, "table", self.spec.table, precision)

    def plain(self, unit: str, name: str) -> QuantLinear:
        shape = self.spec.plain_linears(unit)[name]
        bias = self.vector(unit, f"{name}.bias") if shape.bias else None
        return QuantLinear(self._weight(unit, name, shape, W16), bias)

    def vector(self, unit: str, part: str) -> torch.Tensor:
        return torch.cat([floating(rows) for rows in self.source.rows(unit, part)]).to(self._device, torch.float32)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    def positions(self, dtype: torch.dtype, count: int) -> torch.Tensor | None:
        """Learned embeddings of the first `count` positions [count, hidden_size]; None: there are none."""
        first = self.spec.position_offset
        if first is None:
            return None
        rows = self.source.rows("embedding", "positions.weight", first, first + count)
        return torch.cat([floating(portion) for portion in rows]).to(self._device, dtype)

    def _weight(self, unit: str, name: str, shape: LinearShape, precision: Precision) -> kernels.PreparedWeight:
        (weight,) = self._weights(unit, name, shape, precision)
        return weight

    def _weights(self, unit: str, name: str, shape: LinearShape, precision: Precision) -> list[kernels.PreparedWeight]:
        """One for each expert, whose rows follow each other; of what is no mixture of experts, one."""
        if self._made and shape.weight_bytes(precision) >= _RETURN_AFTER:
            self._return_unused()  # or it were there beside all of the next
        portions = self._portions(unit, name, shape.stacked, precision)
        first = next(portions)
        dtype = first.scales.dtype if isinstance(first, QuantTensor) else first.dtype
        builders = [
            kernels.WeightBuilder(shape.n, shape.k, precision, dtype, self._device, self._backend)
            for _ in range(shape.experts)
        ]
        portions = chain([first], portions)
        del first
        for expert, portion in _by_expert(portions, shape.n):
            builders[expert].add(portion)
            del portion  # or it were there beside the next
        weights = [builder.finish() for builder in builders]
        self._check_mode(weights[0])
        self._made += sum(weight.nbytes for weight in weights)
        if self._made >= _RETURN_AFTER or self._device.type != "cpu":
            self._return_unused()  # before the next one takes some for good in the middle of it
        return weights

    def _return_unused(self) -> None:
        return_free_memory(self._device)
        self._made = 0

    def _check_mode(self, weight: kernels.PreparedWeight) -> None:
        mode = weight.precision.multiplied(self._activations)
        if mode not in weight.activations:
            raise UsageError(
                f"the backend {weight.backend!r} does not multiply in {mode}, only in {', '.join(weight.activations)}; "
                "plan with --activations a16"
            )

    def _portions(self, unit: str, name: str, shape: LinearShape, precision: Precision) -> Iterator[Rows]:
        """The rows of a weight in order at `precision`: as stored if that is it, else quantized or 16-bit.

        What is quantized on a CPU comes by way of the cache for a real model. On a GPU, keeping it there would take
        longer than quantizing.
        """
        stored = brought(self.source.rows(unit, f"{name}.weight"), self._device)
        if precision == self.spec.stored.get(unit, {}).get(name):
            return stored
        if not precision.quantized:
            rows, dtype = map(floating, stored), self._weight_dtype
            return (p if p.dtype == dtype else self._finite(f"{unit}.{name}", p.to(dtype)) for p in rows)

        def quantized() -> Iterator[QuantTensor]:
            rows = map(floating, brought(self.source.rows(unit, f"{name}.weight"), self._device))
            return (self._quantize(f"{unit}.{name}", portion, precision) for portion in rows)

        if not self.source.cacheable or self._device.type != "cpu":
            return quantized()
        key = f"{self.spec.content_hash}-{unit}.{name}"
        return cached(key, shape, precision, self._model_dtype, quantized)

    def _quantize(self, name: str, rows: torch.Tensor, precision: Precision) -> QuantTensor:
        return self._finite(name, quantize(rows, precision, scale_dtype=self._model_dtype))

    def _finite(self, name: str, rows: FiniteRows) -> FiniteRows:
        """`rows`, made of finite numbers. UsageError if some have become infinite in a narrower dtype."""
        if not is_finite(rows):
            dtype = rows.scales.dtype if isinstance(rows, QuantTensor) else rows.dtype
            raise UsageError(f"{self.spec.name}: {name} holds numbers too large for {str(dtype).split('.')[-1]}")
        return rows


def _by_expert(portions: Iterable[Rows], n: int) -> Iterator[tuple[int, Rows]]:
    """Consecutive rows, cut where the `n` of one expert end, each portion with its expert's number."""
    done = 0
    for portion in portions:
        start, rows = 0, portion.shape[0]
        while start < rows:
            stop = min(rows, start + n - done % n)
            if isinstance(portion, QuantTensor):
                yield done // n, portion.rows(start, stop)
            else:
                yield done // n, portion[start:stop]
            done += stop - start
            start = stop
        del portion
