"""A device is lost: the processes of the others go on with the units that stay where they are."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmpq.checkpoint.model_files import Checkpoint, resolve
from llmpq.models.units import forms_of
from llmpq.runtime import recovery, worker_group
from llmpq.runtime.engine import Engine
from llmpq.runtime.launch import Program
from llmpq.runtime.pipeline import Options, Served
from llmpq.runtime.recovery import Recovery
from llmpq.runtime.request import Generated
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.worker import Held
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import DeviceLoss, DeviceMemoryError, LlmpqError, ModelSpec, Plan, WorkerLostError
from tests.support.lost_devices import plan_on
from tests.support.pipelines import make_plan, random_prompts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

PROMPTS = random_prompts(5, 9, 3, 7, 4)
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Generated, ...]:
    with Engine(make_plan(spec, [3], 2, 2), checkpoint, spec) as engine:
        return engine.generate(PROMPTS, SAMPLING).sequences


class Run:
    """Continue the prompts on the first of `plans`, and after each loss on the next one."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, plans: Sequence[Plan]) -> None:
        self._left = list(plans[1:])
        self._served = Served(plans[0], checkpoint, spec)
        self.pids: list[dict[str, int]] = []  # of each plan's devices
        self.lost: list[str] = []
        self.losses: tuple[DeviceLoss, ...] = ()

    def __call__(self, **strikes: Callable[[dict[str, int]], None]) -> tuple[Generated, ...]:
        """`strikes`: what happens, given the processes of devices, once so many tokens have come: after_20=..."""
        at = {int(name.removeprefix("after_")): strike for name, strike in strikes.items()}
        told = 0

        def take(request: int, token: int) -> None:
            nonlocal told
            told += 1
            if told in at:
                at[told](self._note(engine))

        with Engine(*self._served, on_loss=self._on_loss) as engine:
            result = engine.generate(PROMPTS, SAMPLING, on_tokens=take)
            self._note(engine)
            self.losses = engine.losses
        return result.sequences

    def _note(self, engine: Engine) -> dict[str, int]:
        devices = [stage.device for stage in engine.plan.stages]
        self.pids.append(dict(zip(devices, engine.pids, strict=True)))
        return self.pids[-1]

    def _on_loss(self, device: str, before: Plan, error: LlmpqError) -> Served:
        self.lost.append(device)
        self._served = self._served._replace(plan=self._left.pop(0))
        return self._served


def kill(*devices: str, number: signal.Signals = signal.SIGKILL) -> Callable[[dict[str, int]], None]:
    def strike(pids: dict[str, int]) -> None:
        for device in devices:
            os.kill(pids[device], number)

    return strike


def spoil(checkpoint: Checkpoint, *but: str) -> None:
    """Make all tensors NaN, which no loader takes, but those whose names begin so."""
    path = checkpoint.path / "model.safetensors"
    tensors = {
        name: tensor if name.startswith(but) else torch.full_like(tensor, torch.nan)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path.with_suffix(".new"), {"format": "pt"})
    path.with_suffix(".new").rename(path)


