"""The GPTQ form: what readers of it make of a folder is the model that our own form holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmpq.checkpoint import model_files
from llmpq.checkpoint.gptq_form import GptqForm, gptq_options
from llmpq.checkpoint.model_files import Model, describe, load_model, resolve
from llmpq.checkpoint.tensor_names import decoder_tensors
from llmpq.checkpoint.tokenizer import ByteTokenizer
from llmpq.checkpoint.weights import dense
from llmpq.cli.main import main
from llmpq.measure.quantized_model import write_quantized
from llmpq.models.decoder_stage import build_stage
from llmpq.quant import QuantTensor
from llmpq.spec import NATIVE, Precision, UsageError
from tests.support.decoding import (
    CPU,
    EXACT,
    all_logits,
    open_model,
    random_sequences,
    single_plan,
    transformers_logits,
)
from tests.support.gguf_files import write_gguf
from tests.support.pipelines import tiny_model
from tests.support.tiny_models import VOCAB_SIZE

TEXT = "The quick brown fox jumps over the lazy dog. 0123456789! " * 20
USUAL = {"hidden_size": 64, "intermediate_size": 96}
SIZES = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64},
    "bloom": {"hidden_size": 64, "n_head": 4},
    "qwen2_moe": {**USUAL, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
}


def tiny(folder: Path, kind: str, dtype: torch.dtype = torch.float16) -> Model:
    return load_model(tiny_model(folder, kind, dtype, **SIZES.get(kind.partition("-")[0], USUAL)))


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of `bits` bits in int32 words [m, n], which follow each other along m, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
    numbers = words.numpy().view(np.uint32)[:, None] >> shifts & np.uint32(2**bits - 1)
    return torch.from_numpy(numbers.reshape(-1, words.shape[1]).astype(np.int64))


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the form is defined: a zero point is stored less 1."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(names.values())}
    tensors = {name: files[file][name] for name, file in names.items()}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        qweight, qzeros, scales, groups = (
            tensors.pop(f"{name}.{kind}") for kind in ("qweight", "qzeros", "scales", "g_idx")
        )
        assert scales.dtype == torch.float16 and groups.dtype == qzeros.dtype == torch.int32
        zeros = fields(qzeros.T.contiguous(), config["bits"]).T + 1
        codes = fields(qweight, config["bits"])
        assert codes.unique().numel() == 2 ** config["bits"] or config["bits"] == 8
        tensors[f"{name}.weight"] = ((codes - zeros[groups]) * scales[groups].double()).T
    assert all(tensor.element_size() == 2 or tensor.dtype == torch.float64 for tensor in tensors.values())
    return tensors


def network(folder: Path) -> Any:
    """A folder as a network of transformers, float32, with the weights as unpacked here."""
    plain = folder.with_name(f"{folder.name} unpacked")
    plain.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    tensors = unpacked(folder)
    if config["model_type"] == "gpt2":  # whose layers' matrices are those of a convolution
        tensors |= {name: tensor.T for name, tensor in tensors.items() if ".c_" in name and tensor.dim() == 2}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, plain / "model.safetensors")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def served_logits(folder: Path) -> dict[int, torch.Tensor]:
    """By our decoder, of a folder in our own form whose layers are quantized."""
    spec, source = open_model(folder)
    plan = single_plan(spec)
    stage = replace(plan.stages[0], precisions=(NATIVE,) * spec.num_layers, activations="a16")
    stage = build_stage(spec, source, replace(plan, stages=(stage,)), 0, CPU, **EXACT)
    return all_logits([stage], random_sequences(), portions=[20])


def assert_same_weights(folder: Path, ours: Path) -> None:
    """Of a folder in this form, which is read as any other, and of one in our own: bit for bit, layers as stored."""
    (spec, source), (expected_spec, expected) = open_model(folder), open_model(ours)
    for unit, of in expected_spec.stored.items():
        assert spec.stored[unit] == {name: replace(p, quantizer="stored") for name, p in of.items()}
    for unit, part in decoder_tensors(spec, describe(resolve(str(folder))).family):
        found = list(source.rows(unit, part))
        assert torch.equal(dense(source, unit, part), dense(expected, unit, part)), (unit, part)
        native = unit.startswith("layer") and part.removesuffix(".weight") in spec.linears(unit)
        assert {isinstance(rows, QuantTensor) for rows in found} == {native}


@pytest.mark.parametrize(
    ("kind", "precision", "dtype"),
    [
        ("llama-gqa", Precision(4, 32, "asym", "gptq"), "bfloat16"),
        ("llama-tied", Precision(4, None), "float16"),
        ("llama-biases", Precision(8, 32), "float16"),
        ("opt", Precision(4, 32), "bfloat16"),
        ("opt-untied", Precision(8, None, "asym", "gptq"), "float16"),
        ("gpt_neox", Precision(4, 32, "asym", "gptq"), "float16"),
        ("falcon-new", Precision(8, 32), "bfloat16"),
        ("bloom", Precision(4, None), "float16"),
        ("gpt2", Precision(4, 32), "float16"),
        ("gemma2", Precision(4, 32), "bfloat16"),
        ("qwen2_moe", Precision(4, None, "asym", "gptq"), "float16"),
    ],
    ids=str,
)
def test_readers_get_the_model_that_our_own_form_holds(
    kind: str, precision: Precision, dtype: str, tmp_path: Path
) -> None:
    model = tiny(tmp_path / "model", kind, getattr(torch, dtype))
    options = gptq_options(model.spec, precision)
    write_quantized(model, options, tmp_path / "ours", text=TEXT)
    write_quantized(model, options, tmp_path / "theirs", text=TEXT, form="gptq")
    found, sequences = network(tmp_path / "theirs"), random_sequences()
    for slot, logits in served_logits(tmp_path / "ours").items():
        expected = transformers_logits(found, sequences[slot])
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["torch_dtype"] == dtype and "dtype" not in config
    assert config["quantization_config"]["group_size"] == (precision.group_size or -1)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert_same_weights(tmp_path / "theirs", tmp_path / "ours")


def test_a_gguf_file_becomes_a_folder_of_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_gguf(tmp_path / "model.gguf", "llama-tied", types={})
    monkeypatch.setattr(model_files, "load_tokenizer", lambda checkpoint: ByteTokenizer(VOCAB_SIZE))
    model = load_model(model_files.resolve(str(tmp_path / "model.gguf")))
    write_quantized(model, gptq_options(model.spec, Precision(8, 32)), tmp_path / "out", form="gptq")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["LlamaForCausalLM"] and config.tie_word_embeddings
    tokens = random_sequences()[3]
    logits = transformers_logits(network(tmp_path / "out"), tokens)
    reference = transformers_logits(expected, tokens)
    assert (logits - reference).norm() < 0.05 * reference.norm()


def test_a_later_attempt_goes_on_where_an_earlier_one_stopped(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", "llama-tied")
    options = gptq_options(model.spec, Precision(4, 32, "asym", "gptq"))

    def stops(text: str, share: float | None = None, /) -> None:
        if share == pytest.approx(3 / len(model.spec.units)):
            raise KeyboardInterrupt

    write_quantized(model, options, tmp_path / "parts", text=TEXT)
    (tmp_path / "parts" / "config.json").unlink()  # begun in the other form, which is not gone on with
    write_quantized(model, options, tmp_path / "whole", text=TEXT, form="gptq")
    with pytest.raises(KeyboardInterrupt):
        write_quantized(model, options, tmp_path / "parts", text=TEXT, form="gptq", notify=stops)
    assert not (tmp_path / "parts" / "config.json").exists()
    begun = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("layer.[01].*")}
    write_quantized(model, options, tmp_path / "parts", text=TEXT, form="gptq")
    whole, parts = unpacked(tmp_path / "whole"), unpacked(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    for path in (tmp_path / "whole").glob("*.json"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    assert begun.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}.items()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--bits", "3"], "holds 4 or 8 bits in groups of 32, 64, 128 or row, not w3-g32-sym-gptq"),
        (["--bits", "16"], "holds 4 or 8 bits in groups of 32, 64, 128 or row, not w16"),
        (["--bits", "4", "--group-size", "256"], "in groups of 32, 64, 128 or row, not w4-g256-sym-gptq"),
        (["--bits", "4", "--group-size", "64"], "layers.0.mlp.down_proj has 96 columns, no multiple of 64"),
        (["--plan", "{plan}"], "but embedding is w4-g32-sym-rtn where w16 is expected; give --bits alone"),
        (["--bits", "native"], "stores nothing in a precision that kernels read"),
    ],
)
def test_what_the_form_cannot_hold_is_one_line(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(tmp_path / "model", "llama-gqa")
    single_plan(model.spec, Precision(4, 32)).save(tmp_path / "plan.json")
    given = [argument.format(plan=tmp_path / "plan.json") for argument in arguments]
    out = str(tmp_path / "out")
    assert main(["quantize", "--model", str(tmp_path / "model"), "--format", "gptq", "--out", out, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert problem in error and len(error) < 500


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer.1": Precision(8, 32)}, "but layer.1 is w8-g32-sym-rtn where w4-g32-sym-rtn is expected"),
        ({"layer.1": NATIVE}, "but layer.1 is native where"),
        ({"layer.0": NATIVE, "layer.1": NATIVE, "layer.2": NATIVE}, "not native"),
        (dict.fromkeys(["layer.0", "layer.1", "layer.2"], Precision(4, 32, "asym")), "has no zero points of its own"),
    ],
)
def test_mixed_and_native_and_asymmetric_layers_are_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model = tiny(tmp_path, "llama-gqa")
    options = gptq_options(model.spec, Precision(4, 32)) | changes
    with pytest.raises(UsageError, match=problem):
        GptqForm(model.spec, describe(model.checkpoint).family, options)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path, "gpt_oss")
    with pytest.raises(UsageError, match="a gpt_oss has all experts in one tensor, for which the GPTQ form has no lin"):
        GptqForm(model.spec, describe(model.checkpoint).family, gptq_options(model.spec, Precision(4, 32)))


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama-gqa")
    precision = Precision(4, 32)
    form = GptqForm(model.spec, describe(model.checkpoint).family, gptq_options(model.spec, precision))
    weight = QuantTensor(
        torch.zeros(64, 8, dtype=torch.int32), torch.full((64, 2), 1e6).bfloat16(), None, precision, (64, 64)
    )
    with pytest.raises(UsageError, match=r"layers.1.self_attn.o_proj.scales holds numbers too large for torch.float16"):
        form.tensors("layer.1", {"out": weight}, {})


def test_gptqmodel_reads_it(tmp_path: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel", reason="it is not installed: pip install '.[rivals-quality]'")
    model = tiny(tmp_path / "model", "llama-biases")
    options = gptq_options(model.spec, Precision(4, 32, "asym", "gptq"))
    write_quantized(model, options, tmp_path / "out", text=TEXT, form="gptq")
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    found = gptqmodel.GPTQModel.load(str(tmp_path / "out"), device="cpu", backend=backend, dtype=torch.float16)
    expected, linears = unpacked(tmp_path / "out"), 0
    for name, module in found.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            assert torch.equal(module.dequantize_weight().T, expected[f"{name}.weight"].half()), name
            linears += 1
    assert linears == 7 * model.spec.num_layers
