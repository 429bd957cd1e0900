"""The decoder of known shapes: that it has them, what rows say, and that the file is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from bench.end_to_end import gpu_decoder, gpu_models, random_checkpoint
from bench.tables import gpu
from llmpq.checkpoint.model_files import open_model
from llmpq.spec import W16, Precision

ENGINES = "llmpq int4,llmpq int4 ahead,transformers eager"


@pytest.mark.parametrize("name", list(gpu_models.CONFIGS))
def test_a_model_has_as_many_weights_as_transformers_own(name: str) -> None:
    spec = gpu_models.spec(name, W16)
    ours = [shape.n * shape.k for unit in spec.units for shape in spec.linears(unit).values()]
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**gpu_models.config(name)))
    assert sum(ours) + norms == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.slow
def test_rows_are_measured_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decoder.json"
    tiny = ["--model", "tiny", "--device", "cpu", "--rounds", "1", "--json-out", str(path)]
    assert gpu_decoder.main([*tiny, "--batches", "1,3", "--engines", ENGINES]) == 0
    found = json.loads(path.read_text())
    assert found["missing"] == {}
    assert [(row["engine"], row["batch"]) for row in found["rows"]] == [
        (engine, batch) for engine in ("llmpq int4", "llmpq int4 ahead", "transformers eager") for batch in (1, 3)
    ]
    for row in found["rows"]:
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["prefill_tokens_per_s"] > 0
    for row in found["rows"][:4]:
        whole, *top = row["kernels"]
        assert 0 < len(top) <= gpu_decoder.TOP
        assert sum(kernel["seconds"] for kernel in top) <= whole["seconds"] * 1.001
        assert [kernel["seconds"] for kernel in top] == sorted((k["seconds"] for k in top), reverse=True)
    capfd.readouterr()
    assert gpu_decoder.main([*tiny, "--batches", "3", "--engines", ENGINES]) == 0
    assert json.loads(path.read_text())["rows"] == found["rows"]
    assert capfd.readouterr().out == ""
    assert gpu_decoder.main([*tiny, "--batches", "2", "--engines", "llmpq int4"]) == 0
    assert [row["batch"] for row in json.loads(path.read_text())["rows"]].count(2) == 1


def test_an_engine_without_time_or_that_fails_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "decoder.json"
    tiny = ["--model", "tiny", "--device", "cpu", "--rounds", "1", "--batches", "1", "--json-out", str(path)]
    assert gpu_decoder.main([*tiny, "--engines", "llmpq int4", "--budget-seconds", "0"]) == 1
    assert json.loads(path.read_text())["missing"] == {"llmpq int4": "no time was left"}
    monkeypatch.setattr(gpu_decoder, "RIVAL_SECONDS", 0.1)
    assert gpu_decoder.main([*tiny, "--engines", "transformers eager"]) == 0
    assert "stopped after" in json.loads(path.read_text())["missing"]["transformers eager"]


def test_a_step_reads_the_weights_the_keys_and_the_values() -> None:
    engine = gpu_decoder.Ours("tiny", 4, True, torch.device("cpu"), 2)
    spec, work = engine.spec, engine.work
    layer = sum(Precision(4, 32).weight_bytes(shape.n, shape.k) for shape in spec.linears("layer.0").values())
    keys = 2 * (work.prompt + work.output / 2) * 2 * spec.kv_dim * 2  # of two sequences, 16 bits each
    expected = spec.num_layers * (layer + keys) + 2 * spec.vocab_size * spec.hidden_size
    assert engine.bound_seconds(2, 1.0) == pytest.approx(expected, rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decoder.main([]) == 2
    assert capsys.readouterr().err == "error: bench.end_to_end.gpu_decoder needs a CUDA device, and torch sees none\n"


def test_a_checkpoint_of_random_weights_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    for _ in range(2):  # what is there is kept
        assert random_checkpoint.main([str(folder), "--model", "tiny", "--device", "cpu"]) == 0
    assert torch.get_default_dtype() == torch.float32
    model, shape = open_model(str(folder)), gpu_models.CONFIGS["tiny"]
    assert (model.spec.num_layers, model.spec.vocab_size) == (shape["num_hidden_layers"], shape["vocab_size"])
    text = "héllo, world"
    ids = model.tokenizer.encode(text)
    assert model.tokenizer.decode(ids) == text


def test_the_tables_say_how_much_faster_ours_is_and_what_it_spends_its_time_on() -> None:
    kernels = [
        {"name": "all", "seconds": 0.003, "calls": 2.0},
        {"name": "void llmpq::tile_kernel<4, __nv_bfloat16>(llmpq::CudaGemmArgs)", "seconds": 0.002, "calls": 1.0},
    ]
    shared = {"batch": 1, "prefill_tokens_per_s": 1000.0}
    ours = {"engine": "llmpq int4", "decode_tokens_per_s": 250.0, "step_s": 0.004, "graphed": True, "bound_share": 0.5}
    rows = [
        ours | shared | {"kernels": kernels},
        shared | {"engine": "transformers eager", "decode_tokens_per_s": 50.0, "step_s": 0.02},
    ]
    table = gpu.gpu_decoder({"rows": rows, "ceilings": {}})
    assert table[-2:] == [
        "| llmpq int4, graphed | 1 | 1000 | 250 | 4.00 | 50 % | 5.0 |",
        "| transformers eager | 1 | 1000 | 50 | 20.00 |  |  |",
    ]
    assert gpu.gpu_decoder_kernels({"rows": rows})[-1] == "| llmpq int4 | 1 | 4.00 | 3.00 | tile_kernel 2.00 |"
