"""A device is lost while requests run, or one that was lost is back: other workers take over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from llmpq.progress import silent, warn_once
from llmpq.runtime.device_watch import DeviceWatch, OnReturn, changed_units
from llmpq.runtime.handle import Handle
from llmpq.runtime.pipeline import Options, Served, start
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import (
    DeviceLoss,
    DeviceMemoryError,
    DeviceReturn,
    InfeasibleError,
    LlmpqError,
    Plan,
    WorkerLostError,
)
from llmpq.spec.formatting import format_duration, format_seconds


class OnLoss(Protocol):
    """Plans on what is left."""

    def __call__(self, device: str, plan: Plan, error: LlmpqError, /) -> Served:
        """What to run now that a device of `plan` is lost. Raises what keeps it from being planned, or run."""


class _Next(NamedTuple):
    """What is to take over, and what makes the record of it from the fields of a Takeover."""

    served: Served
    planning_s: float
    record: Callable[..., DeviceLoss | DeviceReturn]


class Recovery:
    """Starts the pipelines of an engine that come after losses; `losses` is what was lost, `returns` what came back.

    `on_plan` is told of each of their plans before it is loaded. But for `close`, all is for the thread that listens.
    """

    def __init__(
        self,
        on_loss: OnLoss | None,
        options: Options,
        on_return: OnReturn | None = None,
        on_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        self.losses: list[DeviceLoss] = []
        self.returns: list[DeviceReturn] = []
        self._on_loss, self._on_plan, self._options = on_loss, on_plan, options
        self._watch = DeviceWatch(on_return)

    @property
    def is_off(self) -> bool:
        """Whether a loss is the end."""
        return self._on_loss is None

    @property
    def offered(self) -> Sequence[str] | None:
        """None unless `replacement` has something better than what runs; else the units that this stores or multiplies
        in another way.
        """
        offer = self._watch.offer
        return None if offer is None else offer.changed

    def replacement(
        self,
        served: Served,
        error: LlmpqError | None,
        in_flight: Sequence[Handle],
        folder: Path,
        group: WorkerGroup | None = None,
    ) -> tuple[Served, WorkerGroup]:
        """What runs in the place of `served`, of which a worker was lost; without those that are lost meanwhile, too.

        Without an error, it is what was `offered`. Those left over of `group` go on as far as they can. Raises the
        error if nothing is to take its place.
        """
        ran = served.plan
        while True:
            then = self._offered(group) if error is None else self._without(served.plan, error)
            served = then.served
            self._on_plan(served.plan)
            began_s = time.monotonic()
            started = self._started(served, folder, group)
            kept = started[1] if isinstance(started, tuple) else 0
            record = then.record(
                planning_s=then.planning_s,
                loading_s=time.monotonic() - began_s,
                requests=len(in_flight),
                tokens=sum(len(handle.request.prompt) + len(handle.tokens) for handle in in_flight),
                changed=changed_units(ran, served.plan),
                kept=kept,
                loaded=len(served.spec.units) - kept if isinstance(started, tuple) else 0,
            )
            if isinstance(record, DeviceLoss):
                self.losses.append(record)
            else:
                self.returns.append(record)
            if isinstance(started, tuple):
                warn_once(in_words(record))
                self._watch.run(served.plan)
                return served, started[0]
            error = started

    def _offered(self, group: WorkerGroup | None) -> _Next:
        """What runs with devices that are back. The workers of now leave."""
        assert group is not None
        offer = self._watch.take()
        group.part()
        record = partial(DeviceReturn, devices=offer.devices, out_s=offer.out_s)
        return _Next(offer.served, offer.planning_s, record)

    def _without(self, plan: Plan, error: LlmpqError) -> _Next:
        """What runs without the device whose loss is the error; where nothing fits on the rest, with it once more."""
        if self._on_loss is None or error.rank is None:
            raise error
        device = plan.cluster.device(plan.stages[error.rank].device)
        may_return = self._watch.lose(device)
        again = "" if may_return else "; it was lost again so soon that it is not tried any more"
        warn_once(f"{error}; planning again without {device.name}{again}")
        record = partial(DeviceLoss, device=device.name, reason=str(error))
        began_s = time.monotonic()
        try:
            served = self._on_loss(device.name, plan, error)
        except (InfeasibleError, DeviceMemoryError, WorkerLostError):
            full = [device.name] if isinstance(error, DeviceMemoryError) else []  # it would be so once more
            if (offer := self._watch.all_again(plan, full)) is None:
                raise
            served, record = offer.served, partial(record, restarted=offer.devices)
        return _Next(served, time.monotonic() - began_s, record)

    def close(self) -> None:
        """No device is tried again. From any thread."""
        self._watch.close()

    def _started(
        self, served: Served, folder: Path, group: WorkerGroup | None
    ) -> tuple[WorkerGroup, int] | DeviceMemoryError | WorkerLostError:
        """Workers and how many units they have kept, or the loss of one before all were ready."""
        try:
            try:
                return start(served, self._options, folder, silent, group)
            except DeviceMemoryError as error:
                if group is None or error.rank not in group.reused:
                    raise
                # What it had before may have left its memory in pieces: its process is begun anew.
                return start(served, self._options, folder, silent, group)
        except (DeviceMemoryError, WorkerLostError) as error:
            return error


def in_words(record: DeviceLoss | DeviceReturn) -> str:
    """A line: what a loss, or a return, has cost."""
    if isinstance(record, DeviceReturn):
        verb = "is" if len(record.devices) == 1 else "are"
        what = f"{' and '.join(record.devices)} {verb} back, after {format_duration(record.out_s)}"
    elif record.restarted:
        what = f"goes on with {' and '.join(record.restarted)} once more, as nothing fits without"
    else:
        what = f"goes on without {record.device}"
    texts = "texts are those of a run without it"
    if record.changed:
        texts = (
            f"{len(record.changed)} units are stored or multiplied in another way now, from {record.changed[0]} to "
            f"{record.changed[-1]}, so texts may differ from those of a run without it"
        )
    return (
        f"{what}: planned in {format_seconds(record.planning_s)}, {record.loaded} units loaded and {record.kept} kept "
        f"in {format_seconds(record.loading_s)}; of {record.requests} requests in flight, {record.tokens} tokens are "
        f"computed again; {texts}"
    )
