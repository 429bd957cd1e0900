"""Ours against other engines, end to end: tokens/s of whole batches, and the quality of the weights beside it.

    python -m bench.end_to_end [--models smollm2,qwen,0.5B] [--threads 1,2] [--batches 1,8,32] [--contenders PART ...]
                               [--rounds 5] [--quick] [--python ENGINE=PATH ...] [--work FOLDER] [--json-out FILE]

Every contender is a process of its own, which loads a model once. They take turns, in an order shuffled in every round,
each stopped between its turns, when the machine does nothing else and its processors are at their pace; the quietest
rounds count. Prefill makes the first new token of each sequence, decode the others; all is greedy and goes on past ends
of sequences, with other prompts in every round. A ratio is the median over the rounds of our speed over the best
other's. Rivals: pip install '.[rivals]'; one that has to live in an environment of its own is named by --python
(vllm=/there/bin/python). What is missing is listed, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.end_to_end import goals, models
from bench.end_to_end.bounds import Work, phase_works
from bench.end_to_end.child import Job
from bench.end_to_end.contenders import CONTENDERS, DISTRIBUTIONS, Contender, chosen, is_ours
from bench.end_to_end.processes import Child, ContenderError
from bench.end_to_end.rows import Cell, Record, cell_records, merged, met
from bench.kernels import ceilings
from bench.kernels.rivals.command_line import VERDICTS, numbers, report
from bench.kernels.rivals.rounds import PATIENCE, await_quiet, quietest
from bench.machine import describe, processor, versions, write_results
from bench.process_tree import ended_in_order, own_seconds
from llmpq.measure.perplexity import Perplexity, windows_of
from llmpq.measure.text import evaluation_text
from llmpq.temporary import working_folder

WINDOW = 512  # tokens of a text that are read at a time
_FIRST, _END = 100, 4000  # token ids of prompts


@dataclass
class Bench:
    """What is asked for, and what has been found so far."""

    contenders: Mapping[str, Contender]
    pythons: Mapping[str, str]  # engine -> the interpreter of its environment
    prompt: int
    output: int
    rounds: int
    text_tokens: int
    missing: dict[str, str] = field(default_factory=dict)
    made: int = 0  # rounds
    disturbed: int = 0
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)  # threads -> ceilings

    def start(self, model: str, job: Job, stack: ExitStack) -> dict[str, Child]:
        """The contenders that take part and have loaded."""
        children: dict[str, Child] = {}
        for name, contender in self.contenders.items():
            if not contender.takes_part(model, job.threads):
                continue
            print(f"  loading {name}", file=sys.stderr, flush=True)
            try:
                child = self._child(contender, replace(job, options=contender.options))
                children[name] = stack.enter_context(child)
            except ContenderError as error:
                self.missing[name] = str(error)
        return children

    def _child(self, contender: Contender, job: Job) -> Child:
        python = self.pythons.get(contender.engine, sys.executable)
        environment = {}
        if contender.engine == "vllm":
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: job.threads]))
            environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1"}
        return Child(contender.module, job, python, environment)

    def ask(self, children: dict[str, Child], name: str, do: str, **arguments: Any) -> Any:
        """What a contender answers; None if it fails, which ends its part."""
        try:
            return children[name].ask(do, **arguments)
        except ContenderError as error:
            self.missing[name] = str(error)
            children.pop(name).close()
            return None

    def measure_ceilings(self, threads: int) -> None:
        await_quiet(PATIENCE, own_seconds)
        try:
            self.ceilings[str(threads)] = ceilings.measure(threads)
        except ceilings.CeilingsMissingError as error:
            self.missing["ceilings"] = str(error)

    def perplexities(self, model: str, children: dict[str, Child], windows: list[list[int]]) -> Iterator[Record]:
        for name in list(children):
            if "two stages" in name:
                continue
            if (scores := self.ask(children, name, "score", windows=windows)) is not None:
                found = Perplexity.of(scores, max(map(len, windows))).to_dict()
                yield {"model": model, "contender": name, **found}

    def cell(self, cell: Cell, loaded: dict[str, Child]) -> dict[str, list[dict[str, Any]]]:
        """What the contenders that are still there at the end answered in each of the rounds that count."""
        children = {name: child for name, child in loaded.items() if self.contenders[name].runs(cell.batch)}
        for name in list(children):
            self.ask(children, name, "prepare", batch=cell.batch, length=cell.prompt + cell.output)
            if name in children:
                self.ask(children, name, "generate", prompts=prompts(cell, -1), output=cell.output)
        seeds, shuffle = iter(range(10**9)), random.Random(0).shuffle
        pace, paces = ceilings.pace_of_threads(cell.threads), list[float]()

        def once() -> dict[str, dict[str, Any]]:
            given, order = prompts(cell, next(seeds)), list(children)
            shuffle(order)
            found = {}
            for name in order:
                paces.append(pace())
                if (answer := self.ask(children, name, "generate", prompts=given, output=cell.output)) is not None:
                    found[name] = answer
            paces.append(pace())
            return found

        kept, disturbed = quietest(once, self.rounds, own_seconds, paces)
        self.made += self.rounds
        self.disturbed += disturbed
        for name in set(loaded) & set(self.missing):
            del loaded[name]
        return {name: [answers[name] for answers in kept] for name in children}

    def head(self) -> Record:
        return describe() | {
            "device": processor(),
            "amx": goals.has_amx(),
            "versions": versions(DISTRIBUTIONS),
            "prompt": self.prompt,
            "output": self.output,
            "ceilings": self.ceilings,
            "missing": self.missing,
            "rounds": self.made,
            "disturbed_rounds": self.disturbed,
        }


def prompts(cell: Cell, seed: int) -> list[list[int]]:
    """[batch][prompt] token ids, the same for all contenders."""
    generator = np.random.default_rng(seed + 1)
    return [generator.integers(_FIRST, _END, cell.prompt).tolist() for _ in range(cell.batch)]


def works_of(cell: Cell, job: Job, contenders: Mapping[str, Contender]) -> dict[str, dict[str, Work]]:
    """What those of ours that run as one stage have to do, by phase."""
    from bench.end_to_end.ours import plan_for
    from llmpq.checkpoint.model_files import open_model

    spec, found = open_model(job.model).spec, {}
    for name, contender in contenders.items():
        if is_ours(name) and "stages" not in contender.options and contender.takes_part(cell.model, cell.threads):
            length = cell.prompt + cell.output
            plan = plan_for(spec, replace(job, options=contender.options), cell.batch, length)
            found[name] = phase_works(plan, spec, cell.batch, cell.prompt, cell.output)
    return found


def line(row: Record) -> str:
    threads = f"t={row['threads']} " if "threads" in row else "t=1->2 "
    wanted = "" if row["goal"] is None else f">= {row['goal']:g}"
    shares = [
        f"{100 * row[what]:.0f} % {word}{'' if row.get(least) is None else f' (>= {100 * row[least]:.0f} %)'}"
        for what, least, word in (("bound_share", "bound_goal", "of the bound"), ("busy", "busy_goal", "busy"))
        if row.get(what) is not None
    ]
    rival = f"{row['rival']} {row['rival_tokens_per_s']:.1f}" if row.get("rival") else ""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f}x"
    return (
        f"{row['model']:<8}{threads}b={row['batch']:<3}{row['phase']:<8}{row['contender']:<26}"
        f"{row['tokens_per_s']:9.1f} tokens/s  {rival:<32}{ratio} {wanted:<7} {', '.join(shares)} {VERDICTS[met(row)]}"
    ).rstrip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(models.MODELS), metavar="M,...")
    parser.add_argument("--threads", type=numbers, default=[1, 2], metavar="T,...")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32], metavar="B,...")
    parser.add_argument("--contenders", nargs="+", metavar="PART", help="those whose names have one of these in them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="new tokens")
    parser.add_argument("--text-tokens", type=int, default=4096, help="that perplexity is measured on; 0: none")
    parser.add_argument("--quick", action="store_true", help="one round of short prompts, to see that everything runs")
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH", help="an engine's own interpreter")
    parser.add_argument("--work", metavar="FOLDER", help="where models are written, and kept (default: temporary)")
    parser.add_argument("--json-out", metavar="FILE", help="results of other processors in it are kept")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.models) - set(models.MODELS):
        parser.error(f"there is no model {', '.join(sorted(unknown))}; there are {', '.join(models.MODELS)}")
    if not chosen(arguments.contenders):
        parser.error(f"no contender is called so; there are {', '.join(CONTENDERS)}")
    if any("=" not in python for python in arguments.python):
        parser.error("--python takes ENGINE=PATH, as vllm=/there/bin/python")
    if arguments.output < 2:
        parser.error("--output is at least 2: prefill makes the first")
    if arguments.quick:
        arguments.rounds, arguments.prompt, arguments.output, arguments.text_tokens = 1, 32, 8, 512
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    out = None if arguments.json_out is None else Path(arguments.json_out)
    old = json.loads(out.read_text()) if out is not None and out.exists() else {}
    bench = Bench(
        chosen(arguments.contenders),
        dict(python.split("=", 1) for python in arguments.python),
        arguments.prompt,
        arguments.output,
        arguments.rounds,
        arguments.text_tokens,
    )
    records: dict[str, list[Record]] = {}
    results = merged({}, bench.head(), records)
    with ended_in_order(), ExitStack() as stack:
        work = Path(arguments.work or stack.enter_context(working_folder()))
        for threads in arguments.threads:
            print(f"{threads} thread(s): ceilings", file=sys.stderr, flush=True)
            bench.measure_ceilings(threads)
        for model in arguments.models:
            print(f"{model}: files", file=sys.stderr, flush=True)
            job = models.prepare(model, work)
            for threads in arguments.threads:
                with_text = model in models.WITH_TEXT and threads == arguments.threads[-1]
                for found in measure(bench, model, replace(job, threads=threads), arguments.batches, with_text):
                    for kind, rows in found.items():
                        records.setdefault(kind, []).extend(rows)
                    results = merged({}, bench.head(), records)
                    if out is not None:  # what is done is kept if a later part is cut short
                        write_results(out, merged(old, bench.head(), records))
    judged = [row for kind in ("rows", "second_thread", "pipeline") for row in results[kind]]
    for row in judged:
        print(line(row))
    for row in results["perplexities"]:
        print(f"{row['model']:<8}{row['contender']:<26} perplexity {row['perplexity']:.2f} of {row['tokens']} tokens")
    report(judged, bench.missing, line, met)
    print(f"{bench.disturbed} of {bench.made} rounds were disturbed")


def measure(
    bench: Bench, model: str, job: Job, batches: Sequence[int], with_text: bool
) -> Iterator[dict[str, list[Record]]]:
    """What a model with a number of threads gives, one part of a result file after the other."""
    from llmpq.checkpoint.model_files import open_model

    print(f"{model}, {job.threads} thread(s)", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        children = bench.start(model, job, stack)
        if with_text and bench.text_tokens:
            tokens = open_model(job.model).tokenizer.encode(evaluation_text())
            windows = windows_of(tokens, WINDOW, bench.text_tokens)
            yield {"perplexities": list(bench.perplexities(model, children, windows))}
        for batch in batches:
            print(f"  batch {batch}", file=sys.stderr, flush=True)
            cell = Cell(model, job.threads, batch, bench.prompt, bench.output)
            answers = bench.cell(cell, children)
            works = works_of(cell, job, bench.contenders)
            yield cell_records(cell, answers, works, bench.ceilings.get(str(job.threads), {}), goals.has_amx())
