"""Decode steps by graphs: what they compute, and which steps they take.

Without a GPU a graph is replayed by doing its work again, with what is in its buffers by then: the reference operations
then read a step's sequences where a kernel would, on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmpq import kernels
from llmpq.kernels import Sequences, available_backends
from llmpq.models.decode_graph import DecodeGraph, graph_sizes
from llmpq.models.decoder_stage import DecoderStage, build_stage, capturable
from llmpq.models.step import Step
from llmpq.spec import W16, Device, Dtype, Plan, Precision
from tests.support.decoding import CPU, open_model, split_plan, step_of, transformers_logits
from tests.support.graphs import (
    MAX_LENGTH,
    SIZES,
    SLOTS,
    CaptureHazards,
    Rerun,
    eager_stage,
    generate,
    graphed_stage,
    plan_of,
    prompts,
    read_on_device,
    rounds,
    sizes,
)
from tests.support.launches import counted
from tests.support.tiny_models import VOCAB_SIZE, save_model


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    read_on_device(monkeypatch)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (5, (1, 2, 4, 5)),
        (8, (1, 2, 4, 8)),
        (11, SIZES),
        (16, (1, 2, 4, 8, 16)),
        (33, (1, 2, 4, 8, 16, 24, 32, 33)),
    ],
)
def test_there_is_a_graph_for_each_eight_sequences_and_for_fewer(most: int, expected: tuple[int, ...]) -> None:
    assert graph_sizes(most) == expected


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", ["llama-gqa", "llama-tied", "opt", "opt-350m"])
def test_tokens_are_those_of_an_eager_stage_and_of_transformers(kind: str, tmp_path: Path) -> None:
    model, capture = save_model(tmp_path, kind), Rerun()
    texts, logits = generate([graphed_stage(tmp_path, capture)], prompts(), rounds())
    expected, eager = generate([eager_stage(tmp_path)], prompts(), rounds())
    assert texts == expected
    assert all(map(torch.equal, logits, eager))
    assert set(sizes(capture)) == set(SIZES)
    for slot, prompt in prompts().items():
        likeliest = transformers_logits(model, texts[slot][:-1]).argmax(-1)
        assert texts[slot][len(prompt) :] == likeliest[len(prompt) - 1 :].tolist()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := available_backends()["triton"]) is not None:
        pytest.skip(reason)
    if torch.cuda.is_available():
        pytest.skip("Triton does not interpret where there is a GPU")
    monkeypatch.setenv("LLMPQ_BACKEND", "triton")


def small_stages(folder: Path, precision: Precision, dtype: Dtype = "float32") -> list[DecoderStage]:
    """Two of the backend "triton" for 4 sequences."""
    spec, source = open_model(folder)
    plan = Plan.single(spec, Device("cpu0", "cpu"), precision, slots=4, max_length=MAX_LENGTH, dtype=dtype)
    return [build_stage(spec, source, plan, 0, CPU, eager=True) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_kernels_of_a_gpu_find_a_step_where_a_replay_has_it(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind, num_hidden_layers=1)
    graphed, eager = small_stages(tmp_path, Precision(4, 32))
    graphed.capture((1, 4), Rerun())
    prompts, rounds = {0: [5, 6, 7], 3: [1], 2: [9, 8]}, [[3, 0, 2], [2], [0, 3]]
    (texts, logits), (expected, right) = (generate([stage], prompts, rounds) for stage in (graphed, eager))
    assert texts == expected
    assert all(map(torch.equal, logits, right))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("llama-gqa", Precision(4, 32)),
        ("llama-biases", Precision(3, 32, "asym")),
        ("opt-350m", Precision(8, None, "asym")),
        ("opt", W16),
        ("mixtral", Precision(4, 32, "asym")),
    ],
    ids=str,
)
def test_nothing_in_a_step_cannot_be_captured(
    kind: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, kind, torch.float16, num_hidden_layers=1)
    stage, _ = small_stages(tmp_path, precision, "float16")
    assert capturable(stage, (1, 4)) == (1, 4)
    hazards = CaptureHazards(monkeypatch)
    monkeypatch.setattr(kernels, "check_ids", lambda ids, w: None)  # which on a GPU is not called here

    def capture(work: Callable[[], object]) -> Callable[[], object]:
        work()  # some things are done but once
        with hazards:
            work()
        return work

    stage.capture((2,), capture)
    assert not hazards.found
    with hazards:
        x = torch.arange(3)
        x[[0, 1]], x[x > 1], x.tolist()
    assert hazards.found == ["__getitem__ of a list or mask", "__getitem__ of a list or mask", "tolist"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("precision", "sizes"), [(Precision(3, 32), (1, 128)), (W16, ())], ids=str)
def test_many_tokens_of_experts_or_plain_experts_are_in_no_graph(
    precision: Precision, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """The host has to know who they are."""
    save_model(tmp_path, "mixtral", torch.float16, num_hidden_layers=1)  # two experts of each token
    stage, _ = small_stages(tmp_path, precision, "float16")
    assert capturable(stage, (1, 128, 129)) == sizes


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_biases_take_no_launches_of_their_own(tmp_path: Path) -> None:
    counts = []
    for kind in ("llama-mha", "llama-biases"):
        save_model(tmp_path / kind, kind, torch.float16, num_hidden_layers=1)
        stage, _ = small_stages(tmp_path / kind, Precision(4, 32), "float16")

        def capture(work: Callable[[], object]) -> Callable[[], object]:
            work()
            with counted() as operations:
                work()
            counts.append(len(operations.launches) + len(operations.torch))
            return work

        stage.capture((2,), capture)
    assert counts[0] == counts[1] > 0


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_stages_pass_on_what_eager_ones_do(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    spec, source = open_model(tmp_path)
    plan = replace(split_plan(spec, (1, 1, 1), Precision(4, 32)), slots=SLOTS, decode_microbatch=SLOTS)
    plan = replace(plan, prefill_microbatch=SLOTS, workload=replace(plan.workload, batch_size=SLOTS))
    chains = [[build_stage(spec, source, plan, i, CPU, eager=True) for i in range(3)] for _ in range(2)]
    captures = [Rerun() for _ in range(3)]
    for stage, capture in zip(chains[0], captures, strict=True):
        stage.capture(graph_sizes(SLOTS), capture)
    (texts, logits), (expected, eager) = (generate(chain, prompts(), rounds()) for chain in chains)
    assert texts == expected and all(map(torch.equal, logits, eager))
    assert all(len(capture.replayed) == len(rounds()) for capture in captures)


@pytest.mark.usefixtures("on_device")
def test_a_step_takes_the_smallest_graph_that_it_fits_and_no_other_step_takes_any(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa")
    capture = Rerun()
    spec, source = open_model(tmp_path)
    stage = build_stage(spec, source, plan_of(spec), 0, CPU, eager=True)
    stage.capture((1, 4, 8), capture)
    for new, expected in (
        ({3: [1]}, [2]),
        ({3: [1], 0: [2]}, [1]),
        ({i: [5] for i in range(4)}, [1]),
        ({i: [5] for i in range(5)}, [0]),
        ({i: [5] for i in range(8)}, [0]),
        ({i: [5] for i in range(9)}, []),  # more than any graph is for
        ({3: [1, 2]}, []),
        ({3: [1], 0: [2, 3]}, []),
    ):
        capture.replayed.clear()
        tokens, logits = stage.next_tokens(step_of(new, dict.fromkeys(new, 0)))
        assert capture.replayed == expected
        assert len(tokens) == len(logits) == len(new)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_only_the_positions_of_a_steps_tokens_are_written(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind)
    stage = graphed_stage(tmp_path, Rerun())
    layers = [stage.kv_cache.layer(i) for i in range(3)]
    for layer in layers:
        assert not layer.keys.any() and not layer.values.any()  # capture has written nothing either
    for new, starts in (
        ({4: [7], 9: [8], 0: [9]}, {4: 0, 9: 0, 0: 0}),
        ({9: [1]}, {9: 1}),
        ({i: [3] for i in (0, 4, 2, 7, 9)}, {0: 1, 4: 1, 2: 0, 7: 0, 9: 2}),
    ):
        before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        stage.next_tokens(step_of(new, starts))
        for layer, (keys, values) in zip(layers, before, strict=True):
            for now, then in ((layer.keys, keys), (layer.values, values)):
                changed = (now != then).any(3).any(0).nonzero().tolist()  # block and position in it
                assert changed == sorted([slot * layer.slot_blocks, starts[slot]] for slot in new)


def test_a_replay_finds_a_step_and_absent_sequences_behind_it() -> None:
    def found(tokens: torch.Tensor, of: Sequences) -> tuple[list[int], list[int], list[int], list[int]]:
        at = of.on(CPU)
        return tokens.tolist(), at.slots.tolist(), at.context_lens.tolist(), at.positions.tolist()

    graph = DecodeGraph(4, found, CPU, Rerun(), embeds=True)
    for slots, starts, tokens in (
        ([5, 2, 9, 0], [3, 0, 7, 1], [8, 6, 7, 5]),
        ([1], [30], [4]),
        ([0, 3], [2, 2], [9, 9]),
    ):
        absent = [0] * (4 - len(slots))
        assert graph.replay(Step.of(slots, [1] * len(slots), starts, tokens)) == (
            tokens + absent,
            slots + absent,
            [start + 1 for start in starts] + absent,
            starts + [-1] * len(absent),
        )


@pytest.mark.usefixtures("on_device")
def test_wrong_steps_are_errors_that_leave_the_stage_as_it_was(tmp_path: Path) -> None:
    save_model(tmp_path, "opt")
    capture = Rerun()
    stage = graphed_stage(tmp_path, capture)
    right = step_of({0: [1]}, {0: 0})
    expected = stage.next_tokens(right)[1].clone()
    for new, start, message in (
        ({0: [1]}, MAX_LENGTH, f"a slot of the cache has {MAX_LENGTH} positions"),
        ({SLOTS: [1]}, 0, f"slots names {SLOTS}, but the cache has {SLOTS}"),
        ({0: [VOCAB_SIZE]}, 0, f"ids reach from {VOCAB_SIZE} to {VOCAB_SIZE}, but the table has {VOCAB_SIZE} rows"),
        ({0: [5], 1: [-1]}, 0, "ids reach from -1 to 5"),
    ):
        capture.replayed.clear()
        with pytest.raises(ValueError, match=message):
            stage.next_tokens(step_of(new, dict.fromkeys(new, start)))
        assert not capture.replayed  # on a GPU it would be too late
        assert torch.equal(stage.next_tokens(right)[1], expected)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("batch", [1, 4])
def test_a_decode_step_is_few_launches_and_nothing_of_torch(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 12 for a layer, and 6 for all that is before and after them; whatever the batch."""
    save_model(tmp_path, "llama-gqa", num_hidden_layers=2)
    monkeypatch.setattr(kernels, "check_ids", lambda ids, w: None)  # which on a GPU is not called here
    stage, _ = small_stages(tmp_path, Precision(4, 32))
    found = []

    def capture(work: Callable[[], object]) -> Callable[[], object]:
        work()  # some things are done but once
        with counted() as operations:
            work()
        found.append(operations)
        return work

    stage.capture((batch,), capture)
    (operations,) = found
    assert not operations.torch
    assert len(operations.launches) <= 12 * 2 + 6
    names = [name for name, *_ in operations.launches]
    assert names[0] == "embedding_kernel" and names[-1].endswith("greatest_kernel")
