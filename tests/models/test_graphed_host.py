"""Of decode steps by graphs the host reads nothing but tokens; and what they compute on a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from llmpq.models.decoder_stage import DecoderStage, build_stage
from llmpq.models.step import Step
from llmpq.runtime.loaded_stage import LoadedStage
from llmpq.runtime.message import StepMessage
from llmpq.runtime.sampler import Admitted
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.stage import Turn
from llmpq.runtime.unread import LatestTokens, Unread
from llmpq.spec import W16, Device, Plan, Precision
from tests.support.decoding import CPU, open_model, step_of, transformers_logits
from tests.support.graphs import MAX_LENGTH, SLOTS, Rerun, generate, graphed_stage, prompts, read_on_device, rounds
from tests.support.tiny_models import save_model


class HostLooks(TorchFunctionMode):
    """What the host does between replays with memory of the work, but for views of it and for filling it."""

    def __init__(self, capture: Rerun) -> None:
        super().__init__()
        self._capture, self._memory = capture, capture.touched.memory
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name, result = getattr(function, "__name__", str(function)), function(*arguments, **(named or {}))
        if not self._capture.working and name not in _OF_NO_CONTENT:
            filled = name.endswith("_") and not name.endswith("__")
            if self._of_work(arguments[filled:]) and not self._of_work((result,)):
                self.found.append(name)
            if (named or {}).get("device", "cpu") != "cpu":  # a stage's device is a torch.device, even if that is a CPU
                self.found.append(f"{name} on a device")
        return result

    def _of_work(self, tensors: Sequence[object]) -> bool:
        found = (tensor for tensor in tensors if isinstance(tensor, torch.Tensor))
        return any(tensor.untyped_storage().data_ptr() in self._memory for tensor in found)


_OF_NO_CONTENT = ("__get__", "__len__", "untyped_storage", "dim")


def admission(params: SamplingParams) -> str:
    """Of a request for each slot."""
    requests = [Admitted.of(slot, params, [1]).to_dict() for slot in range(SLOTS)]
    return json.dumps({"requests": requests, "vocabulary": None})


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_of_a_greedy_step_the_host_reads_the_tokens_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_on_device(monkeypatch)
    save_model(tmp_path, kind)
    capture = Rerun()
    stage = graphed_stage(tmp_path, capture)
    loaded = LoadedStage(stage, open_model(tmp_path)[0])
    loaded.admit(admission(SamplingParams()))
    loaded.warm_up()
    for i, chosen in enumerate(rounds()):
        step = step_of({slot: [1 + slot] for slot in chosen}, dict.fromkeys(chosen, i))
        with HostLooks(capture) as looks:
            tokens = loaded.compute(StepMessage(step), Turn(0, 0))
        assert looks.found == ["clone"]  # of the tokens: `cpu`, where they are on another device
        assert torch.equal(tokens, stage.next_tokens(step)[0])
    with HostLooks(capture) as looks:
        int(stage.next_tokens(step)[1].max())
        torch.zeros(2, device=CPU)
    assert looks.found == ["max", "zeros on a device"]  # so it does see them


def gpu_stages(folder: Path, precision: Precision) -> tuple[DecoderStage, DecoderStage]:
    """A graphed one and an eager one."""
    spec, source = open_model(folder)
    plan = Plan.single(spec, Device("cuda0", "cuda"), precision, slots=SLOTS, max_length=MAX_LENGTH, dtype="float16")
    gpu = torch.device("cuda", torch.cuda.current_device())
    graphed, eager = (build_stage(spec, source, plan, 0, gpu, eager=eager) for eager in (False, True))
    assert graphed.is_graphed and not eager.is_graphed
    return graphed, eager


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [W16, Precision(4, 32)], ids=str)
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_on_a_gpu_logits_are_those_of_eager_steps_and_of_transformers(
    kind: str, precision: Precision, tmp_path: Path
) -> None:
    model = save_model(tmp_path, kind, torch.float16)
    graphed, eager = gpu_stages(tmp_path, precision)
    texts, logits = generate([graphed], prompts(), rounds())
    _, expected = generate([eager], prompts(), rounds(), forced=texts)
    for found, right in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, right, atol=2e-2, rtol=0)
    if precision == W16:
        in_full = {slot: transformers_logits(model.float(), text) for slot, text in texts.items()}
        lengths = {slot: len(prompt) for slot, prompt in prompts().items()}
        for chosen, found in zip(rounds(), logits[1:], strict=True):
            right = torch.stack([in_full[slot][lengths[slot]] for slot in chosen])
            assert right.std() > 0.1
            torch.testing.assert_close(found.float(), right, atol=5e-2, rtol=0)
            for slot in chosen:
                lengths[slot] += 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_on_a_gpu_a_replay_waits_for_nothing_and_allocates_nothing(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind, torch.float16)
    stage, _ = gpu_stages(tmp_path, Precision(4, 32))
    steps = [
        step_of({slot: [1 + slot] for slot in chosen}, dict.fromkeys(chosen, i)) for i, chosen in enumerate(rounds())
    ]
    stage.next_tokens(steps[0])
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            stage.next_tokens(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_on_a_gpu_steps_go_on_from_tokens_that_the_host_has_not_read(tmp_path: Path) -> None:
    save_model(tmp_path, "llama-gqa", torch.float16)
    stage, _ = gpu_stages(tmp_path, Precision(4, 32))
    spec, _ = open_model(tmp_path)
    slots, params = list(range(SLOTS)), SamplingParams()
    admitted = admission(params)
    found = []
    for latest in (None, LatestTokens(SLOTS, stage.device)):
        loaded = LoadedStage(stage, spec, None, latest)
        loaded.admit(admitted)
        tokens = loaded.compute(StepMessage(Step.of(slots, [1] * SLOTS, [0] * SLOTS, slots)), Turn(0, 0))
        rows = [tokens if isinstance(tokens, torch.Tensor) else tokens.read()]
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        unread: list[Unread] = []
        torch.cuda.set_sync_debug_mode("default" if latest is None else "error")
        try:
            for start in range(1, 9):
                known = [0] * SLOTS if latest is not None else rows[-1].tolist()
                step = Step.of(slots, [1] * SLOTS, [start] * SLOTS, known)
                tokens = loaded.compute(StepMessage(step, latest=latest is not None), Turn(0, 0))
                if isinstance(tokens, torch.Tensor):
                    rows.append(tokens)
                else:
                    unread.append(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if latest is not None:
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        found.append([*rows, *(each.read() for each in unread)])
    assert all(torch.equal(waited, ahead) for waited, ahead in zip(*found, strict=True))
