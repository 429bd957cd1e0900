"""Quantized models in folders: what is written is what loads, runs and was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmpq.checkpoint.model_files import Model, describe, load_model, open_model
from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.checkpoint.weights import WeightSource, floating, open_weights
from llmpq.cli.main import main
from llmpq.measure import calibrated_weights
from llmpq.measure.calibration_pass import CalibrationPass
from llmpq.measure.quantized_model import as_served, write_quantized
from llmpq.quant import quantize
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampling import SamplingParams
from llmpq.spec import NATIVE, W16, Device, Plan, Precision, UnitPrecision, UsageError
from tests.support.pipelines import tiny_model

RTN = Precision(3, 32)
GPTQ = Precision(3, 32, "asym", "gptq")
TEXT = "The quick brown fox jumps over the lazy dog. 0123456789! " * 80


def whole(source: WeightSource, unit: str, part: str) -> torch.Tensor:
    return torch.cat([floating(rows).float() for rows in source.rows(unit, part)])


def options_of(model: Model, option: UnitPrecision, **others: UnitPrecision) -> dict[str, UnitPrecision]:
    return dict.fromkeys(model.spec.units, option) | {unit.replace("_", "."): other for unit, other in others.items()}


def tiny(folder: Path, kind: str) -> Model:
    return load_model(tiny_model(folder, kind))


@pytest.mark.parametrize("kind", ["llama-biases", "llama-tied", "opt"])
def test_weights_are_those_that_workers_would_make(kind: str, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", kind)
    write_quantized(model, options_of(model, RTN, layer_1=W16), tmp_path / "out")
    source, found = open_weights(model.checkpoint, model.spec), open_model(str(tmp_path / "out"))
    written = open_weights(found.checkpoint, found.spec)
    assert found.spec.source_hash == model.spec.content_hash != found.spec.content_hash
    assert set(found.spec.stored) == {unit for unit in model.spec.units if unit != "layer.1"}
    for unit, part in decoder_tensors(model.spec, describe(model.checkpoint).family):
        expected, linear = whole(source, unit, part), part.removesuffix(".weight")
        if linear in model.spec.linears(unit) and part != linear and unit != "layer.1":
            assert found.spec.stored[unit][linear] == RTN
            expected = quantize(expected, RTN, scale_dtype=torch.bfloat16).dequantize()
        assert torch.equal(whole(written, unit, part), expected), (unit, part)


def served_logits(model: Model, folder: Path, token_ids: list[int]) -> torch.Tensor:
    """float64, of transformers with the weights of a written folder."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model.checkpoint.path, dtype=torch.float64)
    found = open_model(str(folder))
    weights, state = open_weights(found.checkpoint, found.spec), network.state_dict()
    for (unit, part), pieces in decoder_tensors(model.spec, describe(model.checkpoint).family).items():
        rows = whole(weights, unit, part).double().split([piece.shape[0] for piece in pieces])
        for piece, values in zip(pieces, rows, strict=True):
            state[piece.name].copy_(values)
    with torch.no_grad():
        return network(torch.tensor([token_ids])).logits


