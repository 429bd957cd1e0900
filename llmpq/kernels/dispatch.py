"""Which backend multiplies a weight: a pure function over a small table.

A weight is chosen a backend when it is prepared, and keeps it for every m: a backend holds weights in a layout of its
own, and what suits which m best is its own business (of the GPU backends, that of llmpq/kernels/gemm_path.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llmpq.spec import Precision


@dataclass(frozen=True, slots=True)
class Rule:
    """What one backend can do."""

    backend: str
    devices: tuple[str, ...]  # torch's device types
    capability: tuple[int, int] = (0, 0)  # the lowest CUDA compute capability


# Best first: the first rule that fits is the choice.
RULES = (
    Rule("cpu", ("cpu",)),
    Rule("cuda", ("cuda",), (7, 5)),  # the lowest that CUDA 13 compiles for
    Rule("triton", ("cuda",), (8, 0)),  # the lowest whose tensor cores Triton uses
    Rule("reference", ("cpu", "cuda")),
)
BACKENDS = ("reference", "cpu", "cuda", "triton")


def refusal(backend: str, device_type: str, capability: tuple[int, int]) -> str | None:
    """Why a backend does not run on a device, even where it is available; None if it does."""
    rule = next(rule for rule in RULES if rule.backend == backend)
    if device_type not in rule.devices:
        return f"does not run on {device_type!r}, only on {', '.join(rule.devices)}"
    if capability < rule.capability:
        needed, found = (".".join(map(str, version)) for version in (rule.capability, capability))
        return f"needs a GPU of compute capability {needed} or higher, but this one has {found}"
    return None


def select(
    device_type: str, capability: tuple[int, int], available: Collection[str], precision: Precision, dtype: str
) -> str:
    """The name of the best backend for a weight of `precision` on a device.

    `capability` is (0, 0) unless the device is a GPU; `dtype` is that of the scales or of the plain weight. Weights in
    float32 are for tests, and only the reference multiplies them. Raises ValueError if nothing fits.
    """
    if not precision.quantized and dtype == "float32":
        available = {"reference"}
    for rule in RULES:
        if rule.backend in available and refusal(rule.backend, device_type, capability) is None:
            return rule.backend
    raise ValueError(f"no backend runs on {device_type!r}; there are {', '.join(sorted(available))}")
