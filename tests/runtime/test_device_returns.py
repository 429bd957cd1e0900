"""A device that was lost is back: requests move to a plan with it; results are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.runtime import device_watch, lost_devices, recovery
from llmpq.runtime.device_watch import DeviceWatch
from llmpq.runtime.engine import Engine
from llmpq.runtime.handle import Handle
from llmpq.runtime.launch import Program
from llmpq.runtime.pipeline import Options, Served
from llmpq.runtime.recovery import Recovery
from llmpq.runtime.request import Generated, Request
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.session import Session
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import DeviceMemoryError, DeviceReturn, InfeasibleError, LlmpqError, ModelSpec, Plan, WorkerLostError
from tests.support.lost_devices import plan_on, worker_pids
from tests.support.pipelines import make_plan, random_prompts

pytestmark = pytest.mark.usefixtures("nothing_is_left")

PROMPTS = random_prompts(5, 9, 3, 7, 4)
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
SOON_S = 60.0
LIMIT_S = 180.0  # of a run, which waits for processes to import


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Generated, ...]:
    with Engine(make_plan(spec, [3], 2, 2), checkpoint, spec) as engine:
        return engine.generate(PROMPTS, SAMPLING).sequences


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are tried again at once, and count as lost again soon for long."""
    monkeypatch.setattr(lost_devices, "RETRY_S", SOON_S)
    due = lost_devices.LostDevices.due
    monkeypatch.setattr(lost_devices.LostDevices, "due", lambda self, now_s: due(self, now_s + 1.5 * SOON_S))


