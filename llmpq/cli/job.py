"""`llmpq run --prompts IN --output OUT`: a job, whose input is read and whose results are written as it goes on.

It may be killed at any moment: with --resume it goes on with what is not in OUT yet. Of the input no more is in memory
than the lines that a plan is made for, and a few for each slot of the plan; of what is in OUT, 8 bytes for each prompt.
"""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmpq.cli.batch import Batch
from llmpq.cli.batch_results import results
from llmpq.cli.job_input import JobInput, Line
from llmpq.cli.job_output import Job, JobOutput, digest
from llmpq.cli.options import read_model
from llmpq.cli.output_files import check_files
from llmpq.cli.plan_options import PlanOptions
from llmpq.cli.prompts import Prompt, read_prompt, source_name
from llmpq.cli.sampling_options import read_sampling
from llmpq.cli.shared_plan import share_plan
from llmpq.report import console
from llmpq.report.job_progress import JobProgress
from llmpq.report.progress_bar import progress
from llmpq.report.streams import ERR, OUT
from llmpq.runtime.sampling import SEEDS, SamplingParams, spread
from llmpq.spec import Output, Plan, PromptError, Solved, UsageError, Workload
from llmpq.spec.formatting import format_duration
from llmpq.workflow import BATCH_SIZE

if TYPE_CHECKING:
    from llmpq.checkpoint.model_files import Model
    from llmpq.progress import Notify
    from llmpq.runtime.completion import Completion
    from llmpq.runtime.session import Session
    from llmpq.runtime.torchrun import Rank

_POLL_S = 0.5
_SHORT_S = 10.0  # whose tenths are told
WAITING = 2  # requests for each slot of the plan that are handed in: running, or next


def run_job(arguments: Namespace, rank: Rank | None) -> None:
    """Plan, load, and answer the prompts that have no result yet. Raises what `llmpq run` does."""

    check_files(arguments)
    sampling, options = read_sampling(arguments), PlanOptions(arguments)
    with ExitStack() as stack:
        output = stack.enter_context(JobOutput(arguments.output, arguments.resume))
        with progress(arguments.quiet) as notify:
            model = read_model(arguments, notify)
            options.check(model)
            output.check(_job(model, sampling, arguments.no_chat), source_name(arguments.prompts))
            notify("reading the prompts")
            given = JobInput(arguments.prompts, output, planned=options.given is not None)
            if not given.left and rank is None and not arguments.dry_run:
                output.check_count(given.count)
                _finish(output, JobProgress(output.done, given.total, quiet=True), None, arguments.quiet)
                return
            plan, solved = _plan(arguments, options, model, sampling, given, notify)
            if rank is not None:
                share_plan(rank, plan, model, notify, runs=not arguments.dry_run)
        if not arguments.quiet:
            OUT.print(console.plan_table(plan, solved))
            OUT.flush()
        if arguments.dry_run:
            return
        if not output.begin(_weights(plan)):
            ERR.print(
                f"llmpq: {arguments.output} was begun with other bit widths or activations, so texts may differ; a "
                "plan given by --plan keeps them",
                soft_wrap=True,
            )
        with progress(arguments.quiet) as notify:
            engine = stack.enter_context(
                options.engine(model, plan, notify, rank=rank, on_plan=lambda found: output.go_on(_weights(found)))
            )
        asker = Asker(model, plan, sampling, arguments)
        with JobProgress(output.done, given.total, arguments.quiet) as shown, engine.session() as session:
            most = WAITING * plan.slots
            _unless_failed(session, lambda: answer_all(given, asker, session, output, shown, most))
        output.check_count(given.count)
        _finish(output, shown, None if engine.losses else solved, arguments.quiet)


def _job(model: Model, sampling: SamplingParams, no_chat: bool) -> Job:
    return Job(digest(model.spec.content_hash), digest([sampling.to_dict(), no_chat]))


def _weights(plan: Plan) -> str:
    """Of all that a plan decides about the results: how units and the KV cache are stored, and how stages multiply."""
    units = [
        [unit, str(plan.precision(unit)), stage.activations, *([] if stage.kv_bits == 16 else [stage.kv_bits])]
        for index, stage in enumerate(plan.stages)
        for unit in plan.units_of(index)
    ]
    return digest(units)


def _plan(
    arguments: Namespace,
    options: PlanOptions,
    model: Model,
    sampling: SamplingParams,
    given: JobInput,
    notify: Notify,
) -> tuple[Plan, Solved | None]:
    """The plan of --plan, or one for the sample. Raises UsageError if none of that can be run, or InfeasibleError."""
    sample = [_prompt(line, arguments.no_chat) for line in given.sample]
    if options.given is not None:
        with suppress(UsageError):  # an error of its own line
            _tell_template(Batch(sample, sampling, model), arguments.quiet)
        return options.given
    batch = Batch(sample, sampling, model)
    if options.max_length is not None:
        batch.refuse_longer(options.max_length, "--max-length")
    _tell_template(batch, arguments.quiet)
    solved, _ = options.solve(model, options.problem(model, _workload(arguments, model, batch), notify), notify)
    return solved.plan, solved


def _tell_template(batch: Batch, quiet: bool) -> None:
    if not quiet:
        ERR.print(batch.template, soft_wrap=True)