@pytest.mark.parametrize(("kind", "table"), [("llama-biases", W16), ("opt", W16), ("llama-tied", None)])
def test_gptq_disturbs_logits_less_than_rounding(kind: str, table: Precision | None, tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", kind)
    token_ids = model.tokenizer.encode(TEXT)[:60]
    errors = []
    for name, option in (("exact", W16), ("gptq", GPTQ), ("rtn", RTN)):
        options = options_of(model, option, embedding=table or option)
        write_quantized(model, options, tmp_path / name, text=TEXT)
        errors.append(served_logits(model, tmp_path / name, token_ids))
    exact, gptq, rtn = errors
    assert (gptq - exact).square().mean() < 0.5 * (rtn - exact).square().mean()


def test_a_later_attempt_goes_on_where_an_earlier_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path / "model", "llama-tied")
    options = options_of(model, GPTQ, head=replace(GPTQ, bits=4))

    def stops(text: str, share: float | None = None, /) -> None:
        if share == pytest.approx(3 / len(model.spec.units)):
            raise KeyboardInterrupt

    write_quantized(model, options, tmp_path / "whole", text=TEXT)
    with pytest.raises(KeyboardInterrupt):
        write_quantized(model, options, tmp_path / "parts", text=TEXT, notify=stops)
    begun = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert sorted(begun) == ["embedding.safetensors", "layer.0.safetensors", "layer.1.safetensors"]
    with pytest.raises(UsageError, match="without a config"):
        open_model(str(tmp_path / "parts"))
    write_quantized(model, options, tmp_path / "parts", text=TEXT)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    assert begun.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}.items()
    monkeypatch.setattr(CalibrationPass, "run", None)  # whoever calls it fails: no text is read for nothing
    write_quantized(model, options, tmp_path / "whole", text=TEXT)


