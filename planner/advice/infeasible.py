"""Why there is no plan: one line that names what is too small, and by how much."""

from __future__ import annotations

import math

import numpy as np

from llmpq.spec import InfeasibleError
from llmpq.spec.formatting import format_bytes_up
from planner.cost_arrays import Configuration, Costs
from planner.objective import FloatArray
from planner.solver import ilp
from planner.solver.orders import Order

EXPLAIN_S = 10.0  # to spend on the exact shortage, of one device order


def no_plan(costs: Costs, orders: list[Order]) -> InfeasibleError:
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
    if not orders:
        return InfeasibleError("no device may be used: each alone weighs more than at_most allows; allow more")
    rooms = {device.name: costs.constraints.room(device) for device in costs.cluster.devices}
    lacking = ", ".join(
        f"{name} lacks {format_bytes_up(size)} ({format_bytes_up(rooms[name])} to plan with)"
        for name, size in _least_shortage(costs, orders).items()
    )
    lacking = lacking or "less than one unit is too much"
    quality = " within the quality budget" if math.isfinite(costs.omega_budget) else ""
    return InfeasibleError(
        f"the model does not fit{quality}, even in micro-batches of {costs.prefill[0].size}: {lacking}{cannot}; "
        "allow more memory, fewer bits, a smaller batch or shorter sequences"
    )


def _least_shortage(costs: Costs, orders: list[Order]) -> dict[str, float]:
    """Device -> bytes by which it is too small, in the order that asks least of any device."""

    def shortage(order: Order, *, relaxed: bool) -> FloatArray | None:
        program = costs.program(Configuration(order, costs.prefill[0], costs.decode[0]))
        return ilp.least_shortage(program, time_limit_s=EXPLAIN_S, relaxed=relaxed)

    def worst(order: Order) -> float:
        short = shortage(order, relaxed=True)
        rooms = [costs.constraints.room(costs.cluster.devices[d]) for d in order]
        return math.inf if short is None else float((short / np.array(rooms)).max())

    best = min(orders, key=worst)
    sizes = shortage(best, relaxed=False)
    if sizes is None:
        sizes = shortage(best, relaxed=True)
    names = [costs.cluster.devices[d].name for d in best]
    return {} if sizes is None else {name: float(size) for name, size in zip(names, sizes) if size >= 1}
