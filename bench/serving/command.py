"""Ours and llama.cpp's servers under a load of requests that come at random.

    python -m bench.serving [--model qwen] [--threads 2] [--llama-server BINARY] [--contenders PART ...] [--rounds 3]
                            [--seconds 15] [--short] [--work FOLDER] [--json-out FILE]

Passages of real text, of many lengths, come at random times (a Poisson process) and are each continued by a number of
tokens, past any end of text, so that all servers do the same work; answers are streamed over HTTP. For each server the
highest rate of a ladder is searched, in steps of 12 %, at which 95 % of the requests have their first token within two
seconds and all are answered. Servers take turns, round by round; at one rate in one round all are sent the same
requests, and a trial in which other processes work is made again. A row is the median over the rounds. The rate is of
what comes within the seconds of a trial: who falls behind slowly enough counts as keeping up, and answers fewer.

llama-server, with as many slots as ours, is the rival: build it from llama-cpp-python's sources (bench/README.md) and
name it. Its threads spin while they wait, or sleep, whichever answers more requests at once. The server that
llama-cpp-python brings along answers one request after the other: it takes part only where there is no llama-server.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from bench.end_to_end import models
from bench.end_to_end.child import Job
from bench.kernels.rivals.rounds import quietest
from bench.machine import describe, processor, versions, write_results
from bench.process_tree import ended_in_order, own_seconds, settle
from bench.serving.arguments import parser_of
from bench.serving.client import Outcome, send
from bench.serving.ladder import FURTHEST, highest, rate_of, step_below
from bench.serving.load import LEAST, OUTPUT_TOKENS, PROMPT_TOKENS, Load, Loads
from bench.serving.results import Trial, rows_of
from bench.serving.servers import (
    CONTENDERS,
    DISTRIBUTIONS,
    OURS,
    SLOTS,
    Contender,
    MissingError,
    Place,
    Served,
    version_of,
)
from llmpq.checkpoint.model_files import open_model
from llmpq.measure.text import evaluation_text
from llmpq.temporary import working_folder

_NEVER_LESS = 1000  # added to a step, none of a seed is negative
_SHORT = 4  # requests of the first load, and of each one where it is to be short
_DEMO = Job("demo", folder="", gguf="", work="", threads=1)  # for ours alone: nothing is made of it


@dataclass
class Bench:
    """The servers that have loaded, and what they have done so far."""

    stack: ExitStack  # ends the servers
    loads: Loads
    seconds: float
    short: bool  # few requests, hardly a search, and disturbed trials count
    trials: list[Trial] = field(default_factory=list)
    reached: dict[str, list[int | None]] = field(default_factory=dict)
    servers: dict[str, Served] = field(default_factory=dict)
    disturbed: int = 0

    def warmed(self, name: str, contender: Contender, place: Place) -> tuple[Served, int]:
        """The server, and the step of the ladder to begin with: what it does with as many requests as it has slots."""
        found: list[tuple[float, Served]] = []
        for environment in contender.environments:
            served = self.stack.enter_context(Served(contender, place, environment))
            outcome = self._warm(name, served)
            found.append((0.0 if outcome.latency is None else outcome.latency.requests_per_s, served))
        rate, best = max(found, key=lambda one: one[0])
        if rate == 0:
            raise MissingError(f"it answered nothing: {outcome.lost[0]}")
        for _, served in found:
            if served is not best:
                served.close()
        return best, step_below(rate)

    def _warm(self, name: str, served: Served) -> Outcome:
        outcome = self._send(name, served, partial(self.loads.at_once, _SHORT), [0], None, -1)
        if self.short:
            return outcome
        return self._send(name, served, partial(self.loads.at_once, SLOTS), [1], None, -1)

    def climb(self, name: str, served: Served, start: int, number: int) -> int | None:
        """The highest step that it keeps up with in a round."""

        def passes(step: int) -> bool:
            load = partial(self.loads.poisson, rate_of(step), self.seconds)
            self._send(name, served, load, [2 + number, step + _NEVER_LESS], step, number)
            return self.trials[-1].passes

        return highest(start, passes, 0 if self.short else FURTHEST)

    def _send(
        self,
        name: str,
        served: Served,
        load: Callable[[Sequence[int]], Load],
        seed: Sequence[int],
        step: int | None,
        number: int,
    ) -> Outcome:
        """No two loads have the same seed: a server may keep prompts."""
        tries = count()

        def once() -> Outcome:
            with served.awake():
                settle()
                return send(served.port, load([*seed, next(tries)]), served.fields)

        if self.short:
            outcome = once()
        else:
            (outcome,), disturbed = quietest(once, 1, own_seconds)
            self.disturbed += disturbed
        self.trials.append(Trial(name, number, step, outcome))
        print(line(self.trials[-1]), file=sys.stderr, flush=True)
        return outcome


def line(trial: Trial) -> str:
    """A trial to read while others run."""
    found, latency = trial.outcome, trial.outcome.latency
    rate = "at once" if trial.step is None else f"{rate_of(trial.step):6.2f}/s"
    text = f"{trial.contender:<26}{trial.round:3} {rate:>9}: {len(found.times)} answered, {len(found.lost)} lost"
    if latency is not None and latency.ttft_s is not None:
        tpot = "" if latency.tpot_s is None else f", TPOT {' '.join(f'{1e3 * s:.0f}' for s in latency.tpot_s)} ms"
        text += f", {latency.requests_per_s:.2f}/s, TTFT {' '.join(f'{s:.2f}' for s in latency.ttft_s)} s{tpot}"
    return text + (f" ({found.lost[0]})" if found.lost else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("python -m bench.serving", __doc__)
    parser.add_argument("--llama-server", metavar="BINARY", help="llama.cpp's own server")
    parser.add_argument("--contenders", nargs="+", metavar="PART", help="those whose names have one of these in them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a few requests, to see that everything runs")
    arguments = parser.parse_args(argv)
    if arguments.short:
        arguments.model, arguments.rounds, arguments.seconds = "smollm2", 1, 1.0
        rival = ["llama-server as stored"] if arguments.llama_server else []
        arguments.contenders = arguments.contenders or ["llmpq native", *rival]
    arguments.contenders = chosen(arguments.contenders, arguments.llama_server)
    if not arguments.contenders:
        parser.error(f"no contender is called so; there are {', '.join(CONTENDERS)}")
    return arguments


def chosen(parts: Sequence[str] | None, binary: str | None) -> dict[str, Contender]:
    """Those whose names have one of these in them; None: all, of llama.cpp's servers the better one that is there."""
    parts = parts or [OURS, "llama-server" if binary is not None else "llama-cpp-python"]
    return {name: one for name, one in CONTENDERS.items() if any(part in name for part in parts)}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    missing: dict[str, str] = {}
    with ended_in_order(), ExitStack() as stack:
        work = Path(arguments.work or stack.enter_context(working_folder()))
        named = models.prepare(arguments.model, work) if arguments.llama_server or not arguments.short else _DEMO
        job = replace(named, threads=arguments.threads)
        place = Place(job, stack.enter_context(working_folder()), arguments.llama_server)
        least = _SHORT if arguments.short else LEAST
        loads = Loads(open_model(job.model).tokenizer, evaluation_text(), least)
        bench = Bench(stack, loads, arguments.seconds, arguments.short)
        starts: dict[str, int | None] = {}
        for name, contender in arguments.contenders.items():
            print(f"loading {name}", file=sys.stderr, flush=True)
            try:
                bench.servers[name], starts[name] = bench.warmed(name, contender, place)
            except MissingError as error:
                missing[name] = str(error)
        for number in range(arguments.rounds):
            for name, served in bench.servers.items():
                start = starts[name]
                found = None if start is None else bench.climb(name, served, start, number)
                bench.reached.setdefault(name, []).append(found)
                starts[name] = found
            results = results_of(arguments, bench, missing)
            if arguments.json_out is not None:  # what is done is kept if a later round is cut short
                write_results(arguments.json_out, results)
    for row in results["rows"]:
        print(json.dumps(row))
    for name, why in missing.items():
        print(f"missing: {name}: {why}")


def results_of(arguments: argparse.Namespace, bench: Bench, missing: dict[str, str]) -> dict[str, Any]:
    return describe() | {
        "device": processor(),
        "versions": versions(DISTRIBUTIONS) | version_of(arguments.llama_server),
        "model": arguments.model,
        "threads": arguments.threads,
        "slots": SLOTS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "seconds": arguments.seconds,
        "disturbed": bench.disturbed,
        "missing": missing,
        "environments": {name: dict(served.environment) for name, served in bench.servers.items()},
        "rows": rows_of(bench.reached, bench.trials, arguments.threads),
        "trials": [trial.to_dict() for trial in bench.trials],
    }
