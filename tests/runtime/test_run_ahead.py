"""Steps that are started before the tokens of the last one are read: which, in what order, and what comes of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmpq import kernels
from llmpq.models.decode_graph import graph_sizes
from llmpq.models.decoder_stage import build_stage
from llmpq.models.step import Step
from llmpq.runtime import unread
from llmpq.runtime.communication import StageComm
from llmpq.runtime.control import Status
from llmpq.runtime.loaded_stage import LoadedStage
from llmpq.runtime.message import StepMessage
from llmpq.runtime.request import Generated, Request
from llmpq.runtime.run_ahead import Awaited, is_foreseen
from llmpq.runtime.sampler import sample
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.scheduler import Scheduler
from llmpq.runtime.stage import StageRunner, Turn
from llmpq.runtime.unread import LatestTokens, Unread
from llmpq.spec import ModelSpec, Plan
from llmpq.spec.layers import KV_BLOCK
from llmpq.spec.schedule_state import Microbatch
from tests.support.decoding import CPU, EXACT, open_model, single_plan
from tests.support.graphs import Rerun, read_on_device
from tests.support.tiny_models import VOCAB_SIZE, save_model

GOES_ON = Awaited(left=2)


@pytest.mark.parametrize(
    ("phase", "sequences", "expected"),
    [
        ("decode", [GOES_ON, GOES_ON], True),
        ("prefill", [GOES_ON], False),
        ("decode", [GOES_ON, replace(GOES_ON, left=1)], False),  # the second ends, and gets no other token
        ("decode", [GOES_ON, replace(GOES_ON, cancelled=True)], False),  # with the token that is on its way
        ("decode", [GOES_ON, Awaited(1, ended=True, cancelled=True)], True),  # whose token nobody takes
    ],
)
def test_who_goes_on_is_foreseen_unless_more_than_a_token_ends_it(
    phase: Any, sequences: list[Awaited], expected: bool
) -> None:
    assert is_foreseen(Microbatch(phase, tuple(range(len(sequences)))), sequences) == expected


def test_the_latest_token_of_a_slot_is_kept_where_it_was_chosen() -> None:
    latest = LatestTokens(4, CPU)
    first, second = Step.of([3, 0], [1, 1], [0, 0], [0, 0]), Step.of([0, 1, 3], [1, 1, 1], [1, 1, 1], [0] * 3)
    latest.keep(first, torch.tensor([7, 8]))
    assert latest.of(second).tolist() == [8, 0, 7]
    latest.keep(second, torch.tensor([1, 2, 3]))
    assert latest.of(first).tolist() == [3, 1]


@dataclass
class Run:
    """What became of requests, and the order of what was done: "start" or "read", and a step's number."""

    ended: dict[int, Generated] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    steps: list[StepMessage] = field(default_factory=list)
    streamed: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step, as its span has them
    busy_s: float = 0.0  # as the stage tells


