"""Units that a process has loaded and its next stage needs: which are taken over, and what else is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.checkpoint.weights import WeightSource
from llmpq.models.decoder_stage import DecoderStage, build_stage
from llmpq.models.units import Units, forms_of
from llmpq.quant.tensor import QuantTensor
from llmpq.spec import W16, Cluster, Device, ModelSpec, Placement, Plan, Precision, Stage
from tests.support.decoding import open_model
from tests.support.tiny_models import save_model

W8 = Precision(8, 64)


class Read:
    """A WeightSource that notes of which units something is read."""

    cacheable = False

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.units: set[str] = set()
        self.tables = 0

    def rows(self, unit: str, part: str, *bounds: int) -> Iterator[torch.Tensor | QuantTensor]:
        self.units.add(unit)
        self.tables += part == "table.weight"
        return self._source.rows(unit, part, *bounds)


def on_two(spec: ModelSpec, first: int, **fields: Any) -> Plan:
    """So many of the three layers on the first of two stages, in 8 bits."""
    stages = (Stage("a", (0, first), (W8,) * first), Stage("b", (first, 3), (W8,) * (3 - first)))
    plan = Plan.single(spec, Device("a", "cpu"), W8, slots=2, max_length=24)
    devices = Cluster((Device("a", "cpu"), Device("b", "cpu")))
    return replace(plan, cluster=devices, stages=stages, head=Placement(1, W8), **fields)


def built(
    spec: ModelSpec, source: WeightSource, units: Units, plan: Plan, index: int
) -> tuple[int, set[str], DecoderStage]:
    """A stage, how many of the units were kept for it, and what was read."""
    kept, read = units.keep(forms_of(spec, plan, index)), Read(source)
    return kept, read.units, build_stage(spec, read, plan, index, torch.device("cpu"), units=units)


def test_what_is_alike_is_taken_over_and_the_rest_is_read(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    units = Units()
    before = built(spec, source, units, on_two(spec, 2), 0)
    assert before[:2] == (0, {"embedding", "layer.0", "layer.1"})
    plan = on_two(spec, 1)
    kept, read, stage = built(spec, source, units, plan, 1)
    assert (kept, read) == (1, {"layer.2", "head"})
    assert stage.layers[0] is before[2].layers[1] and stage.embedding is None
    mixed = replace(plan.stages[1], precisions=(W8, W16))
    assert built(spec, source, units, replace(plan, stages=(plan.stages[0], mixed)), 1)[:2] == (2, {"layer.2"})


@pytest.mark.parametrize("fields", [{"activations": "a8"}, {"compute_dtype": "bfloat16"}], ids=str)
def test_what_is_multiplied_otherwise_is_loaded_anew(fields: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    units, plan = Units(), on_two(spec, 2)
    built(spec, source, units, plan, 1)
    other = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], **fields)))
    assert built(spec, source, units, other, 1)[:2] == (0, {"layer.2", "head"})


@pytest.mark.parametrize("before", range(2), ids=["embedding", "head"])
def test_a_tied_table_that_is_here_serves_the_other_end_too(before: int, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-tied")
    spec, source = open_model(tmp_path)
    units = Units()
    built(spec, source, units, on_two(spec, 1), before)
    whole = Plan.single(spec, Device("a", "cpu"), W8, slots=2, max_length=24)
    units.keep(forms_of(spec, whole, 0))
    read = Read(source)
    stage = build_stage(spec, read, whole, 0, torch.device("cpu"), units=units)
    assert read.tables == 0
    assert stage.embedding is not None and stage.head is not None
    assert stage.embedding.table is stage.head.table.weight
    linears = [layer.linear(name) for layer in stage.layers for name in ("qkv", "out", "up", "down")]
    assert units.nbytes == stage.embedding.table.nbytes + sum(linear.weight.nbytes for linear in linears)


def test_learned_positions_are_as_many_as_a_plan_has_room_for(tmp_path: Path) -> None:
    save_model(tmp_path, "opt")
    spec, source = open_model(tmp_path)
    units = Units()
    built(spec, source, units, on_two(spec, 2), 0)
    kept, read, stage = built(spec, source, units, on_two(spec, 2, max_length=30), 0)
    assert (kept, read) == (2, {"embedding"})
    assert stage.embedding is not None and stage.embedding.positions is not None
    assert len(stage.embedding.positions) == 30


def test_who_may_not_go_on_loads_no_more(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    left = iter(range(2))

    def check() -> None:
        if next(left, None) is None:
            raise InterruptedError

    units, plan = Units(check), on_two(spec, 2)
    with pytest.raises(InterruptedError):
        built(spec, source, units, plan, 0)
    assert units.keep(forms_of(spec, plan, 0)) == 2
