"""The comparison of quantizers: beds compute what the model computes, and the evaluator and the files are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch.nn import functional as F

from bench.quality.beds import FORMS, Form, make_bed, network, read_tensors, transform
from bench.quality.evaluation import Evaluator, Windows, compare
from bench.quality.gguf_bed import form_of, gguf_name, write_gguf
from bench.quality.rivals import LLAMA_CPP, METHODS, Quantized, Task, grouped_bits, quantize, sizes
from bench.quality.rivals import __main__ as comparison
from bench.tables.quality import GOALS, front_ratio, quality_rivals
from llmpq.checkpoint.model_files import open_model
from llmpq.quant import quantize as round_to_nearest
from llmpq.spec import Precision
from tests.support.tiny_models import save_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return save_model(folder, "llama-tied", hidden_size=64, intermediate_size=96), folder


def tokens(count: int) -> torch.Tensor:
    return torch.randint(272, (count, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_a_bed_is_the_same_function_of_other_numbers(family: str, form: Form, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_model(folder, family, hidden_size=64, intermediate_size=96)
    bed = make_bed(open_model(str(folder)), form, tmp_path / "bed", "its name")
    assert bed.name == "its name" and not bed.model.spec.tied_embeddings
    ids = tokens(3)
    with torch.no_grad():
        expected, found = model(ids).logits, network(bed.folder)(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    before, after = read_tensors(open_model(str(folder))), read_tensors(bed.model)
    for name in bed.linears:
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert (new - old).norm() > (0.9 if form == "A" else 0.05) * old.norm()


def test_of_other_models_there_are_no_beds(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen3")
    with pytest.raises(ValueError, match="no beds"):
        make_bed(open_model(str(tmp_path / "model")), "A", tmp_path / "bed")


def test_b_leaves_outlier_channels_and_norms_alone() -> None:
    size = 48
    generator = torch.Generator().manual_seed(0)
    named = {"model.embed_tokens": (9, size), "lm_head": (9, size)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in named.items()}
    norm = torch.ones(size)
    norm[5], norm[11] = 1e-3, 40.0
    tensors["model.norm.weight"] = norm
    turned = transform(tensors, "B")
    moved = (turned["model.embed_tokens.weight"] - tensors["model.embed_tokens.weight"]).abs().amax(0) > 0
    assert not moved[5] and not moved[11] and int(moved.sum()) == size - 32
    assert torch.equal(turned["model.norm.weight"], norm)


def test_the_evaluator_agrees_with_the_definitions() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, reference = (torch.randn(7, 11, generator=generator) for _ in range(2))
    targets = torch.randint(11, (7,), generator=generator)
    p, q = F.softmax(reference.double(), -1), F.softmax(logits.double(), -1)
    loss = -sum(math.log(float(q[i, t])) for i, t in enumerate(targets.tolist()))
    kl = float((p * (p / q).log()).sum())
    same = int((p.argmax(-1) == q.argmax(-1)).sum())
    torch.testing.assert_close(compare(logits, reference, targets), torch.tensor([loss, kl, same], dtype=torch.float64))


def test_a_network_as_it_is_has_no_divergence_and_its_own_perplexity(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = tiny
    ids = tokens(4)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for _ in range(2):  # the second time from the file
        found = Evaluator(model, [Windows("test", ids)], tmp_path).measure({})["test"]
        assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
        assert found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1


def test_windows_come_from_all_over_the_text() -> None:
    windows = Windows.spread("test", list(range(103)), 4, 10)
    assert windows.token_ids[:, 0].tolist() == [0, 20, 50, 70]
    assert windows.predictions == 36
    with pytest.raises(ValueError, match="less than a window"):
        Windows.spread("test", [1, 2], 4, 10)


def test_of_thirds_every_third_topic_is_for_the_test() -> None:
    read, test = comparison.thirds()
    for i, name in enumerate(sorted(topics.topics)):
        assert topics.topics[name] in (read if i % 3 else test)
    whole = sum(map(len, topics.topics.values())) + 2 * (len(topics.topics) - 2)  # with what joins them
    assert len(read) + len(test) == whole


@pytest.mark.parametrize("method", ["llmpq rtn", "llmpq gptq"])
def test_our_weights_are_judged_as_they_are_served(method: str, tiny: tuple[Any, Path], tmp_path: Path) -> None:
    bed = make_bed(open_model(str(tiny[1])), "A", tmp_path)
    quantized = quantize(method, Task(bed, [], tokens(4), 4, 32))
    before = read_tensors(bed.model)
    for name, weight in quantized.weights.items():
        original = before[f"{name}.weight"]
        nearest = round_to_nearest(original, Precision(4, 32, "asym")).dequantize()
        assert torch.equal(weight, nearest) == (method == "llmpq rtn")
        assert (weight - original).norm() < 0.3 * original.norm()
    assert quantized.bits_per_weight == 4 + (16 + 8) / 32  # k is a multiple of 32 everywhere


def test_short_groups_count_as_whole_ones() -> None:
    weights = {"a": torch.zeros(10, 576), "b": torch.zeros(3, 256)}
    stored = grouped_bits(weights, 3, 128, 3)
    assert stored == 3 * (5760 + 768) + 19 * (10 * 5 + 3 * 2)
    assert Quantized(weights, stored).bits_per_weight == pytest.approx(stored / 6528)


def test_llama_cpp_has_sizes_of_its_own() -> None:
    assert sizes("llama.cpp Q3_K_M", [3, 4], [32, 64]) == [(3, None)]
    assert sizes("llama.cpp Q3_K_M", [4], [64]) == []
    assert sizes("hqq", [3, 4], [64]) == [(3, 64), (4, 64)]
    assert all(f"llama.cpp {kind}" in METHODS for kind in LLAMA_CPP)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_a_bed_goes_to_gguf_and_back(family: str, tmp_path: Path) -> None:
    """Read by our own reader, whose translation of names and of rotated rows is tested against transformers."""
    save_model(tmp_path / "model", family)
    bed = make_bed(open_model(str(tmp_path / "model")), "B", tmp_path / "bed")
    path = tmp_path / "bed.gguf"
    write_gguf(bed, path)
    names = {tensor.name for tensor in GGUFReader(path).tensors}
    assert names >= {gguf_name(form_of(bed), name) + ".weight" for name in bed.linears}
    again, before = read_tensors(open_model(str(path))), read_tensors(bed.model)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_the_front_is_interpolated_between_rivals() -> None:
    rivals = [(3.0, 0.4), (5.0, 0.1), (4.5, 0.9)]  # the last is worse than what is smaller
    assert front_ratio(4.0, 0.1, rivals) == pytest.approx(0.1 / 0.2)  # in the logarithm of the divergence
    assert front_ratio(6.0, 0.1, rivals) == pytest.approx(1.0)
    assert front_ratio(2.9, 0.1, rivals) is None


def test_a_comparison_goes_on_where_it_was_left(
    tiny: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def record(name: str, task: Task) -> Quantized:
        asked.append(name)
        if name == "hqq":
            raise ImportError("no module named hqq")
        return quantize(name, task)

    monkeypatch.setattr(comparison.rivals, "quantize", record)
    monkeypatch.setattr(
        comparison, "open_bed", lambda name, work: make_bed(open_model(str(tiny[1])), name, work / name)
    )
    monkeypatch.setattr(comparison, "LENGTH", 24)
    path = tmp_path / "found.json"
    sizes = ["--bits", "4", "--groups", "32", "--windows", "2", "--other-windows", "2", "--calibration-windows", "2"]

    def run(methods: str) -> Any:
        comparison.main(["--beds", "A", "--methods", methods, *sizes, "--work", str(tmp_path), "--json-out", str(path)])
        return json.loads(path.read_text())

    found = run("hqq,llmpq rtn")
    assert [row["method"] for row in found["rows"]] == ["16 bits", "llmpq rtn"]
    assert found["missing"] == {"hqq, 4 bits, groups of 32, bed A": "ImportError: no module named hqq"}
    assert found["rows"][1]["kl"] > found["rows"][0]["kl"] == 0
    assert run("hqq,llmpq rtn")["rows"] == found["rows"]
    assert asked == ["hqq", "llmpq rtn", "hqq"]  # what is missing is tried again
    path.write_text(path.read_text().replace('"calibration_tokens": 48', '"calibration_tokens": 72'))
    with pytest.raises(SystemExit, match="figures of other texts"):
        run("llmpq rtn")


def row(method: str, size: float, kl: float, **other: Any) -> dict[str, Any]:
    fields = {"bits": 3, "group_size": 64, "perplexity": 10.0, "top1": 0.5, "cpu_seconds": 100.0}
    return {"bed": "A", "method": method, "bits_per_weight": size, "kl": kl, "other_kl": 2 * kl, **fields, **other}


def test_goals_are_held_against_what_was_measured() -> None:
    plain = row("16 bits", 16, 0, bits=16, group_size=None)
    theirs = [row("gptqmodel", 3.3, 0.4), row("llama.cpp Q4_0", 4.5, 0.2, bits=4, group_size=None)]
    ours = row("llmpq gptq", 3.3, 0.1, other_kl=0.8, perplexity=10.5, cpu_seconds=300.0)
    cells = {goal.text.partition(",")[0]: goal.cell("A", [*theirs, ours, plain]) for goal in GOALS[:3]}
    assert list(cells.values()) == ["0.25x", "**1.00x**", "**3.00x**"]
    served = row("llmpq gptq by default", 3.3, 0.1, perplexity=10.5)
    assert [goal.cell("A, thirds", [served, plain]) for goal in GOALS[3:5]] == ["0.100", "+5.0 %"]
    worse = [row("llmpq gptq", 3.6, 0.3, group_size=32), ours]
    assert GOALS[0].cell("A", [*theirs, *worse, plain]) == f"**0.25x to {0.3 / (0.4 * 0.5**0.25):.2f}x**"
    missed = served | {"perplexity": 12.0}
    assert GOALS[4].cell("A, thirds", [missed, plain]) == "**+20.0 %**"
    assert GOALS[4].cell("A", [missed, plain]) == ""  # that goal is of another split of the text


def test_every_row_is_in_the_table() -> None:
    read = {"calibration_tokens": 48, "predictions": {"test": 46}}
    rows = [row("16 bits", 16, 0, bits=16, group_size=None), row("llmpq gptq", 3.4, 0.1), row("hqq", 3.5, 0.3)]
    results = {"rows": rows, "texts": {"bed A": read}, "versions": {"hqq": "0.2"}, "missing": {"hqq, bed B": "no time"}}
    lines = quality_rivals(results)
    assert [line.split(" | ")[2] for line in lines if line.startswith("| A")] == ["llmpq gptq", "hqq", "16 bits"]
    assert "Not measured: hqq, bed B (no time)." in lines
