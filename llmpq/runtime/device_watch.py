"""Lost devices are tried again while requests run on others: a process is started there, then a plan is made with it.

All of that is on a thread of its own, which changes nothing that runs. What it finds is an offer, which the thread that
listens to the workers takes when it likes; a device that is lost before makes it void.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from llmpq.progress import warn_once
from llmpq.runtime.launch import Program, device_environment
from llmpq.runtime.lost_devices import LostDevices
from llmpq.runtime.pipeline import Served
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import Device, InfeasibleError, LlmpqError, Plan

BETTER = 1.05  # times as many tokens a second, predicted: what it takes to compute requests in flight once more
_END_S = 2.0  # for a plan that is being made when nobody wants it any more


class OnReturn(Protocol):
    """Plans with devices that were lost before. From any thread."""

    def __call__(self, devices: Collection[str], plan: Plan, at_least: float, /) -> Served | None:
        """What to run on devices of these names, with room for all that `plan` has room for.

        None if it is predicted to make less than `at_least` times as many tokens a second as `plan`; 0: whatever it
        makes. Raises InfeasibleError, and what keeps it from being planned.
        """


class Offer(NamedTuple):
    """What could run, on some devices more that were lost."""

    served: Served
    devices: tuple[str, ...]
    planning_s: float
    out_s: float  # since the first of them was lost
    changed: Sequence[str]  # units that are stored or multiplied in another way


class DeviceWatch:
    """Which devices are out, and the offer to run with some of them again.

    Without `on_return` none comes back. But for `close`, the methods are for the thread that listens.
    """

    def __init__(self, on_return: OnReturn | None) -> None:
        self._on_return = on_return
        self._changed = threading.Condition()  # guards all below
        self._lost = LostDevices()
        self._devices: dict[str, tuple[Device, float]] = {}  # that were ever lost, and when they were last
        self._plan: Plan | None = None  # what runs; None while others take over
        self._offer: Offer | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def lose(self, device: Device) -> bool:
        """It is lost, with the plan that it ran in. Whether it may come back."""
        now_s = time.monotonic()
        with self._changed:
            self._plan = self._offer = None
            self._devices[device.name] = device, now_s
            self._lost.lose(device.name, now_s)
            return device.name not in self._lost.gone

    def run(self, plan: Plan) -> None:
        """This plan runs now: all of it is loaded."""
        with self._changed:
            self._plan = plan
            self._lost.loaded(time.monotonic())
            if self._thread is None and self._on_return is not None:
                self._thread = threading.Thread(target=self._watch, name="lost devices", daemon=True)
                self._thread.start()
            self._changed.notify()

    @property
    def offer(self) -> Offer | None:
        """What `take` returns, if there is anything."""
        return self._offer

    def take(self) -> Offer:
        """What is offered, which is to run from now on."""
        with self._changed:
            offer, self._plan, self._offer = self._offer, None, None
            assert offer is not None
            self._lost.bring_back(offer.devices)
        return offer

    def all_again(self, plan: Plan, but: Collection[str] = ()) -> Offer | None:
        """What could run on all devices of a plan and all that are out, as nothing fits on less; it is to run then."""
        with self._changed:
            out = tuple(name for name in self._lost.out if name not in but)
            names = {device.name for device in plan.cluster.devices}.union(out).difference(self._lost.gone, but)
        if self._on_return is None or not out:
            return None
        try:
            found = self._planned(names, out, plan, 0.0)
        except InfeasibleError:
            return None
        with self._changed:
            self._lost.bring_back(out)
        return found

    def close(self) -> None:
        """Nothing is tried any more; no process is left. From any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_END_S)

    def _watch(self) -> None:
        while (found := self._due()) is not None:
            plan, devices = found
            answering = tuple(device.name for device in devices if self._answers(device))
            offer = self._better(plan, answering)
            now_s = time.monotonic()
            with self._changed:
                if self._closed or self._plan is not plan:
                    continue  # the next plan is to be better than another one
                self._offer = offer
                for device in devices:
                    if offer is None or device.name not in answering:
                        self._lost.fail(device.name, now_s)

    def _due(self) -> tuple[Plan, list[Device]] | None:
        """Wait until devices are to be tried again, beside those of a plan; None when none ever are."""
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                idle = self._plan is None or self._offer is not None
                if not idle and self._plan is not None and (due := self._lost.due(now_s)):
                    return self._plan, [self._devices[name][0] for name in due]
                wait_s = threading.TIMEOUT_MAX if idle else self._lost.next_s - now_s
                self._changed.wait(min(wait_s, threading.TIMEOUT_MAX))
        return None

    def _answers(self, device: Device) -> bool:
        """Whether a process can start there, import what it needs, and compute."""
        arguments = ("--device", json.dumps(device.to_dict()))
        program = Program(
            f"a try of {device.name}", "llmpq.runtime.device_probe", arguments, device_environment(device)
        )
        try:
            with WorkerGroup([program]) as group:
                (worker,) = group.workers
                group.listen_until(lambda: worker.started or self._closed)
                return worker.started
        except (LlmpqError, OSError) as error:
            warn_once(f"{device.name} does not answer yet: {error}")
            return False

    def _better(self, plan: Plan, devices: Sequence[str]) -> Offer | None:
        """An offer with these devices, if they make one better than a plan."""
        if not devices or self._closed:
            return None
        names = {device.name for device in plan.cluster.devices}.union(devices)
        try:
            found = self._planned(names, devices, plan, BETTER)
        except (LlmpqError, OSError) as error:
            warn_once(f"{_listed(devices)} could not be planned with again: {error}")
            return None
        if found is None:
            warn_once(f"{_listed(devices)} would be no gain, so the run goes on as it is")
        return found

    def _planned(self, names: Collection[str], devices: Sequence[str], plan: Plan, at_least: float) -> Offer | None:
        assert self._on_return is not None
        began_s = time.monotonic()
        served = self._on_return(names, plan, at_least)
        now_s = time.monotonic()
        out_s = now_s - min(self._devices[name][1] for name in devices)
        if served is None:
            return None
        return Offer(served, tuple(devices), now_s - began_s, out_s, changed_units(plan, served.plan))


def changed_units(before: Plan, after: Plan) -> tuple[str, ...]:
    """The units that are stored or multiplied in another way."""

    def ways(plan: Plan) -> dict[str, tuple[object, ...]]:
        return {
            unit: (
                *(plan.precision(unit), stage.activations, stage.compute_dtype),
                *(stage.kv_bits if unit.startswith("layer.") else None, plan.cluster.device(stage.device).kind),
            )
            for index, stage in enumerate(plan.stages)
            for unit in plan.units_of(index)
        }

    old, new = ways(before), ways(after)
    return tuple(unit for unit in new if new[unit] != old[unit])


def _listed(devices: Sequence[str]) -> str:
    return " and ".join(devices)
