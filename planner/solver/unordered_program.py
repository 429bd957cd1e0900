"""The integer program without an order: how many layers of each group each device takes in each option.

Layers of one group cost the same on a device, so costs depend on how many of them there are, not on which. The program
leaves open which devices are used, their order, and which layer is where. So its optimum bounds all plans with these
micro-batch sizes at once, and it is a small program, however many layers and orders there are. It is a relaxation:
a layer may have the option of any device that has layers of its group, every link is the fastest one that its device
sends by, and layers on a device need not follow each other in the model. Of that, `run` limits how many layers of one
group do; where the group changes C times along the model and C is less than the number of devices, `changes`, `starts`
and `ends` limit how many devices have several groups. Where cost is the objective, each set of devices is a program of
its own: its price is then a constant factor.

Given: devices d, groups g, options o, layers i of L = num_layers, rules r of `at_most`, and their costs. As in ilp.py,
l = prefill.longest, m_p = prefill.count, and decode.rounds[k] = (n[k], m[k]). Sums are first[d] and last[d] over
options, and layers[d] = sum_{g,o} count[d,g,o]; units[d] is the sum of these three. For prefill, and decode likewise:

    P_d         seconds of the units on d, and of a step if used[d]
    link_P[d]   used[d] - last[d] times the fastest link from d to another device; none if alone
    Sum_P       sum_d P_d + link_P[d], and the fastest link for tokens on their way back from the last device
    Omega       omega of all match[i,o], first[d,o] and last[d,o]

Where KV caches may have one of two widths, a device has the same for all its layers. P_d, D_d, Omega and the bytes of
units[d] then also have, for each g, what a layer of it takes more over the narrower one on d times kept[d,g].

    variables   used[d], first[d,o], last[d,o] in {0,1}    device in use; holds the embedding, the head, in option o
                count[d,g,o] in {0,1,...}                  layers of g on d in o
                has[d,g] in {0,1}                          g may have layers on d
                narrow[d] in {0,1}                         the caches of d are the narrower ones, if there are two
                kept[d,g] >= 0                             layers of g on d if these are, else 0
                match[i,o] in [0,1]                        option of layer i; whole by itself if count is
                shared[o] in [0,1]                         the tied table is stored once, in o; alone only
                Max_P, Max_D, Sum_D, Round[k] >= 0         as in ilp.py

    minimise    per_second (l Sum_P + (m_p - l) Max_P + sum_k n[k] Round[k] + theta Omega)

    such that   placed, first, last     sum_d layers[d] = L,  sum_d first[d] = 1,  sum_d last[d] = 1
                used(d)                 used[d] <= units[d]
                units(d), layers(d)     units[d] <= (L + 2) used[d],  layers[d] <= L used[d]
                ends(d)                 first[d] + last[d] <= used[d]                             unless alone
                all(d), required(d)     used[d] = 1                               if alone or all_used; if it must be
                together(r)             sum_d weight[r,d] used[d] <= limit[r];  devices that exclude each other; hence
                prefill_together(r)     sum_d weight[r,d] P_d <= limit[r] Max_P,  which tightens the relaxation
                option(g,o)             sum_{i in g} match[i,o] = sum_d count[d,g,o]
                once(i)                 sum_o match[i,o] = 1
                run(d,g,k)              sum_o count[d,g,o] <= slope[g,k] layers[d] + most[g,k] used[d]    (`run_limits`)
                kept(d,g)               kept[d,g] <= sum_o count[d,g,o]
                narrow(d,g)             kept[d,g] <= narrow[d] times the layers of g
                all_kept(d,g)           kept[d,g] >= sum_o count[d,g,o] - (1 - narrow[d]) times the layers of g
                has(d,g)                sum_o count[d,g,o] <= has[d,g] times the layers of g
                changes                 sum_{d,g} has[d,g] <= sum_d used[d] + C
                starts(d,g), ends(d,g)  has[d,g] + first[d] <= 1 + has[d, group of layer 0];  likewise last[d]
                pinned(d,g)             sum_o count[d,g,o] >= layers of g pinned to d;  bounds keep ends and options
                                        where allowed
                alike(d-1,d)            layers[d-1] >= layers[d] for identical neighbours;        breaks symmetry
                budget                  Omega <= omega_budget
                memory(d)               of units[d] and buffers if used, less sum_o bytes[o] shared[o] <= the cap of d
                whole(d,o)              memory(d) for whole units, in layers of o                 (`_round_memory`)
                shared_first(o)         shared[o] <= first[d,o];  shared_last(o) likewise
                prefill_stage(d)        Max_P >= P_d
                prefill_link(d)         Max_P >= link_P[d]                                        unless alone
                decode_stage(d), decode_link(d), decode_together(r)     likewise
                around, way(k), work(k), ttft, tpot                     as in ilp.py

Integer programs without `short` leave out whole(d,o): their solver rounds by itself, and has more to do with these.

Where nothing fits, `shortage` minimises worst + sum_d short[d] / 1000 instead, without times: memory(d) lets a device
hold short[d] >= 0 more than its cap, as a share of it, and worst >= short[d].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import mip
import numpy as np

from planner.clock import Clock, OutOfTime
from planner.constraints import DeviceLimit
from planner.objective import SLACK, FloatArray
from planner.solver import solving
from planner.solver.pool import LayerCounts, Pool, run_limits
from planner.step_costs import StepCosts

FEW = 16  # layers, up to which it matters that a device holds no fraction of one


@dataclass(frozen=True)
class Optimum:
    """A lower bound of all plans (inf: there is none), and the best counts found."""

    bound: float
    outline: LayerCounts | None = None
    objective: float = math.inf  # of the outline
    proven: bool = True  # the outline is optimal within the gap; False: time ran out


def bound(pool: Pool, clock: Clock) -> float:
    """A lower bound of all plans of a pool: that of the linear relaxation; 0 without the time."""
    return _optimum(pool, clock, relaxed=True, gap=0.0).bound


def solve(pool: Pool, clock: Clock, *, gap: float) -> Optimum:
    """The optimum within `gap` (relative), or the best found in time."""
    return _optimum(pool, clock, relaxed=False, gap=gap)


def _optimum(pool: Pool, clock: Clock, *, relaxed: bool, gap: float) -> Optimum:
    try:
        with solving.new_model() as model:
            v = _Variables(model, pool, clock, relaxed=relaxed)
            second = solving.time_unit(pool.prefill.units, pool.decode.units)
            worth = second * pool.costs.per_second(pool.devices)
            v.place()
            v.limit_omega()
            v.limit_memory()
            model.objective = v.objective(second)
            model.max_mip_gap, model.max_mip_gap_abs = gap, 1e-9
            status = solving.optimize(model, clock)
            if status in solving.IMPOSSIBLE:
                return Optimum(math.inf)
            if status == solving.FAILED:
                return Optimum(0.0)
            if relaxed:
                return Optimum(float(model.objective_value) * worth if status == solving.OPTIMAL else 0.0)
            least = max(0.0, float(model.objective_bound) * worth)
            if not model.num_solutions:
                return Optimum(least, proven=False)
            objective = float(model.objective_value) * worth
            return Optimum(min(least, objective), v.outline(), objective, proven=status == solving.OPTIMAL)
    except OutOfTime:
        return Optimum(0.0, proven=False)


@dataclass(frozen=True)
class Shortage:
    """By how much caps are exceeded at least."""

    worst: float  # as a share of a cap
    sizes: FloatArray  # [devices] bytes
    outline: LayerCounts


def shortage(pool: Pool, clock: Clock, *, relaxed: bool) -> Shortage | None:
    """That of the counts which exceed any cap least, with the links' bytes as in `memory`; None: not found.

    Relaxed, layers may be divided: this is fast, and a bound.
    """
    try:
        with solving.new_model() as model:
            v = _Variables(model, pool, clock, relaxed=relaxed)
            short = [model.add_var(f"short({d})") for d in range(len(pool.devices))]
            worst = model.add_var("worst")
            v.place()
            v.limit_omega()
            v.limit_memory(short)
            for d, of_device in enumerate(short):
                model.add_constr(worst >= of_device, f"worst({d})")
            model.objective = worst + 1e-3 * mip.xsum(short)
            model.max_mip_gap = 0.05
            if solving.optimize(model, clock) == solving.FAILED or not model.num_solutions:
                return None
            rooms = np.array([pool.costs.room(d) for d in pool.devices])
            sizes = np.where(np.isinf(rooms), 0.0, rooms) * np.array([z.x for z in short], dtype=float)
            return Shortage(float(worst.x), sizes, v.outline())
    except OutOfTime:
        return None


class _Variables:
    def __init__(self, model: mip.Model, pool: Pool, clock: Clock, *, relaxed: bool) -> None:
        self.model, self.pool, self.costs, self.clock, self.relaxed = model, pool, pool.costs, clock, relaxed
        self.layers, sizes = self.costs.spec.num_layers, self.costs.group_sizes
        devices, options = range(len(pool.devices)), range(len(self.costs.options))
        whole, self.binary = (mip.CONTINUOUS, mip.CONTINUOUS) if relaxed else (mip.INTEGER, mip.BINARY)
        self.groups = range(len(sizes))

        def by_option(name: str, upper: float, kind: str) -> list[mip.Var]:
            return [model.add_var(f"{name},{o})", ub=upper, var_type=kind) for o in options]

        self.used = [model.add_var(f"used({d})", ub=1, var_type=self.binary) for d in devices]
        self.first = [by_option(f"first({d}", 1, self.binary) for d in devices]
        self.last = [by_option(f"last({d}", 1, self.binary) for d in devices]
        self.count = [
            [by_option(f"count({d},{g}", float(size), whole) for g, size in enumerate(sizes)] for d in devices
        ]
        self.match = [by_option(f"match({i}", 1, mip.CONTINUOUS) for i in range(self.layers)]
        several = len(self.costs.kv_bits) > 1
        self.narrow = [model.add_var(f"narrow({d})", ub=1, var_type=self.binary) for d in devices if several]
        self.kept = [[model.add_var(f"kept({d},{g})") for g in self.groups if several] for d in devices]

    def _sum(self, d: int, by_unit: FloatArray, more: FloatArray) -> mip.LinExpr:
        """Of by_unit[unit, option] over the units on d, and of more[unit] over the layers that are kept."""
        layers = zip(self.costs.group_units, self.count[d], strict=True)
        counted = ((0, self.first[d]), *layers, (-1, self.last[d]))
        terms = [float(cost) * z for unit, of in counted for cost, z in zip(by_unit[unit], of) if cost]
        return mip.xsum([*terms, *self._kept(d, more)])

    def _kept(self, d: int, more: FloatArray) -> list[mip.LinExpr]:
        """more[unit] times the layers of each group that are kept on d."""
        return [float(more[unit]) * kept for unit, kept in zip(self.costs.group_units, self.kept[d])]

    def _layers(self, d: int) -> mip.LinExpr:
        return mip.xsum(z for of in self.count[d] for z in of)

    def _weighed(self, rule: DeviceLimit, terms: Sequence[mip.Var | mip.LinExpr]) -> mip.LinExpr:
        """The sum of `terms`, one for each device, times its weight."""
        names = (self.costs.cluster.devices[i].name for i in self.pool.devices)
        return mip.xsum(rule.weight(name) * term for name, term in zip(names, terms))

    def place(self) -> None:
        model, devices = self.model, range(len(self.pool.devices))
        model.add_constr(mip.xsum(z for groups in self.count for of in groups for z in of) == self.layers, "placed")
        model.add_constr(mip.xsum(z for of in self.first for z in of) == 1, "first")
        model.add_constr(mip.xsum(z for of in self.last for z in of) == 1, "last")
        for d in devices:
            ends, layers = mip.xsum(self.first[d]) + mip.xsum(self.last[d]), self._layers(d)
            units = ends + layers
            model.add_constr(units <= (self.layers + 2) * self.used[d], f"units({d})")
            model.add_constr(layers <= self.layers * self.used[d], f"layers({d})")
            model.add_constr(units >= self.used[d], f"used({d})")
            if not self.pool.alone:
                model.add_constr(ends <= self.used[d], f"ends({d})")
            if self.pool.alone or self.pool.all_used:
                model.add_constr(self.used[d] == 1, f"all({d})")
            elif self.pool.devices[d] in self.costs.required:
                model.add_constr(self.used[d] == 1, f"required({d})")
        for r, rule in enumerate(self.costs.constraints.at_most):
            model.add_constr(self._weighed(rule, self.used) <= rule.limit, f"together({r})")
        for g in self.groups:
            members = [self.match[i] for i in np.flatnonzero(self.costs.groups == g)]
            for o in range(len(self.costs.options)):
                matched, counted = mip.xsum(of[o] for of in members), mip.xsum(of[g][o] for of in self.count)
                model.add_constr(matched == counted, f"option({g},{o})")
        for layer, of in enumerate(self.match):
            model.add_constr(mip.xsum(of) == 1, f"once({layer})")
        for g, limits in enumerate(run_limits(self.costs.groups)):
            for k, (slope, most) in enumerate(limits):
                for d in devices:
                    limit = slope * self._layers(d) + most * self.used[d]
                    model.add_constr(mip.xsum(self.count[d][g]) <= limit, f"run({d},{g},{k})")
        self._choose_caches()
        self._limit_changes()
        self._keep_pinned()
        kinds = self.costs.kinds
        for d in devices[1:]:
            if kinds[self.pool.devices[d]] == kinds[self.pool.devices[d - 1]]:
                model.add_constr(self._layers(d - 1) >= self._layers(d), f"alike({d - 1},{d})")

    def _choose_caches(self) -> None:
        """That a device has the caches of all its layers narrow, or of none."""
        for d, narrow in enumerate(self.narrow):
            for g, kept in enumerate(self.kept[d]):
                on, size = mip.xsum(self.count[d][g]), float(self.costs.group_sizes[g])
                self.model.add_constr(kept <= on, f"kept({d},{g})")
                self.model.add_constr(kept <= size * narrow, f"narrow({d},{g})")
                self.model.add_constr(kept >= on + size * narrow - size, f"all_kept({d},{g})")

    def _limit_changes(self) -> None:
        """A stage that has k groups has k - 1 changes of the group in it at least; an end has the group of that end."""
        model, groups, devices = self.model, self.costs.groups, range(len(self.pool.devices))
        changes = int((groups[1:] != groups[:-1]).sum())
        if self.pool.alone or not 0 < changes < len(devices):
            return
        has = [[model.add_var(f"has({d},{g})", ub=1, var_type=self.binary) for g in self.groups] for d in devices]
        for d, g in itertools.product(devices, self.groups):
            model.add_constr(
                mip.xsum(self.count[d][g]) <= float(self.costs.group_sizes[g]) * has[d][g], f"has({d},{g})"
            )
            for name, end, group in (("starts", self.first, groups[0]), ("ends", self.last, groups[-1])):
                model.add_constr(has[d][g] + mip.xsum(end[d]) <= 1 + has[d][group], f"{name}({d},{g})")
        model.add_constr(mip.xsum(z for of in has for z in of) <= mip.xsum(self.used) + changes, "changes")

    def _keep_pinned(self) -> None:
        """The ends go where they may; each device has as many layers as are pinned to it, and layers their options."""
        allowed = self.costs.allowed
        if allowed is None:
            return
        for d, i in enumerate(self.pool.devices):
            for o in range(len(self.costs.options)):
                self.first[d][o].ub, self.last[d][o].ub = float(allowed[0, i, o]), float(allowed[-1, i, o])
            elsewhere = np.delete(allowed[1:-1], i, axis=1).any(axis=(1, 2))
            for g, of in enumerate(self.count[d]):
                pinned = int((~elsewhere & (self.costs.groups == g)).sum())
                self.model.add_constr(mip.xsum(of) >= pinned, f"pinned({d},{g})")
        for layer, of in enumerate(self.match):
            for o, z in enumerate(of):
                z.ub = float(allowed[1 + layer, :, o].any())

    def _omega(self) -> mip.LinExpr:
        omega = self.costs.omega
        ends = ((omega[0], of) for of in self.first), ((omega[-1], of) for of in self.last)
        rows = [*ends[0], *ends[1], *((omega[1 + layer], of) for layer, of in enumerate(self.match))]
        terms = [float(cost) * z for costs, of in rows for cost, z in zip(costs, of) if cost]
        kept = (self._kept(d, self.costs.narrow_omega) for d in range(len(self.kept)))
        return mip.xsum(itertools.chain(terms, *kept))

    def limit_omega(self) -> None:
        budget = self.costs.omega_budget
        if not math.isinf(budget):
            unit = solving.row_unit(budget, self.costs.omega)
            self.model.add_constr(self._omega() * (1 / unit) <= budget / unit, "budget")

    def limit_memory(self, short: Sequence[mip.Var] = ()) -> None:
        """Caps. With `short` (one variable a device, in units of its cap) they may be exceeded by that much."""
        pool, costs = self.pool, self.costs
        tighter = self.relaxed or bool(short)
        for d, i in enumerate(pool.devices):
            room = costs.room(i)
            if math.isinf(room):
                continue
            self.clock.check()
            unit = room / solving.SCALE
            middle = pool.buffer_bytes(i, 0 if pool.alone else 2)
            at_end = 0 if pool.alone else pool.buffer_bytes(i, 1) - middle
            with_head = at_end + pool.buffer_bytes(i, 0, holds_head=True) - pool.buffer_bytes(i, 0)
            sizes = costs.memory[:, i].copy()
            sizes[0] += at_end
            sizes[-1] += with_head
            more = costs.narrow_memory[:, i]
            held = self._sum(d, sizes / unit, more / unit) + middle / unit * self.used[d]
            if pool.alone:
                held = held - mip.xsum(size / unit * s for size, s in self._shared(d))
            if short:
                held = held - solving.SCALE * short[d]
            self.model.add_constr(held <= solving.SCALE * (self.used[d] if tighter else 1.0), f"memory({d})")
            if tighter and not pool.alone:
                self._round_memory(d, sizes, more, room - middle, room * short[d] if short else mip.LinExpr())

    def _round_memory(self, d: int, sizes: FloatArray, more: FloatArray, room: float, short: mip.LinExpr) -> None:
        """That units [units, options] of these sizes are whole, where a device holds few layers.

        The limit of their bytes, divided by those of a layer in option o, is rounded (mixed-integer rounding). Layers
        that are kept take `more` [units]: in the option in which that is rounded to least.
        """
        narrow = sizes + more[:, None]
        divisors = [sizes[1:-1].min(axis=0), *([narrow[1:-1].min(axis=0)] if self.narrow else [])]
        for o, size in enumerate(np.concatenate(divisors)):
            if not 0 < room < FEW * size:
                continue
            most, rest = divmod(room * (1 + SLACK) / size, 1)
            if rest > 0.99:  # what is left of 1 divides below
                most, rest = most + 1, 0.0
            wide, kept = (np.floor(of / size) for of in (sizes, narrow))
            wide += np.maximum(sizes / size - wide - rest, 0.0) / (1 - rest)
            kept += np.maximum(narrow / size - kept - rest, 0.0) / (1 - rest)
            limit = most * self.used[d] + short * (1 / size / (1 - rest))
            self.model.add_constr(self._sum(d, wide, (kept - wide).min(axis=1)) <= limit, f"whole({d},{o})")

    def _shared(self, d: int) -> list[tuple[float, mip.Var]]:
        """(bytes, variable) of each option in which a tied table could be stored once."""
        found = []
        for o, size in enumerate(self.costs.shared):
            if size:
                s = self.model.add_var(f"shared({o})", ub=1)
                self.model.add_constr(s <= self.first[d][o], f"shared_first({o})")
                self.model.add_constr(s <= self.last[d][o], f"shared_last({o})")
                found.append((float(size), s))
        return found

    def objective(self, second: float) -> mip.LinExpr:
        """In units of `second`; adds Max_P, Max_D, Sum_D and Round."""
        pool, costs, model = self.pool, self.costs, self.model
        devices = range(len(pool.devices))
        longest, slowest = model.add_var("Max_P"), model.add_var("Max_D")
        sums = []
        for phase, name, most in ((pool.prefill, "prefill", longest), (pool.decode, "decode", slowest)):
            total, busy = [], []
            fixed = phase.fixed(pool.devices, alone=pool.alone) / second
            for d in devices:
                i = pool.devices[d]
                stage = self._sum(d, phase.units[:, i] / second, phase.narrow[:, i] / second)
                stage = stage + float(fixed[d]) * self.used[d]
                onward, back = self._links(d, phase, second)
                model.add_constr(most >= stage, f"{name}_stage({d})")
                if not pool.alone:
                    model.add_constr(most >= onward, f"{name}_link({d})")
                total += [stage, onward, back]
                busy.append(stage)
            for r, rule in enumerate(costs.constraints.at_most):
                model.add_constr(self._weighed(rule, busy) <= rule.limit * most, f"{name}_together({r})")
            sums.append(mip.xsum(total))
        prefill = pool.prefill.longest * sums[0] + (pool.prefill.count - pool.prefill.longest) * longest
        decode = solving.sum_of_rounds(model, pool.decode.rounds, sums[1], slowest)
        limits = costs.constraints
        if not math.isinf(limits.max_ttft_s):
            unit = solving.row_unit(limits.max_ttft_s, pool.prefill.units)
            model.add_constr(prefill * (second / unit) <= limits.max_ttft_s / unit, "ttft")
        rounds = sum(count for count, _ in pool.decode.rounds)
        if not math.isinf(limits.max_tpot_s) and rounds:
            unit = solving.row_unit(limits.max_tpot_s, pool.decode.units) * rounds
            model.add_constr(decode * (second / unit) <= limits.max_tpot_s * rounds / unit, "tpot")
        quality = limits.theta / second
        return prefill + decode + (quality * self._omega() if quality else 0.0)

    def _links(self, d: int, phase: StepCosts, second: float) -> tuple[mip.LinExpr, mip.LinExpr]:
        """Seconds of the link to the next stage, and of the tokens' way back from the last one."""
        if self.pool.alone:
            return mip.LinExpr(), mip.LinExpr()
        onward, back = (seconds.min(axis=1) / second for seconds in self.pool.link_seconds(phase))
        last = mip.xsum(self.last[d])
        return float(onward[d]) * (self.used[d] - last), float(back[d]) * last

    def outline(self) -> LayerCounts:
        def values(rows: Sequence[Sequence[mip.Var]]) -> FloatArray:
            return np.array([[z.x for z in row] for row in rows])

        first, last = (np.unravel_index(values(of).argmax(), (len(of), len(of[0]))) for of in (self.first, self.last))
        counts = np.rint([values(groups) for groups in self.count]).astype(np.int64)
        narrow = np.array([narrow.x > 0.5 for narrow in self.narrow]) if self.narrow else None
        return LayerCounts(counts, int(first[0]), int(last[0]), int(first[1]), int(last[1]), narrow)
