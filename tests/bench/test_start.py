"""What is said of a stage's start is of the stage's own tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.end_to_end import start
from bench.tables.start import start as table
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.spec import NATIVE
from tests.support.gguf_files import write_gguf

TYPES = {
    **dict.fromkeys(("gate_proj", "up_proj"), "Q4_0"),
    "down_proj": "Q8_0",
    "o_proj": "Q5_0",
    "embed_tokens": "Q5_1",
}
QKV = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "Q4_1")


def test_stages_own_all_tensors_and_each_but_a_tied_table_once(tmp_path: Path) -> None:
    for kind in ("llama-gqa", "llama-tied"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, kind, types=TYPES)
        spec = load_spec(resolve(str(path)))
        plan = start.even_plan(spec, 2)
        plan.check_model(spec)
        assert [stage.layers for stage in plan.stages] == [(0, 1), (1, 3)]
        assert {plan.precision(unit) for unit in spec.units} == {NATIVE}
        first, second = (start.tensors_of(str(path), spec, plan, i) for i in range(2))
        (whole,) = (start.tensors_of(str(path), spec, start.even_plan(spec, 1), 0),)
        assert {*first} | {*second} == {*whole}
        assert [entry.name for entry in first if entry in second] == ["token_embd.weight"] * (kind == "llama-tied")
        assert [entry.offset for entry in whole] == sorted(entry.offset for entry in whole)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads /proc")
def test_a_stage_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, types=TYPES | QKV)
    found = tmp_path / "found.json"
    start.main(["--model", str(path), "--stages", "1", "--trials", "1", "--threads", "1", "--json-out", str(found)])
    (row,) = json.loads(found.read_text())["rows"]
    tensors = start.tensors_of(str(path), spec := load_spec(resolve(str(path))), start.even_plan(spec, 1), 0)
    assert row["own_bytes"] == sum(entry.nbytes for entry in tensors)
    assert row["weight_bytes"] == sum(spec.unit_bytes(unit, NATIVE) for unit in spec.units)
    assert all(row[f"{kind}_{name}_s"] > 0 for kind in ("warm", "cold") for name in ("load", "read"))


def test_goals_that_are_missed_are_bold() -> None:
    seconds = {f"{kind}_{name}_s": 0.25 for kind in ("warm", "cold") for name in ("load", "read")}
    sizes = {"own_bytes": 100, "read_bytes": 106, "weight_bytes": 200, "layer_bytes": 10, "peak_bytes": 215}
    assert table({"model": "m", "threads": 2, "rows": [{"stages": 2, "stage": 0, **sizes, **seconds}]})[-1] == (
        "| 1 of 2 | 0.25 s (0.25 s) | 0.25 s (0.25 s) | **1.060** | 1.5 |"
    )
