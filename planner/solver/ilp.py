"""The integer program: which unit goes to which position in which option. Arrays in, assignment out.

Given: positions d in pipeline order, units u in model order, options o, and the arrays of a `Program`. Abbreviations:
l = prefill_longest, m_p = prefill_microbatches, decode_rounds[k] = (n[k], m[k]). Of an assignment:

    P_d = prefill_step[d] + sum_{u,o} prefill[u,d,o] z[u,d,o]       Sum_P = sum_d P_d + sum prefill_links
    D_d = decode_step[d] + sum_{u,o} decode[u,d,o] z[u,d,o]         Omega = sum_{u,d,o} omega[u,d,o] z[u,d,o]

Where KV caches may have one of two widths, a position has the same for all its layers, and `Program.narrow` says what a
unit takes more over the narrower one, of seconds, bytes and omega. Units for which that is equal are a group g. P_d,
D_d, memory(d) and Omega then also have, for each g, what a unit of it takes more on d times kept[d,g].

    variables   z[u,d,o] in {0,1}    unit u is on position d in option o; at most allowed[u,d,o] (pins)
                narrow[d] in {0,1}   the caches of d are the narrower ones, if there are two
                kept[d,g] >= 0       how many units of g are on d if these are, else 0
                Max_P, Max_D         longest resource of either phase, at least the longest link
                Sum_D >= 0           the way around all resources in decode
                Round[k] >= 0        seconds of one of the n[k] decode rounds that m[k] micro-batches take part in
                s[o] in [0,1]        the tied table is stored once, in option o; with one position only

    minimise    per_second (l Sum_P + (m_p - l) Max_P + sum_k n[k] Round[k] + theta Omega)

                If all sequences are equal, l = 1, and every round is of all micro-batches (lengths.py).

    such that   once(u)         sum_{d,o} z[u,d,o] = 1
                first, last     the first unit is on the first position, the last on the last
                order(u,d)      sum_{d'<=d,o} z[u+1,d',o] <= sum_{d'<=d,o} z[u,d',o]        contiguous and in order
                used(d)         sum_{u,o} z[u,d,o] >= 1                            of the positions between the ends
                memory(d)       memory_fixed[d] + sum_{u,o} memory[u,d,o] z[u,d,o] - sum_o shared[o] s[o] <= capacity[d]
                tied_first(o)   s[o] <= z[first unit,0,o];   tied_last(o) likewise
                budget          Omega <= omega_budget
                kept(d,g)       kept[d,g] <= on[d,g] = sum_{u in g, o} z[u,d,o]
                narrow(d,g)     kept[d,g] <= units of g times narrow[d]
                all_kept(d,g)   kept[d,g] >= on[d,g] - units of g times (1 - narrow[d])
                prefill(d)      Max_P >= P_d;   decode(d) likewise
                around          Sum_D >= sum_d D_d + sum decode_links
                way(k)          Round[k] >= Sum_D
                work(k)         Round[k] >= m[k] Max_D
                ttft            l Sum_P + (m_p - l) Max_P <= max_ttft_s
                tpot            sum_k n[k] Round[k] <= max_tpot_s sum_k n[k]

`order` is the only constraint between neighbours and keeps the relaxation tight. Caches have rows of groups and not of
units: of one group, as narrow[d] itself costs nothing, the relaxation may keep any part of its units either way. Rows
are scaled so that the solver's absolute tolerances are relative ones of 1e-9; its solution is rounded and checked
against the definition in objective.py.

Where nothing fits, `least_shortage` minimises worst + sum_d short[d] / 1000 instead, without times: memory(d) lets a
position hold short[d] >= 0 more than its cap, as a share of it, and worst(d) is worst >= short[d].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import mip
import numpy as np

from planner.clock import Clock, OutOfTime
from planner.objective import Assignment, BoolArray, FloatArray, Narrow, Program, evaluate
from planner.solver.solving import (
    FAILED,
    IMPOSSIBLE,
    OPTIMAL,
    SCALE,
    new_model,
    optimize,
    row_unit,
    sum_of_rounds,
    time_unit,
)


@dataclass(frozen=True)
class Result:
    """The best assignment found, if any, and a lower bound of all (inf: there is none)."""

    assignment: Assignment | None
    bound: float
    proven: bool  # the assignment is optimal within the gap; False: time ran out


class _Variables:
    """The variables z of a model; the constraints are the functions below.

    There is one for each entry of `near` [units, positions], which keeps a plan close to another; None: for all.
    """

    def __init__(
        self, model: mip.Model, program: Program, clock: Clock, *, relaxed: bool, near: BoolArray | None = None
    ) -> None:
        self.model, self.program, self.clock = model, program, clock
        units, positions, options = program.shape
        kind = mip.CONTINUOUS if relaxed else mip.BINARY

        def upper(u: int, d: int, o: int) -> int:
            return int(program.allowed is None or program.allowed[u, d, o])

        def variables(u: int, d: int) -> list[mip.Var]:
            if near is not None and not near[u, d]:
                return []
            return [model.add_var(f"z({u},{d},{o})", ub=upper(u, d, o), var_type=kind) for o in range(options)]

        self.z = [[variables(u, d) for d in range(positions)] for u in range(units)]
        self.more = program.narrow or Narrow(*(np.zeros((units, positions)) for _ in fields(Narrow)))
        self.alike = [] if program.narrow is None else program.narrow.groups()
        self.narrow = [model.add_var(f"narrow({d})", ub=1, var_type=kind) for d in range(positions) if self.alike]
        self.kept = [[model.add_var(f"kept({d},{g})") for g in range(len(self.alike))] for d in range(positions)]

    def add(self, constraint: object, name: str) -> None:
        """Raises OutOfTime: many a row takes seconds."""
        self.clock.check()
        self.model.add_constr(constraint, name)

    def sum(self, costs: FloatArray, more: FloatArray, positions: range) -> mip.LinExpr:
        """sum over all units, these positions and all options of costs[u,d,o] z[u,d,o], and of more[u,d] kept."""
        terms = [
            float(cost) * z
            for u, of_unit in enumerate(self.z)
            for d in positions
            for cost, z in zip(costs[u, d], of_unit[d])
            if cost
        ]
        terms += [float(more[of[0], d]) * kept for d in positions for of, kept in zip(self.alike, self.kept[d])]
        return mip.xsum(terms)

    def on(self, unit: int, positions: range) -> mip.LinExpr:
        """1 if the unit is on one of these positions."""
        return mip.xsum(z for d in positions for z in self.z[unit][d])


def _placement(v: _Variables) -> None:
    units, positions, _ = v.program.shape
    for u in range(units):
        v.add(v.on(u, range(positions)) == 1, f"once({u})")
    if positions == 1:
        return
    v.add(v.on(0, range(1)) == 1, "first")
    v.add(v.on(units - 1, range(positions - 1, positions)) == 1, "last")
    for u in range(units - 1):
        for d in range(positions - 1):
            # Left out where `near` makes it sure: the next unit is nowhere here, or this one is nowhere further on.
            if any(v.z[u + 1][: d + 1]) and any(v.z[u][d + 1 :]):
                v.add(v.on(u + 1, range(d + 1)) <= v.on(u, range(d + 1)), f"order({u},{d})")
    for d in range(1, positions - 1):
        v.add(mip.xsum(v.on(u, range(d, d + 1)) for u in range(units)) >= 1, f"used({d})")


def _caches(v: _Variables) -> None:
    """That a position has the caches of all its layers narrow, or of none."""
    for d, narrow in enumerate(v.narrow):
        for g, (units, kept) in enumerate(zip(v.alike, v.kept[d], strict=True)):
            on, count = mip.xsum(v.on(u, range(d, d + 1)) for u in units), len(units)
            v.add(kept <= on, f"kept({d},{g})")
            v.add(kept <= count * narrow, f"narrow({d},{g})")
            v.add(kept >= on + count * narrow - count, f"all_kept({d},{g})")


def _saved(v: _Variables) -> list[tuple[float, mip.Var]]:
    """(bytes, s[o]) of each option in which a tied table could be stored once."""
    units, positions, _ = v.program.shape
    saved = []
    for o, size in enumerate(v.program.shared):
        if positions == 1 and size > 0:
            s = v.model.add_var(f"s({o})", ub=1)
            v.add(s <= v.z[0][0][o], f"tied_first({o})")
            v.add(s <= v.z[units - 1][0][o], f"tied_last({o})")
            saved.append((float(size), s))
    return saved


def _memory(v: _Variables, *, shortage: list[mip.Var] | None = None, margin: float = 0.0) -> None:
    """Caps. With `shortage` (one variable a position, in units of its cap) they may be exceeded by that much."""
    p, saved = v.program, _saved(v)
    for d, capacity in enumerate(p.capacity):
        if math.isinf(capacity):
            continue
        unit = capacity / SCALE
        used = v.sum(p.memory / unit, v.more.memory / unit, range(d, d + 1))
        used = used - mip.xsum(size / unit * s for size, s in saved)
        free = float((capacity * (1 - margin) - p.memory_fixed[d]) / unit)
        v.add(used <= free if shortage is None else used - SCALE * shortage[d] <= free, f"memory({d})")


def _budget(v: _Variables, *, margin: float = 0.0) -> None:
    p = v.program
    if math.isinf(p.omega_budget):
        return
    unit = row_unit(p.omega_budget, p.omega)
    omega = v.sum(p.omega / unit, v.more.omega / unit, range(p.shape[1]))
    v.add(omega <= p.omega_budget / unit * (1 - margin), "budget")


def _objective(v: _Variables, second: float, *, margin: float = 0.0) -> mip.LinExpr:
    """The objective in units of `second`, without the constant part of Sum_P; adds its variables and constraints."""
    p, more = v.program, v.more
    everywhere = range(p.shape[1])
    longest = v.model.add_var("Max_P", lb=float(max(p.prefill_links, default=0.0)) / second)
    slowest = v.model.add_var("Max_D", lb=float(max(p.decode_links, default=0.0)) / second)
    for d in everywhere:
        here = range(d, d + 1)
        prefill_s = v.sum(p.prefill / second, more.prefill / second, here) + float(p.prefill_step[d]) / second
        decode_s = v.sum(p.decode / second, more.decode / second, here) + float(p.decode_step[d]) / second
        v.add(longest >= prefill_s, f"prefill({d})")
        v.add(slowest >= decode_s, f"decode({d})")
    way = v.sum(p.decode / second, more.decode / second, everywhere)
    way = way + float(p.decode_step.sum() + p.decode_links.sum()) / second
    waits = (p.prefill_microbatches - p.prefill_longest) * longest
    decode = sum_of_rounds(v.model, p.decode_rounds, way, slowest)
    if not math.isinf(p.max_ttft_s):
        unit = row_unit(p.max_ttft_s, p.prefill)
        first, kept = (of.prefill * p.prefill_longest / second for of in (p, more))
        prefill = v.sum(first, kept, everywhere) + waits
        v.add(prefill * (second / unit) <= (p.max_ttft_s * (1 - margin) - _constant(p)) / unit, "ttft")
    if not math.isinf(p.max_tpot_s) and p.rounds:
        unit = row_unit(p.max_tpot_s, p.decode) * p.rounds
        v.add(decode * (second / unit) <= p.max_tpot_s * p.rounds * (1 - margin) / unit, "tpot")
    direct, kept = ((of.prefill * p.prefill_longest + p.theta * of.omega) / second for of in (p, more))
    return v.sum(direct, kept, everywhere) + waits + decode


def bound(program: Program, clock: Clock) -> float:
    """A lower bound of the objective: the linear relaxation; inf if even that has no solution, 0 without the time."""
    second = time_unit(program.prefill, program.decode)
    try:
        with new_model() as model:
            v = _Variables(model, program, clock, relaxed=True)
            _placement(v)
            _caches(v)
            _memory(v)
            _budget(v)
            v.model.objective = _objective(v, second)
            status = optimize(model, clock)
            if status in IMPOSSIBLE:
                return math.inf
            if status != OPTIMAL:
                return 0.0
            return _in_full(program, float(v.model.objective_value) * second)
    except OutOfTime:
        return 0.0


def solve(program: Program, clock: Clock, *, gap: float, near: BoolArray | None = None) -> Result:
    """The best assignment within `gap` (relative), or the best one found in time.

    With `near` [units, positions] the best one that puts no unit elsewhere; the bound is of such ones, too.
    """
    second, best = time_unit(program.prefill, program.decode), math.inf
    for margin in (0.0, 1e-6, 1e-4):  # rounding may break a limit by the solver's tolerances: then leave a margin
        try:
            with new_model() as model:
                v = _Variables(model, program, clock, relaxed=False, near=near)
                _placement(v)
                _caches(v)
                _memory(v, margin=margin)
                _budget(v, margin=margin)
                v.model.objective = _objective(v, second, margin=margin)
                v.model.max_mip_gap = gap
                v.model.max_mip_gap_abs = 1e-9
                status = optimize(model, clock)
                if status in IMPOSSIBLE:
                    continue  # right beside a limit, this may be wrong too
                if status != FAILED and margin == 0.0:
                    best = _in_full(program, float(v.model.objective_bound) * second)
                elif math.isinf(best):
                    best = -math.inf  # the solver failed, as it does right beside a limit only
                if status == FAILED:
                    continue
                if not v.model.num_solutions:
                    return Result(None, best, proven=False)
                assignment = _read(v)
                value = evaluate(program, assignment)
                if value.feasible:
                    return Result(assignment, min(best, value.objective), proven=status == OPTIMAL)
        except OutOfTime:
            return Result(None, -math.inf if math.isinf(best) else best, proven=False)
    return Result(None, best, proven=True)


def least_shortage(program: Program, clock: Clock) -> FloatArray | None:
    """Bytes [positions] by which caps must be exceeded, the largest share of a cap minimised. None: not found."""
    try:
        with new_model() as model:
            v = _Variables(model, program, clock, relaxed=False)
            shortage = [v.model.add_var(f"short({d})") for d in range(program.shape[1])]
            worst = v.model.add_var("worst")
            _placement(v)
            _caches(v)
            _memory(v, shortage=shortage)
            _budget(v)
            for d, short in enumerate(shortage):
                v.add(worst >= short, f"worst({d})")
            v.model.objective = worst + 1e-3 * mip.xsum(shortage)
            v.model.max_mip_gap = 0.05
            if optimize(model, clock) == FAILED or not v.model.num_solutions:
                return None
            return np.maximum(evaluate(program, _read(v)).memory - program.capacity, 0.0)
    except OutOfTime:
        return None


def _constant(program: Program) -> float:
    """The part of the objective that no assignment changes."""
    return float(program.prefill_longest * (program.prefill_step.sum() + program.prefill_links.sum()))


def _in_full(program: Program, seconds: float) -> float:
    """The objective, given the seconds that depend on the assignment."""
    return program.per_second * (seconds + _constant(program))


def _read(v: _Variables) -> Assignment:
    """The assignment of a solved model."""
    units, positions, options = v.program.shape
    x = np.array([[[z.x for z in row] or [-1.0] * options for row in rows] for rows in v.z])
    x = x.reshape(units, positions * options)
    chosen = x.argmax(axis=1)
    narrow = np.array([narrow.x > 0.5 for narrow in v.narrow]) if v.narrow else None
    return Assignment(chosen // options, chosen % options, narrow)
