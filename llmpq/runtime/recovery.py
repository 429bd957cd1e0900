"""A device is lost while requests run: workers on what is left take over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llmpq.progress import silent, warn_once
from llmpq.runtime.handle import Handle
from llmpq.runtime.pipeline import Options, Served, start
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import DeviceLoss, DeviceMemoryError, LlmpqError, Plan, WorkerLostError
from llmpq.spec.formatting import format_seconds


class OnLoss(Protocol):
    """Plans on what is left."""

    def __call__(self, device: str, plan: Plan, error: LlmpqError, /) -> Served:
        """What to run now that a device of `plan` is lost. Raises what keeps it from being planned, or run."""


class Recovery:
    """Starts the pipelines of an engine that come after losses; `losses` is what was lost."""

    def __init__(self, on_loss: OnLoss | None, options: Options) -> None:
        self.losses: list[DeviceLoss] = []
        self._on_loss, self._options = on_loss, options

    @property
    def is_off(self) -> bool:
        """Whether a loss is the end."""
        return self._on_loss is None

    def replacement(
        self,
        served: Served,
        error: LlmpqError,
        in_flight: Sequence[Handle],
        folder: Path,
        group: WorkerGroup | None = None,
    ) -> tuple[Served, WorkerGroup]:
        """What runs in the place of `served`, of which a worker was lost; without those that are lost meanwhile, too.

        Those left over of `group` go on as far as they can. Raises the error if nothing is to take its place.
        """
        ran = served.plan
        while True:
            if self._on_loss is None or error.rank is None:
                raise error
            device = served.plan.stages[error.rank].device
            warn_once(f"{error}; planning again without {device}")
            began_s = time.monotonic()
            served = self._on_loss(device, served.plan, error)
            planned_s = time.monotonic()
            started = self._started(served, folder, group)
            kept = started[1] if isinstance(started, tuple) else 0
            loss = DeviceLoss(
                device=device,
                reason=str(error),
                planning_s=planned_s - began_s,
                loading_s=time.monotonic() - planned_s,
                requests=len(in_flight),
                tokens=sum(len(handle.request.prompt) + len(handle.tokens) for handle in in_flight),
                changed=_changed(ran, served.plan),
                kept=kept,
                loaded=len(served.spec.units) - kept if isinstance(started, tuple) else 0,
            )
            self.losses.append(loss)
            if isinstance(started, tuple):
                warn_once(in_words(loss))
                return served, started[0]
            error = started

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


def _changed(before: Plan, after: Plan) -> tuple[str, ...]:
    """The units that are stored or multiplied in another way."""

    def ways(plan: Plan) -> dict[str, tuple[object, ...]]:
        return {
            unit: (plan.precision(unit), stage.activations, stage.compute_dtype, plan.cluster.device(stage.device).kind)
            for index, stage in enumerate(plan.stages)
            for unit in plan.units_of(index)
        }

    old, new = ways(before), ways(after)
    return tuple(unit for unit in new if new[unit] != old[unit])


def in_words(loss: DeviceLoss) -> str:
    """A line: what a loss has cost."""
    texts = "texts are those of a run without it"
    if loss.changed:
        texts = (
            f"{len(loss.changed)} units are stored or multiplied in another way now, from {loss.changed[0]} to "
            f"{loss.changed[-1]}, so texts may differ from those of a run without it"
        )
    return (
        f"goes on without {loss.device}: planned in {format_seconds(loss.planning_s)}, {loss.loaded} units loaded and "
        f"{loss.kept} kept in {format_seconds(loss.loading_s)}; of {loss.requests} requests in flight, {loss.tokens} "
        f"tokens are computed again; {texts}"
    )