def test_only_units_that_move_are_read_again(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    undisturbed: tuple[Generated, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMPQ_CACHE", str(tmp_path / "cache"))
    spoilt = resolve(str(shutil.copytree(checkpoint.path, tmp_path / "model")))
    run = Run(spoilt, spec, [plan_on(spec, a=1, b=1, c=1), plan_on(spec, a=2, c=1)])

    def strike(pids: dict[str, int]) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        spoil(spoilt, "model.layers.1.")
        kill("b")(pids)

    assert run(after_20=strike) == undisturbed
    (loss,) = run.losses
    assert (loss.kept, loss.loaded) == (4, 1)  # embedding, layers 0 and 2, head
    before, after = run.pids
    assert {name: before[name] for name in ("a", "c")} == after


def test_one_loss_after_the_other_leaves_what_can_stay(
    checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...]
) -> None:
    plans = [plan_on(spec, a=1, b=1, c=1), plan_on(spec, b=2, c=1), plan_on(spec, b=3)]
    run = Run(checkpoint, spec, plans)
    assert run(after_20=kill("a"), after_60=kill("c")) == undisturbed
    assert run.lost == ["a", "c"]
    assert [(loss.kept, loss.loaded) for loss in run.losses] == [(3, 2), (3, 2)]
    assert len({pids["b"] for pids in run.pids}) == 1


def test_who_does_not_leave_in_time_is_begun_anew(
    checkpoint: Checkpoint, spec: ModelSpec, undisturbed: tuple[Generated, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "LEAVE_S", 1.0)
    run = Run(checkpoint, spec, [plan_on(spec, a=1, b=1, c=1, d=0), plan_on(spec, a=1, b=1, c=1)])

    def strike(pids: dict[str, int]) -> None:
        kill("b", number=signal.SIGSTOP)(pids)  # from which c is waiting for a message
        kill("d")(pids)

    assert run(after_20=strike) == undisturbed
    before, after = run.pids
    assert run.lost == ["d"] and before["b"] != after["b"]
    assert (before["a"], before["c"]) == (after["a"], after["c"])
    assert (run.losses[0].kept, run.losses[0].loaded) == (3, 2)


@pytest.mark.parametrize("struck", ["a", pytest.param("c", marks=pytest.mark.full)])
def test_who_is_lost_while_others_take_over(
    struck: str,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    undisturbed: tuple[Generated, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was kept, or one that is new."""
    left = "b" if struck == "a" else "a"
    rest = plan_on(spec, **{left: 3})
    run = Run(checkpoint, spec, [plan_on(spec, a=1, b=1, d=1), plan_on(spec, a=1, b=1, c=1), rest])
    renew = WorkerGroup.renew

    def renewed(group: WorkerGroup, programs: Sequence[Program]) -> None:
        renew(group, programs)
        for worker in group.workers:
            if len(programs) == 3 and worker.program.device == struck:
                worker.process.kill()

    monkeypatch.setattr(WorkerGroup, "renew", renewed)
    assert run(after_20=kill("d")) == undisturbed
    assert run.lost == ["d", struck]
    assert [loss.kept for loss in run.losses] == [0, 2 if left == "a" else 1]
    assert run.pids[0][left] == run.pids[-1][left]


@pytest.mark.parametrize("reused, plans_run", [({0}, ["first", "first"]), ({1}, ["first", "second"])], ids=str)
def test_a_process_that_went_on_and_has_no_room_is_begun_anew(
    reused: set[int], plans_run: list[str], spec: ModelSpec, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its device counts as lost: what it had before may be in the way."""
    plans = {"first": plan_on(spec, a=2, b=1), "second": plan_on(spec, b=3)}
    group, started = SimpleNamespace(reused=reused), list[Plan]()

    def start(served: Served, *_: object) -> tuple[SimpleNamespace, int]:
        started.append(served.plan)
        if len(started) == 1:
            raise lost_at_first(DeviceMemoryError("no room"))
        return group, 3

    monkeypatch.setattr(recovery, "start", start)
    left = [Served(plan, checkpoint, spec) for plan in plans.values()]
    tried = Recovery(lambda device, plan, error: left.pop(0), Options(None, False, None, None, None))
    before = Served(plan_on(spec, a=1, b=1, c=1), checkpoint, spec)
    served, _ = tried.replacement(before, lost_at_first(WorkerLostError("gone")), (), Path(), group)  # type: ignore[arg-type]
    assert started == [plans[name] for name in plans_run] and served.plan == started[-1]
    assert (tried.losses[-1].kept, tried.losses[-1].loaded) == (3, len(spec.units) - 3)


def test_units_of_another_model_are_not_kept(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Where a new plan has other weights, they may be written ahead, into another folder."""
    held, plan = Held(SimpleNamespace(check_leaving=lambda: None)), plan_on(spec, a=2, b=1)  # type: ignore[arg-type]
    job = {"checkpoint": {"path": "here"}, "spec": spec.to_dict()}

    def kept(**changed: object) -> int:
        return held.begin({**job, **changed}, plan, spec, 0)

    assert kept() == 0
    for unit, form in forms_of(spec, plan, 0).items():
        held.units.get(unit, form, torch.nn.Identity)
    assert kept() == 3
    assert kept(checkpoint={"path": "there"}) == 0


def lost_at_first(error: LlmpqError) -> LlmpqError:
    """As the worker of rank 0 has it."""
    error.rank = 0
    return error