def _workload(arguments: Namespace, model: Model, batch: Batch) -> Workload:
    """Of the sample; there is room for --max-length, else for the sample's longest prompt and its longest answer."""
    asked = batch.completions
    prompt_lens, output_len = list(map(len, asked.token_ids)), max(params.max_tokens for params in asked.sampling)
    room = arguments.max_length or min(max(prompt_lens) + output_len, model.spec.max_positions)
    batch_size = min(len(prompt_lens), arguments.batch_size or BATCH_SIZE)
    if arguments.max_length is not None:
        prompt_lens.append(max(1, room - output_len))
    return Workload.of_lengths(batch_size, [(length, min(output_len, room - length)) for length in prompt_lens])


def _prompt(line: Line, no_chat: bool) -> Prompt:
    prompt = read_prompt(line.data, line.where)
    return replace(prompt, continued=True) if no_chat else prompt


class Asker:
    """Makes requests of lines."""

    def __init__(self, model: Model, plan: Plan, sampling: SamplingParams, arguments: Namespace) -> None:
        self.model = model
        self._room = min(plan.max_length, model.spec.max_positions)
        larger = "" if arguments.plan is not None else " (--max-length makes larger ones)"
        self._place = f"the plan's slots{larger}"
        self._sampling = spread(sampling, 1)[0]  # with a seed
        self._no_chat, self._limited = arguments.no_chat, arguments.max_new_tokens is not None

    def prompt(self, line: Line) -> Prompt:
        return _prompt(line, self._no_chat)

    def batch(self, line: Line, prompt: Prompt) -> Batch:
        """Of this prompt alone. Raises UsageError if it cannot be run, or leaves too little room for what it asks."""
        seed = ((self._sampling.seed or 0) + line.number) % SEEDS
        batch = Batch([prompt], replace(self._sampling, seed=seed), self.model, line.number)
        output_len = 1
        if self._limited or "max_tokens" in prompt.sampling:
            asked = batch.completions
            left = self.model.spec.max_positions - len(asked.token_ids[0])
            output_len = max(1, min(asked.sampling[0].max_tokens, left))
        batch.refuse_longer(self._room, self._place, output_len)
        return batch


class _Window:
    """Has who hands in requests wait while `most` have not ended."""

    def __init__(self, most: int) -> None:
        self._most, self._open = most, 0
        self._changed = threading.Condition()

    def enter(self, count: int) -> None:
        """Wait until there is room for so many more, or nothing else runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._open + count <= self._most)
            self._open += count

    def leave(self, future: Future[Any]) -> None:
        """One has ended."""
        with self._changed:
            self._open -= 1
            self._changed.notify()


def answer_all(
    lines: Iterable[Line],
    asker: Asker,
    session: Session,
    output: JobOutput,
    shown: JobProgress,
    most: int,
) -> None:
    """Hand in a request for each line, at most `most` at a time, and write what becomes of each as it ends.

    All has been handed in when it returns; it ends with the session. Raises what ended that, or UsageError.
    """
    window = _Window(most)

    def write(line: Line, lines: list[dict[str, Any]], tokens: int = 0, error: str | None = None) -> None:
        output.write(line.number, line.data, lines, error)
        shown.add(tokens)

    def ending(line: Line, batch: Batch) -> Callable[[int, list[Completion]], None]:
        def on_end(number: int, completions: list[Completion]) -> None:
            if all(each.generated.finish_reason != "cancelled" for each in completions):
                answers = batch.answer(number, completions)
                write(line, batch.results(line.number), sum(len(each.token_ids) for each in answers))

        return on_end

    for line in lines:
        prompt = asker.prompt(line)
        try:
            batch = asker.batch(line, prompt)
        except UsageError as error:
            refused = Output(prompt.text, "", (), "error", line.number, prompt.custom_id, error=str(error))
            write(line, results(prompt, [refused], "", asker.model.tokenizer), error=str(error))
            continue
        asked = batch.completions
        window.enter(len(asked.sampling))
        for handle in asked.submit(session, ending(line, batch)):
            handle.future.add_done_callback(window.leave)


def _unless_failed(session: Session, work: Callable[[], None]) -> None:
    """Do work in another thread, which may wait for its input for ever; return when it has, or the session has failed.

    Raises what one of them did.
    """
    done: Future[None] = Future()

    def carry_out() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=carry_out, name="requests", daemon=True).start()
    try:
        while not wait([done], _POLL_S).done:
            if session.failure is not None:
                raise session.failure
        done.result()
    except BaseException:
        session.close()  # nothing is handed in that nobody would cancel
        raise


def _finish(output: JobOutput, shown: JobProgress, solved: Solved | None, quiet: bool) -> None:
    """Say what became of the job. Raises PromptError if some prompts have no answer."""
    if not quiet:
        parts = [f"{output.done:,} prompts: {output.answered:,} answered, {output.failed:,} not"]
        if shown.tokens:
            rate = f"{shown.tokens / shown.seconds:,.1f} tokens/s"
            took = f"{shown.seconds:.1f} s" if shown.seconds < _SHORT_S else format_duration(shown.seconds)
            parts.append(f"{shown.tokens:,} tokens in {took}, {rate}")
            if solved is not None:
                parts.append(f"{solved.prediction.tokens_per_s:,.1f} were predicted")
        OUT.print("; ".join(parts), soft_wrap=True)
    if output.failed:
        raise PromptError(
            f"{output.failed} of {output.done} prompts were not answered; the first: {output.first_error}"
        )
