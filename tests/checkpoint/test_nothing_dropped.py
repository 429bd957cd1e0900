"""What a checkpoint holds and says is used or refused by name: nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmpq.checkpoint.model_files import Model
from llmpq.checkpoint.model_files import open_model as open_files
from llmpq.checkpoint.weights import open_weights
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import UsageError
from tests.support.decoding import CPU, EXACT, all_logits, random_sequences, single_plan, transformers_logits
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import make_model, save_model, save_tokenizer

TOKENS = random_sequences()[3]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, *dropped: str, **changes: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in dropped}
    save_file({**tensors, **{name.replace("__", "."): t for name, t in changes.items()}}, path, {"format": "pt"})


def logits_of(path: Path) -> torch.Tensor:
    """Of a model's files as they are, in float32."""
    model = open_files(str(path))
    source = open_weights(model.checkpoint, model.spec)
    stage = build_stage(model.spec, source, single_plan(model.spec), 0, CPU, **EXACT)
    return all_logits([stage], {0: TOKENS}, [24])[0]


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_files(str(path))
    return str(caught.value)


def assert_same(path: Path, model: Any) -> None:
    torch.testing.assert_close(logits_of(path), transformers_logits(model, TOKENS), atol=2e-5, rtol=0)


def test_biases_of_a_gguf_file_are_used(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", "llama-biases")
    assert_same(tmp_path / "m.gguf", model)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.0.attn_q.scale", "blk.1.attn_sub_norm.weight", "blk.3.attn_q.weight", "foo"]
)
def test_a_tensor_of_a_gguf_file_that_has_no_use_is_refused(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tensors={name: [1.0] * 64})
    message = refusal(tmp_path / "m.gguf")
    assert name in message or (name == "blk.0.attn_q.bias" and "k_proj.bias is missing" in message)


def test_tensors_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    model = write_gguf(
        tmp_path / "m.gguf",
        tensors={"rope_freqs.weight": [1.0] * 8, "blk.0.attn_rot_embd.weight": [0.5] * 8},
        metadata={"llama.expert_count": 0, "llama.logit_scale": 1.0, "llama.attention.scale": 0.25, "other.key": 5},
    )
    assert_same(tmp_path / "m.gguf", model)
    folder = tmp_path / "folder"
    model = save_model(folder, "llama-gqa")
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    edit_config(folder, logit_scale=1.0, num_experts=0, head_dim=None, layer_types=["full_attention"] * 3)
    assert_same(folder, model)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.q_norm.weight", "score"])
def test_a_tensor_of_a_folder_that_has_no_use_is_refused(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    edit_tensors(tmp_path, **{name: torch.ones(48)})
    assert f"has the tensor {name}, which its configuration has no use for" in refusal(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.finetuned": True},
    ],
    ids=str,
)
def test_linear_scaling_of_a_gguf_file_is_used(metadata: dict[str, Any], tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", "llama-rope-linear", metadata=metadata)
    assert_same(tmp_path / "m.gguf", model)


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-rope-linear")
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={"factor": 4.0})
    assert_same(tmp_path, model)


