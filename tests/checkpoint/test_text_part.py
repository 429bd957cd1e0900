"""Models that see images, too, serve text as transformers does; what is left out, or refused, is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmpq.checkpoint import model_files
from llmpq.checkpoint.text_part import AROUND, DEFAULTS, text_config
from llmpq.checkpoint.weights import open_weights
from llmpq.measure.quantized_model import write_quantized
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import Precision, UsageError
from tests.support.decoding import CPU, EXACT, all_logits, random_sequences, single_plan, transformers_logits
from tests.support.multimodal_models import KINDS, save_multimodal
from tests.support.quantized_files import gptq, write_quantized_folder
from tests.support.quantized_models import GPTQ, Q, served_logits


def change(folder: Path, config: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    config(values)
    path.write_text(json.dumps(values))


def rename(folder: Path, new: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint other names."""
    path = folder / "model.safetensors"
    save_file({new(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def assert_serves(folder: Path, model: transformers.PreTrainedModel) -> None:
    """As transformers does where there is text alone."""
    found = model_files.open_model(str(folder))
    source = open_weights(found.checkpoint, found.spec)
    stage = build_stage(found.spec, source, single_plan(found.spec), 0, CPU, **EXACT)
    sequences = random_sequences()
    for slot, logits in all_logits([stage], sequences, portions=[4, 3]).items():
        expected = transformers_logits(model, sequences[slot])
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    (note,) = found.notes
    assert "its text model alone is used" in note and "vision" in note


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_text_equal_transformers(kind: str, tmp_path: Path) -> None:
    assert_serves(tmp_path, save_multimodal(tmp_path, kind))


def test_files_with_newer_names_and_tables_that_nothing_calls_tied(tmp_path: Path) -> None:
    model = save_multimodal(tmp_path, "gemma3")
    rename(tmp_path, lambda name: f"model.{name.replace('language_model.model.', 'language_model.')}")

    def untold(config: dict[str, Any]) -> None:
        del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]

    change(tmp_path, untold)
    assert_serves(tmp_path, model)
    assert model_files.open_model(str(tmp_path)).spec.tied_embeddings


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_configurations_whose_text_model_has_none_of_its_own(kind: str, tmp_path: Path) -> None:
    """As Qwen publishes them."""
    model = save_multimodal(tmp_path, kind)

    def flatten(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        del text["model_type"]
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "rope_theta": 500.0}
        config.update({**text, "torch_dtype": config.pop("dtype")})

    change(tmp_path, flatten)
    assert_serves(tmp_path, model)


@pytest.mark.parametrize(("outer", "inner"), [("torch_dtype", "dtype"), ("dtype", "torch_dtype")])
def test_the_type_around_a_text_model_counts_in_either_spelling(outer: str, inner: str) -> None:
    around = {"architectures": ["LlavaForConditionalGeneration"], outer: "bfloat16"}
    found = text_config({**around, "text_config": {"model_type": "llama", inner: "float32"}})
    assert found is not None and found[outer] == "bfloat16" and inner not in found


def test_what_a_configuration_leaves_out_of_its_text_model_is_as_transformers_has_it() -> None:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for architecture, kind in AROUND.items():
        if architecture.endswith("Generation"):
            continue
        theirs = transformers.AutoConfig.for_model(architecture, text_config={"model_type": kind}).text_config
        found = text_config({"model_type": architecture, "text_config": {"model_type": kind}})
        assert found is not None
        spec = model_files.spec_from_config(found, kind, "0" * 16)
        for key in keys:
            assert found[key] == getattr(theirs, key), (kind, key)
        assert spec.num_kv_heads == theirs.num_key_value_heads, kind
        assert spec.norm_eps == theirs.rms_norm_eps and spec.max_positions == theirs.max_position_embeddings, kind
        heads = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert spec.head_dim == heads, kind
        ropes = {of.rope.theta for of in spec.layer_kinds if of.rope is not None}
        given = theirs.rope_parameters
        given = given.values() if "full_attention" in given else [given]
        assert ropes == {of["rope_theta"] for of in given}, kind
    assert {*AROUND.values()} <= {*DEFAULTS}


def test_linears_of_its_text_model_may_be_quantized(tmp_path: Path) -> None:
    """By settings of single modules under the names that they have in the file, too."""
    config = {**GPTQ, "dynamic": {f"+:language_model.{Q}": {"group_size": 16}}}
    model, _ = write_quantized_folder(tmp_path, gptq(), config, others={Q: gptq(group=16)})
    rename(tmp_path, "language_model.{}".format)

    def wrap(config: dict[str, Any]) -> None:
        text = {key: config.pop(key) for key in [*config] if key != "quantization_config"}
        config |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}

    change(tmp_path, wrap)
    found = model_files.open_model(str(tmp_path))
    assert found.spec.stored["layer.0"]["down"] == Precision(4, 32, "sym", "stored")
    tokens = random_sequences()[3]
    torch.testing.assert_close(served_logits(found, tokens), transformers_logits(model, tokens), atol=1e-3, rtol=0)


def test_what_is_quantized_of_it_is_a_text_model(tmp_path: Path) -> None:
    save_multimodal(tmp_path / "model", "qwen2_5_vl")
    model = model_files.open_model(str(tmp_path / "model"))
    write_quantized(model, dict.fromkeys(model.spec.units, Precision(8, 32)), tmp_path / "out")
    found = model_files.open_model(str(tmp_path / "out"))
    assert found.notes == () and found.spec.source_hash == model.spec.content_hash
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "vision_config" not in config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "attends within chunks"),
        ({"model_type": "mllama"}, "has layers that attend to images"),
        ({"architectures": ["PaliGemmaForConditionalGeneration"]}, "attends to a prompt in both directions"),
        ({"model_type": "llava", "text_config": {"model_type": "cohere2"}}, "'cohere2' is not known"),
        ({"model_type": "llava", "text_config": ["llama"]}, "is no configuration of a text model"),
        ({"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        model_files.open_model(str(tmp_path), "dummy")


def test_tensors_of_no_known_part_are_refused_by_name(tmp_path: Path) -> None:
    save_multimodal(tmp_path, "llava")
    rename(tmp_path, lambda name: name.replace("multi_modal_projector.linear_1", "audio_tower.linear"))
    with pytest.raises(UsageError, match=r"the tensor audio_tower\.linear\.bias"):
        model_files.open_model(str(tmp_path))