def test_a_folder_whose_weights_are_being_written_again_is_no_model(tmp_path: Path) -> None:
    model, out = tiny(tmp_path / "model", "llama-gqa"), tmp_path / "out"

    def stops(text: str, share: float | None = None, /) -> None:
        if share == pytest.approx(2 / len(model.spec.units)):
            raise KeyboardInterrupt

    write_quantized(model, options_of(model, GPTQ), out, text=TEXT)
    (out / "layer.0.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        write_quantized(model, options_of(model, GPTQ), out, text=TEXT, notify=stops)
    with pytest.raises(UsageError, match="without a config"):
        open_model(str(out))


def test_what_is_wrong_with_a_tokenizer_is_said_before_the_work(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama-gqa")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="tokenizer"):
        write_quantized(model, options_of(model, RTN), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def generated(model: Model, plan: Plan) -> Any:
    with Engine(plan, model.checkpoint, model.spec) as engine:
        return engine.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=8, ignore_eos=True)).sequences


def test_a_plan_is_served_by_weights_that_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    model = tiny(tmp_path / "model", "llama-gqa")
    plan = Plan.single(model.spec, Device("cpu0", "cpu"), GPTQ, slots=2, max_length=16)
    first = generated(*as_served(model, plan))
    monkeypatch.setattr(calibrated_weights, "quantized_in_turn", None)  # whoever calls it fails
    assert generated(*as_served(model, plan)) == first
    monkeypatch.undo()
    assert main(["quantize", "--model", str(model.checkpoint.path), "--bits", "3", "--out", str(tmp_path / "out")]) == 0
    found = open_model(str(tmp_path / "out"))
    native = Plan.single(found.spec, Device("cpu0", "cpu"), NATIVE, slots=2, max_length=16)
    assert generated(found, native) == first
    assert generated(*as_served(found, plan)) == first  # the plan for the model that it was made from
    other = Plan.single(model.spec, Device("cpu0", "cpu"), replace(GPTQ, bits=4), slots=2, max_length=16)
    with pytest.raises(UsageError, match="was quantized to another precision"):
        Engine(other, found.checkpoint, found.spec)
    with pytest.raises(UsageError, match="was quantized to another precision"):
        as_served(found, other)  # not quantized again, nor taken for a plan of this model


def test_without_a_cache_it_is_said_where_the_model_could_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "file"))
    model = tiny(tmp_path / "model", "llama-gqa")
    plan = Plan.single(model.spec, Device("cpu0", "cpu"), GPTQ, slots=1, max_length=16)
    with pytest.raises(UsageError, match="set LLMPQ_CACHE to a folder, or write the model yourself"):
        as_served(model, plan)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("written")
    model = tiny(folder / "model", "llama-gqa")
    write_quantized(model, options_of(model, Precision(4, 32, "asym")), folder / "out")
    yield folder / "out"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("layer.0.qkv.scales"), "layer.0.qkv.scales is missing"),
        (lambda t: t.update({"layer.0.rope.freqs": torch.ones(3)}), "layer.0.rope.freqs is not part of the model"),
        (lambda t: t.update({"layer.0.qkv.scales": t["layer.0.qkv.scales"][:, :1].clone()}), "layer.0.qkv.scales is"),
        (lambda t: t.update({"layer.0.qkv.qweight": t["layer.0.qkv.qweight"].float()}), "layer.0.qkv.qweight is F32"),
        (lambda t: t["layer.0.up.zeros"].fill_(16), "a zero point of layer.0.up.qweight is no code"),
        (lambda t: t["layer.0.up.scales"].fill_(torch.inf), "layer.0.up.scales holds what is no finite number"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, problem: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "out")
    path = tmp_path / "out" / "layer.0.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.unlink()  # all files are read then
    with pytest.raises(UsageError, match=problem):
        found = open_model(str(tmp_path / "out"))
        source = open_weights(found.checkpoint, found.spec)
        for name in found.spec.linears("layer.0"):
            whole(source, "layer.0", f"{name}.weight")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda q: q.pop("source"), "does not say which model is the source"),
        (lambda q: q.pop("precisions"), "has no precisions of units and their linears"),
        (lambda q: q.update(precisions=[]), "has no precisions of units and their linears"),
        (lambda q: q["precisions"].update(head="w4"), "has no precisions of units and their linears"),
        (lambda q: q["precisions"]["head"].update(table=4), "has head.table in 4, which is no quantized precision"),
        (lambda q: q["precisions"]["head"].update(table="w16"), "head.table in 'w16', which is no quantized precision"),
        (lambda q: q["precisions"].update({"layer.9": {"qkv": "w4-g32-asym-rtn"}}), "'layer.9.qkv', which is no lin"),
        (lambda q: q["precisions"]["head"].update(norm="w4-g32-asym-rtn"), "'head.norm', which is no linear"),
        (lambda q: q.update(rotation=1), "has 'rotation', which a newer llmpq may have written"),
    ],
)
def test_a_configuration_that_does_not_say_how_is_refused(
    change: Any, problem: str, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=problem):
        open_model(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "it is not said how many bits to quantize to; give --bits or --plan"),
        (["--bits", "4", "--out", "{model}"], "is the model itself"),
        (["--bits", "4", "--out", "{other}"], "holds other files; choose an empty folder"),
        (["--bits", "4", "--out", "{done}"], "holds a model of other weights; choose another folder"),
        (["--bits", "native"], "stores nothing in a precision that kernels read"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(tmp_path / "model", "llama-gqa")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("")
    write_quantized(model, options_of(model, RTN), tmp_path / "done")
    places = {"model": str(model.checkpoint.path), "other": str(tmp_path / "other"), "done": str(tmp_path / "done")}
    given = [argument.format(**places) for argument in arguments]
    given += [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(["quantize", "--model", places["model"], *given]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["eval", "--bits", "native"], "with --reference, or ask for --perplexity-only"),
        (
            ["quantize", "--bits", "4", "--out", "{out}"],
            "is quantized already; quantize the model that it was made from",
        ),
        (
            [
                "plan",
                "--devices",
                "cpu",
                "--max-kl",
                "1",
                "--batch-size",
                "1",
                "--out",
                "{out}",
                "--prompt-len",
                "4",
                "--output-len",
                "4",
            ],
            "is quantized, so what it loses cannot be measured against it",
        ),
    ],
)
def test_a_quantized_model_is_no_reference(
    command: list[str], problem: str, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(out=tmp_path / "out") for argument in command]
    assert main([given[0], "--model", str(written), *given[1:]]) == 2
    assert problem in capsys.readouterr().err


def test_what_a_killed_attempt_has_left_is_removed(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama-gqa")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".llmpq-0123").write_bytes(b"half")
    arguments = ["--model", str(model.checkpoint.path), "--bits", "4", "--quantizer", "rtn"]
    assert main(["quantize", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / ".llmpq-0123").exists()
