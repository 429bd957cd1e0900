"""The error that quantizing really makes in the output of each linear, in the place of one that follows from steps.

For a linear W quantized to Q, the noise nu_t that token t finds in an output element is, on average over the n outputs,

    nu_t = 1/n * |(Q - W) x_t|^2,    with mean    E_t[nu_t] = 1/n * tr((Q - W) H (Q - W)^T),    H = E_t[x_t x_t^T]

H is, but for a factor, the Hessian of the squared error that GPTQ (arXiv 2210.17323) minimises. So this sees what a
quantizer gains by choosing scales or codes well. What becomes of the noise is in relative_noise.py. LLM-PQ's own
"Hessian" is the error of the weights times the largest eigenvalue of H, which only bounds this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.kernels import embedding
from llmpq.measure.relative_noise import propagated
from llmpq.measure.served_units import ServedUnits
from llmpq.models.linear import QuantLinear
from llmpq.models.step import Step
from llmpq.progress import Notify, silent
from llmpq.spec import W16, ModelSpec, Precision

_ROWS = 128  # tokens whose logits are held at a time


def hessian(
    source: WeightSource,
    spec: ModelSpec,
    precisions: Sequence[Precision],
    token_ids: Sequence[int],
    notify: Notify = silent,
) -> dict[str, dict[str, float]]:
    """omega[unit][precision] by the formula above. Holds a unit at a time."""
    noise = _MeasuredNoise(source, spec, precisions, token_ids)
    names = [str(p) for p in precisions]
    return {unit: dict(zip(names, omega)) for unit, omega in propagated(noise, spec, token_ids, notify).items()}


class _MeasuredNoise:
    def __init__(
        self, source: WeightSource, spec: ModelSpec, precisions: Sequence[Precision], token_ids: Sequence[int]
    ) -> None:
        self.source = source
        self._precisions = precisions
        self._units = ServedUnits(spec, source, token_ids)

    def embedded(self, step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
        exact = embedding(step.tokens, self._units.table("embedding", W16), torch.float32)
        size = hidden_states.double().square().mean(-1)

        def relative(p: Precision) -> torch.Tensor:
            error = embedding(step.tokens, self._units.table("embedding", p), torch.float32) - exact
            return _mean_square(error) / _mean_square(exact).clamp_min(1e-30)

        return self._each(lambda p: relative(p) * size)

    def linear(self, unit: str, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # A bias is in both and cancels.
        return self._each(lambda p: _mean_square(self._units.linear(unit, name, p)(x) - y))

    def experts(self, unit: str, name: str, x: torch.Tensor, experts: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def error(p: Precision) -> torch.Tensor:
            return self._units.experts(unit, name, p)(x, experts, torch.empty_like(y)) - y

        return self._each(lambda p: _mean_square(error(p)))

    def head(self, x: torch.Tensor, table: QuantLinear) -> torch.Tensor:
        def error(p: Precision) -> torch.Tensor:
            quantized = QuantLinear(self._units.table("head", p))
            return torch.cat([_mean_square(quantized(rows) - table(rows)) for rows in x.split(_ROWS)]).mean()

        return self._each(error)

    def _each(self, nu: Callable[[Precision], torch.Tensor]) -> torch.Tensor:
        return torch.stack([nu(p) for p in self._precisions])


def _mean_square(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().square().mean(-1)
