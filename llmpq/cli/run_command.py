"""`llmpq run`: plan, load, generate, and compare prediction and measurement."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmpq import demo
from llmpq.checkpoint.model_files import Model
from llmpq.cli.constraint_options import add_constraints, add_quality
from llmpq.cli.options import (
    add_costs,
    add_devices,
    add_log,
    add_model,
    add_on_loss,
    read_model,
    written_log_path,
)
from llmpq.cli.output_files import JsonLines, check_files
from llmpq.cli.parser import Commands, positive
from llmpq.cli.plan_options import PlanOptions
from llmpq.cli.prompts import Prompt, given_prompt, read_prompts
from llmpq.cli.sampling_options import add_sampling, read_sampling
from llmpq.cli.shared_plan import receive_plan, share_plan
from llmpq.report import chrome_trace, console
from llmpq.report.progress_bar import progress
from llmpq.report.streams import ERR, OUT
from llmpq.spec import (
    DeviceLoss,
    DeviceReturn,
    LlmpqError,
    NotMeasuredError,
    Plan,
    Prediction,
    Profile,
    Report,
    Solved,
    UsageError,
)
from llmpq.spec.files import write_text

if TYPE_CHECKING:
    from llmpq.cli.batch import Batch
    from llmpq.runtime.completion import Completion, Completions
    from llmpq.runtime.engine import RunResult
    from llmpq.runtime.torchrun import Rank

_WHOLE = ("prompt", "json_out", "trace", "log")  # what takes all prompts, or all of a run, at once


def add(commands: Commands) -> None:
    parser = commands.add_command("run", execute, "plan, load, generate, and compare prediction and measurement")
    add_model(parser)
    prompts = parser.add_argument_group("prompts and sampling")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable (default: the demo's eight)")
    prompts.add_argument("--prompts", metavar="FILE", help="JSONL of prompt, messages, text, token_ids; - for stdin")
    prompts.add_argument("--no-chat", action="store_true", help="go on with the text: leave out the chat template")
    prompts.add_argument("--interactive", action="store_true", help="chat at the terminal, or with lines of stdin")
    add_sampling(prompts)
    devices = parser.add_argument_group("devices and plan")
    add_devices(devices)
    devices.add_argument("--plan", metavar="FILE", help="run this plan instead of making one")
    add_on_loss(devices)
    add_costs(devices)
    devices.add_argument("--batch-size", type=positive, metavar="N", help="sequences at once (default: all, up to 32)")
    devices.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of prompt and answer (default: as the prompts ask)"
    )
    keep = parser.add_argument_group("what the plan must keep to")
    add_constraints(keep)
    add_quality(keep)
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write completions as JSONL, each as it comes")
    output.add_argument("--resume", action="store_true", help="go on with what is not in --output yet")
    output.add_argument("--json-out", metavar="FILE", help="write plan, prediction, measurement and completions")
    output.add_argument("--trace", metavar="FILE", help="write all steps, predicted and measured, for Perfetto")
    log = output.add_mutually_exclusive_group()
    add_log(log)
    log.add_argument("--no-log", action="store_true", help="do not add this run to the log")
    output.add_argument("--eager", action="store_true", help="compute operation by operation: no programs, no graphs")
    output.add_argument("--dry-run", action="store_true", help="stop after the plan")
    output.add_argument("--quiet", action="store_true", help="print completions only")


def execute(arguments: Namespace) -> None:
    from llmpq.cli.chat import run_chat
    from llmpq.cli.job import run_job
    from llmpq.runtime.torchrun import Rank

    run = run_chat if arguments.interactive else run_job if _is_job(arguments) else _run
    rank = Rank.current()
    if rank is not None and arguments.on_loss != "end":
        raise UsageError("--on-loss replan is for runs that start all stages themselves, without torchrun")
    if rank is None:
        run(arguments, None)
        return
    with rank.telling():
        (run if rank.first else _serve)(arguments, rank)


def _is_job(arguments: Namespace) -> bool:
    """Whether results are written and forgotten. Raises UsageError for an option that is only for that."""
    whole = next((name for name in _WHOLE if getattr(arguments, name) is not None), None)
    if arguments.prompts is not None and arguments.output is not None and whole is None and not arguments.interactive:
        return True
    for name, given in (("resume", arguments.resume), ("max-length", arguments.max_length is not None)):
        if given:
            without = "" if whole is None else f", without --{whole.replace('_', '-')}"
            raise UsageError(f"--{name} is for --prompts with --output{without}")
    return False


def _run(arguments: Namespace, rank: Rank | None) -> None:
    """What `llmpq run` does, alone or as the first of torchrun's ranks."""
    import planner
    from llmpq.cli.batch import Batch
    from llmpq.runtime.running import reused_names
    from llmpq.workflow import workload_of

    log = written_log_path(arguments)
    check_files(arguments, log)
    sampling = read_sampling(arguments)
    options = PlanOptions(arguments)
    prompts = _prompts(arguments)
    solved: Solved | None
    basis: Profile | Prediction
    with progress(arguments.quiet) as notify:
        model = read_model(arguments, notify)
        options.check(model)
        batch = Batch(prompts, sampling, model)
        if options.given is not None:
            given = options.given[0]
            batch.refuse_longer(given.max_length, "the plan's slots", arguments.max_new_tokens or 1)
        if not arguments.quiet:
            ERR.print(batch.template, soft_wrap=True)
        asked = batch.completions
        token_ids, max_tokens = asked.token_ids, max(params.max_tokens for params in asked.sampling)
        workload = workload_of(model.spec, token_ids, max_tokens, arguments.batch_size)
        if options.given is None:
            problem = options.problem(model, workload, notify)
            solved, problem = options.solve(model, problem, notify)
            plan, basis, ways = solved.plan, problem.profile, planner.find_usual_ways(problem)
        else:
            plan, solved = options.given
            ways = ()
            basis = options.basis_of_given(model, workload, notify)
        if isinstance(basis, Profile):
            lens, names = [len(ids) for ids in token_ids], list(map(reused_names, token_ids, asked.sampling))
            planner.check_measured(plan, model.spec, basis, lens, max_tokens, names)
        if rank is not None:
            share_plan(rank, plan, model, notify, runs=not arguments.dry_run)
    if not arguments.quiet:
        OUT.print(console.plan_table(plan, solved))
        if solved is not None and ways:
            OUT.print(console.usual_ways(solved, ways), soft_wrap=True)
    errors = _Errors()
    if not arguments.dry_run and (rank is not None or _has_reader(arguments)):
        ran = _generate(arguments, plan, options, model, batch, asked, rank, errors)
        _finish(arguments, ran, solved, basis, model, batch, asked, log, errors)
    with errors.kept():
        batch.check()
    errors.raise_any()


