"""A tiny GGUF file of every architecture, as llama.cpp's converter writes it, against transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from bench.models.dequantized import gguf_in_transformers
from llmpq.checkpoint.configuration import spec_from_config
from llmpq.checkpoint.gguf_configuration import config_from_gguf
from llmpq.checkpoint.gguf_forms import FORMS, gguf_form
from llmpq.checkpoint.model_files import open_model as open_files
from llmpq.measure.quantized_model import write_quantized
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import NATIVE, W16, ModelSpec, Precision, UsageError
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
from tests.support.tiny_models import make_model

TOKENS = random_sequences()[3]
SCALAR = {"query_pre_attn_scalar": 16}  # which is not written: llama.cpp takes it to be the size of a head
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama-rope-llama3", {}),
    ("mistral", {}),
    ("mistral", {"architecture": "mistral3"}),
    ("smollm3", {}),
    ("qwen2", {}),
    ("qwen2-yarn", {}),
    ("qwen3", {}),
    ("qwen2", {"architecture": "qwen2vl", "metadata": {"qwen2vl.rope.dimension_sections": [2, 3, 1, 0]}}),
    ("qwen3", {"architecture": "qwen3vl", "metadata": {"qwen3vl.n_deepstack_layers": 3}}),
    ("gemma", {}),
    ("gemma2", SCALAR),
    ("gemma3", {**SCALAR, "metadata": {"gemma3.attention.sliding_window_pattern": 3}}),
    ("gemma3-scaled", {**SCALAR, "metadata": {"gemma3.attention.sliding_window_pattern": 2}}),
    ("phi", {}),
    ("phi3", {}),
    ("phi3-longrope", {}),
    ("granite", {}),
    ("olmo2", {}),
    ("starcoder2", {"sliding_window": None}),  # it is not written
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("gpt_neox-sequential", {}),
    ("bloom", {}),
    ("falcon", {}),
    ("falcon-new", {}),
    ("mixtral", {}),
    ("qwen2_moe", {"mlp_only_layers": []}),
    ("qwen3_moe", {"decoder_sparse_step": 1, "num_hidden_layers": 2}),
    ("gpt_oss", {}),
]


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPQ_BACKEND", "reference")


def logits_of(path: Path, precision: Any = W16) -> torch.Tensor:
    spec, source = open_model(path)
    stage = build_stage(spec, source, single_plan(spec, precision), 0, CPU, **EXACT)
    return all_logits([stage], {0: TOKENS}, portions=[7, 6])[0]


def assert_same(path: Path, model: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(logits_of(path), transformers_logits(model, TOKENS), atol=tolerance, rtol=0)


def test_every_architecture_has_a_case() -> None:
    written = {"llama" if kind.startswith("llama") else options.get("architecture", kind) for kind, options in KINDS}
    others = {"mistral": "llama", "phi": "phi2", "gpt_neox": "gptneox", "mixtral": "llama"}
    others |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
    assert {others.get(kind.partition("-")[0], kind.partition("-")[0]) for kind in written} == FORMS.keys()


@pytest.mark.family("GGUF")
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_architecture_equals_transformers(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(tmp_path / "m.gguf", write_gguf(tmp_path / "m.gguf", kind, types={}, **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {}),
        # What transformers' reader does not read is here as it takes it to be.
        ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0}),
        ("gpt2", {"n_positions": 1024}),
        ("bloom", {}),
        ("falcon", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transformers_reads_the_same_of_a_file(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind, types={}, **options)
    assert_same(tmp_path / "m.gguf", gguf_in_transformers(tmp_path / "m.gguf"))


def test_the_names_are_those_of_the_gguf_package() -> None:
    for name, form in FORMS.items():
        number = next(number for number, arch in gguf.MODEL_ARCH_NAMES.items() if arch == name)
        known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
        family = form.stored(())
        written = {*form.names(family), *(f"blk.{{bid}}.{inner}" for inner in form.layer_names(family))}
        assert written <= known | {"output"}, name  # which may be there though it is that of the embedding


def test_blocks_of_8_bits_are_native_in_a_fused_linear(tmp_path: Path) -> None:
    parts = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head")
    types = dict.fromkeys(parts, "Q8_0")
    model = write_gguf(tmp_path / "m.gguf", "phi3", types=types, hidden_size=64, intermediate_size=96)
    assert set(open_files(str(tmp_path / "m.gguf")).spec.stored) == set(open_files(str(tmp_path / "m.gguf")).spec.units)
    torch.testing.assert_close(
        logits_of(tmp_path / "m.gguf", NATIVE), transformers_logits(model, TOKENS), atol=2e-5, rtol=0
    )


def test_q_k_and_v_may_be_one_tensor(tmp_path: Path) -> None:
    """As in older files of phi-2."""
    model = write_gguf(tmp_path / "m.gguf", "phi", types={}, fused=True)
    assert_same(tmp_path / "m.gguf", model)


def test_a_table_that_is_written_twice_is_that_of_the_head(tmp_path: Path) -> None:
    """As in older files of GPT-2."""
    model = write_gguf(tmp_path / "m.gguf", "gpt2", types={}, tie_word_embeddings=False)
    assert_same(tmp_path / "m.gguf", model)


def test_gemma_is_quantized_to_a_folder_that_loads(tmp_path: Path) -> None:
    """Its norms stand there as they multiply, which transformers' do not."""
    tokens = ["<s>", "a", "b", "ab", *(f"<{i}>" for i in range(268))]
    tokenizer = {"model": "gpt2", "tokens": tokens, "merges": ["a b"], "token_type": [1] * 272}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    model = write_gguf(tmp_path / "m.gguf", "gemma", types={}, metadata=metadata)
    found = open_files(str(tmp_path / "m.gguf"))
    write_quantized(found, dict.fromkeys(found.spec.units, Precision(8, 32)), tmp_path / "out")
    folder = open_files(str(tmp_path / "out")).spec
    for field in ("embedding_scale", "layer_kinds", "norm_eps", "tied_embeddings", "head_dim", "max_positions"):
        assert getattr(folder, field) == getattr(found.spec, field)
    logits = logits_of(tmp_path / "out", NATIVE)
    expected = transformers_logits(model, TOKENS)
    assert (logits - expected).std() < 0.03 * expected.std()


