"""Sensitivity: the quality that each unit loses in each precision (omega of LLM-PQ, arXiv 2403.01136, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llmpq.spec.errors import UsageError
from llmpq.spec.model import KvBits, ModelSpec
from llmpq.spec.precision import Mixed, Native, Precision, UnitPrecision
from llmpq.spec.ranges import Omega
from llmpq.spec.record import Record

KV_CACHE = "kv_cache"  # stands for a unit in Sensitivity.omega, and its bits for a precision

# By what they take. llmpq/measure/indicators.py has them.
SensitivityMethod = Literal[
    "random", "variance", "variance-deterministic", "variance-relative", "hessian", "fisher", "kl"
]


def default_method(precisions: Iterable[Precision], *, per_linear: bool = False) -> SensitivityMethod:
    """How the sensitivity to `precisions` is measured if nothing is said.

    By `kl`, the best in bench.quality.indicators, where gptq takes minutes for the weights anyway; else by `fisher`,
    nearly as good in a third of the time. Only `fisher` tells what each linear loses.
    """
    return "kl" if not per_linear and any(precision.calibrated for precision in precisions) else "fisher"


@dataclass(frozen=True, slots=True)
class Sensitivity(Record):
    """omega[unit][precision], additive over units; in nats, but by the paper's method. 16 bit is 0.

    A layer's linears may stand beside it, as "layer.0.qkv": their shares of it. Of a mixed layer these are added up.
    KV_CACHE has the omega of keys and values in 8 bits in all layers together.
    """

    SCHEMA = "llmpq.sensitivity/2"

    model: str
    model_hash: str
    method: str
    text: str  # digest of the calibration text
    omega: dict[str, dict[str, Omega]]

    def of(self, unit: str, precision: UnitPrecision) -> float:
        """omega of one unit at one precision. Raises UsageError if it was not measured."""
        if isinstance(precision, Mixed):
            return sum(self.of(f"{unit}.{name}", of_linear) for name, of_linear in precision.linears)
        if isinstance(precision, Native) or not precision.quantized:
            return 0.0
        try:
            return self.omega[unit][str(precision)]
        except KeyError:
            raise UsageError(
                f"no sensitivity of {unit} at {precision} was measured; run `llmpq sensitivity` with this group size "
                f"and quantizer{', and --per-linear' if unit.count('.') > 1 else ''}"
            ) from None

    def of_cache(self, spec: ModelSpec, unit: str, bits: KvBits) -> float:
        """omega of a KV cache of so many bits in one unit: of a layer an equal part of that of all layers.

        16 bits have none. Raises UsageError if it was not measured.
        """
        if bits == 16 or unit in ("embedding", "head"):
            return 0.0
        try:
            return self.omega[KV_CACHE][str(bits)] / spec.num_layers
        except KeyError:
            raise UsageError(
                f"what a KV cache of {bits} bits loses was not measured; run `llmpq sensitivity` with --kv-bits {bits}"
            ) from None
