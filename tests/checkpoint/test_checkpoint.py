"""Checkpoints: what is found, what is read of it, and how everything that is wrong with one is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.models.dequantized import gguf_in_transformers
from llmpq.checkpoint.model_files import load_spec, resolve
from llmpq.checkpoint.weights import floating, open_weights
from llmpq.models.decoder_stage import build_stage
from llmpq.models.rotary import inverse_frequencies
from llmpq.spec import Rope, UsageError
from tests.support.decoding import (
    CPU,
    EXACT,
    all_logits,
    random_sequences,
    single_plan,
    transformers_logits,
)
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import KINDS, save_model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_has_the_numbers_of_the_configuration(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    config = model.config
    spec = load_spec(resolve(str(tmp_path)))
    opt = kind.startswith("opt")
    assert (spec.norm, spec.gated_mlp, spec.position_offset) == (("layer", False, 2) if opt else ("rms", True, None))
    assert (spec.layer_kinds[0].rope is None) == opt
    assert (spec.num_layers, spec.hidden_size, spec.num_heads) == (3, 48, 4)
    assert spec.num_kv_heads == getattr(config, "num_key_value_heads", 4)
    assert spec.head_dim == getattr(config, "head_dim", 12)
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.block == ("pre" if getattr(config, "do_layer_norm_before", True) else "post")
    assert spec.embedding_dim == getattr(config, "word_embed_proj_dim", 48)
    assert (spec.eos_token_ids, spec.bos_token_id) == ((1,), 0)
    assert spec.dtype == "float16"
    assert spec.name == tmp_path.name
    # Every parameter is in some unit, and no unit has more: at 4 bytes, small parameters and 2 bytes for the others.
    parameters = sum(
        p.numel() * (4 if p.dim() == 1 or "positions" in name else 2) for name, p in model.named_parameters()
    )
    units = [unit for unit in spec.units if not (spec.tied_embeddings and unit == "head")]
    total = sum(spec.unit_bytes(unit, single_plan(spec).precision(unit)) for unit in units)
    if spec.tied_embeddings:  # of the head all but the table
        total += spec.unit_bytes("head", single_plan(spec).head.precision) - 2 * spec.table.n * spec.table.k
    assert total == parameters


@pytest.mark.parametrize("kind", ["llama-rope-linear", "llama-rope-llama3", "llama-gqa", "qwen2-yarn"])
def test_rotary_frequencies_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    frequencies = inverse_frequencies(rope_of(tmp_path), 64)
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq)


def rope_of(folder: Path) -> Rope:
    rope = load_spec(resolve(str(folder))).layer_kinds[0].rope
    assert rope is not None
    return rope


def test_rope_scaling_is_read_in_its_older_form(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_config(tmp_path, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    older = rope_of(tmp_path)
    assert older.theta == 5e5
    edit_config(tmp_path, rope_theta=None, rope_scaling=None, rope_parameters={**scaling, "rope_theta": 5e5})
    assert rope_of(tmp_path) == older
    edit_config(tmp_path, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})
    assert rope_of(tmp_path) == Rope(10000.0, 12, (2.0,) * 6)


def test_end_of_sequence_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load_spec(resolve(str(tmp_path))).eos_token_ids == (5, 7)


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_shards_and_names_without_their_prefix_are_read(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind, shards=3)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) >= 3
    if kind == "opt":
        for shard in shards:
            save_file({name.removeprefix("model."): t for name, t in load_file(shard).items()}, shard)
    checkpoint = resolve(str(tmp_path))
    spec = load_spec(checkpoint)
    stage = build_stage(spec, open_weights(checkpoint, spec), single_plan(spec), 0, CPU, **EXACT)
    tokens = random_sequences()[3]
    logits = all_logits([stage], {0: tokens}, [24])[0]
    torch.testing.assert_close(logits, transformers_logits(model, tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_in_all_its_types_equals_the_model_it_was_made_from(tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_gguf(path, "llama-tied" if tied else "llama-gqa")
    checkpoint = resolve(str(path))
    spec = load_spec(checkpoint)
    assert (checkpoint.format, spec.tied_embeddings, spec.eos_token_ids, spec.dtype) == ("gguf", tied, (1,), "float16")
    stage = build_stage(spec, open_weights(checkpoint, spec), single_plan(spec), 0, CPU, **EXACT)
    tokens = random_sequences()[3]
    logits = all_logits([stage], {0: tokens}, [24])[0]
    torch.testing.assert_close(logits, transformers_logits(model, tokens), atol=2e-5, rtol=0)
    torch.testing.assert_close(transformers_logits(gguf_in_transformers(path), tokens), logits, atol=2e-5, rtol=0)


def test_rows_are_the_same_in_any_slices(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    checkpoint = resolve(str(tmp_path / "tiny.gguf"))
    source = open_weights(checkpoint, load_spec(checkpoint))
    for part in (("layer.1", "qkv.weight"), ("layer.0", "down.weight"), ("head", "norm.weight")):
        whole = torch.cat([floating(rows) for rows in source.rows(*part)])
        for start, stop in [(0, 1), (3, 21), (33, 64), (7, 8)]:
            assert torch.equal(
                torch.cat([floating(rows) for rows in source.rows(*part, start, stop)]), whole[start:stop]
            )
    assert len(list(source.rows("layer.1", "qkv.weight", 0, 65))) == 2  # of q, and of k


def test_content_hash_changes_with_any_tensor_and_with_the_configuration(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    hashes = {load_spec(resolve(str(tmp_path))).content_hash}
    assert load_spec(resolve(str(tmp_path))).content_hash in hashes
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        changed = {**tensors, name: tensors[name] * 2}
        save_file(changed, path, metadata={"format": "pt"})
        hashes.add(load_spec(resolve(str(tmp_path))).content_hash)
    edit_config(tmp_path, rms_norm_eps=1e-4)
    hashes.add(load_spec(resolve(str(tmp_path))).content_hash)
    hashes.add(load_spec(resolve(str(tmp_path), "dummy")).content_hash)
    assert len(hashes) == len(tensors) + 3


def test_dummy_needs_a_configuration_only(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    (tmp_path / "model.safetensors").unlink()
    checkpoint = resolve(str(tmp_path), "dummy")
    assert load_spec(checkpoint).num_layers == 3
    assert checkpoint.format == "dummy"
    with pytest.raises(UsageError, match=r"holds no \*\.safetensors file"):
        load_spec(resolve(str(tmp_path)))


def refused(model: Path | str) -> str:
    """The message with which a model is refused: one line."""
    with pytest.raises(UsageError) as caught:
        checkpoint = resolve(str(model))
        open_weights(checkpoint, load_spec(checkpoint))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "absent")
    assert "no such file or folder" in refused("nonsense")
    assert "no such file or folder" in refused(tmp_path / "absent.gguf")
    assert "without a config.json" in refused(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"1234")
    assert "neither a .gguf file nor a folder" in refused(tmp_path / "model.bin")


CONFIGURATIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama-gqa",
        {"architectures": ["MambaForCausalLM"]},
        "'MambaForCausalLM' is not known; there are LlamaForCausalLM, ",
    ),
    ("llama-gqa", {"hidden_size": None}, "no 'hidden_size'"),
    ("llama-gqa", {"hidden_size": "wide"}, "hidden_size"),
    ("llama-gqa", {"num_key_value_heads": 3}, "num_kv_heads: is 3, which does not divide num_heads = 4"),
    ("llama-gqa", {"hidden_act": "quick_gelu"}, "'quick_gelu' is not supported"),
    (
        "llama-gqa",
        {"rope_parameters": {"rope_type": "ntk-yarn", "factor": 2.0}},
        "'ntk-yarn' is not supported; there are",
    ),
    ("llama-gqa", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "llama3 rope scaling has no 'low_freq"),
    ("llama-gqa", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama-gqa", {"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing"),
    (
        "llama-gqa",
        {"intermediate_size": 88},
        "gate_proj.weight has the shape [80, 48], its configuration says [88, 48]",
    ),
    ("llama-gqa", {"attention_bias": True}, "q_proj.bias is missing"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False is not supported"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "message"), CONFIGURATIONS, ids=[message for _, _, message in CONFIGURATIONS]
)
def test_configurations_that_cannot_be_run_are_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, kind)
    edit_config(tmp_path, **changes)
    assert message in refused(tmp_path)


def test_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "opt")
    (tmp_path / "config.json").write_text('{"architectures": ')
    assert "is not JSON: Expecting value" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "holds no JSON object" in refused(tmp_path)


def _change(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data[: len(data) // 2], "is truncated"),
        (lambda data: data[:100], "is truncated"),
        (lambda data: data[:5], "is truncated"),
        (lambda data: b"", "is truncated"),
        (_change(0, b"\xff" * 8), "is truncated or no safetensors file"),
        (_change(8, b"x"), "is broken"),
        (lambda data: data.replace(b'"F32"', b'"F16"'), "is broken"),
        (lambda data: data.replace(b'"F32"', b'"I32"'), "is stored as I32"),
    ],
)
def test_damaged_safetensors_are_refused(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert message in refused(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data[: len(data) // 2], "is truncated"),
        (lambda data: data[:200], "is truncated or broken"),
        (lambda data: data[:10], "is no GGUF file, or is truncated"),
        (lambda data: b"", "is no GGUF file, or is truncated"),
        (_change(0, b"GGML"), "is no GGUF file"),
        (_change(4, b"\x09"), "is of GGUF version 9"),
        (_change(24, b"\xff" * 8), "is truncated or broken"),
        (lambda data: data.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"), "layers.1.mlp.up_proj.weight is missing"),
    ],
)
def test_damaged_gguf_files_are_refused(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(damage(path.read_bytes()))
    assert message in refused(path)


def test_a_gguf_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    for size in range(0, len(data), len(data) // 50):
        path.write_bytes(data[:size])
        assert path.name in refused(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "baichuan"}, "GGUF architecture 'baichuan' is not known; there are llama, mistral3"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count = 8 is not supported, only 16"),
        ({"tensors": {"rope_freqs.weight": [1, 2, 3]}}, "factors: has 3 numbers for 8 pairs"),
    ],
)
def test_gguf_files_that_cannot_be_run_are_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", **metadata)
    assert message in refused(tmp_path / "tiny.gguf")
