"""`llmpq sensitivity`: the method and the text are the user's, and stand in the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpq.cli.main import main
from llmpq.measure.text import digest
from llmpq.spec import Precision, Sensitivity, Solved
from tests.support.tiny_models import save_model


def test_method_and_text_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", "llama-gqa")
    (tmp_path / "text").write_text("A text of the user's own.")
    arguments = ["sensitivity", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "omega.json")]
    found = {}
    for method in ("variance", "kl"):
        assert main([*arguments, "--method", method, "--text", str(tmp_path / "text"), "--group-size", "64"]) == 0
        found[method] = Sensitivity.load(tmp_path / "omega.json")
        assert found[method].method == method
        assert found[method].text == digest("A text of the user's own.")
    for quantizer, method in {"rtn": "fisher", "gptq": "kl"}.items():
        assert main([*arguments, "--quantizer", quantizer]) == 0
        assert Sensitivity.load(tmp_path / "omega.json").method == method
    assert main([*arguments, "--quantizer", "gptq", "--per-linear"]) == 0
    assert Sensitivity.load(tmp_path / "omega.json").method == "fisher"
    assert main([*arguments, "--method", "hessian", "--quantizer", "gptq"]) == 0
    assert Sensitivity.load(tmp_path / "omega.json").of("layer.1", Precision(4, 32, "asym", "gptq")) > 0
    layer, w4 = "layer.1", Precision(4, 64)
    assert found["variance"].of(layer, w4) != found["kl"].of(layer, w4)
    assert main([*arguments, "--per-linear"]) == 0
    assert Sensitivity.load(tmp_path / "omega.json").omega["layer.1.qkv"].keys() == {
        f"w{bits}-g32-sym-rtn" for bits in (3, 4, 8)
    }
    assert main([*arguments, "--per-linear", "--method", "kl"]) == 2
    assert "kl does not tell what each linear loses; choose fisher" in capsys.readouterr().err
    assert main([*arguments, "--text", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
    assert main([*arguments, "--method", "magic"]) == 2


def test_files_of_a_quantizer_are_for_its_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", "llama-gqa")
    costs, omega, out = (str(tmp_path / name) for name in ("costs.json", "omega.json", "plan.json"))
    model = ["--model", str(tmp_path / "model")]
    small = ["--devices", "cpu:threads=1", "--batch-size", "1", "--prompt-len", "4", "--output-len", "4"]
    assert main(["sensitivity", *model, "--method", "variance", "--quantizer", "gptq", "--out", omega]) == 0
    assert main(["profile", *model, *small, "--out", costs]) == 0
    plan = ["plan", *model, *small, "--sensitivity", omega, "--costs", costs, "--out", out]
    assert main(plan) == 2
    assert "run `llmpq sensitivity` with this group size and quantizer" in capsys.readouterr().err.replace("\n", " ")
    assert main([*plan, "--quantizer", "gptq"]) == 2
    assert "run `llmpq profile` for this model, workload and quantizer" in capsys.readouterr().err.replace("\n", " ")
    assert main(["profile", *model, *small, "--quantizer", "gptq", "--out", costs]) == 0
    assert main([*plan, "--quantizer", "gptq", "--bits", "4"]) == 0
    assert Solved.load(out).plan.precision("layer.1") == Precision(4, 32, "asym", "gptq")
