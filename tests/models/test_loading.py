"""Loading: what is read, what is cached, what is shared, and how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmpq import cache
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import WeightSource, open_weights
from llmpq.kernels import PreparedWeight, gemm, prepare
from llmpq.models.decoder_stage import DecoderStage, build_stage
from llmpq.models.linear import QuantLinear
from llmpq.quant import quantize
from llmpq.spec import W16, ActivationMode, Cluster, Device, ModelSpec, Placement, Plan, Precision, Stage, UsageError
from tests.support.decoding import all_logits, open_model, random_sequences
from tests.support.tiny_models import save_model

CPU = torch.device("cpu")
W4 = Precision(4, 32, zero="asym")
W8 = Precision(8, 64)


def single_plan(spec: ModelSpec, precision: Precision, activations: ActivationMode = "a16") -> Plan:
    return Plan.single(spec, Device("cpu0", "cpu"), precision, slots=5, max_length=24, activations=activations)


def all_weights(stage: DecoderStage) -> list[PreparedWeight]:
    linears = [module.weight for module in stage.modules() if isinstance(module, QuantLinear)]
    return [*linears, *(unit.table for unit in (stage.embedding,) if unit is not None)]


def assert_same(one: PreparedWeight, other: PreparedWeight) -> None:
    assert (one.backend, one.n, one.k, one.precision, one.dtype) == (
        other.backend,
        other.n,
        other.k,
        other.precision,
        other.dtype,
    )
    assert len(one.data) == len(other.data) > 0
    assert all(torch.equal(a, b) for a, b in zip(one.data, other.data, strict=True))


def cached_entries() -> set[Path]:
    folder = cache.folder()
    assert folder is not None
    return set((folder / "quantized").glob("*"))


class RecordingSource:
    """Passes on another source, and notes which parts of which units were read."""

    def __init__(self, source: WeightSource) -> None:
        self.cacheable, self._source = source.cacheable, source
        self.parts: set[tuple[str, str]] = set()

    def rows(self, unit: str, part: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        for portion in self._source.rows(unit, part, start, stop):
            self.parts.add((unit, part))
            yield portion


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [Precision(3, None), W4, W8, W16], ids=str)
def test_portions_of_fused_linears_make_the_same_weight_as_the_whole(
    precision: Precision, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpq.checkpoint.weights.CHUNK", 500)  # about ten rows
    monkeypatch.setattr("llmpq.models.quantized_cache.CHUNK", 700)
    save_model(tmp_path, "llama-biases", dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    spec, source = open_model(tmp_path)
    layer = build_stage(spec, source, single_plan(spec, precision), 0, CPU).layers[1]
    for linear, parts in [
        (layer.linear("qkv"), ("self_attn.q", "self_attn.k", "self_attn.v")),
        (layer.linear("up"), ("mlp.gate", "mlp.up")),
    ]:
        whole = torch.cat([tensors[f"model.layers.1.{part}_proj.weight"] for part in parts])
        if precision.quantized:
            assert_same(linear.weight, prepare(quantize(whole, precision, scale_dtype=dtype)))
        else:
            assert_same(linear.weight, prepare(whole))
        bias = torch.cat([tensors[f"model.layers.1.{part}_proj.bias"] for part in parts])
        assert torch.equal(linear.bias, bias.float())


def test_quantized_weights_come_from_the_cache_the_second_time(tmp_path: Path) -> None:
    save_model(tmp_path, "opt-350m", torch.bfloat16)
    spec, source = open_model(tmp_path)
    first = build_stage(spec, source, single_plan(spec, W4), 0, CPU)
    recorder = RecordingSource(source)
    second = build_stage(spec, recorder, single_plan(spec, W4), 0, CPU)
    for one, other in zip(all_weights(first), all_weights(second), strict=True):
        assert_same(one, other)
    matrices = {(unit, part) for unit, part in recorder.parts if "norm" not in part and not part.endswith(".bias")}
    assert matrices == {("embedding", "positions.weight"), ("embedding", "project.weight"), ("head", "project.weight")}


def test_one_cached_weight_serves_every_mode_of_activations(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa", torch.bfloat16, intermediate_size=96)
    spec, source = open_model(tmp_path)
    exact = build_stage(spec, source, single_plan(spec, W8), 0, CPU, backend="reference")
    recorder = RecordingSource(source)
    rounded = build_stage(spec, recorder, single_plan(spec, W8, activations="a8"), 0, CPU, backend="reference")
    assert all("norm" in part for _, part in recorder.parts)
    for one, other in zip(all_weights(exact), all_weights(rounded), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.data, other.data, strict=True))
    x = torch.randn(2, spec.hidden_size)
    weight = exact.layers[0].attention.qkv.weight
    assert torch.equal(rounded.layers[0].attention.qkv(x), gemm(x, weight, activations="a8"))
    assert not torch.equal(rounded.layers[0].attention.qkv(x), exact.layers[0].attention.qkv(x))


def test_the_cache_key_is_the_content_and_not_the_name(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    build_stage(spec, source, single_plan(spec, W8), 0, CPU)
    other = replace(spec, content_hash="another")
    recorder = RecordingSource(source)
    build_stage(other, recorder, single_plan(other, W8), 0, CPU)
    assert ("layer.0", "down.weight") in recorder.parts


def test_dummy_weights_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))  # that of all tests may grow meanwhile
    save_model(tmp_path, "llama-gqa", intermediate_size=112)
    checkpoint = resolve(str(tmp_path), "dummy")
    spec = load_spec(checkpoint)
    before = cached_entries()
    build_stage(spec, open_weights(checkpoint, spec), single_plan(spec, W8), 0, CPU)
    assert cached_entries() == before


def test_each_stage_reads_only_its_own_tensors(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    stages = tuple(Stage(f"cpu{i}", (i, i + 1), (W16,)) for i in range(3))
    devices = Cluster(tuple(Device(f"cpu{i}", "cpu") for i in range(3)))
    plan = replace(single_plan(spec, W16), cluster=devices, stages=stages, head=Placement(2, W16))
    own = [{("embedding", "table.weight")}, set(), {("head", "norm.weight"), ("head", "table.weight")}]
    for i in range(3):
        recorder = RecordingSource(source)
        build_stage(spec, recorder, plan, i, CPU)
        assert {part for part in recorder.parts if part[0] != f"layer.{i}"} == own[i]
        assert len(recorder.parts) == len(own[i]) + 6


def test_a_tied_table_is_held_once_if_embedding_and_head_agree(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-tied")
    spec, source = open_model(tmp_path)
    plan = single_plan(spec, W8)
    stage = build_stage(spec, source, plan, 0, CPU)
    assert stage.embedding.table is stage.head.table.weight
    stage = build_stage(spec, source, replace(plan, head=Placement(0, W4)), 0, CPU)
    assert stage.embedding.table.precision == W8
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert_same(stage.head.table.weight, prepare(quantize(table, W4)))


def test_values_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    spec, source = open_model(tmp_path)
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        build_stage(spec, source, single_plan(spec, W8), 0, CPU)


def test_without_a_cache_weights_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    first = build_stage(spec, source, single_plan(spec, W8), 0, CPU)
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "occupied"))
    second = build_stage(spec, source, single_plan(spec, W8), 0, CPU)
    for one, other in zip(all_weights(first), all_weights(second), strict=True):
        assert_same(one, other)
    (line,) = caplog.messages
    assert line.startswith(f"cannot write the cache {tmp_path}/occupied: Not a directory; going on without")


def zero_scales(entry: Path) -> None:
    path = entry / "scales.npy"
    array = np.load(path)
    np.save(path, np.zeros_like(array))


def another_shape(entry: Path) -> None:
    """Whole, but not the weight that is asked for."""

    def write(folder: Path) -> None:
        for path in entry.glob("*.npy"):
            np.save(folder / path.name, np.load(path)[:-1])

    cache.keep("quantized", entry.name, write)


@pytest.mark.parametrize("damage", [zero_scales, another_shape])
def test_damaged_weights_are_not_used_and_made_anew_once(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path, "llama-gqa", torch.bfloat16)
    spec, source = open_model(tmp_path)
    first = build_stage(spec, source, single_plan(spec, W4), 0, CPU)
    entries = [entry for entry in cached_entries() if "layer.1" in entry.name]
    assert len(entries) == 4
    for entry in entries:
        damage(entry)
    recorder = RecordingSource(source)
    for read in ({f"{name}.weight" for name in ("qkv", "out", "up", "down")}, set()):
        second = build_stage(spec, recorder, single_plan(spec, W4), 0, CPU)
        for one, other in zip(all_weights(first), all_weights(second), strict=True):
            assert_same(one, other)
        assert {part for _, part in recorder.parts if "norm" not in part} == read
        recorder.parts.clear()
    assert caplog.messages == [f"the cache {tmp_path}/cache holds damaged results; they are made anew"]


@pytest.mark.parametrize("kind", ["llama-tied", "opt-350m"])
def test_dummy_rows_do_not_depend_on_how_they_are_sliced(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    checkpoint = resolve(str(tmp_path), "dummy")
    source = open_weights(checkpoint, load_spec(checkpoint))
    (whole,) = source.rows("embedding", "table.weight")
    assert whole.std() > 0
    for start, stop in [(0, 1), (63, 65), (100, 272)]:
        (rows,) = source.rows("embedding", "table.weight", start, stop)
        assert torch.equal(rows, whole[start:stop])
    assert not list(source.rows("embedding", "table.weight", 5, 5))
    assert not torch.equal(whole[:64], whole[64:128])


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_dummy_logits_are_of_the_order_of_one(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    checkpoint = resolve(str(tmp_path), "dummy")
    spec = load_spec(checkpoint)
    stage = build_stage(spec, open_weights(checkpoint, spec), single_plan(spec, W16), 0, CPU)
    logits = torch.cat(list(all_logits([stage], random_sequences(), [24]).values()))
    assert 0.1 < float(logits.std()) < 10


_MEASURE = """
import gc, sys, threading
import gguf, torch
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import open_weights
from llmpq.models.arena import return_free_memory
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import NATIVE, Device, Plan, Precision

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

