"""What goes into a network's linears, and what a quantizer is told of it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from llmpq.measure import calibrated_weights, fitted_weights
from llmpq.quant import InputStatistics, QuantTensor, quantize
from llmpq.spec import Precision

GPTQ = Precision(3, 32, "asym", "gptq")
LENGTH = 24  # of a window of the calibration text
Given = tuple[torch.Tensor, InputStatistics]


def inputs_of(network: Any, modules: dict[str, str], token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """[t, k]: what goes into each of these modules, by name."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        found[name] = arguments[0].flatten(0, -2)

    handles = [
        network.get_submodule(path).register_forward_pre_hook(partial(note, name)) for name, path in modules.items()
    ]
    with torch.no_grad():
        network(token_ids)
    for handle in handles:
        handle.remove()
    return found


def note_given(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """Each weight that will be quantized for its inputs, with what is said of these; of short windows, in float32."""
    found: list[Given] = []

    def noted(
        weight: torch.Tensor, precision: Precision, *, inputs: InputStatistics | None = None, **options: torch.dtype
    ) -> QuantTensor:
        if inputs is not None:
            found.append((weight, inputs))
        return quantize(weight, precision, inputs=inputs, **options)

    monkeypatch.setattr(fitted_weights, "quantize", noted)
    monkeypatch.setattr(calibrated_weights, "SEQUENCE_LENGTH", LENGTH)
    monkeypatch.setattr(calibrated_weights, "_bfloat16_products", nullcontext)
    return found