def test_values_for_each_layer_that_are_all_equal_are_read(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count": [4] * 3, "llama.feed_forward_length": [96] * 3}
    model = write_gguf(tmp_path / "m.gguf", metadata={**metadata, "llama.attention.head_count_kv": [2] * 3})
    assert_same(tmp_path / "m.gguf", model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 4),
        ("logit_scale", 0.5),
        ("attention.scale", 0.3),
        ("attention.value_length", 8),
        ("attention.head_count", [4, 2, 4]),
        ("attention.head_count", "four"),
        ("attention.head_count", -4),
        ("attention.head_count_kv", 0.5),
        ("rope.freq_base", float("nan")),
        ("rope.scaling.type", "ntk"),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.scaling.attn_factor", 1.2),
        ("block_count", 10**9),
        ("invented", 1),
        ("feed_forward_length", [7] * 5000),
    ],
)
def test_a_key_of_a_gguf_file_that_is_not_implemented_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={f"llama.{key}": value})
    names = {"rope.scaling.type": "ntk", "attention.head_count_kv": "num_key_value_heads", "block_count": "num_layers"}
    assert names.get(key, f"llama.{key} = ") in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 0.5),
        ("num_local_experts", 8),
        ("attention_multiplier", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("quantization_config", {"quant_method": "gptq"}),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("rope_parameters", {"rope_type": "default", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": "x"}),
        ("rope_parameters", {"rope_type": "linear", "factor": float("inf")}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": -2.0}),
        ("rope_parameters", {"chunked_attention": {"rope_theta": 1.0}}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": float("nan")}),
        ("rope_parameters", "x"),
        ("rms_norm_eps", float("nan")),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_attention_heads", "four"),
        ("max_position_embeddings", [64]),
        ("head_dim", 13),
        ("vocab_size", 10**30),
        ("hidden_act", ["silu"]),
        ("bos_token_id", {"a": 1}),
        ("tie_word_embeddings", 12),
        ("hidden_size", "x" * 10**6),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_that_is_not_implemented_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    edit_config(tmp_path, **{key: value})
    field = {"rope_parameters": "rope", "rms_norm_eps": "norm_eps", "num_hidden_layers": "num_layers"}
    field |= {"hidden_act": "activation", "tie_word_embeddings": "tied_embeddings"}
    message = refusal(tmp_path)
    assert field.get(key, key) in message
    assert len(message) <= 500


def test_mistrals_own_defaults_stand_for_absent_keys(tmp_path: Path) -> None:
    save_model(tmp_path, "mistral", num_key_value_heads=4, max_position_embeddings=8192)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["num_key_value_heads"], config["sliding_window"]
    path.write_text(json.dumps(config))
    assert "num_kv_heads: is 8, which does not divide num_heads = 4" in refusal(tmp_path)
    edit_config(tmp_path, num_key_value_heads=None)
    assert open_files(str(tmp_path)).spec.layer_kinds[0].window == 4096
    edit_config(tmp_path, sliding_window=None)
    assert open_files(str(tmp_path)).spec.layer_kinds[0].window is None


@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_tied_tables_are_what_is_stored(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    name = "model.embed_tokens.weight" if kind == "llama-tied" else "model.decoder.embed_tokens.weight"
    table = load_file(tmp_path / "model.safetensors")[name]
    edit_tensors(tmp_path, name, **{"lm_head.weight": table})  # the head only
    opened = open_files(str(tmp_path))
    assert (opened.spec.tied_embeddings, opened.notes) == (True, ())
    assert_same(tmp_path, model)
    edit_tensors(tmp_path, **{name: table.clone()})  # the same twice
    opened = open_files(str(tmp_path))
    assert (opened.spec.tied_embeddings, opened.notes) == (True, ())
    assert_same(tmp_path, model)
    other = table.clone()
    other[100, 7] += 1
    edit_tensors(tmp_path, **{"lm_head.weight": other})  # two that differ
    opened = open_files(str(tmp_path))
    assert opened.spec.tied_embeddings is False
    (note,) = opened.notes
    assert f"ties {name} and lm_head.weight, but the two differ in its files; each is used as stored" in note
    model.lm_head.weight = torch.nn.Parameter(other)
    assert_same(tmp_path, model)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "gelu_new", "silu", "swish"])
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_activations_with_and_without_a_gate_equal_transformers(kind: str, activation: str, tmp_path: Path) -> None:
    key = "hidden_act" if kind == "llama-gqa" else "activation_function"
    assert_same(tmp_path, save_model(tmp_path, kind, **{key: activation}))


def test_the_files_that_transformers_reads_are_read(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-gqa", shards=3)
    save_file({"layers.0.attention.wk.weight": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    assert_same(tmp_path, model)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"{lost.name} is missing: model.safetensors.index.json names it" in refusal(tmp_path)


def test_latent_attention_and_mixtures_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3_moe")
    edit_config(tmp_path, num_experts_per_tok=7)
    assert "per_token: is 7, but there are 6 experts" in refusal(tmp_path)
    edit_config(tmp_path, num_experts_per_tok=2, decoder_sparse_step=0)
    assert "cannot be used" in refusal(tmp_path)
    edit_config(tmp_path, decoder_sparse_step=1)
    assert "is missing from the checkpoint" in refusal(tmp_path)
    edit_config(tmp_path, architectures=["DeepseekV2ForCausalLM"])
    assert "'DeepseekV2ForCausalLM' is not supported: it attends to a compressed latent" in refusal(tmp_path)


def test_a_split_gguf_file_is_read_whichever_part_is_named(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", split=12)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hashes = set()
    for path in parts:
        assert_same(path, model)
        hashes.add(open_files(str(path)).spec.content_hash)
    assert len(hashes) == 1
    data = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    assert "does not say that it is part 2 of 3" in refusal(parts[0])
    parts[1].unlink()
    for path in (parts[0], parts[2]):
        assert f"{parts[1].name} is missing: the model is split into 3 files" in refusal(path)
    (tmp_path / "renamed.gguf").write_bytes(data)
    assert "the names of its parts must end in" in refusal(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.2.mlp.down_proj.bias", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_named(name: str, value: float, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-biases", torch.bfloat16)
    tensor = load_file(tmp_path / "model.safetensors")[name]
    tensor.view(-1)[tensor.numel() // 2] = value
    edit_tensors(tmp_path, **{name: tensor})
    with pytest.raises(UsageError, match=f"the tensor {name} holds values that are not finite numbers"):
        logits_of(tmp_path)


def test_the_scale_of_a_native_block_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", types={"gate_proj": "Q4_1", "up_proj": "Q4_1"})
    model: Model = open_files(str(tmp_path / "m.gguf"))
    entry = open_weights(model.checkpoint, model.spec)._tensors["layer.1", "up.weight"][1].tensor.entry
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - 20 + 2)  # the offset of the last block
        file.write(b"\x00\x7e")
    with pytest.raises(UsageError, match=r"the tensor blk\.1\.ffn_up\.weight holds values that are not finite"):
        logits_of(tmp_path / "m.gguf")


def test_numbers_beyond_the_models_16_bit_type_are_named(tmp_path: Path) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    edit_tensors(tmp_path, **{"lm_head.weight": torch.full((272, 48), 1e6)})
    model = open_files(str(tmp_path))
    source = open_weights(model.checkpoint, model.spec)
    with pytest.raises(UsageError, match=r"head\.table holds numbers too large for float16"):
        build_stage(model.spec, source, single_plan(model.spec), 0, CPU)
