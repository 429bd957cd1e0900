"""What the simulator expects of our server under a load, beside what was measured.

    python -m bench.serving.predictions [--model qwen] [--threads 2] [--repetitions 5] [--seconds 15] [--costs FILE]
                                        [--work FOLDER] [--json-out FILE]

Costs are measured first, and corrected by a few short runs as `llmpq profile --calibrate` does, unless a file has them.
Then requests come at several shares of the rate that the simulator says the server can do at most. They are others in
every repetition, as the server knows the beginnings of prompts that it has seen, and the simulator expects prompts that
are new. So each repetition is compared with its own simulation. The error of a number is that of the median of measured
over predicted; it may be 5 %, or 1.5 times the spread of these ratios, (highest - lowest) / median, if that is more.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import planner
from bench.end_to_end import models
from bench.end_to_end.ours import constraints_of
from bench.kernels.rivals.rounds import quietest
from bench.machine import describe, write_results
from bench.process_tree import ended_in_order, own_seconds, settle
from bench.serving.arguments import parser_of
from bench.serving.client import Outcome, send
from bench.serving.load import OUTPUT_TOKENS, PROMPT_TOKENS, Load, Loads
from bench.serving.servers import CONTENDERS, OURS, SLOTS, Place, Served, plan_of
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.measure.profiling import profile
from llmpq.measure.text import evaluation_text
from llmpq.spec import Latency, Plan, Profile, Workload
from llmpq.spec.latency import PERCENTS
from llmpq.temporary import working_folder
from llmpq.tuning.calibration import calibration_runs
from llmpq.tuning.refitting import refit

SHARES = (0.4, 0.6, 0.8)  # of what the server can do at most
ERROR, SPREADS = 0.05, 1.5  # of what was measured; of the spread
_SHOWN = (50, 95, 99)


@dataclass(frozen=True)
class Row:
    """One number of one load."""

    rate: float  # requests that come each second
    what: str
    predicted: float  # median
    measured: float  # that, times the median of measured over predicted
    spread: float  # of these ratios

    @property
    def error(self) -> float:
        return (self.predicted - self.measured) / self.measured

    @property
    def limit(self) -> float:
        return max(ERROR, SPREADS * self.spread)

    @property
    def met(self) -> bool:
        return abs(self.error) <= self.limit


def figures(latency: Latency) -> dict[str, float]:
    """What is compared: throughput, and percentiles of TTFT and TPOT in seconds."""
    found = {"requests/s": latency.requests_per_s, "tokens/s": latency.tokens_per_s}
    for name, values in (("TTFT", latency.ttft_s), ("TPOT", latency.tpot_s)):
        by_percent = dict(zip(PERCENTS, values or (), strict=False))
        found |= {f"{name} p{percent}": by_percent[percent] for percent in _SHOWN if percent in by_percent}
    return found


def rows_of(rate: float, repetitions: Sequence[tuple[Latency, Latency]]) -> Iterator[Row]:
    """Of what was predicted and measured in each."""
    found = [(figures(predicted), figures(measured)) for predicted, measured in repetitions]
    for what in found[0][0]:
        expected = statistics.median(predicted[what] for predicted, _ in found)
        ratios = [measured[what] / predicted[what] for predicted, measured in found]
        median = statistics.median(ratios)
        yield Row(rate, what, expected, median * expected, (max(ratios) - min(ratios)) / median)


def new_loads(loads: Loads, rate: float, seconds: float, share: int) -> Iterator[Load]:
    """Requests that come at this rate, the number of a share: no two loads have the same."""
    return (loads.poisson(rate, seconds, seed=[1, share, number]) for number in itertools.count())


def costs_of(model: Model, plan: Plan, constraints: planner.Constraints) -> Profile:
    """Measured and corrected, for all that the plan may be asked."""
    reach = Workload(SLOTS, PROMPT_TOKENS[1] + OUTPUT_TOKENS[1], OUTPUT_TOKENS[1])
    widths, group_size = constraints.bits, constraints.group_size
    measured = profile(
        model.spec,
        plan.cluster,
        reach,
        group_size=group_size,
        zero=constraints.zero,
        activations=constraints.activations,
        bits=widths,
    )
    free = replace(constraints, unit_bits={}, omega_budget=None)
    return refit(measured, calibration_runs(model, plan.cluster, measured, reach, free))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("python -m bench.serving.predictions", __doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--costs", metavar="FILE", help="of an earlier run; written there if it is missing")
    arguments = parser.parse_args(argv)
    name = f"{OURS}int4 a8"
    rows: list[Row] = []
    with ended_in_order(), ExitStack() as stack:
        work = Path(arguments.work or stack.enter_context(working_folder()))
        job = replace(models.prepare(arguments.model, work), threads=arguments.threads)
        model, plan = open_model(job.model), plan_of(job, CONTENDERS[name].weights)
        path = None if arguments.costs is None else Path(arguments.costs)
        if path is not None and path.exists():
            costs = Profile.load(path)
        else:
            constraints = constraints_of(model.spec, replace(job, options={"bits": 4, "activations": "a8"}))
            costs = costs_of(model, plan, constraints)
            if path is not None:
                costs.save(path)
        served = stack.enter_context(Served(CONTENDERS[name], Place(job, stack.enter_context(working_folder())), {}))
        loads = Loads(model.tokenizer, evaluation_text())

        def expected(load: Load) -> Latency:
            lens = load.prompt_lens, load.output_lens
            return planner.simulate(plan, model.spec, costs, *lens, load.arrivals_s).latency

        def sent(load: Load) -> tuple[Load, Outcome]:
            with served.awake():
                settle()
                return load, send(served.port, load, served.fields)

        at_once = loads.at_once(4 * SLOTS, seed=[0])
        sent(at_once)  # to warm up
        most = expected(at_once).requests_per_s
        for number, share in enumerate(SHARES):
            rounds = map(sent, new_loads(loads, share * most, arguments.seconds, number))
            outcomes, disturbed = quietest(rounds.__next__, arguments.repetitions, own_seconds)
            if lost := [why for _, outcome in outcomes for why in outcome.lost]:
                raise SystemExit(f"{len(lost)} requests were lost: {lost[0]}")
            found = [
                (expected(load), latency) for load, outcome in outcomes if (latency := outcome.latency) is not None
            ]
            count = len(outcomes[0][0].requests)
            print(f"{count} requests, {share * most:.2f}/s, {disturbed} of {len(outcomes)} disturbed")
            for row in rows_of(share * most, found):
                rows.append(row)
                print(line(row), flush=True)
    missed = [row for row in rows if not row.met]
    print(f"{len(rows) - len(missed)} of {len(rows)} within max({100 * ERROR:g} %, {SPREADS:g} spreads)")
    if arguments.json_out:
        head = describe() | {"model": arguments.model, "threads": arguments.threads, "most_per_s": most}
        write_results(arguments.json_out, head | {"rows": [asdict(row) for row in rows]})
    return 0


def line(row: Row) -> str:
    return (
        f"  {row.what:<10} predicted {row.predicted:9.4g}, measured {row.measured:9.4g} "
        f"({100 * row.error:+6.1f} % of at most {100 * row.limit:.1f} %){'' if row.met else ', missed'}"
    )


if __name__ == "__main__":
    main()