def spec_of(architecture: str, **metadata: Any) -> ModelSpec:
    """By metadata alone."""
    sizes = {"block_count": 4, "context_length": 64, "embedding_length": 96, "feed_forward_length": 384}
    sizes |= {"attention.head_count": 6, "vocab_size": 99}
    given = {f"{architecture}.{key}": value for key, value in {**sizes, **metadata}.items()}
    config = config_from_gguf(given, {}, {}, gguf_form({"general.architecture": architecture}, (), "m"), "m")
    return spec_from_config(config, "m", "0" * 16)


def test_what_files_do_not_say_is_as_llama_cpp_has_it() -> None:
    qwen = spec_of("qwen3")
    assert (qwen.num_kv_heads, qwen.head_dim, qwen.layer_kinds[0].rope.theta) == (6, 16, 10000.0)
    keys = {"attention.key_length": 32, "attention.sliding_window": 8}
    gemma = spec_of("gemma3", **keys, block_count=12)
    assert [gemma.layer_kind(i).window for i in range(7)] == [8] * 5 + [None, 8]
    assert (gemma.layer_kinds[0].rope.theta, gemma.attention_scale) == (10000.0, 32**-0.5)
    assert spec_of("gemma3", **{"attention.key_length": 32}).layer_kinds[0].window is None
    for architecture, layers in (("gemma2", 46), ("gemma3", 62)):
        assert spec_of(architecture, **keys, block_count=layers).attention_scale == 16**-0.5
    assert spec_of("gemma2").attention_cap == 50.0
    assert spec_of("granite").attention_scale == 16**-0.5
    assert spec_of("phi2").layer_kinds[0].rope.dims == 16
    assert spec_of("gptneox", **{"rope.dimension_count": 6}).layer_kinds[0].rope.dims == 6