class _Errors:
    """What failed of steps none of which needs another: all are taken before it is raised."""

    def __init__(self) -> None:
        self._errors: list[LlmpqError] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except LlmpqError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raise the first error, which tells of the others."""
        if self._errors:
            raise type(self._errors[0])("; ".join(map(str, self._errors)))


def _has_reader(arguments: Namespace) -> bool:
    """Whether anybody would see what is generated."""
    return OUT.problem is None or any((arguments.output, arguments.json_out, arguments.trace))


class _Ran(NamedTuple):
    """A run's result, the plan that it ended on, and the devices that were lost, or taken back, on the way there."""

    result: RunResult
    plan: Plan
    losses: tuple[DeviceLoss, ...]
    returns: tuple[DeviceReturn, ...]


def _generate(
    arguments: Namespace,
    planned: Plan,
    options: PlanOptions,
    model: Model,
    batch: Batch,
    asked: Completions,
    rank: Rank | None,
    errors: _Errors,
) -> _Ran:
    """Run the batch; what is known of each prompt is written as it comes. Whatever breaks it off, that is printed."""
    total = sum(min(params.max_tokens, planned.max_length) for params in asked.sampling)
    text = f"generating {total} tokens or fewer"
    try:
        with ExitStack() as stack:
            notify = stack.enter_context(progress(arguments.quiet))
            engine = stack.enter_context(options.engine(model, planned, notify, rank=rank))
            lines = stack.enter_context(JsonLines(arguments.output))
            for refused in sorted(batch.outputs):
                lines.write_all(batch.results(refused))
            notify(text, 0.0)

            def on_end(number: int, completions: list[Completion]) -> None:
                lines.write_all(batch.results(batch.answer(number, completions)[0].index))

            result = asked.generate(engine, lambda generated: notify(text, generated / total), on_end)
        with errors.kept():
            lines.check()
        return _Ran(result, engine.plan if engine.losses else planned, engine.losses, engine.returns)
    except BaseException:
        _print_outputs(batch)
        raise