torch.set_num_threads(1)
checkpoint = resolve("demo")
spec = load_spec(checkpoint)
source = open_weights(checkpoint, spec)
precision = NATIVE if sys.argv[1] == "native" else Precision(8, 64)
plan = Plan.single(spec, Device("cpu0", "cpu"), precision, slots=1, max_length=8)
if precision == NATIVE:  # what is made at the first time is there then
    build_stage(spec, source, plan, 0, torch.device("cpu"))
    gc.collect()
    return_free_memory()
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
stage = build_stage(spec, source, plan, 0, torch.device("cpu"))
done.set()
watcher.join()
sizes = {unit: spec.unit_bytes(unit, precision) for unit in spec.units if unit != "head"}  # the tied table counts once
print(peak - before - sum(sizes.values()), sizes["layer.0"])
"""


def loading_takes(cache: Path, option: str) -> tuple[int, int]:
    """Bytes that loading takes at most beyond the weights, and those of a layer, in a process of its own."""
    # What is freed goes back at once: else the peak is that of malloc's heap, which differs by 15 MiB from run to run.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **returned, "LLMPQ_CACHE": str(cache)}
    command = [sys.executable, "-c", _MEASURE, option]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    beyond, layer = map(int, result.stdout.split())
    return beyond, layer


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_little_memory_beyond_the_weights(tmp_path: Path) -> None:
    for _ in ("quantizing", "from the cache"):
        beyond, _ = loading_takes(tmp_path, "quantized")
        assert beyond < 17 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_weights_as_they_are_stored_takes_less_than_two_layers_beyond_them(tmp_path: Path) -> None:
    beyond, layer = loading_takes(tmp_path, "native")
    assert beyond < 2 * layer
