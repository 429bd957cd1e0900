"""A recorded stage computes what the decoder does, bit for bit, in one call for each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmpq import kernels
from llmpq.kernels import Program, available_backends
from llmpq.models.arena import Arena
from llmpq.models.decoder_stage import build_stage
from llmpq.spec import W16, Precision
from tests.support.decoding import CPU, MAX_LENGTH, all_logits, open_model, single_plan, split_plan, step_of
from tests.support.reference import random_weight
from tests.support.tiny_models import KINDS, VOCAB_SIZE, save_model

if (reason := available_backends()["cpu"]) is not None:
    pytest.skip(reason, allow_module_level=True)

W4 = Precision(4, 32)


def sequences() -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(5)
    return {
        slot: torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for slot, n in ((3, 17), (0, 5), (4, 11))
    }


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", [W4, W16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "qwen2_moe", "gpt_oss"])
def test_a_recorded_stage_gives_the_bits_of_an_eager_one(kind: str, precision: Precision, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    plan = single_plan(spec, precision)
    expected = all_logits([build_stage(spec, source, plan, 0, CPU, eager=True)], sequences(), portions=[4, 1, 6])
    recorded = build_stage(spec, source, plan, 0, CPU)
    for threads, portions in ((1, [4, 1, 6]), (3, [1, 10])):
        torch.set_num_threads(threads)
        for slot, logits in all_logits([recorded], sequences(), portions).items():
            assert torch.equal(logits, expected[slot])
    assert recorded.is_recorded


def test_a_chain_of_recorded_stages_gives_them_too(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    expected = all_logits(
        [build_stage(spec, source, single_plan(spec, W4), 0, CPU, eager=True)], sequences(), portions=[5]
    )
    plan = split_plan(spec, (2, 0, 1), W4)
    chain = [build_stage(spec, source, plan, i, CPU) for i in range(3)]
    for slot, logits in all_logits(chain, sequences(), portions=[3, 3]).items():
        assert torch.equal(logits, expected[slot])


def test_weights_of_another_backend_are_not_recorded(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    assert not build_stage(spec, source, single_plan(spec), 0, CPU, weight_dtype=torch.float32).is_recorded
    assert not build_stage(spec, source, single_plan(spec, W4), 0, CPU, "reference").is_recorded


def test_a_stage_that_computes_in_bfloat16_is_not_recorded(tmp_path: Path) -> None:
    """The CPU's products take it, but not the other operations."""
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    plan = single_plan(spec, W4)
    plan = replace(plan, stages=(replace(plan.stages[0], compute_dtype="bfloat16"),))
    stage = build_stage(spec, source, plan, 0, CPU)
    assert not stage.is_recorded
    exact = all_logits([build_stage(spec, source, single_plan(spec, W4), 0, CPU)], {0: [1, 2, 3]}, portions=[3])[0]
    torch.testing.assert_close(all_logits([stage], {0: [1, 2, 3]}, portions=[3])[0], exact, atol=0.05, rtol=0)


def test_what_a_recorded_stage_has_no_room_for_is_an_error(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    spec, source = open_model(tmp_path)
    arena = Arena(spec, 6, torch.float32, CPU, logit_rows=2)
    stage = build_stage(spec, source, single_plan(spec, W4), 0, CPU, arena=arena)
    for new, start, message in (
        ({0: [1]}, MAX_LENGTH, f"a slot of the cache has {MAX_LENGTH} positions"),
        ({5: [1]}, 0, "slots names 5, but the cache has 5"),
        ({0: [VOCAB_SIZE]}, 0, f"{VOCAB_SIZE}"),
        ({0: [1] * 7}, 0, "a step of 7 tokens is larger than the 6 that its arena was made for"),
    ):
        for _ in range(2):  # while it is recorded, and afterwards
            with pytest.raises(ValueError, match=message):
                stage(step_of(new, dict.fromkeys(new, start)))
        stage(step_of({0: [1]}, {0: 0}))


def _set_first(x: torch.Tensor) -> None:
    x[0] = 1


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.add_(1),
        lambda x: x + 1,
        lambda x: x.__iadd__(1),
        _set_first,
        lambda x: torch.mul(x, x, out=x),
        lambda x: torch.cat((x, x)),
        lambda x: x.double(),
        lambda x: torch.empty(2),
    ],
)
def test_what_torch_computes_is_not_lost_in_silence(compute: Callable[[torch.Tensor], object]) -> None:
    x, weight = torch.ones(2, 32), torch.ones(32)
    with pytest.raises(RuntimeError, match="was called while a program was recorded"):
        Program(lambda: compute(kernels.rms_norm(x, weight, 1e-5, out=x)))
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), x / (1 + 1e-5) ** 0.5)  # nothing is recorded any more


def test_a_program_takes_any_number_of_rows_and_times_its_operations() -> None:
    w = kernels.prepare(random_weight(24, 32, W4), backend="cpu")
    x, normed, y = torch.randn(9, 32), torch.empty(9, 32), torch.empty(9, 24)
    weight = torch.rand(32)
    program = Program(lambda: kernels.gemm(kernels.rms_norm(x[:2], weight, 1e-5, out=normed[:2]), w, out=y[:2]))
    assert program.names == ("rms_norm", "gemm")
    for rows in (1, 9):
        y.fill_(torch.nan)
        seconds = torch.zeros(2, dtype=torch.float64)
        program.run(rows, seconds=seconds)
        assert torch.equal(y[:rows], kernels.gemm(kernels.rms_norm(x[:rows], weight, 1e-5), w))
        assert y[rows:].isnan().all() and (seconds > 0).all()
