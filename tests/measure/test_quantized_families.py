"""Every family in weights that are quantized for its inputs: written, loaded and run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmpq.checkpoint.model_files import Model, load_model, open_model
from llmpq.checkpoint.packed_writer import PackedWriter
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.quantized_model import write_quantized
from llmpq.models.decoder_stage import build_stage
from llmpq.quant import QuantTensor
from llmpq.spec import NATIVE, Precision
from tests.support.decoding import CPU, run, split_plan, step_of
from tests.support.pipelines import tiny_model
from tests.support.tiny_models import FORMS

GPTQ = Precision(3, 32, "asym", "gptq")
TEXT = "The quick brown fox jumps over the lazy dog. 0123456789! " * 10
FAMILIES = ["llama-gqa", "mistral", "opt", *(kind for kind in FORMS if "-" not in kind)]
OFTEN = ("gpt_neox", "qwen2_moe", "gpt_oss")  # in `make test`, too


def greedy(found: Model, layers: Sequence[int], prompt: list[int], count: int) -> list[int]:
    """Tokens by a chain of as many stages as `layers` has numbers, with so many layers as they are stored."""
    source, tokens, first = open_weights(found.checkpoint, found.spec), list(prompt), len(prompt)
    plan = split_plan(found.spec, layers, NATIVE)
    stages = [build_stage(found.spec, source, plan, i, CPU) for i in range(len(layers))]
    for stop in range(first, first + count):
        start = 0 if stop == first else stop - 1
        tokens.append(int(run(stages, step_of({0: tokens[start:stop]}, {0: start}))[-1].argmax()))
    return tokens[first:]


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.full) for kind in FAMILIES]
)
def test_every_family_is_quantized_for_its_inputs_loaded_bit_for_bit_and_served_by_stages(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, dict[str, QuantTensor]] = {}
    write = PackedWriter.write

    def noted(self: PackedWriter, unit: str, weights: dict[str, QuantTensor], others: dict[str, torch.Tensor]) -> None:
        made[unit] = weights
        write(self, unit, weights, others)

    monkeypatch.setattr(PackedWriter, "write", noted)
    model = load_model(tiny_model(tmp_path / "model", kind))
    write_quantized(model, dict.fromkeys(model.spec.units, GPTQ), tmp_path / "out", text=TEXT)
    found = open_model(str(tmp_path / "out"))
    written = open_weights(found.checkpoint, found.spec)
    for unit in model.spec.units[: -1 if model.spec.tied_embeddings else None]:
        assert found.spec.stored[unit] == dict.fromkeys(model.spec.linears(unit), GPTQ)
        assert made[unit].keys() == model.spec.linears(unit).keys()
        for name, weight in made[unit].items():
            rows = [rows for rows in written.rows(unit, f"{name}.weight") if isinstance(rows, QuantTensor)]
            for part in ("qweight", "scales", "zeros"):
                assert torch.equal(torch.cat([getattr(of, part) for of in rows]), getattr(weight, part)), (unit, name)
    prompt, layers = list(range(40, 52)), model.spec.num_layers
    one = greedy(found, [layers], prompt, 8)
    assert greedy(found, [1, layers - 1], prompt, 8) == one