def _finish(
    arguments: Namespace,
    ran: _Ran,
    solved: Solved | None,
    basis: Profile | Prediction,
    model: Model,
    batch: Batch,
    asked: Completions,
    log: Path | None,
    errors: _Errors,
) -> None:
    """Write what is asked for, then print. What fails does not keep the rest from it."""
    import planner
    from llmpq.runtime.running import reused_names
    from llmpq.tuning import run_log

    result, plan, losses, returns = ran
    prompt_lens = [len(ids) for ids in asked.token_ids]
    simulation = None
    predicted = basis if isinstance(basis, Prediction) else None if solved is None else solved.prediction
    unknown = ""
    if losses:  # nothing was predicted of that
        predicted = None
    elif isinstance(basis, Profile):
        with errors.kept():
            output_lens = [len(sequence.token_ids) for sequence in result.sequences]
            names = [reused_names(*request) for request in zip(asked.token_ids, asked.sampling, strict=True)]
            try:
                simulation = planner.simulate(plan, model.spec, basis, prompt_lens, output_lens, names=names)
                predicted = simulation.prediction
            except NotMeasuredError as error:  # of a step that nobody could foresee; the answers are there
                unknown, predicted = f"nothing to compare with: {error}", None
    if arguments.json_out is not None:
        with errors.kept():
            quality = None if solved is None else solved.quality
            report = Report(
                plan.model, plan.cluster, plan, predicted, result.measured, batch.in_order, quality, losses, returns
            )
            report.save(arguments.json_out)
    if arguments.trace is not None:
        with errors.kept():
            runs = {} if simulation is None else {"predicted": simulation.spans}
            write_text(arguments.trace, json.dumps(chrome_trace.trace(plan, runs | {"measured": result.spans})))
    if isinstance(basis, Profile) and simulation is not None and log is not None:
        with errors.kept():
            run_log.append(run_log.RunRecord.of(plan, basis, prompt_lens, simulation, result), log)
    _print_outputs(batch)
    if losses and not arguments.quiet:
        OUT.print(console.plan_table(plan))
    if not arguments.quiet and predicted is not None:
        expected = () if simulation is None else simulation.spans
        OUT.print(console.comparison_table(plan, predicted, result.measured, expected, result.spans))
    if not arguments.quiet and unknown:
        OUT.print(unknown, soft_wrap=True)
    if not arguments.quiet and (reused := sum(times.reused for times in result.times)):
        OUT.print(f"{reused} of {sum(prompt_lens)} prompt tokens reused, as prompts begin alike")


def _print_outputs(batch: Batch) -> None:
    for output in batch.in_order:
        OUT.print(console.completion(output), soft_wrap=True)


def _serve(arguments: Namespace, rank: Rank) -> None:
    """What a later rank of torchrun does: it runs its stage of the plan that the first rank shares."""
    from llmpq.measure.quantized_model import as_served
    from llmpq.runtime.engine import Engine

    if (received := receive_plan(rank, arguments)) is None:
        return
    plan, model = received
    model, plan = as_served(model, plan)
    with Engine(plan, model.checkpoint, model.spec, rank=rank, eager=arguments.eager) as engine:
        engine.serve()


def _prompts(arguments: Namespace) -> list[Prompt]:
    given = list(arguments.prompt or ())
    if not given and arguments.prompts is None:
        given = list(demo.PROMPTS)
    prompts = [given_prompt(text, f"prompt {i}") for i, text in enumerate(given, 1)]
    if arguments.prompts is not None:
        prompts += read_prompts(arguments.prompts)
    return [replace(prompt, continued=True) for prompt in prompts] if arguments.no_chat else prompts
