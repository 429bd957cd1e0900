"""A prompt longer than layers within a window have room for at once goes through a stage in chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from llmpq.models.decoder_stage import build_stage
from llmpq.runtime.loaded_stage import LoadedStage
from llmpq.spec import ModelSpec, Plan
from tests.support.decoding import (
    CPU,
    EXACT,
    WIDE_CACHE,
    all_logits,
    open_model,
    run,
    single_plan,
    step_of,
    transformers_logits,
)
from tests.support.target import require_backend
from tests.support.tiny_models import VOCAB_SIZE, save_model

WINDOWED = "mistral-window", "gemma2", "gemma3", "gpt_oss"
LENGTH, CHUNK = 150, 41  # positions beyond a ring of 64, of which a window of 6 and a chunk take 46


def chunked_plan(spec: ModelSpec, length: int = LENGTH) -> Plan:
    """For slots of `length` tokens, of which a step adds CHUNK at most."""
    plan = replace(single_plan(spec, max_length=length), max_prompt_len=CHUNK)
    assert all((plan.cached_tokens(kind) < length) == (kind.window is not None) for kind in spec.layer_kinds)
    return plan


def ragged(length: int = LENGTH) -> dict[int, list[int]]:
    """A sequence that fills its slot, and one that ends before a ring does."""
    generator = torch.Generator().manual_seed(7)
    lengths = {3: length, 0: 60}
    return {slot: torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for slot, n in lengths.items()}


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model of one of WINDOWED, as it is in float32 once its weights were rounded to `dtype`."""
    save_model(folder, kind, dtype, max_position_embeddings=LENGTH)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("way", ["reference", "cpu, eager", "cpu, recorded"])
def test_logits_equal_transformers_where_a_prompt_goes_round_the_ring(
    way: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = way.split(",")[0]
    require_backend(backend)
    monkeypatch.setenv("LLMPQ_BACKEND", backend)
    exact = backend == "reference"
    model = save(tmp_path, kind, torch.float32 if exact else torch.float16)
    spec, source = open_model(tmp_path)
    options = EXACT if exact else {**WIDE_CACHE, "eager": way.endswith("eager")}
    stage = build_stage(spec, source, chunked_plan(spec), 0, CPU, **options)
    assert stage.is_recorded == way.endswith("recorded")
    sequences = ragged()
    for slot, logits in all_logits([stage], sequences, portions=[CHUNK, 17, 1, CHUNK, CHUNK]).items():
        expected = transformers_logits(model, sequences[slot])
        torch.testing.assert_close(logits, expected, atol=2e-5 if exact else 1e-3, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("kind", WINDOWED)
def test_logits_of_chunks_on_an_interpreted_gpu_equal_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_backend("triton")
    monkeypatch.setenv("LLMPQ_BACKEND", "triton")
    model = save(tmp_path, kind)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, chunked_plan(spec), 0, CPU, **EXACT)
    tokens = ragged()[3]
    logits = all_logits([stage], {1: tokens}, portions=[CHUNK] * 3 + [LENGTH - 3 * CHUNK - 1])[1]
    torch.testing.assert_close(logits, transformers_logits(model, tokens), atol=5e-5, rtol=0)


def test_a_step_may_hold_chunks_of_some_sequences_and_new_tokens_of_others(tmp_path: Path) -> None:
    """Bit for bit as each alone: what a neighbour has in the same step makes no difference."""
    require_backend("cpu")
    save(tmp_path, "gemma2", torch.float16)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, chunked_plan(spec), 0, CPU)
    sequences = ragged()
    alone = all_logits([stage], {3: sequences[3]}, portions=[CHUNK] * 4)[3]
    other = all_logits([stage], {0: sequences[0]}, portions=[CHUNK])[0]
    run([stage], step_of({0: sequences[0][:CHUNK]}, {0: 0}))
    done = CHUNK
    for start in range(0, LENGTH, CHUNK):
        chunk, token = sequences[3][start : start + CHUNK], [sequences[0][done]]
        logits = run([stage], step_of({3: chunk, 0: token}, {3: start, 0: done}))
        assert torch.equal(logits[:-1], alone[start : start + len(chunk)])
        assert torch.equal(logits[-1], other[done])
        done += 1


def test_a_stage_is_warmed_up_in_no_more_than_it_has_room_for(tmp_path: Path) -> None:
    save(tmp_path, "mistral-window", torch.float16)
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, replace(chunked_plan(spec), max_prompt_len=7), 0, CPU)
    LoadedStage(stage, spec).warm_up()
    run([stage], step_of({2: [5] * 7}, {2: 0}))
    with pytest.raises(ValueError, match="room for 7 new tokens of a sequence in a step"):
        run([stage], step_of({2: [5] * 8}, {2: 7}))
