"""Emulated slowness, links and stages: how long they wait, on a clock made for it; in runs, that nothing is early."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import planner
from llmpq.checkpoint.model_files import Checkpoint
from llmpq.measure import cases
from llmpq.models.step import Step
from llmpq.runtime import emulation
from llmpq.runtime import stage as running_stage
from llmpq.runtime.communication import Kind, Message
from llmpq.runtime.emulation import EmulatedLink, SimulatedStage, SlowdownEmulator, wait_until
from llmpq.runtime.engine import Engine, RunResult, SamplingParams
from llmpq.runtime.stage import StageRunner, begin
from llmpq.spec import Context, Device, Link, ModelSpec, Plan, Profile, Span, UsageError, stage_ops
from tests.support.pipelines import MIXED, load_spec, make_plan, random_prompts, tiny_model
from tests.support.planner_instances import cost_table

MS = 10**6  # nanoseconds


class FakeTime:
    """Time that passes when a thread sleeps, when it works, and a little whenever it looks."""

    def __init__(self) -> None:
        self.now = self.worked = 0
        self.slept = 0
        self.look = 1  # nanoseconds that pass whenever it looks

    def monotonic_ns(self) -> int:
        self.now += self.look
        return self.now

    def thread_time_ns(self) -> int:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.now += int(1e9 * seconds)
        self.slept += int(1e9 * seconds)

    def work(self, elapsed: int, worked: int) -> None:
        self.now += elapsed
        self.worked += worked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(emulation, "time", fake)
    return fake


def test_a_wait_ends_at_its_moment_and_never_before(clock: FakeTime) -> None:
    wait_until(5 * MS)
    assert 5 * MS <= clock.now <= 5 * MS + 10
    assert clock.slept >= 4 * MS  # and spins for no more than the rest
    wait_until(3 * MS)
    assert clock.now <= 5 * MS + 20


@pytest.mark.parametrize(
    "slowdown, elapsed, worked, takes",
    [
        (1.0, 7, 7, 7),
        (3.0, 4, 4, 12),
        (3.0, 5, 4, 12),  # 1 ms was another process's: it is not multiplied
        (3.0, 30, 4, 30),  # 26 ms were: there is nothing left to wait for
    ],
)
def test_slowness_multiplies_the_threads_own_time(
    slowdown: float, elapsed: int, worked: int, takes: int, clock: FakeTime
) -> None:
    slowness = SlowdownEmulator(Device("d", "cpu", slowdown=slowdown))
    clock.work(MS, MS)  # before: does not count
    slowness.begin()
    began = clock.now
    clock.work(elapsed * MS, worked * MS)
    stretch = slowness.hold()
    assert clock.now - began == pytest.approx(takes * MS, rel=1e-4)
    assert stretch == pytest.approx(takes / elapsed, rel=1e-4)


def test_a_clock_stretches_all_it_timed_by_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([1.0, 1.5, 3.5])
    monkeypatch.setattr(cases, "time", SimpleNamespace(perf_counter=lambda: next(marks)))
    calls: list[str] = []
    slowness = SimpleNamespace(begin=lambda: calls.append("begin"), hold=lambda: calls.append("hold") or 3.0)
    clock = cases.Clock(torch.device("cpu"), slowness)  # type: ignore[arg-type]

    def call() -> None:
        calls.append("call")
        clock.mark()

    assert clock.timed(call) == [1.5, 6.0]
    assert calls == ["begin", "call", "hold"]


def test_an_emulated_link_is_busy_with_one_message_after_the_other(clock: FakeTime) -> None:
    held = EmulatedLink(Link("a", "b", latency_s=0.010, bytes_per_s=1e6, emulated=True))
    arrivals = []
    for sent_ms, size in ((0, 5000), (1, 5000), (100, 0), (101, 20000)):
        arrived = held.hold(sent_ms * MS, size, sent_ms * MS)
        arrivals.append(round(clock.now / MS, 3))
        assert round(arrived / MS, 3) == arrivals[-1]
    assert arrivals == [15, 30, 110, 140]
    held.hold(0, 0, 0)  # one that is late anyway: the link was free at 140 ms
    assert round(clock.now / MS, 3) == 150
    assert held.hold(0, 0, 999 * MS) == 999 * MS  # it really took longer


@pytest.mark.parametrize("link", [None, Link("a", "b", 10.0, 1.0)])
def test_other_links_hold_nothing_back(link: Link | None, clock: FakeTime) -> None:
    assert EmulatedLink(link).hold(0, 10**9, 7) == 7
    assert clock.slept == 0


def test_a_link_knows_when_messages_were_on_their_way_that_were_awaited(clock: FakeTime) -> None:
    real, held = EmulatedLink(None), EmulatedLink(Link("a", "b", latency_s=0.010, bytes_per_s=1e6, emulated=True))
    real.hold(sent_ns=5, size=1, arrived_ns=8, awaited_ns=4)
    assert real.passage == (5, 8)
    real.hold(sent_ns=5, size=1, arrived_ns=8, awaited_ns=6)
    assert real.passage is None  # sent before: it may have been there since
    for sent_ms, awaited_ms, passage in ((1, 0, (1, 16)), (2, 30, (16, 31)), (90, 95, (90, 105))):
        held.hold(sent_ms * MS, 5000, 120 * MS, awaited_ms * MS)
        assert held.passage == (passage[0] * MS, passage[1] * MS)


@pytest.mark.parametrize("slowdown, waits", [(1.0, 0), (2.0, 1)])
def test_a_gpu_is_waited_for_only_where_it_is_slowed_down(
    slowdown: float, waits: int, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("device"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    slowness = SlowdownEmulator(Device("d", "cuda", slowdown=slowdown))
    slowness.begin()
    slowness.hold()
    assert waited == ["stream"] * waits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama-gqa")


def timed(
    spec: ModelSpec, split: list[int], *, latency: float = 0.004, bytes_per_s: float = 2e5, emulated: bool = True
) -> tuple[Plan, Profile]:
    """A plan of unequal devices, and costs of some milliseconds a step."""
    plan = make_plan(spec, split, 2, 3)
    names = [device.name for device in plan.cluster.devices]
    links = tuple(Link(a, b, latency, bytes_per_s, emulated) for a, b in itertools.permutations(names, 2))
    tables = {
        name: cost_table(spec, MIXED, slowness=30.0 * (1 + i), step=1e-3, max_rows=256) for i, name in enumerate(names)
    }
    return replace(plan, cluster=replace(plan.cluster, links=links)), Profile(tables, links)


def test_a_timed_stage_takes_what_its_operations_add_up_to(checkpoint: Checkpoint, clock: FakeTime) -> None:
    spec = load_spec(checkpoint)
    plan, costs = timed(spec, [2, 1])
    for index in (0, 1):
        stage = SimulatedStage(plan, spec, index, costs)
        for lens, starts in (([3, 7], [0, 0]), ([1, 1, 1], [9, 4, 30])):
            step = Step.of(range(len(lens)), lens, starts, [0] * sum(lens))
            keys = [start + 1 + i for length, start in zip(lens, starts) for i in range(length)]
            ops = list(stage_ops(plan, spec, index, len(keys), len(lens), Context.of(*keys)))
            assert len(ops) == 1 + 6 * (2 - index) + (1 if index == 0 else 2)
            began = clock.now
            stage.begin(began)
            hidden_states = stage(step)
            stage.hold(2000)
            takes = 1e9 * sum(map(costs.table(f"cpu{index}").seconds, ops)) - 2000
            assert clock.now - began == pytest.approx(takes, abs=100)
            assert hidden_states.shape == (len(keys), spec.hidden_size) and not hidden_states.any()
            logits = stage.logits(hidden_states[:2])
            assert logits.shape == (2, spec.vocab_size) and not logits.any()


def test_a_timed_step_and_its_sending_take_together_what_a_table_says(
    checkpoint: Checkpoint, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_stage, "time", clock)
    clock.look = 200
    spec = load_spec(checkpoint)
    plan, costs = timed(spec, [2, 1])
    takes = itertools.cycle((20_000, 180_000, 50_000, 150_000))  # nanoseconds; 100,000 on average
    links = SimpleNamespace(send=lambda message: clock.work(0 if message.kind is Kind.BEGIN else next(takes), 0))
    stage = SimulatedStage(plan, spec, 0, costs)
    runner = StageRunner(plan, spec, 0, stage, links, SimpleNamespace())  # type: ignore[arg-type]
    runner.handle(begin(SamplingParams(), 0))
    step = Step.of([0], [1], [9], [0])
    for _ in range(100):
        runner.handle(Message(Kind.GENERATE, step))
    expected = sum(map(costs.table("cpu0").seconds, stage_ops(plan, spec, 0, 1, 1, Context.of(10))))
    assert expected > 0.0005
    steps = [span.seconds for span in runner.spans[20:]]
    assert sum(steps) / len(steps) == pytest.approx(expected, abs=2e-6)


def test_a_running_stage_takes_its_devices_slowdown_times_as_long(
    checkpoint: Checkpoint, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_stage, "time", clock)
    spec = load_spec(checkpoint)
    plan = make_plan(spec, [2, 1], 2, 3)
    slow = tuple(replace(device, slowdown=slowdown) for device, slowdown in zip(plan.cluster.devices, (3.0, 7.0)))
    plan = replace(plan, cluster=replace(plan.cluster, devices=slow))

    def compute(step: Step, hidden_states: torch.Tensor | None) -> torch.Tensor:
        clock.work(4 * MS, 4 * MS)
        return torch.zeros(step.num_tokens, spec.hidden_size)

    sent: list[Message] = []
    links = SimpleNamespace(send=sent.append)
    runner = StageRunner(plan, spec, 0, compute, links, SimpleNamespace())  # type: ignore[arg-type]
    runner.handle(begin(SamplingParams(), 0))
    step = Step.of([0], [5], [0], [0] * 5)
    runner.handle(Message(Kind.GENERATE, step))
    (span,) = runner.spans
    assert span.seconds == pytest.approx(3 * 0.004, rel=1e-3)
    assert [message.kind for message in sent] == [Kind.BEGIN, Kind.GENERATE]


PROMPTS = random_prompts(3, 9, 1, 20, 7, 4, 5)  # two waves of a plan's five slots
TOKENS = 6


def run(checkpoint: Checkpoint, plan: Plan, waits: Profile | None = None) -> RunResult:
    with Engine(plan, checkpoint, load_spec(checkpoint), waits=waits) as engine:
        result = engine.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert result is not None
    return result


def of_stage(spans: tuple[Span, ...], index: int) -> Iterator[Span]:
    return (span for span in spans if (span.kind, span.index) == ("stage", index))


@pytest.mark.parametrize("split", [[3], [2, 1], [1, 1, 1]], ids=str)
def test_timed_waits_go_as_simulated(split: list[int], checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    plan, costs = timed(spec, split)
    result = run(checkpoint, plan, costs)
    assert {token for s in result.sequences for token in s.token_ids} == {0}
    expected = planner.simulate(plan, spec, costs, [len(p) for p in PROMPTS], [TOKENS] * len(PROMPTS))
    for index in range(len(split)):
        pairs = list(zip(of_stage(expected.spans, index), of_stage(result.spans, index), strict=True))
        for simulated, measured in pairs:
            assert (measured.phase, measured.sequences, measured.tokens) == (
                simulated.phase,
                simulated.sequences,
                simulated.tokens,
            )
            assert measured.seconds >= simulated.seconds - 1e-3
        links = ([s for s in run.spans if (s.kind, s.index) == ("link", index)] for run in (expected, result))
        for simulated, measured in zip(*links, strict=True):  # all links are emulated
            assert (measured.phase, measured.tokens) == (simulated.phase, simulated.tokens)
            assert measured.seconds == pytest.approx(simulated.seconds, abs=1e-6)
    total, simulated_total = (p.prefill_s + p.decode_s for p in (result.measured, expected.prediction))
    assert total >= 0.9 * simulated_total


def test_a_given_link_is_not_slowed_unless_it_is_emulated(checkpoint: Checkpoint) -> None:
    spec = load_spec(checkpoint)
    plan, costs = timed(spec, [2, 1], latency=2.0, emulated=False)
    expected = planner.predict(plan, spec, costs, [len(p) for p in PROMPTS], [TOKENS] * len(PROMPTS))
    measured = run(checkpoint, plan, costs).measured
    assert expected.prefill_s + expected.decode_s > 40 > measured.prefill_s + measured.decode_s


def test_slow_devices_and_links_change_no_token_and_no_message_is_early(checkpoint: Checkpoint) -> None:
    plan = make_plan(load_spec(checkpoint), [1, 1, 1], 2, 3)
    devices = tuple(replace(device, slowdown=1.0 + i) for i, device in enumerate(plan.cluster.devices))
    links = (Link("cpu0", "cpu1", 1e-2, 1e6, emulated=True), Link("cpu2", "cpu0", 3e-3, 1e5, emulated=True))
    slowed = run(checkpoint, replace(plan, cluster=replace(plan.cluster, devices=devices, links=links)))
    assert slowed.sequences == run(checkpoint, plan).sequences
    for sent, received in zip(of_stage(slowed.spans, 0), of_stage(slowed.spans, 1), strict=True):
        wire = 4 * load_spec(checkpoint).hidden_size * sent.tokens
        assert received.start_s - sent.start_s >= links[0].seconds(wire)


def test_an_emulated_link_between_hosts_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_model(tmp_path, "llama-gqa")
    plan, _ = timed(load_spec(checkpoint), [2, 1])
    devices = (plan.cluster.devices[0], replace(plan.cluster.devices[1], host="elsewhere"))
    plan = replace(plan, cluster=replace(plan.cluster, devices=devices))
    with pytest.raises(UsageError, match=r"from cpu0 to cpu1 is emulated.* localhost and elsewhere"):
        Engine(plan, checkpoint, load_spec(checkpoint))
