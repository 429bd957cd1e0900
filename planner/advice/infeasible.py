"""Why there is no plan: one line that names what is too small, and by how much.

Memory is asked for least with the smallest micro-batches. So one program without an order tells for all devices,
orders and sizes that the model is too large, and by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llmpq.spec import InfeasibleError
from llmpq.spec.formatting import format_bytes_up
from planner.clock import Clock
from planner.cost_arrays import Configuration, Costs, memory_of_narrow
from planner.memory import CacheSize
from planner.objective import SLACK
from planner.solver import ilp, unordered_program
from planner.solver.candidate import Candidate
from planner.solver.pool import Pool
from planner.solver.realization import draft

EXPLAIN_S = 10.0  # to spend on a shortage, at most
NONE = 1e-6  # of a cap; a shortage that is less may be none


def is_too_large(costs: Costs, clock: Clock) -> bool:
    """Whether it is sure that the model, within the quality budget, is too large. False if time is up."""
    if _whole_units(costs):
        return True
    for pool in least_pools(costs):
        if pool.floor() < math.inf:
            short = unordered_program.shortage(pool, clock, relaxed=True)
            if short is None or short.worst <= NONE:
                return False
    return True


def _whole_units(costs: Costs) -> str:
    """What of the model cannot be held as units are not divided; "" if that is not the reason."""
    layers, devices = costs.spec.num_layers, list(costs.kinds)
    pool = Pool(costs, costs.prefill[0], costs.decode[0], tuple(devices), alone=False)
    rooms = np.array([costs.room(d) - pool.buffer_bytes(d, 0) for d in devices]) * (1 + SLACK)
    least = costs.least_memory[:, devices]
    for unit, sizes in zip(costs.spec.units, least):
        if (sizes > rooms).all():
            return f"{unit} takes {format_bytes_up(float(sizes.min()))} at least, which no device has room for"
    most = np.clip(np.floor(rooms / least[1:-1].min(axis=0)), 0, layers)
    held = int(np.sort(most)[-(layers + 2) :].sum())
    return f"the devices hold {held} of its {layers} layers at most" if held < layers else ""


def least_pools(costs: Costs) -> Iterator[Pool]:
    """All devices together, and each one alone, with the smallest micro-batches."""
    every = tuple(costs.kinds)
    for devices in (*([every] if len(every) > 1 else []), *((d,) for d in sorted(set(costs.kinds.values())))):
        if costs.required <= set(devices):
            yield Pool(costs, costs.prefill[0], costs.decode[0], devices, alone=len(devices) == 1)


def no_plan(costs: Costs, clock: Clock) -> InfeasibleError:
    """The error for a search that proved that there is no plan: by the budget alone, or by memory."""
    cannot, possible = costs.lacking_words, costs.omega
    if costs.allowed is not None:
        somewhere = np.logical_or.reduce(costs.allowed, axis=1)  # [units, options]
        places = somewhere.sum(axis=1)
        if cannot and places.min() == 0:
            unit = costs.spec.units[int(places.argmin())]
            return InfeasibleError(
                f"no device can have {unit} in a width that it may have{cannot}; allow other widths, or measure these "
                "with `llmpq profile`"
            )
        possible = np.where(somewhere, costs.omega, math.inf)
    least_omega = float(possible.min(axis=1).sum())
    if least_omega > costs.omega_budget:
        best = costs.options[int(possible.sum(axis=0).argmin())]
        return InfeasibleError(
            f"no plan meets the quality budget: the least summed sensitivity of the allowed bits ({best.width} nearly "
            f"everywhere) is {least_omega:.4g}, the budget {costs.omega_budget:.4g}{cannot}; allow more bits or a "
            "larger budget"
        )
    if len(costs.required) > len(costs.spec.units):
        return InfeasibleError(
            f"no plan uses all {len(costs.required)} devices: the model has only {costs.spec.num_layers} layers; let "
            "devices be dropped"
        )
    if next(costs.orders(), None) is None:
        return InfeasibleError("no device may be used: each alone weighs more than at_most allows; allow more")
    rooms = {device.name: costs.room(d) for d, device in enumerate(costs.cluster.devices)}
    lacking = ", ".join(
        f"{name} lacks {format_bytes_up(size)} ({format_bytes_up(rooms[name])} to plan with)"
        for name, size in (_least_shortage(costs, clock) or {}).items()
    )
    lacking = lacking or _whole_units(costs)
    lacking = lacking or ("there was no time to see by how much" if clock.over else "less than one unit is too much")
    quality = " within the quality budget" if math.isfinite(costs.omega_budget) else ""
    cache = f" and with a KV cache of {costs.kv_bits[-1]} bits" if len(costs.kv_bits) > 1 else ""
    narrower = "; a KV cache of 8 bits would fit: allow it with --kv-bits auto" if _fits_in_8_bits(costs, clock) else ""
    return InfeasibleError(
        f"the model does not fit{quality}, even in micro-batches of {costs.prefill[0].size}{cache}: {lacking}{cannot}; "
        f"allow more memory, fewer bits, a smaller batch or shorter sequences{narrower}"
    )


def _fits_in_8_bits(costs: Costs, clock: Clock) -> bool:
    """Whether it is sure that a KV cache of 8 bits on some devices is small enough, where all have 16.

    By memory alone: what it takes and what it loses may not have been measured.
    """
    if costs.kv_bits != (16,):
        return False
    saved = memory_of_narrow(costs.spec, costs.cluster, CacheSize.of(costs.workload), (16, 8))
    either = replace(costs, kv_bits=(16, 8), narrow_memory=saved)
    return not _whole_units(either) and _least_shortage(either, clock) == {}


def _least_shortage(costs: Costs, clock: Clock) -> dict[str, float] | None:
    """Device -> bytes by which it is too small, where that asks least of any device. None: not found."""
    several, alone = ([pool for pool in least_pools(costs) if pool.alone == wanted] for wanted in (False, True))
    alone = sorted(alone, key=lambda pool: pool.least_bytes / costs.room(pool.devices[0]))[:1]
    found = [
        (short.worst, short, pool)
        for pool in (*several, *alone)
        if (short := unordered_program.shortage(pool, clock.part(1 / 3, most_s=EXPLAIN_S), relaxed=False)) is not None
    ]
    if not found:
        return None
    _, short, pool = min(found, key=lambda of_pool: of_pool[0])
    outline = short.outline
    order = [d for d in outline.used if d not in (outline.first, outline.last)]
    order = [outline.first] if pool.alone else [outline.first, *order, outline.last]
    choice = Configuration(tuple(pool.devices[d] for d in order), pool.prefill, pool.decode)
    drafted = Candidate.of(costs, choice, draft(outline, tuple(order), costs.groups, costs.omega)).value
    program = costs.program(choice)
    sizes = np.maximum(drafted.memory - program.capacity, 0.0)
    if drafted.omega > costs.omega_budget * (1 + SLACK):
        exact = ilp.least_shortage(program, clock.part(1 / 2, most_s=EXPLAIN_S))
        sizes = short.sizes[order] if exact is None else exact
    names = [costs.cluster.devices[d].name for d in choice.order]
    return {name: float(size) for name, size in zip(names, sizes) if size >= 1}