@pytest.mark.parametrize(
    ("kind", "texts", "named", "ends"),
    [
        ("phi3", {1: "<|endoftext|>", 7: "<|end|>"}, {}, (1, 7)),  # as in Microsoft's own file
        ("gemma2", {1: "<eos>", 7: "<end_of_turn>"}, {}, (1, 7)),
        ("llama-gqa", {3: "<|end_of_text|>", 5: "<|eom_id|>", 9: "<|eot_id|>"}, {"eos": 9}, (9, 3, 5)),
        ("llama-gqa", {2: "<|im_end|", 3: "an <|end|>", 5: "<|END|>"}, {"eot": 6, "eom": 4}, (1, 6, 4)),
        ("gpt_oss", {1: "<|return|>", 2: "<|call|>", 3: "<|end|>", 4: "<|endoftext|>"}, {"eot": 3}, (1, 2, 4)),
        ("phi3", {1: "<|return|>", 3: "<|end|>"}, {}, (1, 3)),
    ],
)
def test_answers_end_at_the_tokens_at_which_they_end_in_llama_cpp(
    kind: str, texts: dict[int, str], named: dict[str, int], ends: tuple[int, ...], tmp_path: Path
) -> None:
    tokens = [texts.get(i, f"<{i}>") for i in range(make_model(kind).config.vocab_size)]
    keys = {f"tokenizer.ggml.{key}_token_id": token for key, token in named.items()}
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["<|im_end |>", "<|end|>"], **keys}
    more = SCALAR if kind == "gemma2" else {}
    write_gguf(tmp_path / "m.gguf", kind, types={}, metadata=metadata, **more)
    assert open_files(str(tmp_path / "m.gguf")).spec.eos_token_ids == ends


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("bloom", {"feed_forward_length": 380}, "bloom.feed_forward_length = 380 is not supported, only 384"),
        ("bloom", {"attention.head_count_kv": 2}, "bloom.attention.head_count_kv = 2 is not supported, only 6"),
        ("bloom", {"rope.freq_base": 1e4}, "bloom.rope.freq_base = 10000.0 is not supported"),
        ("qwen2", {"attention.sliding_window": 8}, "qwen2.attention.sliding_window = 8 is not supported, only 0"),
        ("qwen2", {"rope.dimension_count": 8}, "qwen2.rope.dimension_count = 8 is not supported, only 16"),
        ("qwen2", {"rope.scaling.type": "yarn"}, "no qwen2.rope.scaling.factor beside qwen2.rope.scaling.type"),
        ("phi3", {"rope.scaling.type": "longrope"}, "its longrope rope scaling has no list of numbers 'short_factor'"),
        ("mistral3", {"attention.temperature_scale": 0.1}, "mistral3.attention.temperature_scale = 0.1"),
        ("gemma3", {"attention.sliding_window_pattern": (True, False)}, "expected one value for all layers"),
        ("gptneox", {"use_parallel_residual": 2}, "use_parallel_residual = 2 is not supported"),
        ("granite", {"residual_scale": "x"}, "granite.residual_scale = 'x' is no number above 0"),
    ],
)
def test_what_is_not_read_is_refused_by_name(architecture: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_of(architecture, **metadata)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"rope_freqs.weight": [2.0] * 5}, {}, "has 5 numbers for 8 pairs"),
        (
            {"rope_freqs.weight": [2.0] * 8},
            {"qwen2.rope.scaling.factor": 2.0},
            "rope_freqs.weight beside a rope.scaling",
        ),
        ({"rope_freqs.weight": [0.0] * 8}, {}, "factors"),
        ({"rope_factors_long.weight": [2.0] * 8}, {}, "no list of numbers 'short_factor'"),
        ({}, {"qwen2.feed_forward_length": 88}, "has the shape [80, 64], its configuration says [88, 64]"),
        ({}, {"qwen2.block_count": 2}, "has the tensor blk.2.attn_q.weight (and"),
        ({}, {"qwen2.vocab_size": 271}, "its configuration says [271, 64]"),
    ],
)
def test_metadata_and_tensors_that_disagree_are_refused(
    tensors: dict[str, Any], metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2", types={}, hidden_size=64, tensors=tensors, metadata=metadata)
    with pytest.raises(UsageError) as caught:
        open_files(str(tmp_path / "m.gguf"))
    assert message in str(caught.value)