class Run:
    """Requests on a and b; on a alone whenever b is lost, and on both once b is back. More come until `is_over`.

    b is killed when some tokens have come, and once more when it is back, if it is not lost before.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self._both, self._rest = (
            Served(plan, checkpoint, spec) for plan in (plan_on(spec, a=1, b=2), plan_on(spec, a=3))
        )
        self.asked: list[tuple[set[str], float]] = []
        self.handles: list[Handle] = []
        self.told: list[list[int]] = []
        self.kills = 0
        self.pids: list[list[int]] = []  # before each of them, and at the end
        self.plans: list[Plan] = []

    def __call__(self, is_over: Callable[[Engine], bool]) -> Engine:
        with Engine(
            *self._both,
            on_loss=lambda device, plan, error: self._rest,
            on_return=self._on_return,
            on_plan=self.plans.append,
        ) as engine:
            with engine.session() as session:
                self._submit(session)
                until, told = time.monotonic() + LIMIT_S, 20
                while not is_over(engine) and time.monotonic() < until:
                    if sum(not handle.future.done() for handle in self.handles) < len(PROMPTS):
                        self._submit(session)
                    runs_on_both = len(engine.plan.stages) == 2 and len(engine.returns) == self.kills
                    if runs_on_both and self._count > told:
                        self.pids.append(engine.pids)
                        os.kill(engine.pids[1], signal.SIGKILL)
                        self.kills, told = self.kills + 1, self._count + 20
                    time.sleep(0.01)
                self._submit(session)
            self.pids.append(engine.pids)
        return engine

    @property
    def _count(self) -> int:
        """Tokens that have come."""
        return sum(map(len, self.told))

    def _submit(self, session: Session) -> None:
        for prompt in PROMPTS:
            self.told.append([])
            self.handles.append(session.submit(Request(tuple(prompt), SAMPLING), self.told[-1].append))

    def check(self, undisturbed: Sequence[Generated]) -> None:
        """Nothing is lost, doubled, or another."""
        found = [handle.result() for handle in self.handles]
        assert found == list(undisturbed) * (len(found) // len(undisturbed))
        assert [tuple(tokens) for tokens in self.told] == [each.token_ids for each in found]

    def _on_return(self, devices: Collection[str], plan: Plan, at_least: float) -> Served:
        assert plan is self._rest.plan
        self.asked.append((set(devices), at_least))
        return self._both


@pytest.mark.slow
def test_requests_move_to_a_device_that_is_back_but_not_if_it_is_lost_again_soon(
    checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...], soon: None
) -> None:
    run = Run(checkpoint, spec)
    engine = run(lambda engine: len(engine.losses) == 2)
    run.check(undisturbed)
    assert [(loss.device, loss.restarted) for loss in engine.losses] == [("b", ())] * 2
    (back,) = engine.returns
    assert (back.devices, back.kept, back.loaded, back.changed) == (("b",), 2, 3, ())  # a has embedding and layer 0
    assert back.requests > 0 and back.tokens > 0 and back.out_s > 0
    assert run.asked == [({"a", "b"}, device_watch.BETTER)]
    first, second, last = run.pids
    assert first[0] == second[0] == last[0] and first[1] != second[1] and len(last) == 1
    assert [len(plan.stages) for plan in run.plans] == [1, 2, 1] and engine.plan is run.plans[-1]


@pytest.mark.full
@pytest.mark.slow
def test_who_is_lost_again_while_others_take_over_stays_out(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    undisturbed: tuple[Generated, ...],
    soon: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renew, renewed = WorkerGroup.renew, count()

    def renewing(group: WorkerGroup, programs: Sequence[Program]) -> None:
        renew(group, programs)
        if len(programs) == 2:
            next(renewed)
            group.workers[1].process.kill()

    monkeypatch.setattr(WorkerGroup, "renew", renewing)
    run = Run(checkpoint, spec)
    engine = run(lambda engine: len(engine.losses) == 2)
    run.check(undisturbed)
    assert [loss.device for loss in engine.losses] == ["b", "b"] and len(engine.plan.stages) == 1
    assert [(back.devices, back.kept, back.loaded) for back in engine.returns] == [(("b",), 0, 0)]
    assert next(renewed) == 1 and len(run.asked) == 1
    assert run.pids[0][:1] == run.pids[1]


def watching(spec: ModelSpec, on_return: Callable[..., Any]) -> DeviceWatch:
    """b is lost; a runs."""
    watch = DeviceWatch(on_return)
    assert watch.lose(plan_on(spec, a=1, b=2).cluster.device("b"))
    watch.run(plan_on(spec, a=3))
    return watch


def test_a_try_that_fails_is_said_and_changes_nothing(
    spec: ModelSpec, soon: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Event()

    def fail(self: lost_devices.LostDevices, device: str, now_s: float) -> None:
        self._due_s.clear()
        tried.set()

    def absent(name: str, module: str, *rest: Any) -> Program:
        return Program(name, "llmpq.runtime.absent", *rest)

    monkeypatch.setattr(lost_devices.LostDevices, "fail", fail)
    monkeypatch.setattr(device_watch, "Program", absent)
    asked: list[object] = []
    watch = watching(spec, lambda *arguments: asked.append(arguments))
    assert tried.wait(SOON_S)
    watch.close()
    assert asked == [] and watch.offer is None
    assert "b does not answer yet: a try of b" in caplog.text and "llmpq.runtime.absent" in caplog.text


def test_nothing_is_left_of_a_try_when_nobody_wants_it(
    spec: ModelSpec, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(name: str, module: str, arguments: Any, environment: Any) -> Program:
        return Program(name, "llmpq.runtime.worker", (), environment)  # it waits to be told what to do

    monkeypatch.setattr(device_watch, "Program", waiting)
    before = worker_pids()
    watch = watching(spec, lambda *arguments: pytest.fail("it answered"))
    until = time.monotonic() + SOON_S
    while worker_pids() <= before and time.monotonic() < until:
        time.sleep(0.001)
    watch.close()
    assert worker_pids() <= before and watch.offer is None


def test_an_offer_is_void_when_another_device_is_lost(spec: ModelSpec, soon: None, monkeypatch: Any) -> None:
    """Before it is there, or before it is taken."""
    monkeypatch.setattr(DeviceWatch, "_answers", lambda self, device: True)
    plans = [plan_on(spec, a=2, c=1), plan_on(spec, a=3)]
    asked: list[Plan] = []
    there, then = threading.Event(), threading.Event()

    def on_return(devices: Collection[str], plan: Plan, at_least: float) -> Served:
        asked.append(plan)
        if len(asked) == 1:
            there.set()
            assert then.wait(SOON_S)
        return Served(plan, None, spec)  # type: ignore[arg-type]

    watch = DeviceWatch(on_return)
    watch.lose(plan_on(spec, a=1, b=1, c=1).cluster.device("b"))
    watch.run(plans[0])
    assert there.wait(SOON_S)
    watch.lose(plans[0].cluster.device("c"))
    watch.run(plans[1])
    then.set()
    wait_for(lambda: watch.offer is not None)
    offer = watch.take()
    assert [id(plan) for plan in asked] == [id(plan) for plan in plans]
    assert offer.served.plan is plans[1] and offer.devices == ("b", "c")
    watch.run(offer.served.plan)
    watch.lose(plan_on(spec, a=1, d=2).cluster.device("d"))
    watch.run(plans[1])
    wait_for(lambda: watch.offer is not None)
    watch.lose(plan_on(spec, a=1, e=2).cluster.device("e"))
    assert watch.offer is None
    watch.close()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_what_is_gone_is_not_among_those_that_are_started_again(spec: ModelSpec) -> None:
    asked: list[set[str]] = []
    plan = plan_on(spec, a=1, b=1, c=1)
    watch = DeviceWatch(lambda devices, plan, at_least: asked.append(set(devices)))
    for device in ("b", "c", "a"):
        watch.lose(plan.cluster.device(device))
    watch._lost.bring_back(["b"])
    assert not watch.lose(plan.cluster.device("b"))
    assert watch.all_again(plan) is None and asked == [{"a", "c"}]


class Again:
    """Stages on a and b, of which one is lost whenever it is told; nothing fits on less than both."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self.both = Served(plan_on(spec, a=1, b=2), checkpoint, spec)
        self.asked: list[tuple[set[str], float]] = []
        self.recovery = Recovery(self._on_loss, Options(None, False, None, None, None), self._on_return)

    def lose(self, error: LlmpqError) -> Served:
        """b."""
        error.rank = 1
        return self.recovery.replacement(self.both, error, (), Path())[0]

    def _on_loss(self, device: str, plan: Plan, error: LlmpqError) -> Served:
        raise InfeasibleError(f"nothing fits without {device}")

    def _on_return(self, devices: Collection[str], plan: Plan, at_least: float) -> Served:
        self.asked.append((set(devices), at_least))
        return self.both