class Noted(LoadedStage):
    """Notes what is started."""

    def __init__(self, run: Run, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._run = run

    def compute(self, message: StepMessage, turn: Turn) -> Any:
        self._run.order.append(("start", len(self._run.steps)))
        self._run.steps.append(message)
        return super().compute(message, turn)


def generate(
    folder: Path,
    plan: Plan,
    spec: ModelSpec,
    requests: Sequence[tuple[list[int], SamplingParams]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    ahead: bool,
    graphed: bool = False,
    drawn: bool = False,
    heard: Callable[[Scheduler, SimpleQueue[Any], int], None] = lambda scheduler, inbox, generated: None,
) -> Run:
    """All requests in one process. `heard` is called after each step that was read.

    `drawn`: tokens are drawn where the stage is, by what the host would do there.
    """
    run, inbox = Run(), SimpleQueue[Any]()
    stage = build_stage(spec, open_model(folder)[1], plan, 0, CPU, **(EXACT | {"eager": True}))
    if graphed:
        stage.capture(graph_sizes(plan.slots), Rerun())
    monkeypatch.setattr(kernels, "draws", lambda device, dtype: drawn)
    monkeypatch.setattr(kernels, "draw_", draw_as_the_host_does)
    model = Noted(run, stage, spec, None, LatestTokens(plan.slots, CPU) if ahead else None)
    read, made = Unread.read, unread.Unread.__init__

    def numbered(self: Unread, values: torch.Tensor) -> None:
        made(self, values)
        self.number = len(run.steps) - 1  # type: ignore[attr-defined]

    def noted(self: Unread) -> torch.Tensor:
        run.order.append(("read", self.number))  # type: ignore[attr-defined]
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Unread, "__init__", numbered)
        patch.setattr(Unread, "read", noted)
        memory = SimpleNamespace(sample=lambda: 0)
        status = Status()
        runner = StageRunner(plan, 0, model, StageComm(plan, spec, 0), memory, status)  # type: ignore[arg-type]
        scheduler: Scheduler

        def tokens(generated: int, kv_tokens: int, streamed: Sequence[tuple[int, int]]) -> None:
            run.streamed += streamed
            heard(scheduler, inbox, generated)

        scheduler = Scheduler(runner, inbox, spec, tokens, lambda i, generated, times: run.ended.update({i: generated}))
        given = [(i, Request(tuple(prompt), params).to_dict()) for i, (prompt, params) in enumerate(requests)]
        inbox.put({"command": "finish"})
        submit = {"command": "submit", "requests": given, "arrived_s": time.monotonic(), "stream": True}
        submit["vocabulary"] = None
        scheduler.run(submit)
        run.seconds = [span.seconds for span in runner.spans.take() if span.kind == "stage"]
        run.busy_s = status.busy_s
    return run


def draw_as_the_host_does(
    tokens: torch.Tensor, logits: torch.Tensor, parameters: torch.Tensor, numbers: torch.Tensor
) -> None:
    for row, (temperature, top_k, top_p, min_p) in enumerate(parameters.T.tolist()):
        if temperature > 0:
            params = SamplingParams(temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p)
            tokens[row] = sample(logits[row].float(), params, float(numbers[row]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path, "llama-gqa")
    return tmp_path


def plan_of(spec: ModelSpec, slots: int, decode_microbatch: int) -> Plan:
    return replace(
        single_plan(spec), slots=slots, max_length=24, decode_microbatch=decode_microbatch, prefill_microbatch=2
    )


def requests(count: int, sampling: Sequence[SamplingParams]) -> list[tuple[list[int], SamplingParams]]:
    draw = random.Random(5)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 9))] for _ in range(count)]
    return [(prompt, sampling[i % len(sampling)]) for i, prompt in enumerate(prompts)]


def with_ends(spec: ModelSpec, found: Run) -> ModelSpec:
    """Some of what was generated ends an answer: the third token of every second one."""
    return replace(spec, eos_token_ids=tuple({g.token_ids[2] for i, g in found.ended.items() if i % 2}))


MIXED = (
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=7),
    SamplingParams(max_tokens=9, temperature=0.9, seed=3),
    SamplingParams(max_tokens=12, repetition_penalty=1.3),
)


