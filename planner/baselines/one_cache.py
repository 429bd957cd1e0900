"""Plans all whose stages have KV caches of one width, as other systems have them; each width by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planner.cost_arrays import Configuration, Costs
from planner.solver.candidate import Candidate
from planner.step_costs import StepCosts


def by_cache(costs: Costs) -> Iterator[Costs]:
    """Costs of plans with the one or the other cache only; if there is one width, these."""
    for bits in costs.kv_bits:
        yield costs if len(costs.kv_bits) == 1 else _of_cache(costs, narrow=bits != costs.kv_bits[0])


def _of_cache(costs: Costs, *, narrow: bool) -> Costs:
    def of_phase(steps: StepCosts) -> StepCosts:
        return replace(steps, units=steps.units + narrow * steps.narrow[:, :, None], narrow=0 * steps.narrow)

    return replace(
        costs,
        kv_bits=costs.kv_bits[narrow : narrow + 1],
        omega=costs.omega + narrow * costs.narrow_omega[:, None],
        narrow_omega=0 * costs.narrow_omega,
        memory=costs.memory + narrow * costs.narrow_memory[:, :, None],
        narrow_memory=0 * costs.narrow_memory,
        prefill=tuple(map(of_phase, costs.prefill)),
        decode=tuple(map(of_phase, costs.decode)),
    )


def among_both(costs: Costs, found: Candidate, of_cache: Costs) -> Candidate:
    """The plan that was found with the costs of one cache, with those that it was taken from."""
    prefill, decode = ({steps.size: steps for steps in phase} for phase in (costs.prefill, costs.decode))
    choice = Configuration(found.choice.order, prefill[found.choice.prefill.size], decode[found.choice.decode.size])
    narrow = np.full(len(choice.order), of_cache.kv_bits != costs.kv_bits[:1])
    return Candidate.of(costs, choice, replace(found.assignment, narrow=narrow))
