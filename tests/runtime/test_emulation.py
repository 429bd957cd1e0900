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
from llmpq.measure import operation_clock
from llmpq.models.step import Step
from llmpq.runtime import communication, emulation
from llmpq.runtime import stage as running_stage
from llmpq.runtime.control import Status
from llmpq.runtime.emulation import EmulatedLink, SimulatedStage, SlowdownEmulator, SlowedStage, emulated, wait_until
from llmpq.runtime.engine import Engine, RunResult, SamplingParams
from llmpq.runtime.message import Message, Received, StepMessage
from llmpq.runtime.stage import StageRunner, Turn
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
    monkeypatch.setattr(operation_clock, "time", SimpleNamespace(perf_counter=lambda: next(marks)))
    calls: list[str] = []
    slowness = SimpleNamespace(begin=lambda: calls.append("begin"), hold=lambda: calls.append("hold") or 3.0)
    clock = operation_clock.Clock(torch.device("cpu"), slowness)  # type: ignore[arg-type]

    def call() -> None:
        calls.append("call")
        clock.mark()

    assert clock.timed(call) == [1.5, 6.0]
    assert calls == ["begin", "call", "hold"]


class Arrivals:
    """Links on which tokens arrive that were sent, and really arrived, at given milliseconds."""

    def __init__(self, *arrivals: tuple[int, int, int]) -> None:
        self.arrivals = iter(arrivals)  # sent, arrived, bytes

    def receive_tokens(self) -> Received[torch.Tensor]:
        sent_ms, arrived_ms, nbytes = next(self.arrivals)
        return Received(torch.zeros(0), nbytes, sent_ms * MS, arrived_ms * MS, None)


def test_an_emulated_link_is_busy_with_one_message_after_the_other(clock: FakeTime) -> None:
    real = Arrivals((0, 0, 5000), (1, 1, 5000), (100, 100, 0), (101, 101, 20000), (0, 0, 0), (0, 999, 0))
    held = EmulatedLink(real, Link("a", "b", latency_s=0.010, bytes_per_s=1e6, emulated=True))  # type: ignore[arg-type]
    # The last but one is late anyway: the link was free at 140 ms. The last one really took longer.
    for passage, arrived in (
        ((0, 15), 15),
        ((15, 30), 30),
        ((100, 110), 110),
        ((110, 140), 140),
        ((140, 150), 150),
        ((150, 160), 999),
    ):
        received = held.hold(held.receive_tokens())
        assert received.passage == (passage[0] * MS, passage[1] * MS)
        assert received.arrived_ns == arrived * MS
        assert passage[1] * MS <= clock.now <= passage[1] * MS + 100


def test_only_links_that_are_emulated_are_wrapped(checkpoint: Checkpoint) -> None:
    spec, real = load_spec(checkpoint), Arrivals()
    for is_emulated in (False, True):
        plan, _ = timed(spec, [2, 1], emulated=is_emulated)
        for rank in (0, 1):
            links = emulated(real, plan, rank)  # type: ignore[arg-type]
            assert isinstance(links, EmulatedLink) if is_emulated else links is real
    assert emulated(real, make_plan(spec, [2, 1], 2, 3), 1) is real  # type: ignore[arg-type,comparison-overlap]


@pytest.mark.parametrize("one_clock, awaited, passage", [(True, 4, (5, 8)), (True, 6, None), (False, 4, None)])
def test_a_messages_passage_is_known_if_it_was_sent_while_awaited(
    one_clock: bool, awaited: int, passage: tuple[int, int] | None
) -> None:
    assert communication.passage(one_clock, sent_ns=5, awaited_ns=awaited, arrived_ns=8) == passage


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
            hidden_states = None if index == 0 else torch.ones(len(keys), spec.hidden_size)
            result = stage.compute(StepMessage(step, hidden_states), Turn(began, 2000))
            takes = 1e9 * sum(map(costs.table(f"cpu{index}").seconds, ops)) - 2000
            assert clock.now - began == pytest.approx(takes, abs=100)
            assert result.shape == ((len(keys), spec.hidden_size) if index == 0 else (len(lens),))
            assert not result.any()


def stage_runner(plan: Plan, model: SimulatedStage | SlowedStage, links: SimpleNamespace) -> StageRunner:
    """The first stage of a plan, with links that are made for a test and no memory to watch."""
    return StageRunner(plan, 0, model, links, SimpleNamespace(), Status())  # type: ignore[arg-type]


def test_a_timed_step_and_its_sending_take_together_what_a_table_says(
    checkpoint: Checkpoint, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_stage, "time", clock)
    clock.look = 200
    spec = load_spec(checkpoint)
    plan, costs = timed(spec, [2, 1])
    takes = itertools.cycle((20_000, 180_000, 50_000, 150_000))  # nanoseconds; 100,000 on average
    links = SimpleNamespace(send=lambda message: clock.work(next(takes), 0))
    runner = stage_runner(plan, SimulatedStage(plan, spec, 0, costs), links)
    for _ in range(100):
        runner.handle(StepMessage(Step.of([0], [1], [9], [0])))
    expected = sum(map(costs.table("cpu0").seconds, stage_ops(plan, spec, 0, 1, 1, Context.of(10))))
    assert expected > 0.0005
    steps = [span.seconds for span in runner.spans.take()[20:]]
    assert sum(steps) / len(steps) == pytest.approx(expected, abs=2e-6)


def test_a_running_stage_takes_its_devices_slowdown_times_as_long(
    checkpoint: Checkpoint, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_stage, "time", clock)
    spec = load_spec(checkpoint)
    plan = make_plan(spec, [2, 1], 2, 3)
    slow = tuple(replace(device, slowdown=slowdown) for device, slowdown in zip(plan.cluster.devices, (3.0, 7.0)))
    plan = replace(plan, cluster=replace(plan.cluster, devices=slow))

    class Busy:
        def compute(self, message: StepMessage, turn: Turn) -> torch.Tensor:
            clock.work(4 * MS, 4 * MS)
            return torch.zeros(message.step.num_tokens, spec.hidden_size)

    sent: list[Message] = []
    slowed = SlowedStage(Busy(), plan.cluster.devices[0])  # type: ignore[arg-type]
    runner = stage_runner(plan, slowed, SimpleNamespace(send=sent.append))
    runner.handle(StepMessage(Step.of([0], [5], [0], [0] * 5)))
    (span,) = runner.spans.take()
    assert span.seconds == pytest.approx(3 * 0.004, rel=1e-3)
    (message,) = sent
    assert isinstance(message, StepMessage) and message.hidden_states is not None


PROMPTS = random_prompts(3, 9, 1, 20, 7, 4, 5)  # more than the five slots of a plan
TOKENS = 6


def run(checkpoint: Checkpoint, plan: Plan, waits: Profile | None = None) -> RunResult:
    with Engine(plan, checkpoint, load_spec(checkpoint), waits=waits) as engine:
        return engine.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, ignore_eos=True))


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