@pytest.mark.parametrize(
    ("slots", "decode_microbatch", "sampling", "drawn"),
    [(3, 3, MIXED[:1], False), (4, 2, MIXED[:2], False), (2, 2, MIXED[:3], False), (3, 3, MIXED, True)],
    ids=["one length", "two", "sampled, too", "by rules, too"],
)
def test_tokens_are_those_of_steps_that_wait(
    folder: Path,
    slots: int,
    decode_microbatch: int,
    sampling: Sequence[SamplingParams],
    drawn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of more requests than there are slots, of which some end by a token that nobody could foresee."""
    spec, _ = open_model(folder)
    plan, asked = plan_of(spec, slots, decode_microbatch), requests(7, sampling)
    spec = with_ends(spec, generate(folder, plan, spec, asked, monkeypatch, ahead=False))
    waits, runs = (
        generate(folder, plan, spec, asked, monkeypatch, ahead=ahead, drawn=ahead and drawn) for ahead in (False, True)
    )
    assert runs.ended == waits.ended and len(runs.ended) == 7
    assert {g.finish_reason for g in runs.ended.values()} == {"stop", "length"}
    assert sorted(runs.streamed) == sorted(waits.streamed)
    for run in (waits, runs):
        assert len(run.seconds) == len(run.steps)
        assert run.busy_s == pytest.approx(sum(run.seconds), rel=1e-3)
    assert any(message.latest for message in runs.steps)
    reads = [number for kind, number in runs.order if kind == "read"]
    assert reads == sorted(reads)
    decoded = {number for number in reads if runs.steps[number].phase == "decode"}
    for number, message in enumerate(runs.steps):
        before = runs.order[: runs.order.index(("start", number))]
        started, read = ({at for kind, at in before if kind == name} & decoded for name in ("start", "read"))
        if message.latest:
            assert len(started - read) == 1  # one that it goes on from, and no other


def test_of_graphs_a_step_takes_the_tokens_that_the_last_one_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_on_device(monkeypatch)
    spec, _ = open_model(folder)
    plan, asked = plan_of(spec, 5, 5), requests(5, MIXED[:2])
    waits, runs = (
        generate(folder, plan, spec, asked, monkeypatch, ahead=ahead, graphed=True) for ahead in (False, True)
    )
    assert runs.ended == waits.ended
    assert any(message.latest for message in runs.steps)
    assert all(message.step.tokens.eq(0).all() for message in runs.steps if message.latest)  # the host did not know


def test_drawing_is_warmed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel takes seconds to compile."""
    spec, source = open_model(folder)
    drawn: list[int] = []
    monkeypatch.setattr(kernels, "draws", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "draw_", lambda tokens, logits, parameters, numbers: drawn.append(len(tokens)))
    LoadedStage(build_stage(spec, source, plan_of(spec, 2, 2), 0, CPU), spec).warm_up()
    assert drawn == [1, 1]


def test_what_a_device_draws_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = open_model(folder)
    sampling = (MIXED[2], MIXED[0], SamplingParams(max_tokens=12, temperature=1.1, top_k=30, min_p=0.01, seed=9))
    plan, asked = plan_of(spec, 3, 3), requests(5, sampling)
    waits, runs = (
        generate(folder, plan, spec, asked, monkeypatch, ahead=ahead, drawn=ahead) for ahead in (False, True)
    )
    assert runs.ended == waits.ended
    assert sum(message.latest for message in runs.steps) > 5


def test_who_is_cancelled_gets_the_token_that_is_on_its_way_and_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = open_model(folder)
    asked = requests(2, [SamplingParams(max_tokens=12, ignore_eos=True)])

    def heard(scheduler: Scheduler, inbox: SimpleQueue[Any], generated: int) -> None:
        if generated == 8:
            inbox.put({"command": "cancel", "requests": [0]})

    full = generate(folder, plan_of(spec, 2, 2), spec, asked, monkeypatch, ahead=False)
    found = generate(folder, plan_of(spec, 2, 2), spec, asked, monkeypatch, ahead=True, heard=heard)
    assert found.ended[1] == full.ended[1]
    assert found.ended[0].finish_reason == "cancelled"
    tokens = found.ended[0].token_ids
    assert 4 <= len(tokens) <= 6 and tokens == full.ended[0].token_ids[: len(tokens)]


def test_blocks_that_run_out_change_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives its blocks back is computed anew from all of its tokens, the last one included."""
    save_model(tmp_path, "llama-gqa", max_position_embeddings=2 * KV_BLOCK)
    spec, _ = open_model(tmp_path)
    slots, blocks = 3, 4
    plan = replace(plan_of(spec, slots, slots), max_length=2 * KV_BLOCK, kv_blocks=blocks)
    draw = random.Random(7)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(KV_BLOCK - 4)] for _ in range(5)]
    asked = [(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt in prompts]
    waits, runs = (generate(tmp_path, plan, spec, asked, monkeypatch, ahead=ahead) for ahead in (False, True))
    assert runs.ended == waits.ended and len(runs.ended) == 5
    assert any(message.latest for message in runs.steps)
    computed = sum(len(message.step.tokens) for message in runs.steps if message.phase == "prefill")
    assert computed > sum(map(len, prompts))  # some anew