@pytest.mark.parametrize("dies", [False, True])
def test_where_nothing_fits_without_it_a_device_is_started_again_once(
    dies: bool, spec: ModelSpec, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(served: Served, *_: object) -> tuple[SimpleNamespace, int]:
        if dies:
            error = WorkerLostError("gone once more")
            error.rank = 1
            raise error
        return SimpleNamespace(), 2

    monkeypatch.setattr(recovery, "start", start)
    again = Again(spec, checkpoint)
    if not dies:
        assert again.lose(WorkerLostError("gone")) is again.both
    with pytest.raises(InfeasibleError, match="nothing fits without b"):
        again.lose(WorkerLostError("gone"))
    assert again.asked == [({"a", "b"}, 0.0)]
    assert [(loss.device, loss.restarted) for loss in again.recovery.losses] == [("b", ("b",))]
    again.recovery.close()


def test_what_ran_out_of_its_memory_is_not_started_again_at_once(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    again = Again(spec, checkpoint)
    with pytest.raises(InfeasibleError, match="nothing fits without b"):
        again.lose(DeviceMemoryError("no room"))
    assert again.asked == []


def test_a_session_stays_where_it_is_once_all_has_ended_or_when_told_to() -> None:
    offered: list[Sequence[str]] = []
    idle, closed, told = (session_of(offered) for _ in range(3))
    assert not idle.moves()
    offered.append(())
    told.stays = True
    closed.submit(Request((1, 1), SAMPLING))
    closed.close()
    assert idle.moves() and closed.moves() and not told.moves()
    closed._open.clear()
    assert not closed.moves()


@pytest.mark.parametrize("logprobs", [None, 1])
def test_who_begins_again_is_not_moved_to_where_its_tokens_may_differ(logprobs: int | None) -> None:
    offered: list[Sequence[str]] = [()]
    session = session_of(offered)
    handle = session.submit(Request((1, 1), SamplingParams(max_tokens=9, logprobs=logprobs)))
    offered.append(["head"])
    assert session.moves()
    handle.receive(7)
    assert session.moves() == (logprobs is None)
    offered.pop()
    assert session.moves()


def session_of(offered: Sequence[Sequence[str]]) -> Session:
    """It is offered the last of these."""
    workers: Any = SimpleNamespace(wake=lambda: None, knows_vocabulary=False)
    return Session(workers, count(), lambda requests: None, offered=lambda: offered[-1] if offered else None)


def test_a_line_says_what_a_return_has_cost() -> None:
    back = DeviceReturn(
        devices=("cpu1",), out_s=75.0, planning_s=0.5, loading_s=2.0, requests=4, tokens=100, kept=3, loaded=2
    )
    assert recovery.in_words(back) == (
        "cpu1 is back, after 75 s: planned in 500 ms, 2 units loaded and 3 kept in 2 s; of 4 requests in flight, "
        "100 tokens are computed again; texts are those of a run without it"
    )
