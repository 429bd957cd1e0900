"""The decoder against transformers' own modelling code, in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from llmpq.models.decoder_stage import build_stage
from llmpq.quant import quantize
from llmpq.spec import Precision, UsageError
from tests.support.decoding import (
    CPU,
    EXACT,
    WIDE_CACHE,
    all_logits,
    open_model,
    random_sequences,
    single_plan,
    split_plan,
    step_of,
    transformers_logits,
)
from tests.support.target import require_backend
from tests.support.tiny_models import FORMS, KINDS, VOCAB_SIZE, save_model

W4 = Precision(4, 32)


BY_LENGTH = "phi3-longrope", "llama-dynamic"  # whose rotation depends on how long the longest sequence may get


@pytest.mark.family("safetensors", "CPU")
@pytest.mark.parametrize("kind", [kind for kind in (*KINDS, *FORMS) if kind not in BY_LENGTH])
def test_logits_equal_transformers_through_prefill_and_decode(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec), 0, CPU, **EXACT)
    sequences = random_sequences()
    for slot, logits in all_logits([stage], sequences, portions=[4, 3]).items():
        expected = transformers_logits(model, sequences[slot])
        assert expected.std() > 0.1  # or there were nothing to tell apart
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        *((kind, "layer_types") for kind in FORMS if kind.endswith("-window") or kind in ("gemma2", "gpt_oss")),
        ("smollm3", "no_rope_layers"),
    ],
)
def test_what_a_configuration_does_not_say_of_layers_is_as_transformers_has_it(
    kind: str, absent: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop(absent, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path)).eval()
    expected.load_state_dict(model.state_dict())
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec), 0, CPU, **EXACT)
    tokens = random_sequences()[3]
    logits = all_logits([stage], {0: tokens}, portions=[17])[0]
    torch.testing.assert_close(logits, transformers_logits(expected.float(), tokens), atol=2e-5, rtol=0)


@pytest.mark.full
@pytest.mark.family("GPU, interpreted")
@pytest.mark.parametrize(
    "kind", [kind for kind in ("llama-gqa", "mistral", "opt", *FORMS) if "-" not in kind or kind in KINDS]
)
def test_logits_equal_transformers_on_an_interpreted_gpu(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operations but products of float32 weights, which no kernel of a GPU multiplies."""
    require_backend("triton")
    monkeypatch.setenv("LLMPQ_BACKEND", "triton")
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec), 0, CPU, **EXACT)
    sequences = {slot: tokens[:9] for slot, tokens in random_sequences().items()}
    for slot, logits in all_logits([stage], sequences, portions=[7]).items():
        torch.testing.assert_close(logits, transformers_logits(model, sequences[slot]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("length", [8, 17], ids=["within", "beyond"])
@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rotation_by_length_equals_transformers_for_sequences_that_fill_a_slot(
    kind: str, length: int, tmp_path: Path
) -> None:
    """There a sequence is rotated in one way throughout; transformers begins anew when it gets longer."""
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec, max_length=length), 0, CPU, **EXACT)
    tokens = random_sequences()[3][:length]
    logits = all_logits([stage], {0: tokens}, portions=[5])[0]
    torch.testing.assert_close(logits, transformers_logits(model, tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama-tied", "opt-350m"])
def test_a_slot_is_used_again_without_clearing(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec), 0, CPU, **EXACT)
    all_logits([stage], random_sequences(), portions=[20])
    again = {3: [7, 8, 9], 4: [5, 6]}
    for slot, logits in all_logits([stage], again, portions=[2]).items():
        torch.testing.assert_close(logits, transformers_logits(model, again[slot]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["llama-gqa", "opt-350m"])
def test_keys_and_values_are_kept_in_16_bits(
    kind: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take half the memory, and what their rounding does to logits is small, but not nothing."""
    require_backend(backend)
    monkeypatch.setenv("LLMPQ_BACKEND", backend)
    save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    plan, sequences = single_plan(spec, max_length=32), random_sequences()
    stage, wide = (build_stage(spec, source, plan, 0, CPU, **kind) for kind in ({}, WIDE_CACHE))
    assert wide.kv_cache.nbytes == 2 * stage.kv_cache.nbytes
    if spec.head_dim % 16 == 0:
        assert stage.kv_cache.nbytes == spec.num_layers * spec.kv_bytes(plan.slots * 32, "float16")
    expected = all_logits([wide], sequences, portions=[4, 3])
    for slot, logits in all_logits([stage], sequences, portions=[4, 3]).items():
        difference = (logits - expected[slot]).abs().max()
        assert 0 < difference < 5e-3 * expected[slot].std()


@pytest.mark.parametrize("layers", [(1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("kind", ["llama-tied", "llama-biases", "opt-350m"])
def test_chained_stages_equal_one_bit_for_bit(kind: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    one = [build_stage(spec, source, single_plan(spec, W4), 0, CPU)]
    plan = split_plan(spec, layers, W4)
    chain = [build_stage(spec, source, plan, i, CPU) for i in range(len(layers))]
    sequences = random_sequences()
    expected = all_logits(one, sequences, portions=[6, 6])
    for slot, logits in all_logits(chain, sequences, portions=[6, 6]).items():
        assert torch.equal(logits, expected[slot])


@pytest.mark.parametrize(
    ("precision", "backend"),
    [
        (Precision(3, 32), "cpu"),
        (Precision(4, None, zero="asym"), "cpu"),
        (Precision(8, 64), "cpu"),
        (W4, "reference"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama-gqa", "opt-350m"])
def test_quantized_stage_equals_transformers_with_dequantized_weights(
    kind: str, precision: Precision, backend: str, tmp_path: Path
) -> None:
    require_backend(backend)
    model = save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec, precision), 0, CPU, backend, **WIDE_CACHE)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed_positions" not in name:
            if "project_" in name:
                parameter.data = parameter.data.half().float()
            else:
                parameter.data = quantize(parameter.data, precision).dequantize()
    sequences = random_sequences()
    for slot, logits in all_logits([stage], sequences, portions=[4, 3]).items():
        torch.testing.assert_close(logits, transformers_logits(model, sequences[slot]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_units_keep_the_models_own_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path, "llama-tied", dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    spec, source = open_model(tmp_path)
    assert spec.dtype == str(dtype).removeprefix("torch.")
    stage = build_stage(spec, source, single_plan(spec), 0, CPU, **WIDE_CACHE)
    tokens = random_sequences()[3]
    logits = all_logits([stage], {0: tokens}, portions=[30])[0]
    torch.testing.assert_close(logits, transformers_logits(model, tokens), atol=2e-5, rtol=0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["llama-gqa", "opt-350m"])
def test_a_sequences_logits_depend_on_nothing_but_the_sequence(kind: str, tmp_path: Path) -> None:
    # Wide enough for torch to share elementwise work among threads, at a boundary within a row.
    width = {"intermediate_size": 1532} if kind == "llama-gqa" else {"ffn_dim": 1532}
    save_model(tmp_path, kind, max_position_embeddings=160, **width)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, single_plan(spec, W4, max_length=150), 0, CPU)
    generator = torch.Generator().manual_seed(3)
    sequences = {slot: torch.randint(VOCAB_SIZE, (150,), generator=generator).tolist() for slot in (0, 1)}
    torch.set_num_threads(1)
    alone = all_logits([stage], {0: sequences[0]}, portions=[150])[0]
    for threads, portions in [(1, [150]), (7, [150]), (2, [33, 1, 110])]:
        torch.set_num_threads(threads)
        assert torch.equal(all_logits([stage], sequences, portions)[0], alone)


def test_a_stage_leaves_its_input_as_it_was(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, split_plan(spec, (1, 2), W4), 1, CPU)
    hidden_states = torch.randn(3, spec.hidden_size)
    before = hidden_states.clone()
    stage(step_of({1: [1, 2, 3]}, {1: 0}), hidden_states)
    assert torch.equal(hidden_states, before)


def test_a_missing_head_or_input_is_an_error(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    plan = split_plan(spec, (1, 2), W4)
    step = step_of({0: [1]}, {0: 0})
    with pytest.raises(ValueError, match="no LM head"):
        build_stage(spec, source, plan, 0, CPU).logits(torch.zeros(1, spec.hidden_size))
    with pytest.raises(ValueError, match="hidden_states is missing"):
        build_stage(spec, source, plan, 1, CPU)(step)


def test_plans_of_other_models_or_for_more_positions_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "mistral", max_position_embeddings=16)
    spec, source = open_model(tmp_path)
    build_stage(spec, source, single_plan(spec, max_length=16), 0, CPU)
    with pytest.raises(UsageError, match="can attend to 16 positions, but the plan has slots of 17"):
        build_stage(spec, source, single_plan(spec, max_length=17), 0, CPU)
    with pytest.raises(UsageError, match="another model"):
        build_stage(spec, source, replace(single_plan(spec), model_hash="0" * 16), 0, CPU)


def test_step_knows_where_its_tokens_are() -> None:
    step = step_of({4: [7, 8, 9], 1: [5], 2: [1, 2]}, {4: 2, 1: 6, 2: 0})
    assert step.sequences.positions.tolist() == [2, 3, 4, 6, 0, 1]
    assert step.sequences.token_sequences.tolist() == [0, 0, 0, 1, 2, 2]
    assert step.context_lens.tolist() == [5, 7, 2]
    assert step.last_rows.tolist() == [2, 3, 5]
    assert (step.num_sequences, step.num_tokens) == (3, 6)
    with pytest.raises(ValueError, match="tokens is"):
        replace(step, tokens=step.tokens[:-1])
    with pytest.raises(ValueError, match="starts is"):
        replace(step, starts=step.starts.long())
